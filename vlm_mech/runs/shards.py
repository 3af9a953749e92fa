"""Parts of a run that are done apart: which batches are whose, and what ends a process that has done its own.

A batch is a few examples, never a few cells of them, and how a run is cut into batches follows from its options alone.
So a batch is the same file whoever makes it, and a run made in parts is the run made by one process, to the bit.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vlm_mech.errors import UsageError

SHARDS = "shards"
"""Folder of the shards of a run, within the run's own."""
DONE = "shard.json"
"""Written when a shard is whole: which one it is, of what run."""


class PartDone(Exception):  # noqa: N818 - nothing went wrong
    """Ends an experiment in a process whose part is done; what follows needs the batches of all."""


@runtime_checkable
class Share(Protocol):
    """Which of a run's batches a process does."""

    @property
    def ends_at_collect(self) -> bool:
        """Whether what follows the batches is another process's."""
        ...

    def of(self, keys: Sequence[str], name: str, done: "Mapping[str, bool]") -> Iterator[str]:
        """Keys to do now, of all keys of a loop, some of which are done."""
        ...


@dataclass(frozen=True)
class Shard:
    """Every so many-th batch of a run: `3/16` is the third, the nineteenth and so on."""

    number: int
    of_all: int

    ends_at_collect = True

    def __str__(self) -> str:
        return f"{self.number}/{self.of_all}"

    def of(self, keys: Sequence[str], name: str, done: Mapping[str, bool]) -> Iterator[str]:
        """The batches of this shard that are not done; the same ones whatever was done before."""
        from tqdm.auto import tqdm

        own = keys[self.number - 1 :: self.of_all]
        left = [key for key in own if not done[key]]
        return iter(
            tqdm(left, desc=f"{name}, shard {self}", total=len(own), initial=len(own) - len(left), disable=None)
        )

    def folder(self, run: Path) -> Path:
        """Where it is kept within the folder of the run."""
        return run / SHARDS / f"{self.number}-of-{self.of_all}"


def shard_of(text: str | None) -> Shard | None:
    """The shard that `3/16` names; None where none is named.

    Raises:
        UsageError: the text names none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard is {text!r}; K/N is needed, such as 3/16: the third of sixteen, the first is 1/16")
    return Shard(int(found[1]), int(found[2]))


def told(folder: Path) -> dict[str, Any] | None:
    """What a whole shard says of itself; None while it is not whole.

    Raises:
        UsageError: the file is broken.
    """
    path = folder / DONE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{str(path)!r} is broken ({error}); make that shard again with --overwrite") from error
