"""Results of the same kind as one, told apart by an axis: two checkpoints, or two data sets, in one figure."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from vlm_mech.errors import UsageError
from vlm_mech.results.result import Result


def together(results: Mapping[str, Result], *, axis: str = "model") -> Result:
    """Several results in one table, whose first axis says which is which; `plot`, `summary` and `contrast` go over all.

    Examples are those that all of them have; the finding says how many are left out. Compare two with `contrast`, whose
    difference is paired by example.

    Args:
        results: by what they are called.
        axis: what tells them apart.

    Raises:
        UsageError: fewer than two, other axes or metrics, cells that not all have, or no example in common.
    """
    if not isinstance(results, Mapping) or len(results) < 2:
        raise UsageError("together takes two results at least, by name, such as {'base': one, 'tuned': other}")
    wrong = [type(each).__name__ for each in results.values() if not isinstance(each, Result)]
    if wrong:
        raise UsageError(f"together takes results by name, not a {wrong[0]}; what a call gives beside one has .result")
    first, *others = results.values()
    for name, each in list(results.items())[1:]:
        if (each.axes, each.metrics) != (first.axes, first.metrics):
            raise UsageError(f"{name!r} has other axes or metrics than the first result ({', '.join(first.axes)})")
    common = set(first.table["example"]).intersection(*(each.table["example"] for each in others))
    if not common:
        raise UsageError(f"no example is in all of {', '.join(results)}; compare results of the same data")
    tables = []
    for name, each in results.items():
        rows = each.table[each.table["example"].isin(common)]
        tables.append(rows.assign(**{axis: name}))
    table, axes = pd.concat(tables, ignore_index=True), (axis, *first.axes)
    left = max(len(set(each.table["example"])) for each in results.values()) - len(common)
    findings = (f"{left} examples that not all results have are left out.",) if left else ()
    about: dict[str, Any] = {axis: {name: each.provenance.get("model") for name, each in results.items()}}
    return Result(first.name, table, axes, first.metrics, {}, about, findings, first.elsewhere)
