"""Files of rows as they lie in a folder (JSON, JSON lines, csv, tsv, parquet): their columns, and their rows in turn.

Only the first row is read to know the columns. Pictures that stand in the cells of a table stay there until they are
needed (`Held`), so that a table of many gigabytes takes no more memory than its text.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_mech.data.json_lines import Twice, lines_of, object_of, once
from vlm_mech.data.readers.format import Table
from vlm_mech.data.readers.held import HeldCell, records
from vlm_mech.data.readers.hub_rows import hub_rows
from vlm_mech.data.readers.parquet import parquet_columns, parquet_first, parquet_rows
from vlm_mech.data.readers.streamed import is_list, listed
from vlm_mech.data.text_files import opened_text
from vlm_mech.data.user_files import Refused, Row
from vlm_mech.errors import UsageError

KINDS = {".csv": ",", ".tsv": "\t", ".json": "", ".jsonl": "", ".parquet": ""}
WHOLE = {"paco_lvis_v1": ("images", "annotations", "categories"), "annotations_part": ("anno",)}
"""Columns of what is known by how its name begins, and not opened: large files of one object, folders of many files."""
DEPTH = 2
"""Folders below the one that is given in which tables are looked for."""
LONGEST, MOST_LINES = 1 << 26, 1_000
"""Bytes of a line, and lines without an object, after which a file called .json is no JSON lines."""


def tables_in(path: Path) -> tuple[Table, ...]:
    """The tables of a folder and of the folders below it, or of one file, in the order of their names.

    What has no rows, or cannot be read as its name says, is none; hidden files are left out.
    """
    return files_in(path)[0]


def files_in(path: Path, *, depth: int = DEPTH) -> tuple[tuple[Table, ...], dict[str, str]]:
    """The tables of a folder and of the folders below it, or of one file, and by name what cannot be read, and why.

    Args:
        depth: folders below it in which they are looked for.

    Raises:
        UsageError: a folder that cannot be read.
    """
    root = path if path.is_dir() and not _whole(path) else path.parent
    try:
        paths = [path] if path.is_file() or _whole(path) else sorted(_files(path, depth))
    except OSError as error:
        raise UsageError(f"folder {str(path)!r:.200} cannot be read: {error}") from error
    tables, unread = list[Table](), dict[str, str]()
    for each in paths:
        try:
            table = _table(each, root) if kind_of(each) in KINDS or each.is_dir() else None
            tables += [] if table is None else [table]
        except (OSError, UsageError, RecursionError) as error:
            told = re.sub(rf"file {re.escape(repr(str(each)))} cannot be read(?:: | (?=after))", "", str(error))
            unread[each.relative_to(root).as_posix()] = told
    return tuple(tables), unread


def _whole(path: Path) -> tuple[str, ...]:
    return next((columns for name, columns in WHOLE.items() if path.name.lower().startswith(name)), ())


def kind_of(path: Path) -> str:
    """How the name of a file ends, in lower case."""
    return path.suffix.lower()


def _files(folder: Path, depth: int) -> Iterator[Path]:
    for each in folder.iterdir():
        if each.name.startswith("."):
            continue
        if each.is_dir():
            if _whole(each):
                yield each
            else:
                yield from _files(each, depth - 1) if depth else ()
        elif kind_of(each) in KINDS and each.is_file():
            yield each


def _table(path: Path, root: Path) -> Table | None:
    """The table of a file; None where it holds something else than rows.

    Raises:
        UsageError: it cannot be read as its name says, is empty, or names a column twice.
    """
    kind, whole = kind_of(path), _whole(path)
    if whole and (kind == ".json" or path.is_dir()):
        return Table(path, root, whole)
    if not path.stat().st_size:
        raise UsageError("it is empty")
    if kind == ".parquet":
        return Table(path, root, _unlike(parquet_columns(path)), parquet_first(path))
    if kind in (".csv", ".tsv"):
        head = list(itertools.islice(records(path, KINDS[kind]), 2))
        columns = _unlike([cell.strip() for cell in head[0][1]]) if head else ()
        if len(columns) == 1 and (other := next((each for each in ";\t," if each in columns[0]), "")):
            raise UsageError(f"its first line is split by {other!r}; cells of a {kind} are split by {KINDS[kind]!r}")
        return Table(path, root, columns, dict(zip(columns, head[1][1], strict=False)) if head[1:] else {})
    with opened_text(path) as file:
        first = _first(file, kind)
    return None if first is None else Table(path, root, tuple(first), first)


def _unlike(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns, if no name is there twice; those without a name do not count."""
    twice = next((name for name, count in Counter(columns).items() if name and count > 1), None)
    if twice is not None:
        raise UsageError(f"its column {twice!r:.60} is named twice; each needs a name of its own")
    return tuple(columns)


def _first(file: io.BufferedIOBase, kind: str) -> dict[str, Any] | None:
    """The first row of a JSON list, or of JSON lines, that is one; None where there is none."""
    if is_list(file):
        return next((fields for row in listed(file, hook=once) if (fields := _as_fields(row)) is not None), None)
    wrong = ""
    for line in itertools.islice(iter(lambda: file.readline(LONGEST), b""), MOST_LINES):
        if len(line) == LONGEST:
            break
        try:
            if bare := line.removeprefix(b"\xef\xbb\xbf").strip():
                return object_of(bare)
        except UsageError as error:
            wrong = wrong or str(error)
    # What is called .json may be an object over many lines, such as a configuration.
    if kind == ".jsonl":
        raise UsageError(f"none of its lines holds an object; the first {wrong or 'is empty'}")
    return None


def _as_fields(row: Any) -> dict[str, Any] | None:
    """A row of a JSON list; the values of a list are called by their numbers."""
    if isinstance(row, list):
        row = {str(number): value for number, value in enumerate(row)}
    return row if isinstance(row, dict) else None


def read(table: Table, held: Sequence[str] = ()) -> Iterator[Row | Refused]:
    """The rows of a table in turn: their number from 1 on, where they stand, and their cells by column.

    What is no row is refused with the reason.

    Args:
        held: columns whose cells hold pictures, which are left in the file (`Held`); those of parquet that are bytes,
            or as the hub holds pictures, and those of the hub always are, of JSON none.

    Raises:
        UsageError: the file cannot be read.
    """
    kind = kind_of(table.path)
    if table.given is not None or kind == ".parquet":
        rows = parquet_rows(table.path, held) if table.given is None else hub_rows(table.given)
        numbered = enumerate(rows, 1)
        yield from (Row(number, str(number), fields, _place(table, number)) for number, fields in numbered)
    elif kind in (".csv", ".tsv"):
        yield from _cells(table, held)
    else:
        yield from _json(table)


def _place(table: Table, number: int) -> str:
    return f"{table.name} row {number}"


def _json(table: Table) -> Iterator[Row | Refused]:
    path = table.path
    try:
        with opened_text(path) as file:
            if is_list(file):
                yield from _rows_of_list(table, file)
                return
    except (OSError, UsageError) as error:
        raise UsageError(f"file {str(path)!r} cannot be read: {error}") from error
    for line, _, each in lines_of(path, "file"):
        yield Row(line, each.id, each.fields, _place(table, line)) if isinstance(each, Row) else each


def _rows_of_list(table: Table, file: io.BufferedIOBase) -> Iterator[Row | Refused]:
    for number, row in enumerate(listed(file, hook=once), 1):
        fields = _as_fields(row)
        if fields is None or isinstance(fields, Twice):
            wrong = fields.told if isinstance(fields, Twice) else f"is a {type(row).__name__}; an object is needed"
            yield Refused(_place(table, number), f"it {wrong}")
        else:
            yield Row(number, str(number), fields, _place(table, number))


def _cells(table: Table, held: Sequence[str]) -> Iterator[Row | Refused]:
    """The rows of a csv or tsv; cells may hold line breaks and be of any length."""
    delimiter = KINDS[kind_of(table.path)]
    for number, (start, cells) in enumerate(itertools.islice(records(table.path, delimiter), 1, None), 1):
        if len(cells) != len(table.columns):
            n, m = len(cells), len(table.columns)
            yield Refused(_place(table, number), f"it has {n} cells where the first line names {m} columns")
            continue
        fields: dict[str, Any] = dict(zip(table.columns, cells, strict=True))
        for column in held:
            if fields.get(column):
                at = table.columns.index(column)
                fields[column] = HeldCell(table.path, start, delimiter, at)
        yield Row(number, str(number), fields, _place(table, number))
