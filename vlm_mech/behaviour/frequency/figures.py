"""Figures of counts of classes, drawn from a saved `Result` alone."""

import html
from typing import TYPE_CHECKING

from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """The classes by their counts."""
    return {"counts": ranked(result, title="texts that mention a class")}


def ranked(result: Result, *, title: str) -> "go.Figure":
    """A dot a class from the most to the least frequent, on a logarithmic scale of 1 + count."""
    import plotly.graph_objects as go

    counts = result.table.groupby("example", sort=False)["count"].sum().sort_values(ascending=False, kind="stable")
    told = [f"{html.escape(str(name))}: {int(count)}" for name, count in counts.items()]
    dots = go.Scatter(
        x=list(range(1, len(counts) + 1)), y=[1 + float(count) for count in counts], mode="markers",
        marker={"color": COLOURS[0], "size": 6}, text=told, hoverinfo="text",
    )  # fmt: skip
    figure = go.Figure(dots)
    figure.update_xaxes(title="class, by rank")
    figure.update_yaxes(title="1 + number of texts", type="log")
    return figure.update_layout(
        template="plotly_white", width=720, height=420,
        title={"text": html.escape(title), "x": 0.02, "xanchor": "left"},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13}, meta=drawn_by(ranked, title=title),
    )  # fmt: skip
