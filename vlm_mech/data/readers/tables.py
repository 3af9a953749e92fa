"""Files of rows as they lie in a folder (JSON, JSON lines, csv, tsv, parquet): their columns, and their rows in turn.

Only the first row is read to know the columns. Pictures that stand in the cells of a table stay there until they are
needed (`Held`), so that a table of many gigabytes takes no more memory than its text.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_mech.data.readers.format import Table
from vlm_mech.data.readers.held import Held, HeldCell, HeldColumn, records
from vlm_mech.data.user_files import Refused, Row, object_of, read_rows
from vlm_mech.errors import UsageError

KINDS = {".csv": ",", ".tsv": "\t", ".json": "", ".jsonl": "", ".parquet": ""}
DEPTH = 2
"""Folders below the one that is given in which tables are looked for."""
HEAD = 1 << 20
"""Bytes of a JSON list within which its first row must end for the file to be known."""


def tables_in(path: Path) -> tuple[Table, ...]:
    """The tables of a folder and of the folders below it, or of one file, in the order of their names.

    What has no rows, or cannot be read as its name says, is none; hidden files are left out.
    """
    root = path if path.is_dir() else path.parent
    paths = [path] if path.is_file() else sorted(_files(path, DEPTH))
    tables = (_table(each, root) for each in paths if each.suffix.lower() in KINDS)
    return tuple(table for table in tables if table is not None)


def _files(folder: Path, depth: int) -> Iterator[Path]:
    for each in folder.iterdir():
        if each.name.startswith("."):
            continue
        if each.is_dir():
            yield from _files(each, depth - 1) if depth else ()
        elif each.suffix.lower() in KINDS:
            yield each


def _table(path: Path, root: Path) -> Table | None:
    try:
        if path.suffix == ".parquet":
            file = _parquet(path)
            return Table(path, root, tuple(file.schema_arrow.names))
        if path.suffix in (".csv", ".tsv"):
            delimiter = KINDS[path.suffix]
            head = list(itertools.islice(records(path, delimiter), 2))
            columns = tuple(cell.strip() for cell in head[0][1]) if head else ()
            return Table(path, root, columns, dict(zip(columns, head[1][1], strict=False)) if head[1:] else {})
        first = _first(path)
        return None if first is None else Table(path, root, tuple(first), first)
    except (OSError, ValueError, RecursionError):
        return None


def _first(path: Path) -> dict[str, Any] | None:
    """The first row of a JSON list, or of JSON lines."""
    with path.open("rb") as file:
        head = file.read(HEAD).removeprefix(b"\xef\xbb\xbf").decode(errors="ignore").lstrip()
        if not head.startswith("["):
            file.seek(0)
            line = next((each for each in file if each.strip()), b"")
            return object_of(line.removeprefix(b"\xef\xbb\xbf"))
    row, _ = json.JSONDecoder().raw_decode(head, len(head) - len(head[1:].lstrip()))
    return _as_fields(row)


def _as_fields(row: Any) -> dict[str, Any] | None:
    """A row of a JSON list; the values of a list are called by their numbers."""
    if isinstance(row, list):
        row = {str(number): value for number, value in enumerate(row)}
    return row if isinstance(row, dict) else None


def read(table: Table, held: Sequence[str] = ()) -> Iterator[Row | Refused]:
    """The rows of a table in turn: their number from 1 on, where they stand, and their cells by column.

    What is no row is refused with the reason.

    Args:
        held: columns whose cells hold pictures, which are left in the file (`Held`); of csv and parquet alone.

    Raises:
        UsageError: the file cannot be read.
    """
    if table.path.suffix == ".parquet":
        yield from _parquet_rows(table, held)
    elif table.path.suffix in (".csv", ".tsv"):
        yield from _cells(table, held)
    else:
        yield from _json(table)


def _place(table: Table, number: int) -> str:
    return f"{table.path.name} row {number}"


def _json(table: Table) -> Iterator[Row | Refused]:
    path = table.path
    with path.open("rb") as file:
        is_list = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_list:
        found = read_rows(path, "file")
        rows: dict[int, Row | Refused] = {**{row.line: row for row in found.rows}, **found.refused}
        for line, each in sorted(rows.items(), key=lambda pair: pair[0]):
            yield Row(line, each.id, each.fields, _place(table, line)) if isinstance(each, Row) else each
        return
    try:
        given = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"file {str(path)!r} cannot be read: {error}") from error
    for number, row in enumerate(given, 1):
        fields = _as_fields(row)
        if fields is None:
            yield Refused(_place(table, number), f"it is a {type(row).__name__}; an object is needed")
        else:
            yield Row(number, str(number), fields, _place(table, number))


def _cells(table: Table, held: Sequence[str]) -> Iterator[Row | Refused]:
    """The rows of a csv or tsv; cells may hold line breaks and be of any length."""
    delimiter = KINDS[table.path.suffix]
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


def _parquet_rows(table: Table, held: Sequence[str]) -> Iterator[Row | Refused]:
    file = _parquet(table.path)
    kept = [column for column in table.columns if column in held]
    columns = {column: HeldColumn(file, table.path, column) for column in kept}
    others = [column for column in table.columns if column not in held]
    number = 0
    for group in range(file.num_row_groups):
        empty = {column: each.empty(group) for column, each in columns.items()}
        rows = file.read_row_group(group, columns=others).to_pylist()
        for at, row in enumerate(rows):
            number += 1
            for column, each in columns.items():
                row[column] = None if empty[column][at] else Held(each, group, at)
            yield Row(number, str(number), row, _place(table, number))


def _parquet(path: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, memory_map=True)
    except (OSError, ArrowException) as error:
        raise UsageError(f"file {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
