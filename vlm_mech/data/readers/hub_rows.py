"""Rows of a data set of the hub, in which pictures stay until they are needed (`Held`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

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


def class_names(source: Any) -> Callable[[Any], Any]:
    """What writes the classes of a row of a data set of the hub by their names, which it holds as numbers."""
    features = getattr(source, "features", None)
    known = {column: _names_of(each) for column, each in features.items()} if isinstance(features, Mapping) else {}
    labelled = {column: names for column, names in known.items() if names}

    def name(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, list | tuple):
            return [name(each, names) for each in value]
        return names[int(value)] if isinstance(value, Integral) and 0 <= int(value) < len(names) else None

    def named(row: Any) -> Any:
        if not labelled or not isinstance(row, Mapping):
            return row
        return {key: name(value, labelled[key]) if key in labelled else value for key, value in row.items()}

    return named


def _names_of(feature: Any) -> Sequence[str]:
    """The names of the classes of a column, or of a column of lists of them; none of others."""
    inner = next((each for each in (feature, getattr(feature, "feature", None)) if hasattr(each, "int2str")), None)
    return () if inner is None else tuple(inner.names)
