"""The figures of a map: decodable, used, must flow and preferred over depth with the layers named; single examples."""

import html
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.methods.layer_swap.study import compared_by
from vlm_mech.methods.visual_flow.claims import READ, SUPPRESS, FlowClaims
from vlm_mech.methods.visual_flow.data import LAST, edges, spans
from vlm_mech.methods.visual_flow.example_pages import example_pages
from vlm_mech.methods.visual_flow.named_figure import named_figure
from vlm_mech.methods.visual_flow.study import (
    CONTROL,
    INPUT,
    KNOCKOUT,
    LENS,
    PROBE,
    SHUFFLED,
    SWAP,
    difference_of,
    said_in,
)
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

READING, SUPPRESSING, GREY = "#009E73", "#D55E00", "#888888"
STREAMS = {"vision": "vision tower", "projector": "projector", "llm": "language model"}
ROWS = {
    "decodable (probe)": "probability",
    "used (patching)": "recovered fraction",
    "needed (knockout)": "change of {what}<br>difference ({unit})",
    "preferred (lens)": "lead over the<br>rival ({unit})",
}
MOST_TICKS = 40
Place = tuple[str, int]


def drawn(result: Result) -> "dict[str, go.Figure]":
    """The map, and the page of single examples and what lenses name where the result holds any."""
    found = {"flow_map": flow_map(result)}
    found |= {"examples": example_pages(result)} if result.provenance.get("pages") else {}
    return found | ({"named_patches": named_figure(result)} if result.provenance.get("named") else {})


def flow_map(result: Result, *, title: str | None = None) -> "go.Figure":
    """Four rows over the depth of the model, with 95 % bands; layers that are claimed to read or suppress are marked.

    A swap, probe or lens at layer l is after block l, a cut is in block l.
    """
    from plotly.subplots import make_subplots

    rival = result.provenance.get("rival", "the rival")
    names = list(ROWS) if PROBE in set(result.table["method"]) else list(ROWS)[1:]
    figure = make_subplots(len(names), 1, shared_xaxes=True, vertical_spacing=0.045)
    summary, places = result.summary(), _places(result)
    at = {place: number for number, place in enumerate(places)}
    place = said_in(result)
    drawn = {"decodable (probe)": _probes, "used (patching)": partial(_swaps, place=place)}
    drawn |= {"preferred (lens)": partial(_lead, place=place)}
    drawn["needed (knockout)"] = partial(_cuts, metric=difference_of(result), place=place)
    how = {"what": compared_by(difference_of(result)), "unit": result.metric("lead").unit}
    for number, name in enumerate(names, 1):
        drawn[name](figure, number, summary, at, str(rival))
        title_text = f"<b>{name}</b><br>{ROWS[name].format(**how)}"
        figure.update_yaxes(title_text=title_text, title_font={"size": 12}, row=number, col=1)
    _marked(figure, FlowClaims.of(result.claims), at, len(names))
    _axis(figure, places, len(names))
    height = 165 + 190 * len(names)
    _dressed(figure, result, title, height, names)
    figure.update_layout(meta=drawn_by(flow_map, title=title))
    return figure


def _places(result: Result) -> list[Place]:
    """Every place of the depth in the order of the forward pass."""
    found = result.table[["stream", "layer"]].drop_duplicates()
    places = [(str(stream), int(layer)) for stream, layer in found.to_numpy().tolist()]
    return sorted(places, key=lambda place: (list(STREAMS).index(place[0]), place[1]))


# Rows


def _probes(figure: "go.Figure", row: int, summary: pd.DataFrame, at: dict[Place, int], rival: str) -> None:
    spans = (("object", "object's patches"), ("last", "last token"))
    for (span, name), colour in zip(spans, COLOURS, strict=False):
        for metric, said, dash in (("p_true", "answer", "solid"), ("p_rival", "rival", "dash")):
            rows = _rows(summary, PROBE, span, metric)
            _line(figure, row, rows, at, f"P({said}), {name}", colour, dash=dash)
        control = _rows(summary, SHUFFLED, span, "p_true")
        _line(figure, row, control, at, f"{name}, shuffled labels", colour, dash="dot", thin=True)
    figure.update_yaxes(range=[-0.03, 1.03], row=row, col=1)


def _swaps(
    figure: "go.Figure", row: int, summary: pd.DataFrame, at: dict[Place, int], rival: str, *, place: str
) -> None:
    for span, colour in zip(spans(place), COLOURS, strict=False):
        _line(figure, row, _rows(summary, SWAP, span, "recovered"), at, f"patch {span}", colour)


def _cuts(
    figure: "go.Figure", row: int, summary: pd.DataFrame, at: dict[Place, int], rival: str, *, metric: str, place: str
) -> None:
    for edge, colour in zip(edges(place), COLOURS, strict=False):
        name = html.escape(edge, quote=False)
        _line(figure, row, _rows(summary, KNOCKOUT, edge, metric), at, f"cut {name}", colour, of="effect")
    for edge, colour in zip(edges(place), COLOURS, strict=False):
        control = _rows(summary, CONTROL, edge, metric)
        _line(
            figure, row, control, at, "dotted: equally many<br>random edges", colour, of="effect", dash="dot", thin=True
        )
    figure.add_hline(y=0, line={"color": GREY, "width": 1}, row=row, col=1)


def _lead(
    figure: "go.Figure", row: int, summary: pd.DataFrame, at: dict[Place, int], rival: str, *, place: str
) -> None:
    where = "last" if place == LAST else "last and<br>answer's tokens"
    name = f"lens at {where}: answer<br>minus {html.escape(rival, quote=False)}"
    _line(figure, row, _rows(summary, LENS, place, "lead"), at, name, COLOURS[0])
    figure.add_hline(y=0, line={"color": GREY, "width": 1}, row=row, col=1)


def _rows(summary: pd.DataFrame, method: str, span: str, metric: str) -> pd.DataFrame:
    chosen = (summary["method"] == method) & (summary["span"] == span) & (summary["metric"] == metric)
    return pd.DataFrame(summary[chosen & summary["n"].gt(0)])


def _line(
    figure: "go.Figure",
    row: int,
    rows: pd.DataFrame,
    at: dict[Place, int],
    name: str,
    colour: str,
    *,
    of: str = "mean",
    dash: str = "solid",
    thin: bool = False,
) -> None:
    """One line with its band (thin ones have none), broken where a stream has nothing to show."""
    import plotly.graph_objects as go

    if rows.empty:
        return
    rows = rows.assign(
        x=[at[str(stream), int(layer)] for stream, layer in zip(rows["stream"], rows["layer"], strict=True)]
    )
    rows = rows.sort_values("x")
    low, high = ("ci_low", "ci_high") if of == "mean" else ("effect_low", "effect_high")
    legend = {"legend": "legend" if row == 1 else f"legend{row}", "legendgroup": f"{row} {name}"}
    if not thin:
        held = rows.dropna(subset=[low, high])
        red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
        band = go.Scatter(
            x=[*held["x"], *held["x"][::-1]], y=[*held[high], *held[low][::-1]], mode="lines", fill="toself",
            fillcolor=f"rgba({red},{green},{blue},0.16)", line={"width": 0}, hoverinfo="skip", showlegend=False,
            **legend,
        )  # fmt: skip
        figure.add_trace(band, row=row, col=1)
    known = any(trace.legendgroup == legend["legendgroup"] and trace.showlegend is not False for trace in figure.data)
    hover = [
        f"{_place(str(each['stream']), int(each['layer']))}<br>{name}: {each[of]:.3f}"
        f" ({each[low]:.3f} to {each[high]:.3f})"
        f"<br>n {each['n']}, baseline {each['baseline']:.3f}, corrected p {each['p_corrected']:.2g}"
        for _, each in rows.iterrows()
    ]
    line = go.Scatter(
        x=rows["x"], y=rows[of], mode="lines" if thin else "lines+markers", name=name, text=hover,
        line={"color": colour, "dash": dash, "width": 1 if thin else 2.2}, marker={"size": 5},
        hovertemplate="%{text}<extra></extra>", showlegend=not known, **legend,
    )  # fmt: skip
    figure.add_trace(line, row=row, col=1)


def _place(stream: str, layer: int) -> str:
    if (stream, layer) == ("llm", INPUT):
        return "the decoder's input"
    return STREAMS[stream] if stream == "projector" else f"{STREAMS[stream]}, layer {layer}"


# Marks and axes


def _marked(figure: "go.Figure", said: FlowClaims, at: dict[Place, int], n_rows: int) -> None:
    """Bands over all rows for the layers that are claimed, ticks above them: bold where a claim passed its gates."""
    for kind, colour, word, shift in ((READ, READING, "read", 16), (SUPPRESS, SUPPRESSING, "suppress", 2)):
        claims = [claim for claim in said.made if claim.kind == kind]
        for claim in claims:
            x, text = at["llm", claim.about["layer"]], word if len(claims) <= 3 else "▾"
            figure.add_annotation(
                x=x, y=1, xref="x", yref="paper", yanchor="bottom", yshift=shift, showarrow=False,
                text=text if claim.lost else f"<b>{text}</b>", font={"color": colour, "size": 11},
            )  # fmt: skip
            band = {"x0": x - 0.5, "x1": x + 0.5, "fillcolor": colour, "opacity": 0.13, "line_width": 0}
            for row in range(1, n_rows + 1):
                figure.add_vrect(**band, layer="below", row=row, col=1)
    if said.overtaken is not None:
        line = {"color": SUPPRESSING, "width": 1.5, "dash": "dash"}
        words = {"annotation_text": "rival leads", "annotation_font": {"size": 10, "color": SUPPRESSING}}
        figure.add_vline(
            x=at["llm", said.overtaken], line=line, row=n_rows, col=1, annotation_position="top right", **words
        )


def _axis(figure: "go.Figure", places: list[Place], n_rows: int) -> None:
    step = max(1, -(-len(places) // MOST_TICKS))
    shown = [number for number, (_, layer) in enumerate(places) if layer < 1 or layer % step == 0]
    labels = ["" if places[number][0] == "projector" else str(places[number][1]) for number in shown]
    labels = ["in" if places[number] == ("llm", INPUT) else label for number, label in zip(shown, labels, strict=True)]
    figure.update_xaxes(tickvals=shown, ticktext=labels, range=[-0.6, len(places) - 0.4], showticklabels=True)
    for number in range(1, len(places)):
        if places[number][0] != places[number - 1][0]:
            for row in range(1, n_rows + 1):
                figure.add_vline(x=number - 0.5, line={"color": "#bbbbbb", "width": 1}, row=row, col=1)
    for stream, name in STREAMS.items():
        numbers = [number for number, place in enumerate(places) if place[0] == stream]
        if numbers:
            figure.add_annotation(
                x=sum(numbers) / len(numbers), y=0, xref="x", yref="paper", yshift=-38, text=name, showarrow=False,
                font={"size": 11, "color": "#555555"},
            )  # fmt: skip


def _dressed(figure: "go.Figure", result: Result, title: str | None, height: int, names: list[str]) -> None:
    n = result.table["example"].nunique()
    about = result.provenance.get("model", {})
    model = about.get("name", "") if isinstance(about, dict) else str(about)
    words = title or f"from image to answer: {model}"
    note = (
        f"n = {n} examples; bands: 95 % interval over examples. Probe, patching, lens: after a block; knockout: in "
        "it; in: the decoder's input.<br>Shaded: layers claimed to read (green) and to suppress (orange), tested on "
        "held-out examples; bold: passes all gates;<br>dashed: from here on the rival is claimed to lead."
    )
    figure.add_annotation(
        text=note, xref="paper", yref="paper", x=0, y=0, yshift=-98, xanchor="left", align="left", showarrow=False,
        font={"size": 11}, name="caption",
    )  # fmt: skip
    figure.update_layout(
        template="plotly_white", width=1060, height=height, margin={"l": 95, "r": 215, "t": 80, "b": 130},
        title={"text": html.escape(words, quote=False), "x": 0.01, "xanchor": "left", "y": 0.985, "yanchor": "top"},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12},
    )  # fmt: skip
    for row in range(1, len(names) + 1):
        domain = figure.layout["yaxis" if row == 1 else f"yaxis{row}"]["domain"]
        place = {"x": 1.01, "y": domain[1], "xanchor": "left", "yanchor": "top", "font": {"size": 10.5}}
        figure.update_layout({"legend" if row == 1 else f"legend{row}": place | {"tracegroupgap": 0}})
