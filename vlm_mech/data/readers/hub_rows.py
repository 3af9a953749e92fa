"""Rows of a data set of the hub, in which pictures stay until they are needed (`Held`)."""

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_mech.data.given_rows import class_names
from vlm_mech.data.readers.held import Held


class HeldRow(Held):
    """A picture in a column of a data set of the hub."""

    def __init__(self, column: Any, name: str, at: int) -> None:
        self._rows, self._name, self._number = column, name, at

    def _given(self) -> Mapping[str, Any]:
        return self._rows[self._number][self._name]


def hub_rows(data: Any) -> Iterator[dict[str, Any]]:
    """The rows in turn, classes by their names.

    Args:
        data: a `datasets.Dataset` whose pictures are not decoded.
    """
    pictures = [name for name, feature in data.features.items() if type(feature).__name__ == "Image"]
    columns = {name: data.select_columns([name]) for name in pictures}
    empty = {name: _empty(column) for name, column in columns.items()}
    named = class_names(data)
    for at, row in enumerate(data.remove_columns(pictures)):
        held = {name: None if empty[name][at] else HeldRow(column, name, at) for name, column in columns.items()}
        yield {**named(row), **held}


def _empty(column: Any) -> list[bool]:
    """Which cells of a column of pictures have neither bytes nor a path; no picture is read for it."""
    import pyarrow.compute as pc

    found: list[bool] = []
    for batch in column.with_format("arrow").iter(1_000):
        cells = batch.column(0).combine_chunks()
        inner = [pc.is_null(pc.struct_field(cells, field)) for field in ("bytes", "path")]
        found += pc.or_(pc.is_null(cells), pc.and_(*inner)).to_pylist()
    return found
