"""Puts the shards of a run together: `python -m vlm_mech.runs.merge FOLDER` makes the result that one process would."""

import contextlib
import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vlm_mech.errors import UsageError, WorkError, one_line_errors
from vlm_mech.runs.shards import SHARDS, Shard, told
from vlm_mech.runs.workspace import LOCK, PARTIAL, STARTED, Workspace, write


@dataclass(frozen=True)
class Merge:
    """Puts the shards of a run together and does what follows them, which needs the model as every shard does."""

    folder: tyro.conf.Positional[Path]
    """The folder of the run, which the shards were given as --out."""
    workers: int = 1
    """Number of worker processes for what is left to do (needs ray)."""
    keep: bool = False
    """Keep the shards when the run is complete."""


def merge(folder: Path) -> str:
    """Puts the batches of all shards into the folder of their run, which can be resumed then.

    Returns:
        The module of the experiment.

    Raises:
        UsageError: a shard is missing or not whole, or was made of something else than another.
        WorkError: the run has another file of the same name as a shard.
    """
    shards, about = _whole(folder)
    for shard in shards:
        of = shard.folder(folder)
        for path in sorted(of.rglob("*")):
            if path.parent.name == PARTIAL and (path.suffix in (".parquet", ".json", STARTED)) and path.name != LOCK:
                _put(path, folder / path.relative_to(of))
    return about["module"]


def _whole(folder: Path) -> tuple[list[Shard], dict[str, Any]]:
    """All shards of a run, and what they say of themselves."""
    names = [re.fullmatch(r"(\d+)-of-(\d+)", path.name) for path in (folder / SHARDS).glob("*-of-*")]
    found = [Shard(int(name[1]), int(name[2])) for name in names if name is not None]
    if not found:
        raise UsageError(f"there are no shards in {str(folder / SHARDS)!r}; --shard 1/4 and so on make them")
    counts = sorted({shard.of_all for shard in found})
    if len(counts) > 1:
        listed = " and of ".join(map(str, counts))
        raise UsageError(f"{str(folder)!r} has shards of {listed}; remove all but those of one number")
    every = [Shard(number, counts[0]) for number in range(1, counts[0] + 1)]
    said = {shard: told(shard.folder(folder)) for shard in every}
    whole = {shard: each for shard, each in said.items() if each is not None}
    missing = [shard for shard in every if shard not in whole]
    if missing:
        named = [f"{shard}{' (begun)' if shard in found else ''}" for shard in missing[:8]]
        raise UsageError(
            f"of the {len(every)} shards of {str(folder)!r} some are not whole: {', '.join(named)}"
            f"{' and more' if len(missing) > 8 else ''}; {_command(folder, missing[0], whole)}"
        )
    first, about = next(iter(whole.items()))
    for shard, each in whole.items():
        sides = {"options": (_options(folder, first), _options(folder, shard))}
        sides |= {"versions": (about["versions"], each["versions"]), "files": (about["made_of"], each["made_of"])}
        for kind, (one, other) in sides.items():
            for key in sorted({*one, *other}):
                if one.get(key) != other.get(key):
                    values = "" if kind == "files" else f" ({one.get(key)!r:.60} and {other.get(key)!r:.60})"
                    raise UsageError(
                        f"shards {first} and {shard} of {str(folder)!r} have different {kind}: {key}{values}; make one "
                        "again with --overwrite"
                    )
    return every, about


def _options(folder: Path, shard: Shard) -> dict[str, Any]:
    return json.loads((shard.folder(folder) / PARTIAL / "config.json").read_text())


def _command(folder: Path, shard: Shard, whole: dict[Shard, dict[str, Any]]) -> str:
    if not whole:
        return "the same command that began them goes on with them"
    one, about = next(iter(whole.items()))
    config = str(one.folder(folder) / PARTIAL / "config.json")
    command = ["python", "-m", about["module"], "--config", config, "--out", str(folder), "--shard", str(shard)]
    return f"{shlex.join(command)} does the first of them"


def _put(path: Path, place: Path) -> None:
    """Copies a file of a shard, unless the run has it."""
    content = path.read_bytes()
    if place.is_file():
        if place.read_bytes() != content:
            raise WorkError(
                f"{str(place)!r} is there already and differs from {str(path)!r}; remove it and merge again"
            )
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    write(place, content)


def main() -> None:
    """Merges, runs what follows, and removes the shards."""
    config = tyro.cli(Merge, prog="python -m vlm_mech.runs.merge", config=(tyro.conf.FlagCreatePairsOff,))
    folder = config.folder
    with one_line_errors(), contextlib.ExitStack() as held:
        if Workspace(folder).complete:
            print(f"the run in {str(folder)!r} is already complete")
            return
        for path in sorted((folder / SHARDS).glob(f"*/{PARTIAL}")):
            # None may be made anew meanwhile.
            held.enter_context(Workspace(path.parent).held())
        module = merge(folder)
        options = ["--config", str(folder / PARTIAL / "config.json"), "--workers", str(config.workers)]
        sys.argv = [module, *options, "--out", str(folder), "--resume"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        if not config.keep:
            shutil.rmtree(folder / SHARDS)


if __name__ == "__main__":
    main()
