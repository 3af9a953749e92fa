"""Results of the same examples in several wordings: side by side, their mean, and how far wordings lie apart.

Two things are uncertain, and are distinguished: which examples were drawn (the interval of each example's mean over
wordings), and which wordings were (the spread of the wordings' means over the same examples).
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd

from vlm_mech.errors import UsageError
from vlm_mech.results.result import Result

AXIS = "wording"
MISSING = "not in the run of this wording"
"""Why an example has no value where another wording has it."""
LEFT_OUT = "the wording is left out: "
"""Begins why no example has a value in a wording whose run could say nothing."""
WORDS = 60
"""Letters of a wording that a finding shows."""


def side_by_side(results: Mapping[str, Result], left_out: Mapping[str, str] = MappingProxyType({})) -> Result:
    """The results of a run of each wording in one table, with an axis `wording` before the others.

    An example that a wording does not have (its run refused it, or left it out) stands there without a value. Metrics
    are those that all have.

    Args:
        left_out: wordings whose runs have no result, with the reason: no example has a value there.

    Raises:
        UsageError: fewer than two wordings, no result, or results of other axes or without a metric in common.
    """
    if len(results) + len(left_out) < 2 or not results:
        raise UsageError(f"{len(results)} wording is given; two are needed to be compared")
    first, *others = results.values()
    names = set.intersection(*({metric.name for metric in each.metrics} for each in results.values()))
    if not names or any(each.axes != first.axes for each in others):
        raise UsageError("the runs of the wordings have other axes, or no metric in common, and cannot be compared")
    metrics = tuple(metric for metric in first.metrics if metric.name in names)
    groups: dict[object, object] = {}
    for each in results.values():
        known = each.table.drop_duplicates("example")
        for example, group in zip(known["example"], known["group" if "group" in known else "example"], strict=True):
            groups.setdefault(example, group)
    tables = []
    for wording, each in results.items():
        lacking = [example for example in groups if example not in set(each.table["example"])]
        rows = [each.table]
        if lacking:
            rows.append(pd.DataFrame({"example": lacking}).merge(each.cells, how="cross").assign(skipped=MISSING))
        tables.append(pd.concat(rows, ignore_index=True).assign(**{AXIS: wording}))
    for wording, reason in left_out.items():
        rows = pd.DataFrame({"example": list(groups)}).merge(first.cells, how="cross")
        tables.append(rows.assign(skipped=f"{LEFT_OUT}{reason}", **{AXIS: wording}))
    table = pd.concat(tables, ignore_index=True)
    if any("group" in each.table for each in results.values()):
        table["group"] = table["example"].map(groups)
    if "skipped" in table:
        table["skipped"] = table["skipped"].fillna("")
    return Result(
        f"{first.name}, {len(results)} wordings", table, (AXIS, *first.axes), metrics, elsewhere=first.elsewhere
    )


def over_wordings(result: Result) -> Result | None:
    """Each example's mean over wordings, in the cells that all wordings have; None where there is no such cell.

    An example counts in a cell where it has a value in every wording.

    Args:
        result: of `side_by_side`.
    """
    axes, table = list(result.axes[1:]), _shared_cells(result)
    if table.empty:
        return None
    columns = [name for metric in result.metrics for name in (metric.name, f"{metric.name}_baseline")]
    by_example = table.groupby(["example", *axes], sort=False, observed=True)
    means = by_example[columns].mean().where(by_example[columns].count() == _n_wordings(result)).reset_index()
    if "group" in table:
        means["group"] = means["example"].map(table.drop_duplicates("example").set_index("example")["group"])
    if result.elsewhere:
        means["skipped"] = by_example["skipped"].first().to_numpy()
    return Result(result.name, means, tuple(axes), result.metrics, elsewhere=result.elsewhere)


def spread(result: Result, over: Result) -> pd.DataFrame:
    """The summary over wordings, a row a cell and metric, with how far the wordings' means lie apart next to it.

    Mean and interval are those of the examples' means over wordings (see `Result.summary`). `n_wordings` is their
    number; `wording_sd` the standard deviation of their means (n - 1), all over the same examples; `wording_low` and
    `wording_high` the lowest and highest of these, and `lowest_wording` and `highest_wording` whose they are.

    Args:
        result: of `side_by_side`; `over` is what `over_wordings` makes of it.
    """
    axes, found = list(over.axes), []
    for metric in result.metrics:
        own, numbers = over.summary(metric.name), over.cells.reset_index(names="cell")
        means = means_of_wordings(result, metric.name).merge(numbers, on=axes).groupby("cell")
        # A cell in which no example counts in all wordings has no row there.
        own["n_wordings"] = _n_wordings(result)
        own["wording_sd"] = own.index.map(means["mean"].std(ddof=1))
        for end, place in (("low", means["mean"].idxmin()), ("high", means["mean"].idxmax())):
            rows = means.obj.loc[place].set_index("cell")
            own[f"wording_{end}"], own[f"{end}est_wording"] = own.index.map(rows["mean"]), own.index.map(rows[AXIS])
        found.append(own.astype({"wording_sd": float, "wording_low": float, "wording_high": float}))
    told = pd.concat(found, ignore_index=True)
    beside = [name for name in told if "wording" in str(name)]
    others = [name for name in told if name not in beside]
    place = others.index("ci_high") + 1
    return told.reindex(columns=[*others[:place], *beside, *others[place:]])


def means_of_wordings(result: Result, metric: str) -> pd.DataFrame:
    """The mean of every wording in every cell that all have, over the examples that count in all: a row each."""
    axes, table = list(result.axes[1:]), _shared_cells(result)
    keys = [table[name] for name in ("example", *axes)]
    whole = table[metric].notna().groupby(keys, observed=True).transform("sum") == _n_wordings(result)
    return table[whole].groupby([AXIS, *axes], sort=False, observed=True)[metric].mean().reset_index(name="mean")


def findings(result: Result, over: Result | None) -> tuple[str, ...]:
    """How many examples count in all wordings, and how far the wordings lie apart in the first metric."""
    return (*_over(result, over), *(f"Wording {_short(each)}: {why}." for each, why in _left_out(result).items()))


def wordings_of(result: Result) -> list[str]:
    """The wordings that are compared, without those that are left out."""
    gone = _left_out(result)
    return [each for each in result.cells[AXIS].drop_duplicates() if each not in gone]


def _over(result: Result, over: Result | None) -> tuple[str, ...]:
    n, table, metric = _n_wordings(result), result.table, result.metrics[0]
    if n == 1:
        return (f"One wording has a result, {_short(wordings_of(result)[0])}; nothing is said over wordings.",)
    n_all = table["example"].nunique()
    if over is None:
        return (f"{n} wordings, {n_all} examples. No cell exists in all wordings, so they cannot be compared.",)
    found = spread(result, over)
    rows = found[(found["metric"] == metric.name) & found["wording_sd"].notna()]
    n_whole = int(over.table.loc[over.table[metric.name].notna(), "example"].nunique())
    left = "" if n_whole == n_all else f"; {n_all - n_whole} others lack a value in some wording and are excluded"
    told = [f"{n} wordings; numbers over them are of the {n_whole} examples that have a value in each{left}."]
    n_cells = result.cells[list(over.axes)].drop_duplicates().shape[0]
    if n_cells > len(over.cells):
        told.append(f"{n_cells - len(over.cells)} of {n_cells} cells do not exist in all wordings and are excluded.")
    if rows.empty:
        return (*told, f"No cell has {metric.name} of the same example in all wordings.")
    widest = rows.loc[rows["wording_sd"].idxmax()]
    ends = [f"{widest[f'wording_{end}']:.3f} ({_short(widest[f'{end}est_wording'])})" for end in ("low", "high")]
    interval = "" if np.isnan(widest["ci_low"]) else f" (interval over examples {_span(widest)})"
    told.append(
        f"Largest standard deviation of {metric.name} over wordings in any cell: "
        f"{widest['wording_sd']:.3f}, from {ends[0]} to {ends[1]}, mean {widest['mean']:.3f}{interval}; in the median "
        f"cell {rows['wording_sd'].median():.3f}."
    )
    width, reach = rows["ci_high"] - rows["ci_low"], rows["wording_high"] - rows["wording_low"]
    n_wider, n_known = int((reach > width).sum()), int(width.notna().sum())
    if n_known:
        told.append(
            f"In {n_wider} of {n_known} cells the range over wordings exceeds the width of the interval over examples."
        )
    return tuple(told)


def _short(wording: str) -> str:
    return repr(wording if len(wording) <= WORDS else f"{wording[: WORDS - 3]}...")


def _span(row: pd.Series) -> str:
    return f"{row['ci_low']:.3f} to {row['ci_high']:.3f}"


def _n_wordings(result: Result) -> int:
    return len(wordings_of(result))


def _left_out(result: Result) -> dict[str, str]:
    """Wordings that are left out, each with the reason."""
    if "skipped" not in result.table:
        return {}
    rows = result.table[result.table["skipped"].str.startswith(LEFT_OUT)].drop_duplicates(AXIS)
    return dict(zip(rows[AXIS], rows["skipped"], strict=True))


def _shared_cells(result: Result) -> pd.DataFrame:
    """The rows of the cells that every wording has."""
    axes = list(result.axes[1:])
    kept = wordings_of(result)
    cells, table = (each[each[AXIS].isin(kept)] for each in (result.cells, result.table))
    counts = cells.groupby(axes, sort=False, observed=True)[AXIS].nunique()
    shared = counts[counts == len(kept)].reset_index()[axes]
    return table.merge(shared, how="inner", on=axes)
