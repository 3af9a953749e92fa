"""Kills runs at random moments and takes them up again: `python -m tests.runs.kills` says whether bytes are the same.

A command, not a test: thirty kills take a while.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

EXPERIMENTS = {
    "knockout": ("--n", "24", "--batch", "4"),
    "layer_swap": ("--n", "24", "--batch", "4"),
    "erroneous_agreement": ("--n", "24", "--batch", "4"),
    "blur_decay": ("--n", "12", "--batch", "4", "--no-probe"),
    "horizon": ("--n", "24", "--batch", "4", "--gates", "none"),
    "compensation": ("--n", "16", "--batch", "4"),
    "steer": ("--n", "40", "--batch", "4", "--gates", "none"),
}
FILES = ("result.parquet", "summary.csv", "config.json")
AFTER = 3.0
"""Seconds after which a run is killed at the earliest: before, it has not begun."""


@dataclass(frozen=True)
class Kills:
    """How often each experiment is killed."""

    each: int = 6
    """Kills of each experiment, every third one with workers."""
    seed: int = 0
    """Draws the moments."""
    workers: int = 2
    """Workers of those that have some."""


def command(name: str, folder: Path, *more: str) -> list[str]:
    """One experiment in a folder."""
    return [sys.executable, "-m", f"experiments.{name}", *EXPERIMENTS[name], "--out", str(folder), *more]


def started(arguments: list[str]) -> subprocess.Popen:
    """The command, in a session of its own, silent."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)


def finish(arguments: list[str]) -> None:
    """Runs the command to its end; raises if that is not well."""
    done = started(arguments)
    told = done.communicate()[1]
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: {told.decode()[-500:]}")


def kept(folder: Path) -> int:
    """Batches that are there."""
    return len(list(folder.glob("partial/*.json"))) if folder.exists() else 0


def main() -> None:
    """Prints a row for each kill, and fails where a byte differs."""
    options = tyro.cli(Kills, prog="python -m tests.runs.kills")
    rng, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as place:
        for name in EXPERIMENTS:
            whole = Path(place) / name / "whole"
            began = time.time()
            finish(command(name, whole))
            seconds = time.time() - began
            for number in range(options.each):
                folder = Path(place) / name / str(number)
                shared = ("--workers", str(options.workers)) if number % 3 == 2 else ()
                run = started(command(name, folder, *shared))
                moment = rng.uniform(AFTER, seconds * (2 if shared else 1))
                time.sleep(moment)
                alive = run.poll() is None
                os.kill(run.pid, signal.SIGKILL) if alive else None
                run.communicate()
                n_kept, begun = kept(folder), (folder / "partial/config.json").exists()
                if begun or not (folder / "result.parquet").exists():
                    finish(command(name, folder, *shared, *(("--resume",) if begun else ())))
                same = all((folder / each).read_bytes() == (whole / each).read_bytes() for each in FILES)
                leftover = (folder / "partial").exists()
                rows.append((name, " ".join(shared), round(moment, 1), alive, n_kept, same and not leftover))
                print(*rows[-1], sep="\t", flush=True)
    table = pd.DataFrame(rows, columns=["experiment", "workers", "killed after", "while running", "kept", "same bytes"])
    print(table.to_string(index=False))
    sys.exit(0 if table["same bytes"].all() else 1)


if __name__ == "__main__":
    main()
