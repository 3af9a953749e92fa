"""What a table must be to become a `Result`, and what may be asked of it: refused in one line where it is not."""

import json
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd

from vlm_mech.errors import UsageError

SCALARS = (str, bool, int, float, np.generic)
"""What an axis may hold."""
COLUMNS = ("example", "group", "skipped")
"""Columns of a table beside its axes and metrics."""
SUMMARISED = (
    "metric", "unit", "n", "n_missing", "mean", "ci_low", "ci_high", "baseline", "effect", "effect_low", "effect_high",
    "p", "p_corrected",
)  # fmt: skip
"""Columns of a summary beside the axes."""


def check_axes(axes: Sequence[str], columns: Sequence[str] = ()) -> None:
    """Raises `UsageError` where an axis is called like a column of every result or summary, or one of these columns."""
    lost = sorted({*COLUMNS, *SUMMARISED, *columns} & set(axes))
    if lost:
        raise UsageError(f"an axis is called {lost[0]!r}, which is a column of every result; another name is needed")


def check_columns(axes: tuple[str, ...], metrics: Sequence[str]) -> None:
    """Axes and metrics have columns of their own."""
    columns = [column for name in metrics for column in (name, f"{name}_baseline")]
    check_axes(axes, columns)
    twice = [column for column, count in Counter([*axes, *columns]).items() if count > 1]
    if twice:
        raise UsageError(f"two axes or metrics have the column {twice[0]!r}; give one of them another name")


def check_axis_values(table: pd.DataFrame, axes: tuple[str, ...]) -> None:
    """Values that could not be distinguished, or not be kept in a file."""
    for axis in axes:
        if table[axis].dtype != object:
            continue
        kinds = {type(value): value for value in table[axis] if not pd.api.types.is_scalar(value) or pd.notna(value)}
        wrong = next((value for kind, value in kinds.items() if not issubclass(kind, SCALARS)), None)
        if wrong is not None:
            said = " ".join(repr(wrong).split())[:80]
            raise UsageError(f"axis {axis} holds {said}, a {type(wrong).__name__}; numbers or text are needed")
        if len({issubclass(kind, str) for kind in kinds}) > 1:
            raise UsageError(f"axis {axis} holds both text and numbers; one of these is needed")


def check_complete(table: pd.DataFrame, axes: tuple[str, ...]) -> None:
    """Every example has one row in every cell, and examples are named by one kind of value."""
    names = table["example"]
    if names.dtype == object and len({isinstance(name, str) for name in names}) > 1:
        raise UsageError("examples are named by both text and numbers; one of these is needed")
    keys = table[["example", *axes]]
    repeated = keys[keys.duplicated().to_numpy()]
    if len(repeated):
        twice = repeated.iloc[0].to_dict()
        raise UsageError(f"the table has two rows for {twice}")
    if keys.isna().to_numpy().any():
        raise UsageError("the table has a row without example or axis value")
    n_cells = len(table[list(axes)].drop_duplicates())
    codes, _ = pd.factorize(names)
    counts = np.bincount(codes)
    if (counts != n_cells).any():
        first = int((counts != n_cells).argmax())
        example = names[codes == first].tolist()[0]
        raise UsageError(f"example {example!r} has {counts[first]} of {n_cells} cells; every example needs every cell")


def check_drawn(level: float, seed: int) -> None:
    """The level of intervals, between 0 and 1, and the seed of what is resampled."""
    if not 0 < level < 1:
        raise UsageError(f"level is {level}; a number between 0 and 1 is needed, such as 0.95")
    if not isinstance(seed, Integral) or seed < 0:
        raise UsageError(f"seed is {seed!r}; a whole number of at least 0 is needed")


def check_json(given: dict[str, Any], what: str) -> None:
    """What could not be saved is refused where it is given."""
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the {what} cannot be saved as JSON: {error}; plain numbers without NaN are needed") from None


def check_numbers(table: pd.DataFrame, column: str) -> None:
    """A column of finite numbers, NaN where one is missing."""
    if table[column].dtype.kind not in "biuf":
        raise UsageError(f"column {column} holds {table[column].dtype}; numbers are needed, NaN where one is missing")
    endless = np.isinf(table[column].to_numpy(dtype=float))
    if endless.any():
        example = table["example"].to_numpy()[endless.argmax()]
        raise UsageError(f"{column} of example {example!r} is infinite; a missing value is NaN")


def check_groups(table: pd.DataFrame) -> None:
    """Every example has one group, the same in all of its rows."""
    split = table.groupby("example", sort=False, observed=True)["group"].nunique(dropna=False)
    if int(split.max()) > 1 or table["group"].isna().to_numpy().any():
        raise UsageError(f"example {split.idxmax()!r} has {split.max()} groups, or none; every example needs one group")
