"""Rows of the user's own, cells of a csv, and which rows are used.

Text is UTF-8, with or without a byte order mark. What cannot be used is told with the reason, never left out in
silence.
"""

import csv
import dataclasses
import io
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Generic, TypeVar

from vlm_mech.data.text_files import opened_text
from vlm_mech.errors import UsageError, shortened

MOST_TOLD, MOST_OF_ID = 200, 80
"""Characters with which a row that cannot be used is told, and those of its id among them."""
UsedT = TypeVar("UsedT")


@dataclass(frozen=True)
class Refused:
    """An example that cannot be used, and why; both together are told in at most 200 characters."""

    id: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", shortened(self.id, MOST_OF_ID))
        object.__setattr__(self, "reason", shortened(self.reason, MOST_TOLD - len(self.id) - len(": ")))

    @property
    def told(self) -> str:
        """Both in one text."""
        return with_reason(self.id, self.reason)


def with_reason(name: str, reason: str) -> str:
    """What cannot be used and why, the name once where the reason begins with it, as in `item 7: it shows no image`."""
    begins = re.match(rf"(?:[^\s'\"]+ )?(?:line|row|item|pair) {re.escape(name)}(?=[: ])", reason)
    return reason if begins else f"{name}: {reason}"


@dataclass(frozen=True)
class Row:
    """A row of a file: its number from 1 on, its id (else that number), its fields, and where it stands."""

    line: int
    id: str
    fields: dict[str, Any]
    where: str = ""

    @property
    def place(self) -> str:
        """Where it stands, for errors: its line unless something else is told."""
        return self.where or f"line {self.line}"


class Later(Sequence[Row]):
    """Rows whose ids and places are known; fields are fetched each time one is asked for.

    Args:
        heads: the rows without their fields.
        fields_of: fetches these of a row.
    """

    def __init__(self, heads: Sequence[Row], fields_of: Callable[[Row], dict[str, Any]]) -> None:
        self.heads, self.fields_of = heads, fields_of

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, at: Any) -> Any:
        head = self.heads[at]
        return dataclasses.replace(head, fields=self.fields_of(head))


@dataclass(frozen=True)
class Rows:
    """The rows of a source in its order, by number what holds none, and what is to be told of it.

    Rows of a stream, whose number is not known, come one after the other.
    """

    rows: Sequence[Row] | Iterator[Row]
    refused: dict[int, Refused]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn(Generic[UsedT]):
    """What was made of the rows of a file that are used, and which could not be, both in the order of the file.

    `told` says how they were drawn where these are not all rows; `notes` are those of the source.
    """

    used: tuple[UsedT, ...]
    refused: tuple[Refused, ...]
    told: str
    notes: tuple[str, ...] = ()


def check_count(n: object, name: str, of: str) -> None:
    """Raises `UsageError` unless n is a whole number of at least one.

    Args:
        name: what the number is called. of: what it counts.
    """
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise UsageError(f"{name} is {n!r:.60}; a whole number is needed")
    if n < 1:
        raise UsageError(f"{name} is {n}; at least one {of} is needed")


def id_of(fields: Mapping[str, Any], number: int) -> str:
    """What a row is called: its id, or else its number.

    Raises:
        UsageError: an id that is neither a text nor a number.
    """
    given = fields.get("id")
    told = str(number) if given is None else written(given)
    if told is None or not told.strip():
        raise UsageError(f"has the id {given!r:.60}; a text or a number is needed")
    return told


def written(given: object) -> str | None:
    """A text as it is, a number as a text; None for anything else.

    7.0 is 7: of whole numbers, some of which are missing, tables make fractions.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, bool) or not isinstance(given, Real) or given != given:
        return None
    return str(int(given)) if isinstance(given, Integral) or float(given).is_integer() else str(given)


def read_cells(path: Path, what: str) -> dict[int, list[str]]:
    """The cells of every row of a csv that has any, by the number of its line.

    Args:
        what: what the file is called where it cannot be read.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        with io.TextIOWrapper(opened_text(path), encoding="utf-8-sig", newline="") as opened:
            lines = csv.reader(opened)
            # A cell in quotes may go over several lines; the row then has the number of the last.
            numbered = [(lines.line_num, row) for row in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{what} {str(path)!r} cannot be read: {error}") from error
    return {number: [cell.strip() for cell in row] for number, row in numbered if row}


def read_told(path: Path, what: str, columns: str, *, key: Callable[[str], str] = str) -> dict[str, tuple[int, str]]:
    """What a csv of two cells a line says of each name, by `key` of that name: the number of the line, the second cell.

    Args:
        columns: what the cells are, as `class,count`; a first line that says so is left out.

    Raises:
        UsageError: the file cannot be read, a line has another number of cells, or two lines are about one name.
    """
    found: dict[str, tuple[int, str]] = {}
    for number, row in read_cells(path, what).items():
        if number == 1 and ",".join(row) == columns:
            continue
        if len(row) != 2:
            said = ",".join(row)
            raise UsageError(f"{what} {str(path)!r} line {number} is {said!r:.60}; {columns} is needed")
        name = key(row[0])
        if name in found:
            raise UsageError(f"{what} {str(path)!r}: lines {found[name][0]} and {number} are both about {row[0]!r:.60}")
        found[name] = number, row[1]
    return found


def with_own_ids(found: Rows, name: str) -> Rows:
    """The rows, of those with one id the first; the later ones are refused.

    What rows are called that are not there yet (a stream, a table in memory) is not known: they stay as they are.

    Args:
        name: what the source is called, for the error.

    Raises:
        UsageError: more than half of the rows have the id of another.
    """
    if not isinstance(found.rows, tuple | Later):
        return found
    heads = found.rows.heads if isinstance(found.rows, Later) else found.rows
    first, refused = dict[str, Row](), dict[int, Refused]()
    for head in heads:
        if (other := first.setdefault(head.id, head)) is not head:
            refused[head.line] = Refused(head.id, same_id(head, other.place))
    if len(refused) > len(first):
        raise UsageError(
            f"more than half of the rows of {name!r} have the id of another, as {next(iter(refused.values())).reason}"
        )
    kept = tuple(first.values())
    rows = Later(kept, found.rows.fields_of) if isinstance(found.rows, Later) else kept
    return dataclasses.replace(found, rows=rows, refused=found.refused | refused)


def same_id(row: Row, place: str) -> str:
    """What is wrong with a row whose id another one has already, which stands at that place."""
    return f"{row.place}: its id {row.id!r:.60} is that of {place}; each needs one of its own, or none"


def draw(found: Rows, n: int | None, seed: int, use: Callable[[Row], UsedT]) -> Drawn[UsedT]:
    """What `use` makes of n rows drawn with the seed, of all where n is None.

    For a row that `use` refuses with a `UsageError` another is drawn, as long as there are any. Of a stream the first n
    that can be used are taken, and it is read no further.
    """
    used: dict[int, UsedT] = {}
    refused = dict(found.refused)
    for row in _in_order(found.rows, n, seed):
        try:
            used[row.line] = use(row)
        except UsageError as error:
            refused[row.line] = Refused(row.id, str(error))
        if len(used) == n:
            break
    kept = tuple(used[line] for line in sorted(used)), tuple(refused[line] for line in sorted(refused))
    notes = (*found.notes, *fewer_than_asked(n, len(used), len(used) + len(refused)))
    return Drawn(*kept, _told(found, len(used), n, seed), notes)


def fewer_than_asked(n: int | None, n_used: int, n_held: int, of: str = "") -> tuple[str, ...]:
    """A note where a source holds, or can use, fewer examples than were asked for; n is None where all were.

    Args:
        n_used: of those that it holds.
        of: what they are called, where it is not plain.
    """
    if n is None or n_used >= n:
        return ()
    usable = "" if n_used == n_held else f", {n_used} of which can be used"
    return (f"requested {n}{of and f' {of}'}, the source holds {n_held}{usable}",)


def _in_order(rows: Sequence[Row] | Iterator[Row], n: int | None, seed: int) -> Iterator[Row]:
    """The rows in the order in which they are tried."""
    if not isinstance(rows, Sequence):
        yield from rows
        return
    order = range(len(rows)) if n is None else random.Random(f"rows/{seed}").sample(range(len(rows)), len(rows))
    for at in order:
        yield rows[at]


def _told(found: Rows, n_used: int, n: int | None, seed: int) -> str:
    """How rows were drawn; nothing where all were taken."""
    if n is None:
        return ""
    if not isinstance(found.rows, Sequence):
        return f"the first {n_used} rows of a stream that could be used"
    n_rows = len(found.rows) + len(found.refused)
    return "" if n >= n_rows else f"{n_used} of {n_rows} rows, drawn with seed {seed}"
