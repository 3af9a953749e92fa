"""Figures of a page about facts, drawn from its result alone: where each method reads, and all lines by layer."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.methods.facts.data import ATTRIBUTION, HEADS, KNOCKOUT, LATE, LENS, PATHS, SWAP, TUNED
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["curves", "drawn", "reading"]

TITLES = {
    KNOCKOUT: "knockout: windows of 5 layers around",
    SWAP: "patching: states of the other text after",
    HEADS: "heads: last<-subject cut at",
    ATTRIBUTION: "attribution patching: heads' outputs",
    LENS: "lens: change across",
    PATHS: "paths: from a head to the end",
    TUNED: "tuned lens: change across",
}
LEGENDS = {SWAP: ("middle", 0.5), LENS: ("top", 0.98), TUNED: ("top", 0.98)}
"""Where in its panel the legend of a part stands, if not at the bottom: lines leave room there."""
LINES = ("all heads", "step")
"""Lines without a head that are drawn as bars."""


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Both figures."""
    return {"reading": reading(result), "curves": curves(result)}


def reading(result: Result) -> "go.Figure":
    """The layer that each method names, with the range of resamples, and the layers that all have in common.

    Args:
        result: of a page.
    """
    import plotly.graph_objects as go

    rows = result.provenance["reading"]
    names = [f"{row['method']}<br><sup>{row['what']}</sup>" for row in rows]
    figure = go.Figure()
    for number, row in enumerate(rows):
        if row["layer"] is None:
            figure.add_annotation(x=0.5, xref="paper", y=names[number], text="no claim", showarrow=False)
            continue
        spans = {"array": [row["high"] - row["layer"]], "arrayminus": [row["layer"] - row["low"]]}
        told = f"claimed layers {row['claimed layers']}, heads {row['claimed heads']}"
        figure.add_scatter(
            x=[row["layer"]], y=[names[number]], mode="markers", showlegend=False, hovertext=[told],
            marker={"size": 13, "color": COLOURS[0]}, error_x={"symmetric": False, "thickness": 3, **spans},
        )  # fmt: skip
    for layer in result.provenance["agreed"]:
        figure.add_vrect(x0=layer - 0.5, x1=layer + 0.5, fillcolor=COLOURS[2], opacity=0.25, line_width=0)
    n_layers = int(result.provenance["n_layers"])
    figure.add_vrect(
        x0=LATE * n_layers - 0.5, x1=n_layers - 0.5, fillcolor="#888888", opacity=0.08, line_width=0, layer="below",
        annotation_text="upper half: expected", annotation_position="bottom left",
    )  # fmt: skip
    figure.update_xaxes(title_text="layer", range=[-0.7, n_layers - 0.3], dtick=max(1, n_layers // 10))
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    title = f"Where the last token reads the answer: layer and 95 % bootstrap interval (n = {_n(result)} pairs)"
    return _laid_out(figure, title, drawn_by(reading), height=130 + 62 * len(rows), left=330)


def curves(result: Result) -> "go.Figure":
    """Changes of the answer's lead by layer, a panel a part; means with 95 % intervals, of single heads the means.

    Args:
        result: of a page.
    """
    from plotly.subplots import make_subplots

    summary = result.summary("change")
    summary = summary[summary["n"] > 0]
    parts = [part for part in TITLES if part in set(summary["part"])]
    n_rows = -(-len(parts) // 2)
    titles = [TITLES[part] for part in parts]
    figure = make_subplots(n_rows, 2, subplot_titles=titles, horizontal_spacing=0.09, vertical_spacing=0.29 / n_rows)
    for at, part in enumerate(parts):
        where: dict[str, Any] = {"row": at // 2 + 1, "col": at % 2 + 1}
        some = summary[summary["part"] == part]
        for number, line in enumerate(some["line"].drop_duplicates()):
            rows = some[some["line"] == line].sort_values(["layer", "head"])
            for trace in _traces(rows, str(line), COLOURS[number % len(COLOURS)]):
                trace.legend = f"legend{at + 1}" if at else "legend"
                figure.add_trace(trace, **where)
        left = figure.layout[f"xaxis{at + 1}" if at else "xaxis"].domain[0]
        low, high = figure.layout[f"yaxis{at + 1}" if at else "yaxis"].domain
        anchor, share = LEGENDS.get(part, ("bottom", 0.02))
        legend = {"x": left + 0.005, "y": low + share * (high - low), "yanchor": anchor, "font": {"size": 10}}
        figure.update_layout({f"legend{at + 1}" if at else "legend": legend | {"bgcolor": "rgba(255,255,255,0.7)"}})
        figure.update_xaxes(title_text="layer", range=[-0.7, result.provenance["n_layers"] - 0.3], **where)
        figure.update_yaxes(title_text="logits", **where)
    title = f"Change of the answer's lead over the other subject's answer (n = {_n(result)} pairs)"
    return _laid_out(figure, title, drawn_by(curves), height=90 + 320 * n_rows)


def _traces(rows: pd.DataFrame, line: str, colour: str) -> "list[go.Scatter | go.Bar]":
    import plotly.graph_objects as go

    shown: dict[str, Any] = {"x": rows["layer"], "y": rows["mean"], "name": line}
    if max(rows["head"]) >= 0:
        text = [f"head {head}" for head in rows["head"]]
        return [go.Scatter(**shown, mode="markers", hovertext=text, marker={"size": 5, "color": colour})]
    if line in LINES:
        return [go.Bar(**shown, marker={"color": colour, "opacity": 0.6})]
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    ends = {"x": [*rows["layer"], *rows["layer"][::-1]], "y": [*rows["ci_high"], *rows["ci_low"][::-1]]}
    band = go.Scatter(
        **ends, fill="toself", fillcolor=f"rgba({red},{green},{blue},0.2)", mode="none", showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip
    return [band, go.Scatter(**shown, mode="lines", line={"color": colour})]


def _n(result: Result) -> int:
    return int(result.table["example"].nunique())


def _laid_out(figure: "go.Figure", title: str, meta: dict[str, Any], *, height: int, left: int = 90) -> "go.Figure":
    figure.update_layout(
        template="plotly_white", title={"text": title, "x": 0.01, "font": {"size": 17}}, width=1100, height=height,
        font={"family": "Helvetica, Arial, sans-serif", "size": 13}, margin={"l": left, "r": 30, "t": 80, "b": 60},
        meta=meta,
    )  # fmt: skip
    return figure
