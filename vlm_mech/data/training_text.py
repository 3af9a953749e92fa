"""Text that a model was trained on, most of it about pictures: what it holds, an entry in memory at a time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_mech.data.readers.llava import Entry, read_entries
from vlm_mech.data.readers.registry import find_source, is_file
from vlm_mech.data.user_files import Refused, fewer_than_asked
from vlm_mech.errors import UsageError

MOST = 8
"""Values and reasons that are told one by one."""


def entries(source: str | Path) -> Iterator[Entry | Refused]:
    """The entries of `llava:FILE`, `llava:FOLDER`, or of such a file or folder, in its order; what is none is refused.

    Raises:
        UsageError: it is something else, or cannot be read.
    """
    found = find_source(source, others=True)
    if found is None or found.format.holds != "text":
        told = "" if found is None else f"; it holds {found.format.holds} ({found.format.name})"
        raise UsageError(f"{str(source)!r:.200} is not training text, as in llava:FILE{told}")
    return read_entries(found.tables)


def describe_text(source: str | Path, *, asked: int | None = None) -> list[str]:
    """What training text holds, in lines, read once from end to end; numbers alone are kept of each entry.

    Args:
        asked: entries that are asked for; where there are fewer, that is told.

    Raises:
        UsageError: see `entries`.
    """
    turns, said, sides, pictures = Counter[int](), Counter[str](), Counter[bool](), Counter[bool]()
    refused, n_refused = list[Refused](), 0
    for each in entries(source):
        if isinstance(each, Refused):
            n_refused += 1
            refused += [each] if n_refused <= MOST else []
            continue
        turns[len(each.turns)] += 1
        said.update(who for who, _ in each.turns)
        if each.image is not None:
            pictures[is_file(Path(each.image))] += 1
        if each.names_a_side:
            sides[each.image is not None] += 1
    n, n_pictures = turns.total(), pictures.total()
    more = [f"  and {n_refused - MOST} more"] if n_refused > MOST else []
    return [
        f"entries of training text: {n}",
        f"with an image: {n_pictures}, without: {n - n_pictures}; images that are not there: {pictures[False]}",
        f"turns: {said.total()} ({_counted(said.most_common())})",
        f"turns in an entry: {_counted(sorted(turns.items()))}",
        f"about left and right (--sides): {sides.total()}, {sides[True]} of them with an image",
        *(f"note: {note}" for note in fewer_than_asked(asked, n, n + n_refused)),
        f"cannot be used: {n_refused}",
        *(f"  {each.told}" for each in refused),
        *more,
    ]


def _counted(counts: Sequence[tuple[Any, int]]) -> str:
    """Values with how often each occurs."""
    told = ", ".join(f"{value!s:.60} {count}" for value, count in counts[:MOST])
    return f"{told}{f', and {len(counts) - MOST} more' if len(counts) > MOST else ''}"
