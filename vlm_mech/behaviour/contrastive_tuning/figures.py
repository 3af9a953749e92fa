"""Figures of a tuning of a contrastive model, drawn from a saved `Result` alone."""

import html
import textwrap
from typing import TYPE_CHECKING

from vlm_mech.behaviour.contrastive_tuning.data import NONE, READER
from vlm_mech.results.figures import COLOURS, drawn_by, ending
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

GREY = "#888888"
LEFT, PANEL = 240, 220
"""Pixels left of the panels, and of a panel."""
TITLE, CAPTION = 35, 5.4
"""Signs in the title of a panel, and pixels of a sign of the caption."""


def before_after(result: Result, *, metric: str, title: str) -> "go.Figure":
    """A panel a data set, a row a tuning: hollow before, filled after with its interval; chance and VLM as lines."""
    from plotly.subplots import make_subplots

    rows = result.summary(metric)
    rows = rows[rows["n"] > 0]
    data = list(rows["data"].drop_duplicates())
    names = [name for name in rows["tuning"].drop_duplicates() if name not in (NONE, READER)]
    figure = make_subplots(
        cols=len(data), shared_yaxes=True, horizontal_spacing=0.04 / len(data),
        subplot_titles=[html.escape(ending(name, TITLE), quote=False) for name in data],
    )  # fmt: skip
    for shown, name in zip(figure.layout.annotations, data, strict=True):
        shown.update(font={"size": 12}, hovertext=html.escape(name))
    for column, name in enumerate(data, 1):
        _panel(figure, rows[rows["data"] == name].set_index("tuning"), names, column)
    figure.update_xaxes(range=[-0.04, 1.04], tickvals=[0, 0.5, 1], zeroline=False)
    ticks = {"tickvals": list(range(len(names))), "ticktext": [html.escape(name, quote=False) for name in names]}
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], zeroline=False, **ticks)
    told = result.metric(metric)
    n = sorted(set(rows["n"]))
    count = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    note = f"{told.description} ({told.unit}); {count} pairs per data set; bars, band: 95 % interval over pairs"
    # The title must end left of plotly's tools.
    width = max(720, LEFT + 30 + PANEL * len(data))
    lines = textwrap.wrap(note, int((width - 40) / CAPTION))
    below = 75 + 15 * len(lines)
    height = 110 + 30 * len(names) + below
    figure.add_annotation(
        text="<br>".join(html.escape(line, quote=False) for line in lines), xref="paper", yref="paper", x=0, y=0,
        xshift=20 - LEFT, yshift=-65, showarrow=False, xanchor="left", yanchor="top", align="left",
        font={"size": 11}, name="caption",
    )  # fmt: skip
    return figure.update_layout(
        template="plotly_white", width=width, height=height,
        margin={"l": LEFT, "r": 30, "t": 80, "b": below}, font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        title={"text": html.escape(title), "x": 0.01, "xanchor": "left", "y": 1 - 12 / height, "yanchor": "top"},
        legend={
            "orientation": "h", "yref": "container", "y": (below - 60) / height, "yanchor": "bottom", "x": 0,
            "xanchor": "left",
        },
        meta=drawn_by(before_after, metric=metric, title=title),
    )  # fmt: skip


def _panel(figure: "go.Figure", rows: "pd.DataFrame", names: list[str], column: int) -> None:
    import plotly.graph_objects as go

    before, reader = rows.loc[NONE], rows.loc[READER]
    chance = float(before["baseline"])
    y = list(range(len(names)))
    steps = [value for row in y for value in (row, row, None)]
    shifts = [value for name in names for value in (before["mean"], rows.at[name, "mean"], None)]
    held = rows.loc[names]
    errors = {
        "type": "data", "symmetric": False, "thickness": 1.5, "width": 3,
        "array": held["ci_high"] - held["mean"], "arrayminus": held["mean"] - held["ci_low"],
    }  # fmt: skip
    edges = [-0.5, len(names) - 0.5]
    low, high = reader["ci_low"], reader["ci_high"]
    shown = {"showlegend": column == 1}
    for trace in (
        go.Scatter(x=[chance] * 2, y=edges, mode="lines", name="chance", line={"color": GREY, "dash": "dot"}),
        go.Scatter(x=[reader["mean"]] * 2, y=edges, mode="lines", name="VLM", line={"color": COLOURS[1]}),
        go.Scatter(x=shifts, y=steps, mode="lines", name="shift", line={"color": GREY, "width": 1}, hoverinfo="skip"),
        go.Scatter(
            x=[before["mean"]] * len(names), y=y, mode="markers", name="before",
            marker={"symbol": "circle-open", "color": COLOURS[0], "size": 9},
        ),
        go.Scatter(
            x=held["mean"], y=y, mode="markers", name="after fine-tuning", marker={"color": COLOURS[0], "size": 9},
            error_x=errors,
        ),
    ):  # fmt: skip
        visible = shown if trace.name != "shift" else {"showlegend": False}
        figure.add_trace(trace.update(legendgroup=trace.name, **visible), row=1, col=column)
    # A band needs a panel that is not empty any more.
    figure.add_vrect(
        x0=low, x1=high, fillcolor=COLOURS[1], opacity=0.15, line_width=0, layer="below", col=column, row=1
    )  # pyright: ignore


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Pairs and single pictures, before and after."""
    return {
        "pair": before_after(result, metric="pair", title="both images of a pair, before and after fine-tuning"),
        "individual": before_after(result, metric="individual", title="single images, before and after fine-tuning"),
    }
