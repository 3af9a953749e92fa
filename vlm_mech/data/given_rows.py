"""Rows that are given in Python: a list of mappings, a pandas DataFrame, a data set of the hub, or a stream.

A row is fetched when it is drawn, and no picture is decoded before its row is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_mech.data.readers.hub_rows import class_names
from vlm_mech.data.user_files import Row, Rows, written
from vlm_mech.errors import UsageError


class _Fetched(Sequence[Row]):
    """Rows of a source that gives each by its number."""

    def __init__(self, n: int, fetch: Callable[[int], Any]) -> None:
        self._n, self._fetch = n, fetch

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, at: Any) -> Any:
        return _row(at, self._fetch(at))


def rows_given(given: Iterable[Any], call: str) -> Rows:
    """The rows of what is given; those of a stream, which has no length, in its order as long as they are asked for.

    Args:
        call: that they are given to, for the error.

    Raises:
        UsageError: what is given has no rows.
    """
    if isinstance(given, str | bytes | Path | Mapping) or not isinstance(given, Iterable):
        raise UsageError(
            f"{call} takes rows, not a {type(given).__name__}: a list of dicts, a DataFrame, a datasets.Dataset, or an "
            "iterable of dicts"
        )
    source: Any = given
    if hasattr(source, "iloc"):
        columns = [str(each) for each in source.columns]
        twice = next((each for each in columns if columns.count(each) > 1), None)
        if twice is not None:
            raise UsageError(f"{call}: column {twice!r:.60} is named twice; each needs a name of its own")
        return Rows(_Fetched(len(source), lambda at: source.iloc[at].to_dict()), {})
    source, named = undecoded(source), class_names(source)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return Rows(_Fetched(len(source), lambda at: named(source[at])), {})
    return Rows((_row(number, named(each), copied=True) for number, each in enumerate(source)), {})


def _row(at: int, fields: Any, *, copied: bool = False) -> Row:
    """The row at a place, missing values left out.

    Args:
        copied: arrays are copied, since a stream may fill the same one for every row.
    """
    if not isinstance(fields, Mapping):
        raise UsageError(f"row {at + 1} is a {type(fields).__name__}; a mapping of image, question, answer is needed")
    told = {str(name): _listed(value, copied) for name, value in fields.items() if not _is_missing(value)}
    # An id that is none is refused once the row is used.
    name = (written(told.get("id")) or "").strip()
    return Row(at + 1, name or str(at + 1), told, f"row {at + 1}")


def _listed(value: Any, copied: bool) -> Any:
    """Arrays of texts or objects, as tables hold lists, as lists."""
    if copied and isinstance(value, list | tuple):
        return [_listed(each, copied) for each in value]
    if not isinstance(value, np.ndarray):
        return value
    return value.tolist() if value.dtype.kind in "OU" else value.copy() if copied else value


def _is_missing(value: Any) -> bool:
    if isinstance(value, float | np.floating | np.datetime64):
        return bool(value != value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def undecoded(source: Any) -> Any:
    """A data set of the hub that gives pictures as it holds them, not decoded; anything else as it is.

    A transform of the user's own expects pictures, and gives what it gives.
    """
    features, form = getattr(source, "features", None), getattr(source, "format", None)
    if not isinstance(features, Mapping) or not hasattr(source, "cast_column"):
        return source
    if isinstance(form, Mapping) and form.get("type") == "custom":
        return source
    for column, feature in features.items():
        inner = getattr(feature, "feature", None)
        if type(feature).__name__ == "Image":
            source = source.cast_column(column, type(feature)(decode=False))
        elif type(inner).__name__ == "Image":
            source = source.cast_column(column, type(feature)(type(inner)(decode=False)))
    return source
