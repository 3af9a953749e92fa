"""Figures of an attribution, drawn from its re-checked `Result` alone."""

import html
from typing import TYPE_CHECKING, Any

from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["drawn", "estimate_against_effect"]

LEGENDS = {
    "top": "largest estimates",
    "random": "random sample of the rest",
    "top of half": "largest estimates on half of the pairs",
}


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """What was estimated beside what patching found; `result` is what an `Attribution` has `checked`."""
    return {"estimate_against_effect": estimate_against_effect(result)}


def estimate_against_effect(checked: Result, *, title: str | None = None) -> "go.Figure":
    """Each re-checked cell: the estimate across, the true effect with its 95 % interval up; a panel a direction.

    Cells on the diagonal are estimated rightly; those off it show where a first-order estimate fails.

    Args:
        checked: of an `Attribution`.
    """
    from plotly.subplots import make_subplots

    estimate, effect = (checked.summary(name).set_index(list(checked.axes)) for name in ("estimate", "effect"))
    kinds = checked.table.drop_duplicates(list(checked.axes)).set_index(list(checked.axes))["chosen"]
    directions = list(checked.table["direction"].drop_duplicates())
    unit = html.escape(checked.metric("effect").unit, quote=False)
    figure = make_subplots(
        cols=len(directions), shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=[html.escape(name, quote=False) for name in directions],
    )  # fmt: skip
    ends = [effect["ci_low"].min(), effect["ci_high"].max(), estimate["mean"].min(), estimate["mean"].max()]
    for column, direction in enumerate(directions, 1):
        _diagonal(figure, min(ends), max(ends), column)
        for number, (kind, name) in enumerate(LEGENDS.items()):
            rows = effect.loc[(kinds == kind).reindex(effect.index)]
            rows = rows[rows.index.get_level_values("direction") == direction]
            if rows.empty:
                continue
            dots = _dots(estimate.loc[rows.index], rows, COLOURS[number])
            figure.add_trace(dots.update(name=name, legendgroup=name, showlegend=column == 1), row=1, col=column)
    figure.update_xaxes(title_text=f"estimated change ({unit})", zeroline=False)
    figure.update_yaxes(zeroline=False)
    figure.update_yaxes(title_text=f"true change ({unit})", col=1)
    n = sorted(set(effect["n"]))
    count = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    figure.add_annotation(
        text=f"one dot per cell, mean over {count} pairs; bars: 95 % interval of the true change; line: identity",
        xref="paper", yref="paper", x=0, y=0, yshift=-72, showarrow=False, xanchor="left", font={"size": 11},
        name="caption",
    )  # fmt: skip
    shown = title or "attribution patching: estimated and true change"
    return figure.update_layout(
        template="plotly_white", width=180 + 420 * len(directions), height=520,
        margin={"l": 80, "r": 30, "t": 110, "b": 100}, font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        title={"text": html.escape(shown, quote=False), "x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top"},
        legend={"orientation": "h", "y": 0.91, "yref": "container", "yanchor": "top", "x": 0, "xanchor": "left"},
        meta=drawn_by(estimate_against_effect, title=title),
    )  # fmt: skip


def _diagonal(figure: "go.Figure", low: float, high: float, column: int) -> None:
    import plotly.graph_objects as go

    line = {"color": "#888888", "dash": "dot", "width": 1}
    ends = [low, high]
    figure.add_trace(
        go.Scatter(x=ends, y=ends, mode="lines", line=line, showlegend=False, hoverinfo="skip"), row=1, col=column
    )


def _dots(estimate: "pd.DataFrame", effect: "pd.DataFrame", colour: str) -> "go.Scatter":
    import plotly.graph_objects as go

    names = list(effect.index.names)
    hovers = [
        ", ".join(f"{axis} {html.escape(str(value), quote=False)}" for axis, value in zip(names, place, strict=True))
        for place in effect.index
    ]
    errors: dict[str, Any] = {
        "type": "data", "symmetric": False, "thickness": 1, "width": 2,
        "array": effect["ci_high"] - effect["mean"], "arrayminus": effect["mean"] - effect["ci_low"],
    }  # fmt: skip
    return go.Scatter(
        x=estimate["mean"], y=effect["mean"], error_y=errors, mode="markers", marker={"color": colour, "size": 7},
        customdata=hovers, hovertemplate="%{customdata}<br>estimate %{x:.3g}, effect %{y:.3g}<extra></extra>",
    )  # fmt: skip
