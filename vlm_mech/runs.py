"""The run contract of every experiment: options, folder, resuming, what is written, and how errors end.

Light to import: `--help` must not wait for torch.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlm_mech.errors import UsageError, WorkError

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from vlm_mech.result import Result

# Options that do not change the numbers of a run.
HOW = ("out", "resume", "overwrite", "debug", "config")
OWN_FILES = ("result.parquet", "result.json", "summary.csv", "config.json", "provenance.json", "report.html")
PARTIAL = "partial"


@dataclass(frozen=True)
class RunConfig:
    """Options that every experiment has."""

    model: str = "organism"
    """Embedded model (organism, organism-grounded), folder, or Hugging Face id."""
    data: str = "scenes/colour"
    """Generated pairs (scenes/colour, scenes/left-right, ...) or a folder with pairs.jsonl."""
    n: int | None = None
    """Number of examples; 64 scenes by default, all of a folder."""
    seed: int = 0
    """Draws the examples."""
    device: str = "cpu"
    """Where the model runs, such as cpu or cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and activations."""
    attn: Literal["sdpa", "eager"] = "sdpa"
    """Attention back end."""
    revision: str | None = None
    """Revision of a Hugging Face model."""
    out: Path | None = None
    """Folder for the results; runs/NAME by default."""
    resume: bool = False
    """Go on with the same run where it was interrupted."""
    overwrite: bool = False
    """Replace the results of an earlier run in the folder."""
    debug: bool = False
    """Show the whole traceback of an error."""
    config: Path | None = None
    """Repeat the run of a config.json; options given beside it take precedence."""


ConfigT = TypeVar("ConfigT", bound=RunConfig)


@dataclass(frozen=True)
class Outcome:
    """What an experiment hands back: its result, figures by name, and pictures to show with captions."""

    result: "Result"
    figures: dict[str, Any]
    pictures: tuple[tuple[str, "Image.Image"], ...] = ()


def as_json(config: RunConfig) -> dict[str, Any]:
    """The options that determine the numbers, as JSON values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in HOW
    }


@dataclass(frozen=True, eq=False)
class Workspace:
    """A run's folder, with the tables of the batches already done, so that a killed run goes on where it was."""

    folder: Path
    config: RunConfig

    @property
    def _partial(self) -> Path:
        return self.folder / PARTIAL

    def __contains__(self, key: str) -> bool:
        return (self._partial / f"{key}.parquet").is_file()

    def keep(self, key: str, table: "pd.DataFrame", notes: dict[str, Any]) -> None:
        """Stores the table of one batch, with its notes; afterwards `key in workspace`."""
        self._partial.mkdir(parents=True, exist_ok=True)
        _write(self._partial / f"{key}.json", json.dumps(notes).encode())
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        _write(self._partial / f"{key}.parquet", buffer.getvalue())

    def collect(self) -> tuple["pd.DataFrame", list[dict[str, Any]]]:
        """All stored tables one after the other in the order of their keys, and their notes."""
        import pandas as pd

        paths = sorted(self._partial.glob("*.parquet"))
        notes = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
        return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True), notes

    def progress(self, steps: Sequence[Any], name: str) -> Iterator[Any]:
        """The steps, with a progress bar on a terminal."""
        from tqdm import tqdm

        return iter(tqdm(steps, desc=name, disable=None))

    def done(self) -> None:
        """Removes the partial tables."""
        shutil.rmtree(self._partial, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    """All or nothing: a kill leaves the file as it was."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)


def main(
    config_class: type[ConfigT],
    run: Callable[[ConfigT, Workspace], Outcome],
    *,
    name: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs an experiment from the command line and exits: 0 done, 1 failed work, 2 wrong use, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        config = parse(config_class, arguments, name=name)
        execute(config, run, name=name)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # the contract of every command: one line, never a traceback
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, UsageError | WorkError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {kind}{message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def parse(config_class: type[ConfigT], arguments: Sequence[str], *, name: str) -> ConfigT:
    """The options of a command line; `--config FILE` gives the defaults.

    Raises:
        UsageError: an unknown option or value, in one line.
    """
    import tyro

    default = _replayed(config_class, arguments)
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(
                config_class, args=list(arguments), default=default, prog=f"python -m experiments.{name}",
                config=(tyro.conf.FlagCreatePairsOff,),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(f"{_plain(caught.getvalue())}; --help lists the options") from None


def _plain(message: str) -> str:
    """tyro's framed message as one line."""
    bare = re.sub(r"\x1b\[[0-9;]*m", "", message)
    lines = [re.sub(r"[─│╭╮╰╯]+", " ", line).strip() for line in bare.splitlines()]
    kept = [line for line in lines if line and line != "Parsing error" and not line.startswith("For full helptext")]
    return " ".join(kept) or "the options cannot be understood"


def _replayed(config_class: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    path = None
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            path = Path(arguments[position + 1])
        elif argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
    if path is None:
        return config_class()
    try:
        saved = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"config {str(path)!r} cannot be read: {error}") from error
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(set(saved) - known) if isinstance(saved, dict) else ["(no object)"]
    if unknown:
        raise UsageError(f"config {str(path)!r} has unknown option(s) {', '.join(unknown)}")
    return config_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})


def execute(config: ConfigT, run: Callable[[ConfigT, Workspace], Outcome], *, name: str) -> Outcome:
    """Runs an experiment in its folder and writes everything a run leaves.

    Raises:
        UsageError: the folder holds other files or another run.
    """
    folder = config.out if config.out is not None else Path("runs") / name
    work = _prepared(folder, config)
    started = time.time()
    outcome = run(config, work)
    seconds = time.time() - started
    result = dataclasses.replace(
        outcome.result,
        config=as_json(config),
        provenance=_provenance(outcome.result, config, seconds, list(outcome.figures)),
    )
    outcome = dataclasses.replace(outcome, result=result)
    from vlm_mech.figures import save_figure
    from vlm_mech.report import write_report

    result.save(folder)
    for title, figure in outcome.figures.items():
        save_figure(figure, folder / "figures", title)
    command = f"python -m experiments.{name} --config {folder / 'config.json'} --out OTHER_FOLDER"
    write_report(folder / "report.html", outcome, command=command)
    work.done()
    _announce(result, folder, seconds)
    return outcome


def _prepared(folder: Path, config: RunConfig) -> Workspace:
    marker = folder / PARTIAL / "config.json"
    wanted = as_json(config)
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is a file; --out needs a folder")
    if config.resume:
        found = marker if marker.is_file() else folder / "config.json"
        if not found.is_file():
            raise UsageError(f"there is no run to resume in {str(folder)!r}")
        saved = json.loads(found.read_text())
        different = sorted(key for key in {*saved, *wanted} if saved.get(key) != wanted.get(key))
        if different:
            raise UsageError(f"the run in {str(folder)!r} had other options: {', '.join(different)}")
    elif folder.exists() and any(folder.iterdir()):
        if not config.overwrite:
            raise UsageError(
                f"folder {str(folder)!r} is not empty; --resume goes on with that very run, --overwrite replaces it"
            )
        _clear(folder)
    marker.parent.mkdir(parents=True, exist_ok=True)
    _write(marker, json.dumps(wanted).encode())
    return Workspace(folder, config)


def _clear(folder: Path) -> None:
    """Removes what a run of ours left, and nothing else."""
    record = folder / "provenance.json"
    figures = json.loads(record.read_text()).get("figures", []) if record.is_file() else []
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in figures:
        for ending in ("html", "json"):
            (folder / "figures" / f"{name}.{ending}").unlink(missing_ok=True)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def _provenance(result: "Result", config: RunConfig, seconds: float, figures: list[str]) -> dict[str, Any]:
    import importlib.metadata
    import platform

    packages = ("vlm_mech", "torch", "transformers", "nnsight", "numpy", "pandas", "plotly")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return result.provenance | {
        "versions": versions,
        "seed": config.seed,
        "device": config.device,
        "dtype": config.dtype,
        "attention": config.attn,
        "seconds": round(seconds, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "figures": figures,
    }


def _announce(result: "Result", folder: Path, seconds: float) -> None:
    for finding in result.findings:
        print(f"- {finding}")
    print(f"\n{len(result.table)} rows in {seconds:.1f} s -> {folder}")
    print(f"report: {(folder / 'report.html').resolve()}")
