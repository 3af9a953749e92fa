"""Figures of sinks, drawn from the result alone: their share by layer, and where they are in some pictures."""

import html
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.results import figures
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.overlays import VEIL
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["drawn", "sink_maps"]

MARKS = {"V": ("square-open", COLOURS[0]), "L": ("circle-open", COLOURS[1]), "both": ("diamond-open", COLOURS[2])}
"""How a patch with a sink is marked, by its label."""


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Shares by layer, and maps of pictures where there are any.

    Args:
        result: that of `find_sinks`.
    """
    found = {
        "sinks_by_layer": figures.lines(result, x="layer", colour="kind", metric="sinks"),
        "attention_on_sinks": figures.lines(result, x="layer", colour="kind", metric="attention"),
    }
    if result.provenance.get("pages"):
        found["sink_maps"] = sink_maps(result)
    return found


def sink_maps(result: Result, *, title: str | None = None) -> "go.Figure":
    """Pictures under the number of layers in which each patch is a sink of the decoder; labelled patches are marked.

    Args:
        result: that of `find_sinks`.
        title: in place of the usual one.

    Raises:
        UsageError: the result holds no pictures.
    """
    from plotly.subplots import make_subplots

    pages = result.provenance.get("pages")
    if not pages:
        raise UsageError(f"{result.name} holds no images; this model's image tokens are not patches")
    titles = [html.escape(page["title"], quote=False) for page in pages]
    figure = make_subplots(1, len(pages), subplot_titles=titles, horizontal_spacing=0.03)
    named: set[str] = set()
    for number, page in enumerate(pages):
        for trace in _traces(page, result.table["layer"].nunique(), named):
            figure.add_trace(trace, row=1, col=number + 1)
        _under(figure, page, number)
    heading = title or "Sinks: layers in which the rule labels a patch; marked: verified"
    figure.update_layout(
        template="plotly_white", plot_bgcolor="rgba(0,0,0,0)", width=300 * len(pages) + 160, height=420,
        title={"text": heading, "x": 0.01, "xanchor": "left"}, meta=drawn_by(sink_maps, title=title),
        font={"family": "Helvetica, Arial, sans-serif", "size": 12},
    )  # fmt: skip
    return figure


def _traces(page: dict[str, Any], n_layers: int, named: set[str]) -> list[Any]:
    """The heatmap of a picture, and a trace of marks for each label that it has."""
    import plotly.graph_objects as go

    (n_rows, n_columns), boxes = page["grid"], page["boxes"]
    across = [box[0] for box in boxes[:n_columns]] + [boxes[n_columns - 1][2]]
    down = [box[1] for box in boxes[::n_columns]] + [boxes[-1][3]]
    values = [page["layers"][row * n_columns : (row + 1) * n_columns] for row in range(n_rows)]
    found: list[Any] = [
        go.Heatmap(
            x=across, y=down, z=values, zmin=0, zmax=n_layers, colorscale=VEIL, xgap=1, ygap=1, showscale=not named,
            hovertemplate="sink in %{z} layers<extra></extra>", colorbar={"title": "layers"},
        )
    ]  # fmt: skip
    named.add("")
    for label, (symbol, colour) in MARKS.items():
        held = [box for box, each in zip(boxes, page["labels"], strict=True) if each == label]
        if held:
            found.append(
                go.Scatter(
                    x=[(box[0] + box[2]) / 2 for box in held], y=[(box[1] + box[3]) / 2 for box in held], name=label,
                    mode="markers", marker={"symbol": symbol, "size": 14, "color": colour, "line": {"width": 3}},
                    showlegend=label not in named, hoverinfo="name", legendgroup=label,
                )
            )  # fmt: skip
            named.add(label)
    return found


def _under(figure: "go.Figure", page: dict[str, Any], number: int) -> None:
    """Puts a picture under its traces, its pixels as axes."""
    axis, (width, height) = "" if number == 0 else str(number + 1), page["picture"]["size"]
    figure.add_layout_image(
        source=page["picture"]["source"], xref=f"x{axis}", yref=f"y{axis}", x=0, y=0, sizex=width, sizey=height,
        sizing="stretch", layer="below",
    )  # fmt: skip
    figure.layout[f"xaxis{axis}"].update(range=[0, width], visible=False, constrain="domain")
    figure.layout[f"yaxis{axis}"].update(range=[height, 0], visible=False, scaleanchor=f"x{axis}", constrain="domain")
