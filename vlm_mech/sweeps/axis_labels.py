"""What stands in a table for the values of a grid's axes: numbers and text as they are, a label for anything else."""

import hashlib
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.results.result_checks import check_axes

Axes = tuple[tuple[str, Any], ...]
KINDS = ((bool,), (int,), (int, float), (str,))
LONGEST = 60
"""Characters of a label; what is longer is cut, with a digest of all of it."""


def axis_table(points: Sequence[Axes], columns: Sequence[str] = ()) -> pd.DataFrame:
    """One row per point, a column per axis.

    Args:
        columns: further names that the table will need, such as those of metrics.

    Raises:
        UsageError: points with unlike axes, an axis whose name the table needs, or the same point twice.
    """
    names = [name for name, _ in points[0]]
    for each in points:
        if [name for name, _ in each] != names:
            own = ", ".join(name for name, _ in each)
            raise UsageError(f"a point has the axes {own}; those of the first are {', '.join(names)}")
    check_axes(names, columns)
    table = pd.DataFrame({name: labels([dict(each)[name] for each in points]) for name in names})
    twice = table[table.duplicated().to_numpy()]
    if len(twice):
        raise UsageError(f"the grid has the point {twice.iloc[0].to_dict()} twice; once is needed")
    return table


def labels(values: Sequence[Any]) -> list[Any]:
    """Values of one axis that a table can hold: all of one kind, equal ones alike, unlike ones apart.

    Numbers (also as tensors or arrays of one element without dimension) and text are kept where all values are. Else
    every value becomes text: a span or another object as it is written, a tensor by shape and digest.
    """
    plain = [_plain(value) for value in values]
    for kinds in KINDS:
        if all(type(value) in kinds and value == value for value in plain):
            return plain
    known: dict[Hashable, str] = {}
    for value in plain:
        text = label(value)
        key = (type(value), value) if _hashable(value) else text
        if key not in known:
            number = sum(_stem(each, text) for each in known.values()) + 1
            known[key] = text if number == 1 else f"{text} ({number})"
    return [known[(type(value), value) if _hashable(value) else label(value)] for value in plain]


def label(value: Any) -> str:
    """A value as short text, the same in every process."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none" if value is None else "nan"
    if isinstance(value, str | Site):
        return str(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        array = torch.as_tensor(value).detach().cpu()
        content = repr((str(array.dtype), tuple(array.shape))).encode()
        content += array.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"tensor {'x'.join(map(str, array.shape))} #{_digest(content)}"
    if isinstance(value, list | tuple):
        text = ", ".join(label(_plain(each)) for each in value)
    else:
        text = getattr(value, "__name__", None) or repr(value)
    if " at 0x" in text:
        text = type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 10]}... #{_digest(text.encode())}"


def _plain(value: Any) -> Any:
    single = isinstance(value, np.generic) or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0)
    return value.item() if single else value


def _hashable(value: Any) -> bool:
    # Tensors are told apart by what they hold, not by who they are.
    if isinstance(value, torch.Tensor | np.ndarray):
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _stem(taken: str, text: str) -> bool:
    return taken == text or (taken.startswith(f"{text} (") and taken.endswith(")"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
