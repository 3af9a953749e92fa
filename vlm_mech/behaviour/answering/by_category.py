"""Accuracy by category, such as the nine visual patterns of MMVP-VLM: its table, its figure, its sentences."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

Cells = Mapping[str, Sequence[Any]]
"""Which values of some axes are told by category."""
COLUMN = "category"
TITLES = {"individual": "images correct", "pair": "both of a pair correct"}
"""What metrics are called over their panels."""


def has_categories(result: Result) -> bool:
    """Whether its examples are of several categories."""
    return COLUMN in result.table and len(set(result.table[COLUMN].dropna()) - {""}) > 1


def by_category(result: Result, metrics: Sequence[str], cells: Cells) -> pd.DataFrame:
    """The summary of some cells within each category: n, mean, 95 % interval and baseline; examples of none left out.

    Args:
        metrics: those of the result that are told; what it does not have is left out.
    """
    table = result.table
    for axis, values in cells.items():
        table = table[table[axis].isin(list(values))]
    known = tuple(each for each in result.metrics if each.name in metrics)
    found = []
    for category, rows in table[table[COLUMN].notna()].groupby(COLUMN, sort=True):
        if category:
            summary = Result(result.name, rows, result.axes, known).summary()
            found.append(summary[summary["n"] > 0].assign(**{COLUMN: category}))
    columns = [COLUMN, *result.axes, "metric", "n", "mean", "ci_low", "ci_high", "baseline"]
    every = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    return every.reindex(columns=columns)


def with_categories(result: Result, options: Mapping[str, Any]) -> Result:
    """The result, what `by_category` gives with these options in its provenance where it has categories."""
    if not has_categories(result):
        return result
    table = by_category(result, **options).astype(object)
    # Of one example there is no interval.
    rows = table.where(table.notna(), None).to_dict("records")
    return dataclasses.replace(result, provenance=result.provenance | {"by_category": rows})


def told_by_category(table: pd.DataFrame, names: Sequence[str], metric: str) -> Iterable[str]:
    """A sentence for each combination of some axes: the metric in each category.

    Args:
        table: what `by_category` gives.
        names: the axes that are named.
    """
    for key, rows in table[table["metric"] == metric].groupby(list(names), sort=False):
        each = [f"{row[COLUMN]} {row['mean']:.3f} ({_interval(row)}n = {row['n']})" for row in rows.to_dict("records")]
        yield f"{', '.join(map(str, key))}, {metric} by category: {'; '.join(each)}."


def _interval(row: Mapping[Any, Any]) -> str:
    """An interval in words; of one example there is none."""
    return "" if pd.isna(row["ci_low"]) else f"{row['ci_low']:.3f} to {row['ci_high']:.3f}, "


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def categories(result: Result, *, metrics: Sequence[str], cells: Cells, named: Sequence[str]) -> "go.Figure":
    """Dots with intervals, a row a category and a panel a metric, coloured by some axes; chance dotted.

    Args:
        named: the axes whose values name a colour.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    table = by_category(result, metrics, cells)
    table = table.assign(label=[", ".join(map(str, each)) for each in table[list(named)].to_numpy()])
    shown, labels = list(dict.fromkeys(table["metric"])), list(dict.fromkeys(table["label"]))
    rows = list(dict.fromkeys(table[COLUMN]))
    titles = [TITLES.get(metric, metric) for metric in shown]
    figure = make_subplots(cols=len(shown), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    step = 0.7 / len(labels)
    for column, metric in enumerate(shown, 1):
        for number, label in enumerate(labels):
            some = table[(table["metric"] == metric) & (table["label"] == label)]
            error = {"type": "data", "array": some["ci_high"] - some["mean"], "thickness": 1.5, "width": 3}
            places = [rows.index(each) + (number - (len(labels) - 1) / 2) * step for each in some[COLUMN]]
            trace = go.Scatter(
                x=some["mean"], y=places, mode="markers", name=label, legendgroup=label, showlegend=column == 1,
                error_x=error | {"arrayminus": some["mean"] - some["ci_low"]}, customdata=some[[COLUMN, "n"]],
                marker={"color": COLOURS[number % len(COLOURS)], "size": 8},
                hovertemplate="%{customdata[0]}: %{x:.3f}, n = %{customdata[1]}",
            )  # fmt: skip
            figure.add_trace(trace, row=1, col=column)
        # Categories may have unlike numbers of options: each has its own chance.
        chances = table[table["metric"] == metric][[COLUMN, "baseline"]].drop_duplicates()
        for category, chance in chances.to_numpy().tolist():
            ends = {"y0": rows.index(category) - 0.5, "y1": rows.index(category) + 0.5}
            line = {"dash": "dot", "color": "#888888"}
            figure.add_shape(type="line", x0=chance, x1=chance, **ends, line=line, row=1, col=column)
    sizes = table.groupby(COLUMN)["n"].agg(["min", "max"])
    names = [f"{each} (n = {_span(*sizes.loc[each])})" for each in rows]
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=names, range=[len(rows) - 0.5, -0.5], automargin=True)
    figure.update_xaxes(range=[-0.04, 1.04], title_text="share")
    recipe = {"metrics": list(metrics), "cells": {axis: list(each) for axis, each in cells.items()}}
    return figure.update_layout(
        template="plotly_white", width=560 + 240 * len(shown), height=220 + len(rows) * max(26, 14 * len(labels)),
        title={"text": "accuracy by category (bars: 95 % interval; dotted: chance)", "x": 0.01},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13}, margin={"t": 90, "b": 70},
        meta=drawn_by(categories, **recipe, named=list(named)),
    )  # fmt: skip
