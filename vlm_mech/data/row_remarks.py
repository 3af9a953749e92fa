"""What is to be told of rows beside those that cannot be used: fields that are spelt wrongly, and rows there twice."""

import functools
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence

from vlm_mech.data.user_files import Row

MOST = 4


class FieldRemarks:
    """Counts fields that are not read but look as if they were meant to be, by their names.

    These are nearly the name of one that the row lacks, or are read elsewhere.

    Args:
        known: fields that are read.
        elsewhere: others, and what is to be told of them.
    """

    def __init__(self, known: Collection[str], elsewhere: Mapping[str, str] | None = None) -> None:
        self._known, self._elsewhere = frozenset(known), dict(elsewhere or {})
        self._counts = Counter[tuple[str, str]]()

    def look(self, row: Row) -> None:
        """Looks at the names of a row's fields."""
        for name in row.fields:
            if name in self._elsewhere:
                self._counts[name, self._elsewhere[name]] += 1
            elif name not in self._known and (near := _nearest(name, self._known - set(row.fields))):
                self._counts[name, f"{near} is meant, if it is misspelt"] += 1

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be told."""
        return tuple(
            f"field {name!r:.60} of {count} row{'s' * (count > 1)} is not read; {told}"
            for (name, told), count in self._counts.items()
        )


@functools.lru_cache(maxsize=1_000)
def _nearest(name: str, known: frozenset[str]) -> str:
    """The nearest known name at most two slips of the pen away (one, of a short name); empty where none is."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    near = dict[str, int]()
    for each in sorted(known):
        most = 2 if min(len(each), len(plain)) > 5 else 1 if min(len(each), len(plain)) > 3 else 0
        if abs(len(each) - len(plain)) <= most and (slips := _slips(plain, each)) <= most:
            near[each] = slips
    return min(near, key=near.__getitem__, default="")


def _slips(one: str, other: str) -> int:
    """Letters added, left out, exchanged for others, or exchanged with their neighbours (optimal string alignment)."""
    before, last = list[int](), list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, wanted in enumerate(other, 1):
            best = min(last[column] + 1, line[-1] + 1, last[column - 1] + (letter != wanted))
            if row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == wanted:
                best = min(best, before[column - 2] + 1)
            line.append(best)
        before, last = last, line
    return last[-1]


def repeats(names: Sequence[str], said: Sequence[Hashable]) -> tuple[str, ...]:
    """A note on examples that are the same as another one.

    Args:
        names: of the examples. said: all that an example shows and says, equal where two are the same.
    """
    first, same = dict[Hashable, str](), list[str]()
    for name, each in zip(names, said, strict=True):
        if each in first:
            same.append(f"{name} as {first[each]}")
        first.setdefault(each, name)
    if not same:
        return ()
    more = f" and {len(same) - MOST} more" if len(same) > MOST else ""
    return (f"there twice, to the pixel and the word: {len(same)} of {len(names)} ({', '.join(same[:MOST])}{more})",)
