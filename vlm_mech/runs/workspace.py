"""The folder of a run: batches already done, taking up a killed run, and putting the finished files in place."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlm_mech.errors import UsageError, WorkError
from vlm_mech.runs.shards import SHARDS, PartDone, Share

if TYPE_CHECKING:
    import pandas as pd

StepT = TypeVar("StepT")
MADE_OF = "made_of.json"
"""What the batches are made of, beside them."""
LOCK = "lock"
"""Held by the process that writes the batches."""
PARTIAL = "partial"
"""Sub-folder with the batches of an unfinished run; it is gone when the run is complete."""
STARTED = ".started"
"""Ending of the marks of the runs that were begun within a run."""
OWN_FILES = (
    "report.html", "summary.csv", "config.json", "provenance.json", "claims.json", "result.json", "result.parquet",
)  # fmt: skip
"""What a run leaves beside its figures and further tables, in the order in which it is put in place."""
VIEWER = "index.html"


@dataclass(frozen=True)
class Workspace:
    """A run's folder, with the tables of the batches already done, so that a killed run goes on where it was."""

    folder: Path
    seen: set[str] = field(default_factory=set, compare=False, repr=False)
    """Keys of the batches that are known to be kept."""
    made: tuple[Path, ...] = field(default=(), compare=False, repr=False)
    """Folders that were made for this run, the inmost first."""
    resumed: bool = field(default=False, compare=False, repr=False)
    """Whether the run was begun before."""
    share: Share | None = field(default=None, compare=False, repr=False)
    """Which batches this process does; all of them by default."""

    @property
    def partial(self) -> Path:
        """Where the batches are kept until the run is complete."""
        return self.folder / PARTIAL

    @property
    def complete(self) -> bool:
        """Whether the folder holds a finished run."""
        return _holds_run(self.folder) and not self.partial.exists()

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run that is not finished."""
        return (self.partial / "config.json").is_file()

    def __contains__(self, key: str) -> bool:
        """Whether a batch is kept, whole: its table and notes are those that its checksum was taken of."""
        if key in self.seen and (self.partial / f"{key}.parquet").is_file():
            return True
        if not (self.partial / f"{key}.json").is_file():
            return False
        if self._notes(key) is None:
            print(f"batch {key} in {str(self.partial)!r} is broken; it is made again", file=sys.stderr)
            return False
        self.seen.add(key)
        return True

    def _notes(self, key: str) -> dict[str, Any] | None:
        """The notes of a batch; None unless they and its table are whole."""
        kept, table = _json(self.partial / f"{key}.json"), self.partial / f"{key}.parquet"
        whole = table.is_file() and kept.get("sha256") == _digest(key, table.read_bytes(), kept.get("notes"))
        return kept["notes"] if whole else None

    def batches(self, steps: Mapping[str, StepT], name: str) -> Iterator[tuple[str, StepT]]:
        """The steps that this process is to do, each with the key to `keep` its table by; a progress bar on a terminal.

        What is kept is not done again. Where other processes do a part of the run, these are some of the steps only.

        Args:
            steps: every step of a loop by its key. No step may need what another one did.
            name: what the bar says.
        """
        done = {key: key in self for key in steps}
        if self.share is not None:
            keys = self.share.of(list(steps), name, done)
        else:
            from tqdm.auto import tqdm

            left = [key for key in steps if not done[key]]
            keys = tqdm(left, desc=name, total=len(steps), initial=len(steps) - len(left), disable=None)
        for key in keys:
            yield key, steps[key]

    def made_of(self, found: Mapping[str, str]) -> None:
        """Says what the batches are made of, as digests by name; it is kept with the first of them.

        Raises:
            UsageError: those already kept were made of something else.
        """
        record = self.ingredients
        other = [name for name, value in found.items() if record.get(name, value) != value]
        if other:
            raise UsageError(
                f"the run in {str(self.folder)!r} was made of another {' and another '.join(other)}, which changed "
                "since; put it back to resume, or begin anew with --overwrite or in another --out"
            )
        if not self.complete and not found.items() <= record.items():
            self.partial.mkdir(parents=True, exist_ok=True)
            write(self.partial / MADE_OF, json.dumps(record | dict(found)).encode())

    @property
    def ingredients(self) -> dict[str, str]:
        """What the batches are made of, as far as `made_of` was told."""
        return _record(self.folder).get("made_of", {}) if self.complete else _json(self.partial / MADE_OF)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No other process may write the run meanwhile; the system lets go when this one ends, however it ends.

        Raises:
            UsageError: another holds it.
        """
        with _lock(self.partial):
            yield

    def keep(self, key: str, table: "pd.DataFrame", notes: dict[str, Any]) -> None:
        """Stores the table of one batch, with its notes; afterwards `key in workspace`."""
        if self.share is None:  # a late batch of another process must not begin a run anew
            self.partial.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        write(self.partial / f"{key}.parquet", buffer.getvalue())
        # The notes come last: a batch counts as done once they are there, with the checksum of all.
        kept = {"sha256": _digest(key, buffer.getvalue(), notes), "notes": notes}
        write(self.partial / f"{key}.json", json.dumps(kept).encode())
        self.seen.add(key)

    def together(self) -> None:
        """Called before what needs the batches of all.

        Raises:
            PartDone: this process does a part of them; what follows is for the one that has all.
        """
        if self.share is not None and self.share.ends_at_collect:
            raise PartDone

    def collect(self) -> tuple["pd.DataFrame", list[dict[str, Any]]]:
        """All stored tables one after the other in the order of their keys, and their notes.

        Raises:
            UsageError: none is stored.
            WorkError: one that was there is gone, or was changed.
            PartDone: other processes do a part of the batches, and what follows.
        """
        import pandas as pd

        self.together()
        # A table without notes was not whole when its process was killed.
        keys = sorted(path.stem for path in self.partial.glob("*.parquet") if path.with_suffix(".json").is_file())
        notes = {key: self._notes(key) for key in keys}
        gone = sorted({*self.seen - set(keys), *(key for key in keys if notes[key] is None)})
        if gone:
            raise WorkError(
                f"batch {gone[0]} in {str(self.partial)!r} is gone or was changed; something else wrote there meanwhile"
            )
        if not keys:
            raise UsageError(f"no batch is stored in {str(self.partial)!r}; keep() comes before collect()")
        tables = [pd.read_parquet(self.partial / f"{key}.parquet") for key in keys]
        return pd.concat(tables, ignore_index=True), [each for each in notes.values() if each is not None]

    def progress(self, steps: Sequence[Any], name: str) -> Iterator[Any]:
        """The steps, with a progress bar on a terminal."""
        from tqdm.auto import tqdm

        return iter(tqdm(steps, desc=name, disable=None))

    def staging(self) -> Path:
        """An empty folder in which the finished files are made before `publish` puts them in place."""
        folder = self.partial / "finished"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    @contextlib.contextmanager
    def part(self, name: str, wanted: dict[str, Any]) -> "Iterator[Workspace]":
        """The folder of a run within this one, taken up where it was if this run began it; else made anew.

        Raises:
            UsageError: the folder holds something else than a run.
        """
        started, folder = self.partial / f"{name}{STARTED}", self.folder / name
        begun = started.exists() and _holds_run(folder)
        held = folder.is_dir() and any(folder.iterdir())
        made = prepare(folder, wanted, resume=begun, overwrite=held and not begun)
        started.touch()
        try:
            yield replace(made, share=self.share)
        except Exception:
            if not made.partial.exists():  # it took itself back
                started.unlink()
            raise

    def drop(self, name: str) -> None:
        """Removes the batches of a run within this one that ended without a result."""
        shutil.rmtree(self.folder / name / PARTIAL, ignore_errors=True)
        (self.partial / f"{name}{STARTED}").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # an earlier run is in it, or it is gone
            (self.folder / name).rmdir()

    def publish(self) -> None:
        """Moves the finished files into the folder, in place of an earlier run's, and removes the batches.

        A kill in between can be resumed, because the batches go last.
        """
        made = self.partial / "finished"
        told = _json(made / "provenance.json")
        _clear(self.folder, _record(self.folder), kept=[each["folder"] for each in told.get("wordings", [])])
        for path in sorted((made / "figures").glob("*")):
            (self.folder / "figures").mkdir(exist_ok=True)
            os.replace(path, self.folder / "figures" / path.name)
        for name in (*(f"{each}.csv" for each in told.get("tables", [])), *OWN_FILES):
            os.replace(made / name, self.folder / name)
        shutil.rmtree(self.partial)

    def withdraw(self) -> None:
        """Takes the folder back if nothing was measured in it, so that a corrected command finds it as it was.

        What was there before the run stays, and so does what it kept: batches with a value, states, runs within it.
        """
        if self.resumed or any(map(_is_kept, self.partial.iterdir())):
            return
        shutil.rmtree(self.partial)
        for folder in self.made:
            with contextlib.suppress(OSError):  # another run is in it
                folder.rmdir()


def in_batches(n: int, size: int) -> dict[str, slice]:
    """The rows of each batch of so many examples, by the key that it is kept by; keys are in the order of the rows."""
    return {f"{start:08d}": slice(start, min(start + size, n)) for start in range(0, n, size)}


def prepare(folder: Path, wanted: dict[str, Any], *, resume: bool, overwrite: bool) -> Workspace:
    """The folder of a run with the options `wanted`: new, taken up again, or that of a run to be replaced.

    What an earlier run left stays until the new one is complete.

    Raises:
        UsageError: the folder holds something else, another run, one that still goes on, or (with `resume`) none; or it
            cannot be written in.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is a file; --out needs a folder")
    work = Workspace(folder)
    if work.partial.is_dir():
        with _lock(work.partial):
            pass
    if resume:
        check_same(folder, wanted)
        return replace(work, resumed=True)
    if (folder / SHARDS).is_dir():
        raise UsageError(
            f"folder {str(folder)!r} holds shards of a run; python -m vlm_mech.runs.merge puts them together, or give "
            "another --out"
        )
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise UsageError(
                f"folder {str(folder)!r} is not empty; --resume goes on with that very run, --overwrite replaces it"
            )
        if not _holds_run(folder):
            raise UsageError(f"folder {str(folder)!r} holds files but no run of ours; --overwrite replaces runs only")
        if not _record(folder):
            # What a kill put in place of a run that was about to be complete.
            _clear(folder, _record(work.partial / "finished"))
        shutil.rmtree(work.partial, ignore_errors=True)
    made = tuple(each for each in (folder, *folder.parents) if not each.exists())
    try:
        work.partial.mkdir(parents=True, exist_ok=True)
        write(work.partial / "config.json", json.dumps(wanted).encode())
    except OSError as error:
        raise UsageError(f"folder {str(folder)!r} cannot be written in: {error}; --out names another") from error
    return replace(work, made=made)


def check_same(folder: Path, wanted: dict[str, Any]) -> None:
    """Raises `UsageError` unless the folder holds a run with these options, finished or not."""
    places = (folder / PARTIAL / "config.json", folder / "config.json")
    found = next((path for path in places if path.is_file()), None)
    if found is None or not _holds_run(folder):
        raise UsageError(f"there is no run to resume in {str(folder)!r}")
    saved = json.loads(found.read_text())
    different = sorted(key for key in {*saved, *wanted} if saved.get(key) != wanted.get(key))
    if different:
        raise UsageError(f"the run in {str(folder)!r} had other options: {', '.join(different)}")


def _digest(key: str, table: bytes, notes: Any) -> str:
    """Checksum of a batch: of its key, its table and its notes."""
    told = json.dumps(json.loads(json.dumps(notes)), sort_keys=True)
    return hashlib.sha256(b"\0".join((key.encode(), told.encode(), table))).hexdigest()


def _is_kept(path: Path) -> bool:
    """Whether something among the batches is worth keeping; a batch of which nothing was measured is not."""
    if path.suffix == ".parquet":
        import pandas as pd

        table = pd.read_parquet(path)
        metrics = [name for name in table if f"{name}_baseline" in table]
        return not metrics or bool(table[metrics].notna().any(axis=None))
    if path.is_dir():
        return path.name != "finished" and any(each.is_file() for each in path.rglob("*"))
    return path.suffix not in (".json", ".new") and path.name != LOCK


def _holds_run(folder: Path) -> bool:
    """Whether a run of ours wrote here; a config.json alone is what any model folder has."""
    return (folder / PARTIAL / "config.json").is_file() or bool(_record(folder))


def _record(folder: Path) -> dict[str, Any]:
    record = _json(folder / "provenance.json")
    return record if {"versions", "finished", "figures"} <= set(record) else {}


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another run is going on in {str(folder.parent)!r}; wait for it, or give another --out"
            ) from None
        yield


def _clear(folder: Path, record: dict[str, Any], *, kept: Sequence[str] = ()) -> None:
    """Removes the finished files of an earlier run and of the runs within it, and nothing else.

    Args:
        record: its provenance; empty where there was none.
        kept: runs within it that stay.
    """
    for name in record.get("figures", []):
        # 0.1.0 wrote a page for each figure.
        for file in (f"{Path(name).name}.html", f"{Path(name).name}.json", VIEWER):
            (folder / "figures" / file).unlink(missing_ok=True)
    tables = (f"{Path(name).name}.csv" for name in record.get("tables", []))
    for name in (*tables, *OWN_FILES) if record else ():
        (folder / name).unlink(missing_ok=True)
    for each in record.get("wordings", []):
        part = folder / Path(each["folder"]).name
        if part.name not in kept:
            _clear(part, _record(part))
            for left in (part / "figures", part):
                with contextlib.suppress(OSError):  # something else is in it, or it is gone
                    left.rmdir()


def write(path: Path, content: bytes) -> None:
    """All or nothing, and on the disk: a kill leaves the file as it was."""
    # Another process, perhaps of another machine, may make the very same batch.
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
