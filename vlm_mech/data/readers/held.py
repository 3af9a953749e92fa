"""Pictures that stay in the file that holds them until they are needed."""

import base64
import binascii
import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_mech.data.text_files import not_utf8, opened_text
from vlm_mech.errors import UsageError


class Held(Mapping[str, Any]):
    """A picture in a column of a table, as `load_image` takes it: a mapping with `bytes` or `path`, read each time."""

    def __init__(self, column: "HeldColumn", group: int, at: int) -> None:
        self._column, self._group, self._at = column, group, at

    def _given(self) -> Mapping[str, Any]:
        return self._column.cell(self._group, self._at)

    def __getitem__(self, name: str) -> Any:
        if name not in ("bytes", "path"):
            raise KeyError(name)
        return self._given()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("bytes", "path"))

    def __len__(self) -> int:
        return 2


class HeldColumn:
    """A column of pictures of a parquet file; the group of rows that was asked for last is kept."""

    def __init__(self, file: Any, path: Path, name: str) -> None:
        self._file, self._path, self._name = file, path, name
        self._kept: tuple[int, Any] = (-1, None)

    def _read(self, group: int, column: str) -> Any:
        return self._file.read_row_group(group, columns=[column]).column(self._name).combine_chunks()

    def empty(self, group: int) -> list[bool]:
        """Which cells of a group of rows are empty, without reading the pictures where they have a field next to it."""
        import pyarrow as pa

        kind = self._file.schema_arrow.field(self._name).type
        fields = [kind.field(number).name for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        light = f"{self._name}.path" if "path" in fields else self._name
        return self._read(group, light).is_null().to_pylist()

    def cell(self, group: int, at: int) -> Mapping[str, Any]:
        """The picture of a row as `bytes` or `path`, whichever way the file has it."""
        from pyarrow import ArrowException

        if self._kept[0] != group:
            try:
                self._kept = (group, self._read(group, self._name))
            except (OSError, ArrowException) as error:
                raise UsageError(f"the images of {self._path.name} cannot be read: {error}") from error
        given = self._kept[1][at].as_py()
        if isinstance(given, Mapping):
            path = given.get("path")
            return {"bytes": given.get("bytes"), "path": self._path.parent / path if path else None}
        if isinstance(given, bytes):
            return {"bytes": given, "path": None}
        if isinstance(given, str):
            here = self._path.parent / given if len(given) < 500 else None
            return {"bytes": None, "path": here if here is not None and here.is_file() else given}
        raise UsageError(f"{self._name} is a {type(given).__name__}; an image is needed")


class HeldCell(Held):
    """A picture in base64 in a cell of a csv or tsv: where its row begins, and the number of the cell."""

    def __init__(self, path: Path, start: int, delimiter: str, at: int) -> None:
        self._path, self._start, self._delimiter, self._at = path, start, delimiter, at

    def _given(self) -> Mapping[str, Any]:
        _, cells = next(records(self._path, self._delimiter, start=self._start))
        text = cells[self._at]
        content = "".join((text.partition(",")[2] if text.startswith("data:") else text).split())
        try:
            return {"bytes": base64.b64decode(content, validate=True), "path": None}
        except binascii.Error as error:
            raise UsageError(f"the image is no base64: {error}") from error


def records(path: Path, delimiter: str, *, start: int = 0) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv or tsv with the byte at which each begins, one in memory at a time; empty lines do not count.

    Args:
        start: byte at which the first begins.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or a cell in quotes does not end.
    """
    at = start

    def lines() -> Iterator[str]:
        nonlocal at
        with opened_text(path) as file:
            file.seek(start)
            for line in file:
                at += len(line)
                yield (line if at > len(line) else line.removeprefix(b"\xef\xbb\xbf")).decode()

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        begins = at
        # Pictures in base64 are longer than the cells that csv reads by default.
        usual = csv.field_size_limit(sys.maxsize)
        try:
            row = next(rows)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise UsageError(f"file {str(path)!r} cannot be read after byte {begins}: {not_utf8(error)}") from error
        except (OSError, ValueError, csv.Error) as error:
            told = (
                "its lines end in carriage returns alone; save it with line feeds"
                if "new-line" in str(error)
                else error
            )
            raise UsageError(f"file {str(path)!r} cannot be read after byte {begins}: {told}") from error
        finally:
            csv.field_size_limit(usual)
        if row:
            yield begins, row
