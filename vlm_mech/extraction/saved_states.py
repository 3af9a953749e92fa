"""Extracted hidden states on disk: opened without the model; written shard by shard, each all or nothing."""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.as_html import escaped, tabled, titled
from vlm_mech.inputs.span import Span

Pool = Literal["mean"] | None
RECORD = "extract.json"


@dataclass(frozen=True, eq=False)
class Extracted:
    """Hidden states on disk, read on request; neither the model nor the images are needed.

    Rows stand in the order of the prompts. `record` is what `extract.json` holds: model, settings and shards.
    """

    folder: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "Extracted":
        """The states that `extract` left in the folder, all parts together where it was called for parts.

        Raises:
            UsageError: there are none, they are not finished, or a shard or a part is missing.
        """
        folder = Path(folder)
        record = read_record(folder)
        if record is None and (parts := sorted(folder.glob("part-*-of-*"))):
            record = _of_parts(folder, parts)
        if record is None:
            raise UsageError(f"there are no extracted states in {str(folder)!r}")
        settings = record["settings"]
        done, total = record["shards"][-1]["stop"], settings.get("stop", settings["n_prompts"])
        if done < total:
            raise UsageError(f"{str(folder)!r} holds {done} of {total} prompts; call extract again, it goes on there")
        absent = [shard["file"] for shard in record["shards"] if not (folder / shard["file"]).is_file()]
        if absent:
            raise UsageError(f"{str(folder)!r} lacks {', '.join(absent)}; call extract again, it makes them anew")
        return cls(folder, record)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, as requested."""
        return tuple(Site(name, layer) for name, layer in self.record["settings"]["sites"])

    @property
    def spans(self) -> tuple[str, ...]:
        """The spans in the order of the second axis: names, or the text that Python shows for other spans."""
        return tuple(self.record["settings"]["spans"])

    @property
    def pool(self) -> Pool:
        """`mean` for one vector a span, None where every position is kept."""
        return self.record["settings"]["pool"]

    @property
    def refused(self) -> dict[int, str]:
        """Number of each prompt whose image could not be read, and why; such prompts have no rows."""
        return {int(number): why for shard in self.record["shards"] for number, why in shard["refused"].items()}

    @property
    def examples(self) -> tuple[int, ...]:
        """Number of the prompt behind each row."""
        return tuple(number for shard in self.record["shards"] for number in examples_of(shard))

    def __len__(self) -> int:
        return sum(len(examples_of(shard)) for shard in self.record["shards"])

    def __getitem__(self, site: Site) -> Float[Tensor, "example span width"]:
        """Means of a site, in the data type of the files; a single shard is mapped into memory, several are joined.

        Raises:
            UsageError: the site was not extracted, or whole spans were.
        """
        self._check(site, "mean")
        parts = [self._tensor(shard, str(site)) for shard in self._filled()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def pooled(self, site: Site, span: Span) -> Float[Tensor, "example width"]:
        """Means of a site over one of the spans."""
        return self[site][:, self._number(span)]

    def whole(self, site: Site, span: Span, example: int) -> Float[Tensor, "token width"]:
        """Every position of a span in one example; only these rows are read from disk.

        Args:
            example: number of the prompt in the list that was given to `extract`.

        Raises:
            UsageError: the site or span was not extracted, the prompt was refused, or only means were kept.
        """
        self._check(site, None)
        if example in self.refused:
            raise UsageError(f"prompt {example} was refused: {self.refused[example]}")
        number = self._number(span)
        for shard in self.record["shards"]:
            if shard["first"] <= example < shard["stop"]:
                counts = self._tensor(shard, f"counts/{site.place}/{number}").tolist()
                row = examples_of(shard).index(example)
                start = sum(counts[:row])
                with safe_open(self.folder / shard["file"], framework="pt") as opened:
                    return opened.get_slice(f"{site}/{number}")[start : start + counts[row]]
        raise UsageError(f"prompt {example} is out of range: prompts are 0..{self.record['settings']['n_prompts'] - 1}")

    def verify(self) -> None:
        """Reads every shard once.

        Raises:
            WorkError: a shard is not the file that was written.
        """
        for shard in self.record["shards"]:
            verify_shard(self.folder, shard)

    def _filled(self) -> list[dict[str, Any]]:
        return [shard for shard in self.record["shards"] if examples_of(shard)]

    def _tensor(self, shard: dict[str, Any], key: str) -> Tensor:
        with safe_open(self.folder / shard["file"], framework="pt") as opened:
            return opened.get_tensor(key)

    def _check(self, site: Site, pool: Pool) -> None:
        if self.pool != pool:
            kept = "whole spans were kept; use whole(...)" if pool else "only means were kept; use states[site]"
            raise UsageError(kept)
        if site not in self.sites:
            raise UsageError(f"{site} was not extracted; there are {', '.join(map(str, self.sites))}")

    def _number(self, span: Span) -> int:
        if label(span) not in self.spans:
            raise UsageError(f"span {label(span)!r} was not extracted; there are {', '.join(self.spans)}")
        return self.spans.index(label(span))

    def _repr_html_(self) -> str:
        by_point: dict[str, list[str]] = {}
        for site in self.sites:
            by_point.setdefault(site.name, []).extend([] if site.layer is None else [str(site.layer)])
        rows = [(escaped(name), escaped(", ".join(layers) or "-")) for name, layers in by_point.items()]
        spans = f"<div>spans: {escaped(', '.join(self.spans))}</div>"
        kept = "means of each span" if self.pool else "whole spans"
        told = f"{self.folder}: {len(self)} examples, {kept}, {len(self.refused)} refused"
        return titled("Extracted", told, spans + tabled(("site", "layers"), rows))

    def __repr__(self) -> str:
        points = f"{len(self.sites)} sites x {len(self.spans)} spans"
        kind = "means" if self.pool else "whole spans"
        return f"Extracted({str(self.folder)!r}: {len(self)} examples, {points}, {kind}, {len(self.refused)} refused)"


def part_of(text: str) -> tuple[int, int]:
    """Which part `3/16` is, and of how many.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"part is {text!r}; K/N is needed, such as 3/16: the third of sixteen, the first is 1/16")
    return int(found[1]), int(found[2])


def part_folder(folder: Path, number: int, of_all: int) -> Path:
    """Where a part of an extraction is kept."""
    return folder / f"part-{number}-of-{of_all}"


def _of_parts(folder: Path, found: Sequence[Path]) -> dict[str, Any]:
    """The record of an extraction that was made in parts, once all are there."""
    of_all = {int(path.name.rpartition("-")[2]) for path in found}
    if len(of_all) > 1:
        counts = " and of ".join(map(str, sorted(of_all)))
        raise UsageError(f"{str(folder)!r} has parts of {counts}; remove all but those of one number")
    (n,) = of_all
    opened = {}
    for number in range(1, n + 1):
        part = part_folder(folder, number, n)
        if read_record(part) is None:
            raise UsageError(f"{str(folder)!r} lacks part {number}/{n}; extract(..., part='{number}/{n}') makes it")
        opened[part.name] = Extracted.open(part).record
    own = ("part", "stop")
    every = [{key: value for key, value in each["settings"].items() if key not in own} for each in opened.values()]
    for number, each in enumerate(every, 1):
        if each != every[0]:
            different = ", ".join(key for key in each if each[key] != every[0].get(key))
            raise UsageError(f"parts 1/{n} and {number}/{n} in {str(folder)!r} had other arguments: {different}")
    shards = [shard | {"file": f"{name}/{shard['file']}"} for name, each in opened.items() for shard in each["shards"]]
    return {"settings": every[0], "shards": shards}


def examples_of(shard: dict[str, Any]) -> list[int]:
    """Numbers of the prompts that have rows in the shard."""
    return [number for number in range(shard["first"], shard["stop"]) if str(number) not in shard["refused"]]


def label(span: Span) -> str:
    """The name by which a span is found again: itself if it is one, else its shortened representation."""
    text = span if isinstance(span, str) else repr(span)
    return text if len(text) <= 200 else f"{text[:120]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `extract.json` in the folder holds, or None."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def verify_shard(folder: Path, shard: dict[str, Any]) -> None:
    """Raise `WorkError` when a shard is not the file that was written."""
    if file_hash(folder / shard["file"]) != shard["sha256"]:
        raise WorkError(f"{shard['file']} in {str(folder)!r} is not what was written; delete it and call extract again")


def resumed(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of the same extraction with its finished shards, or a new one."""
    record = read_record(folder)
    if record is None:
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        # A kill before the first shard was recorded leaves such files; they are written anew.
        strange = [name for name in found if not name.startswith(("shard-", RECORD))]
        if strange:
            raise UsageError(f"folder {str(folder)!r} holds files but no extraction, such as {strange[0]!r}")
        return {"settings": settings, "shards": []}
    saved = record["settings"]
    different = [key for key in settings if saved.get(key) != settings[key]]
    if different:
        told = "; ".join(f"{key} {_short(saved.get(key))}, now {_short(settings[key])}" for key in different)
        raise UsageError(f"the extraction in {str(folder)!r} had other arguments: {told}")
    finished = itertools.takewhile(lambda shard: (folder / shard["file"]).is_file(), record["shards"])
    record["shards"] = list(finished)
    for shard in record["shards"]:
        verify_shard(folder, shard)
    return record


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def add_shard(folder: Path, record: dict[str, Any], pieces: dict[str, list[Tensor]], about: dict[str, Any]) -> None:
    """Puts a shard in place and then into the record, each all or nothing."""
    name = f"shard-{len(record['shards']):05d}.safetensors"
    # Each list goes when it is joined, so that the shard is not held twice.
    joined = {key: torch.cat(pieces.pop(key)) for key in list(pieces)}
    with fresh_file(folder / name) as path:
        save_file(joined, path)
    refused = {str(number): why for number, why in about["refused"].items()}
    record["shards"].append(about | {"file": name, "refused": refused, "sha256": file_hash(folder / name)})
    with fresh_file(folder / RECORD) as path:
        path.write_text(json.dumps(record, indent=1))


@contextlib.contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Waits until no other process writes in the folder, which is made; the system lets go when this one ends."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        folder.mkdir(parents=True, exist_ok=True)  # who was here before and wrote nothing took it away
        try:
            yield
        finally:
            for each in made:
                with contextlib.suppress(OSError):  # something is in it, as is right
                    each.rmdir()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """A temporary path, renamed to the given one when the block has ended well."""
    fresh = path.with_name(path.name + ".new")
    yield fresh
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(fresh, path)
