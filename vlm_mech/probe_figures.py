"""Figures of probes, drawn from a saved `Result` alone: depth on one axis, conflict, confusion, a map of patches."""

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.errors import UsageError
from vlm_mech.figures import COLOURS
from vlm_mech.lens_figure import VEIL, lay_out
from vlm_mech.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

DASHES = {"shuffled": "dot", "control task": "dash", "no image": "dashdot", "random weights": "longdash"}
STREAMS = {"vision": "vision tower", "projector": "projector", "llm": "language model"}
WIDTH_A_PLACE, MOST_TICKS = 34, 40


def depth_lines(result: Result, *, probe: str, title: str | None = None) -> "go.Figure":
    """Test accuracy over the whole depth of the model, one line a span with its band, controls dashed, a panel a model.

    Bands are the 95 % bootstrap interval over scenes, of the mean over seeds. The dotted grey line is the commonest
    label. Click a control in the legend to hide or show it.

    Raises:
        UsageError: the result has no such probe.
    """
    summary = _of_probe(result, "accuracy", probe, "test")
    figure, panels, places = _panels(result, summary)
    spans = list(summary["span"].drop_duplicates())
    for column, (_, panel) in enumerate(panels, 1):
        for (control, span), rows in panel.groupby(["control", "span"], sort=False):
            colour = COLOURS[spans.index(span) % len(COLOURS)]
            name = span if control == "none" else f"{span}, {control}"
            style = {"color": colour, "width": 2.5 if control == "none" else 1, "dash": DASHES.get(control, "solid")}
            _line(figure, column, rows, name, style, band=control == "none")
        baseline = panel[panel["control"] == "none"].groupby("place", sort=False)["baseline"].mean()
        _flat(figure, column, baseline, "commonest label")
    figure.update_yaxes(title_text="accuracy (share of test examples)", range=[-0.03, 1.03], col=1)
    n = int(summary["n"].min())
    note = f"n = {n} examples; bands: 95 % bootstrap interval over scenes, of the mean over seeds"
    figure.update_layout(meta=_recipe("depth_lines", probe=probe, title=title))
    return _finished(figure, result, places, title or f"what a {probe} probe reads at every depth", note, len(panels))


def conflict_lines(result: Result, *, probe: str, title: str | None = None) -> "go.Figure":
    """In scenes that show what is unusual: the probe's probability of what is shown, of the usual, and of any other.

    One panel for each model and span.

    Raises:
        UsageError: nothing was read on scenes in conflict.
    """
    metrics = {"p_true": "what is shown", "p_prior": "what is usual", "p_other": "each other answer"}
    known = [metric for metric in metrics if any(each.name == metric for each in result.metrics)]
    summaries = [_of_probe(result, metric, probe, "conflict").assign(metric=metric) for metric in known]
    summary = pd.concat(summaries, ignore_index=True)
    summary["panel"] = summary["model"] + ", " + summary["span"]
    figure, panels, places = _panels(result, summary, by="panel")
    for column, (_, panel) in enumerate(panels, 1):
        for number, metric in enumerate(known):
            rows = panel[(panel["metric"] == metric) & panel["n"].gt(0)]
            if len(rows):
                _line(figure, column, rows, metrics[metric], {"color": COLOURS[number], "width": 2.5}, band=True)
        _flat(
            figure, column, panel[panel["metric"] == known[0]].groupby("place", sort=False)["baseline"].mean(), "chance"
        )
    figure.update_yaxes(title_text="probability", range=[-0.03, 1.03], col=1)
    note = f"n = {int(summary['n'].max())} scenes; bands: 95 % bootstrap interval over scenes"
    figure.update_layout(meta=_recipe("conflict_lines", probe=probe, title=title))
    return _finished(figure, result, places, title or f"seen or usual? a {probe} probe in conflict", note, len(panels))


def confusion(result: Result, *, model: str, probe: str, span: str, place: str, read_on: str = "test") -> "go.Figure":
    """How often each label is read as each class at one place; rows are labels and sum to 1, with counts on hovering.

    Raises:
        UsageError: the result has no such cell.
    """
    import plotly.graph_objects as go

    wanted = {"model": model, "probe": probe, "control": "none", "span": span, "place": place, "read_on": read_on}
    table = result.table
    for axis, value in wanted.items():
        table = table[table[axis] == value]
    table = table[table["label"] != ""]
    if table.empty:
        raise UsageError(f"{result.name} has no cell {wanted}")
    classes = sorted({*table["label"], *table["predicted"]})
    counts = pd.crosstab(table["label"], table["predicted"]).reindex(index=classes, columns=classes, fill_value=0)
    shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    names = [html.escape(name, quote=False) for name in classes]
    figure = go.Figure(
        go.Heatmap(
            x=names, y=names, z=shares.to_numpy(), customdata=counts.to_numpy(), colorscale="Viridis", zmin=0, zmax=1,
            texttemplate="%{z:.2f}" if len(classes) <= 12 else None, xgap=1, ygap=1,
            hovertemplate="%{y} read as %{x}: %{customdata} examples, %{z:.2f}<extra></extra>",
            colorbar={"title": {"text": "share of the label's examples", "side": "right"}, "thickness": 14},
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="read by the probe", type="category")
    figure.update_yaxes(title_text="label", autorange="reversed", type="category")
    text = f"{model}: {probe} probe at {place}, {span} ({read_on}, n = {int(counts.to_numpy().sum())})"
    side = 300 + 44 * len(classes)
    options = {"model": model, "probe": probe, "span": span, "place": place, "read_on": read_on}
    figure.update_layout(meta=_recipe("confusion", **options))
    return _dressed(figure, text, side + 120, side)


def patch_picture(result: Result, *, model: str) -> "go.Figure":
    """What a probe of the object reads at every patch of a picture, shaded by the probability of the label.

    A slider goes through the places (see `probe_map.patch_map`).

    Raises:
        UsageError: no patches of that model were read.
    """
    import plotly.graph_objects as go
    from PIL import Image

    steps = [step for step in result.provenance.get("steps", []) if step.get("map") and step["model"] == model]
    if not steps:
        raise UsageError(f"{result.name} holds no map of patches for model {model!r}")
    found = steps[0]["map"]
    with Image.open(io.BytesIO(base64.b64decode(found["picture"]["png"]))) as opened:
        picture = opened.convert("RGB").resize(found["picture"]["size"])
    n_rows, n_columns = found["grid"]
    boxes = found["boxes"]
    across = [box[0] for box in boxes[:n_columns]] + [boxes[n_columns - 1][2]]
    down = [box[1] for box in boxes[::n_columns]] + [boxes[-1][3]]
    label = html.escape(found["label"], quote=False)
    maps = []
    for number in range(len(found["places"])):
        words = np.array(found["best"][number]).reshape(n_rows, n_columns)
        maps.append(
            go.Heatmap(
                x=across, y=down, z=np.array(found["p_true"][number]).reshape(n_rows, n_columns), zmin=0, zmax=1,
                text=[[html.escape(word, quote=False) for word in row] for row in words.tolist()],
                texttemplate="%{text}", textfont={"color": "black"}, colorscale=VEIL, xgap=1, ygap=1,
                hovertemplate="read as %{text}; probability of " + label + " %{z:.3f}<extra></extra>",
                visible=number == 0,
                colorbar={"title": {"text": f"probability of {label}", "side": "right"}, "thickness": 14},
            )
        )  # fmt: skip
    figure = go.Figure(maps)
    figure.update_layout(sliders=[_slider(found["places"])])
    lay_out(
        figure, picture, f"{found['model']}, {found['probe']} probe of the object: {found['question']} {found['label']}"
    )
    figure.update_layout(meta=_recipe("patch_picture", model=model))
    return figure


def _slider(places: list[str]) -> dict[str, Any]:
    """Shows one place at a time."""
    steps = [
        {"method": "update", "label": place, "args": [{"visible": [other == number for other in range(len(places))]}]}
        for number, place in enumerate(places)
    ]
    return {"active": 0, "steps": steps, "currentvalue": {"prefix": "place: "}, "pad": {"t": 24}}


# Parts


def _recipe(name: str, **options: Any) -> dict[str, Any]:
    """What `figures.redraw` needs to draw a figure again."""
    return {"drawn_by": f"{__name__}:{name}", "options": options}


def _of_probe(result: Result, metric: str, probe: str, read_on: str) -> pd.DataFrame:
    summary = result.summary(metric)
    found = summary.loc[(summary["probe"] == probe) & (summary["read_on"] == read_on)]
    if found.empty:
        raise UsageError(f"{result.name} has no {probe} probe read on {read_on} examples")
    return pd.DataFrame(found)


def _order(result: Result) -> list[str]:
    """The places in the order of the forward pass, whatever order the table has."""
    names = list(result.table["place"].drop_duplicates())
    return sorted(names, key=lambda name: (list(STREAMS).index(name.split(".")[0]), _number(name)))


def _number(name: str) -> int:
    inside = name.partition("[")[2].rstrip("]")
    return int(inside) if inside else 0


def _panels(result: Result, summary: pd.DataFrame, *, by: str = "model") -> tuple[Any, Any, list[str]]:
    from plotly.subplots import make_subplots

    panels = list(summary.groupby(by, sort=False))
    titles = [html.escape(str(name), quote=False) for name, _ in panels]
    figure = make_subplots(cols=len(panels), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    return figure, panels, _order(result)


def _line(
    figure: "go.Figure", column: int, rows: pd.DataFrame, name: str, style: dict[str, Any], *, band: bool
) -> None:
    import plotly.graph_objects as go

    known = {trace.name for trace in figure.data}
    if band:
        held = rows.dropna(subset=["ci_low", "ci_high"])
        red, green, blue = (int(style["color"][at : at + 2], 16) for at in (1, 3, 5))
        edge = go.Scatter(
            x=[*held["place"], *held["place"][::-1]], y=[*held["ci_high"], *held["ci_low"][::-1]], fill="toself",
            fillcolor=f"rgba({red},{green},{blue},0.18)", line={"width": 0}, mode="lines", hoverinfo="skip",
            showlegend=False, legendgroup=name,
        )  # fmt: skip
        figure.add_trace(edge, row=1, col=column)
    hover = [
        f"{row.place}<br>{html.escape(name, quote=False)}: {row.mean:.3f} ({row.ci_low:.3f} to {row.ci_high:.3f})<br>"
        f"n {row.n}, commonest label {row.baseline:.3f}"
        for row in rows.itertuples()
    ]
    line = go.Scatter(
        x=rows["place"], y=rows["mean"], mode="lines+markers" if band else "lines", name=name, line=style, text=hover,
        hovertemplate="%{text}<extra></extra>", legendgroup=name, showlegend=name not in known,
    )  # fmt: skip
    figure.add_trace(line, row=1, col=column)


def _flat(figure: "go.Figure", column: int, values: pd.Series, name: str) -> None:
    import plotly.graph_objects as go

    style = {"color": "#888888", "width": 1.5, "dash": "dot"}
    trace = go.Scatter(
        x=list(values.index), y=values.to_list(), mode="lines", name=name, line=style,
        legendgroup=name, showlegend=column == 1, hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(trace, row=1, col=column)


def _finished(
    figure: "go.Figure", result: Result, places: list[str], title: str, note: str, n_panels: int
) -> "go.Figure":
    """One axis for the whole depth, with the streams marked off."""
    step = max(1, -(-len(places) // MOST_TICKS))
    ticks = places[::step]
    labels = [f"{_number(each)}" if "[" in each else each.split(".")[-1] for each in ticks]
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=places, tickvals=ticks, ticktext=labels,
        title_text="block, in the order of the forward pass",
    )  # fmt: skip
    for column in range(1, n_panels + 1):
        for stream, name in STREAMS.items():
            numbers = [number for number, place in enumerate(places) if place.startswith(stream)]
            if not numbers:
                continue
            where = {"row": 1, "col": column}
            if numbers[0]:
                figure.add_vline(x=numbers[0] - 0.5, line={"color": "#666666", "width": 1}, **where)
            middle = (numbers[0] + numbers[-1]) / 2
            text = name if len(numbers) > 1 else ""
            figure.add_annotation(
                x=middle, y=-0.02, text=text, showarrow=False, font={"size": 11, "color": "#666666"}, **where
            )
    figure.add_annotation(
        text=note, xref="paper", yref="paper", x=0, y=0, yshift=-72, showarrow=False, xanchor="left", font={"size": 11}
    )
    return _dressed(figure, title, max(760, n_panels * (140 + WIDTH_A_PLACE * min(len(places), 30))) + 200, 520)


def _dressed(figure: "go.Figure", title: str, width: int, height: int) -> "go.Figure":
    figure.update_layout(
        template="plotly_white",
        title={"text": html.escape(title, quote=False), "x": 0.01, "xanchor": "left", "font": {"size": 17}},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12},
        width=width,
        height=height,
        margin={"l": 80, "r": 40, "t": 90, "b": 110},
    )
    return figure
