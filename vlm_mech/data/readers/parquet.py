"""Parquet files: their columns, and their rows, in which pictures stay in the file (`Held`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_mech.data.readers.held import Held, HeldColumn
from vlm_mech.errors import UsageError


def parquet_columns(path: Path) -> tuple[str, ...]:
    """The names of the columns.

    Raises:
        UsageError: the file cannot be read.
    """
    return tuple(_opened(path).schema_arrow.names)


def parquet_first(path: Path) -> dict[str, Any]:
    """The first row without its pictures; nothing where there is none, or it cannot be read."""
    from pyarrow import ArrowException

    file = _opened(path)
    columns = [each for each in file.schema_arrow.names if each not in _pictures(file)]
    try:
        batch = next(file.iter_batches(batch_size=1, columns=columns), None)
    except (OSError, ArrowException) as error:
        raise _unreadable(path, error) from error
    rows = [] if batch is None else batch.to_pylist()
    return rows[0] if rows else {}


def parquet_rows(path: Path, held: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows in turn, a group of them in memory at a time.

    Args:
        held: columns of texts that hold pictures too.

    Raises:
        UsageError: the file cannot be read.
    """
    from pyarrow import ArrowException

    file = _opened(path)
    names = file.schema_arrow.names
    kept = {*held, *_pictures(file)} & set(names)
    columns = {column: HeldColumn(file, path, column) for column in names if column in kept}
    for group in range(file.num_row_groups):
        try:
            empty = {column: each.empty(group) for column, each in columns.items()}
            rows = file.read_row_group(group, columns=[each for each in names if each not in kept]).to_pylist()
        except (OSError, ArrowException) as error:
            raise _unreadable(path, error) from error
        for at, row in enumerate(rows):
            for column, each in columns.items():
                row[column] = None if empty[column][at] else Held(each, group, at)
            yield row


def _pictures(file: Any) -> set[str]:
    """The columns that hold bytes, or bytes and a path, as the hub holds pictures."""
    import pyarrow as pa

    found = set()
    for each in file.schema_arrow:
        kind = each.type
        struct = {kind.field(number).name for number in range(kind.num_fields)} if pa.types.is_struct(kind) else set()
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or {"bytes", "path"} <= struct:
            found.add(each.name)
    return found


def _opened(path: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, memory_map=True)
    except (OSError, ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(f"file {str(path)!r} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}")
