"""Figures of a horizon, drawn from its `Result` alone."""

import html
from typing import TYPE_CHECKING, Any

from vlm_mech.methods.horizon.data import FROZEN, HALF, OTHER, REMOVED, TEXT, source_of
from vlm_mech.methods.horizon.study import KL, PROB, SAID
from vlm_mech.results import figures
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["curves", "drawn"]

MOST_SOURCES = 3
"""Of more exchanged sources a heatmap is drawn in the place of a figure each."""
SHOWN = (SAID, PROB, KL)
FLOORS = {REMOVED: ("never seen", "#888888"), OTHER: ("other picture", "#555555")}


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Three curves over depth for each arm; of many exchanged sources two heatmaps."""
    arms = list(result.table["arm"].drop_duplicates())
    sources = [arm for arm in arms if source_of(arm) is not None]
    found = {arm: curves(result, arm=arm) for arm in (REMOVED, FROZEN)}
    if len(sources) <= MOST_SOURCES:
        return found | {f"exchanged_{source_of(arm)}": curves(result, arm=arm) for arm in sources}
    for metric in (KL, SAID):
        title = f"{result.name}: {metric.name} ({metric.unit}), image states of one layer at the input of another"
        found[f"exchanged_{metric.name}"] = figures.heatmap(
            result, x="layer", y="arm", metric=metric.name, where={"arm": sources}, title=title
        )
    return found


def curves(result: Result, *, arm: str) -> "go.Figure":
    """Accuracy, probability and divergence of an arm over depth with 95 % bands, floors, and the horizon.

    The removal of the image has its two controls next to it. The horizon is a line with its interval as a strip behind
    it: that of the selection half of the examples.

    Args:
        arm: of the result.
    """
    from plotly.subplots import make_subplots

    names = [f"{metric.name} ({metric.unit})" for metric in SHOWN]
    figure = make_subplots(cols=len(SHOWN), subplot_titles=names, horizontal_spacing=0.07)
    lines = [arm, *((HALF, TEXT) if arm == REMOVED else ())]
    counts = []
    for column, metric in enumerate(SHOWN, 1):
        summary = result.summary(metric.name)
        counts.append(int(summary["n"].max()))
        for number, one in enumerate(lines):
            rows = summary[summary["arm"] == one].sort_values("layer")
            for trace in _band(rows, one, COLOURS[number], shown=column == 1):
                figure.add_trace(trace, row=1, col=column)
        ends = [int(summary["layer"].min()), int(summary["layer"].max())]
        for floor, (name, colour) in FLOORS.items():
            at = summary[(summary["arm"] == floor) & (summary["layer"] == 0)]
            if len(at):
                line = _level(ends, float(at["mean"].iloc[0]), name, colour, shown=column == 1)
                figure.add_trace(line, row=1, col=column)
    known = {row["arm"]: row for row in result.provenance.get("horizons", [])}
    text = "bands: 95 % interval of the mean over examples; dashed: floors"
    if arm in known:
        text += f"; {_mark(figure, known[arm])}"
    axis = "first layer" if source_of(arm) is None else "layer"
    figure.update_xaxes(title_text=axis, dtick=1 if int(result.table["layer"].max()) <= 40 else None)
    figure.add_annotation(
        text=f"n = {max(counts)}; {text}", xref="paper", yref="paper", x=0, y=0, yshift=-104, showarrow=False,
        xanchor="left", font={"size": 11}, name="caption",
    )  # fmt: skip
    source = source_of(arm)
    does = f"{arm} from each layer on"
    if source is not None:
        does = f"image states of the input of layer {source} at that of each layer"
    title = html.escape(f"{result.name}: {does}", quote=False)
    return figure.update_layout(
        template="plotly_white", width=1080, height=490, margin={"l": 50, "r": 20, "t": 90, "b": 130},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        title={"text": title, "x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top", "font": {"size": 17}},
        meta=drawn_by(curves, arm=arm),
    )  # fmt: skip


def _band(rows: "pd.DataFrame", name: str, colour: str, *, shown: bool) -> list[Any]:
    import plotly.graph_objects as go

    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    held = rows.dropna(subset=["ci_low", "ci_high"])
    band = go.Scatter(
        x=[*held["layer"], *held["layer"][::-1]], y=[*held["ci_high"], *held["ci_low"][::-1]], mode="lines",
        fill="toself", fillcolor=f"rgba({red},{green},{blue},0.18)", line={"width": 0}, hoverinfo="skip",
        legendgroup=name, showlegend=False,
    )  # fmt: skip
    line = go.Scatter(
        x=rows["layer"], y=rows["mean"], mode="lines+markers", name=name, line={"color": colour, "width": 2.5},
        customdata=rows[["ci_low", "ci_high", "n"]].to_numpy(), legendgroup=name, showlegend=shown,
        hovertemplate="layer %{x}: %{y:.3g} (%{customdata[0]:.3g} to %{customdata[1]:.3g}, n = %{customdata[2]})",
    )  # fmt: skip
    return [band, line]


def _level(ends: list[int], value: float, name: str, colour: str, *, shown: bool) -> "go.Scatter":
    import plotly.graph_objects as go

    return go.Scatter(
        x=ends, y=[value, value], mode="lines", name=name, line={"color": colour, "width": 1.5, "dash": "dash"},
        legendgroup=name, showlegend=shown, hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
    )  # fmt: skip


def _mark(figure: "go.Figure", horizon: dict[str, Any]) -> str:
    """Draws the horizon in each panel and says what was drawn; what is no layer is told in words alone."""
    end = horizon.get("none")
    if end is not None and horizon["declared"] == end:
        return "the selection half has no horizon"  # a result of an earlier version, where this stood for none
    low, high, declared = horizon["low"], horizon["high"], horizon["declared"]
    if low == "":
        return horizon["horizon"]
    if isinstance(declared, int):
        figure.add_vline(x=declared, line_color="#444444", line_width=1.5)
        said = "vertical: horizon on the selection half of the examples; strip: its 95 % interval"
    else:
        said = f"horizon on the selection half of the examples: {declared}"
    if isinstance(low, int):
        strip = {"line_width": 0, "fillcolor": "#888888", "opacity": 0.15, "layer": "below"}
        shut = isinstance(high, int) and high != end
        last = max(max(trace.x) for trace in figure.data if trace.x is not None and len(trace.x))
        figure.add_vrect(x0=low - 0.1, x1=high + 0.1 if shut else last + 0.1, **strip)
        said += "" if isinstance(declared, int) else ", strip: its 95 % interval"
        said += "" if shut else f", from {low} to none"
    return said
