"""Figures of probes, drawn from a saved `Result` alone: depth on one axis, conflict, confusion, a map of patches."""

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.data.nouns import nouns_in
from vlm_mech.errors import UsageError
from vlm_mech.methods.probing.controls import NONE
from vlm_mech.methods.probing.study import CONFLICT, best_spot, summary_of
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.overlays import VEIL, lay_out, which_picture
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["conflict_lines", "confusion", "depth_lines", "drawn", "patch_picture"]

CONTROL_LINES = {
    "shuffled": {"dash": "dot"},
    "control task": {"dash": "dash"},
    "no image": {"dash": "dashdot"},
    "random weights": {"dash": "solid"},
}
GREY = "#666666"
STREAMS = {"vision": "vision encoder", "projector": "", "llm": "language model"}
WIDTH_A_PLACE, MOST_TICKS = 34, 40


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Accuracy over depth and what is read in conflict by each kind of probe; confusion and a picture for each model.

    Places, and what was read at patches, come from `provenance["steps"]`.
    """
    probes, found = list(result.table["probe"].drop_duplicates()), {}
    notes = result.provenance["steps"]
    for probe in probes:
        found[f"depth_{probe}"] = depth_lines(result, probe=probe)
    if CONFLICT in set(result.table["read_on"]):
        found |= {f"conflict_{probe}": conflict_lines(result, probe=probe) for probe in probes}
    for number, step in enumerate(each for each in notes if each["step"] == NONE):
        place, span = best_spot(step, probes[0])
        found[f"confusion_{number}"] = confusion(result, model=step["model"], probe=probes[0], place=place, span=span)
        if step["map"] is not None:
            found[f"patches_{number}"] = patch_picture(result, model=step["model"])
    return found


def depth_lines(result: Result, *, probe: str, title: str | None = None) -> "go.Figure":
    """Test accuracy over the whole depth of the model, one line a span with its band, controls thin, a panel a model.

    Bands are the 95 % bootstrap interval over scenes (pairs, items), of the mean over seeds. The grey line is the
    commonest label. Click a control in the legend to hide or show it for all spans.

    Raises:
        UsageError: the result has no such probe.
    """
    summary = _of_probe(result, "accuracy", probe, "test")
    models, places = list(summary["model"].drop_duplicates()), _order(result)
    figure = _grid([[model] for model in models] if len(models) > 2 else [models])
    spans = list(summary["span"].drop_duplicates())
    for number, model in enumerate(models):
        where = _cell(number, 1 if len(models) > 2 else len(models))
        panel = summary[summary["model"] == model]
        baseline = panel[panel["control"] == "none"].groupby("place", sort=False)["baseline"].mean()
        _flat(figure, where, baseline, "majority label")
        for control, span in panel[["control", "span"]].drop_duplicates().itertuples(index=False):
            rows = panel[(panel["control"] == control) & (panel["span"] == span)]
            style = {"color": COLOURS[spans.index(span) % len(COLOURS)], "width": 2.5}
            if control == "none":
                _line(figure, where, rows, span, style, band=True)
            else:
                thin = style | {"width": 1.2} | CONTROL_LINES[control]
                _line(figure, where, rows, f"{span}, {control}", thin, band=False, group=control)
    for control in summary["control"].drop_duplicates():
        if control != "none":
            _legend_of(figure, control, CONTROL_LINES[control])
    figure.update_yaxes(title_text="accuracy (share of test examples)", col=1)
    units = nouns_in(result.provenance).units
    note = f"n = {int(summary['n'].min())} examples; bands: 95 % interval over {units}, of the mean over seeds"
    figure.update_layout(meta=drawn_by(depth_lines, probe=probe, title=title))
    return _finished(figure, places, title or f"probe accuracy by depth ({probe})", note)


def conflict_lines(result: Result, *, probe: str, title: str | None = None) -> "go.Figure":
    """In pictures that show what is unusual: the probe's probability of what is shown, of the usual, and of any other.

    A row for each model, a column for each span.

    Raises:
        UsageError: nothing was read on scenes in conflict.
    """
    metrics = {"p_true": "what is shown", "p_prior": "what is usual", "p_other": "each other answer"}
    known = [metric for metric in metrics if any(each.name == metric for each in result.metrics)]
    summary = pd.concat([_of_probe(result, metric, probe, "conflict") for metric in known], ignore_index=True)
    models, spans = (list(summary[name].drop_duplicates()) for name in ("model", "span"))
    figure = _grid([[f"{model}, {span}" for span in spans] for model in models])
    for number, (model, span) in enumerate((model, span) for model in models for span in spans):
        where = _cell(number, len(spans))
        panel = summary[(summary["model"] == model) & (summary["span"] == span)]
        chance = panel[panel["metric"] == known[0]].groupby("place", sort=False)["baseline"].mean()
        _flat(figure, where, chance, "chance")
        for colour, metric in zip(COLOURS, known, strict=False):
            rows = panel[(panel["metric"] == metric) & panel["n"].gt(0)]
            if len(rows):
                _line(figure, where, rows, metrics[metric], {"color": colour, "width": 2.5}, band=True)
    figure.update_yaxes(title_text="probability", col=1)
    units = _units_in_conflict(result)
    note = f"n = {int(summary['n'].max())} {units}; bands: 95 % interval over {units}"
    figure.update_layout(meta=drawn_by(conflict_lines, probe=probe, title=title))
    return _finished(
        figure, _order(result), title or f"shown or usual answer? probes ({probe}) on images in conflict", note
    )


def _units_in_conflict(result: Result) -> str:
    """What the pictures in conflict are drawn in: those of the last data set."""
    data = result.provenance.get("data") or [{}]
    return nouns_in({"data": data[-1]}).units


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
            text=[[f"{share:.2f}" if share else "" for share in row] for row in shares.to_numpy()],
            texttemplate="%{text}" if len(classes) <= 12 else None, xgap=1, ygap=1,
            hovertemplate="%{y} read as %{x}: %{customdata} examples, %{z:.2f}<extra></extra>",
            colorbar={"title": {"text": "<br>share of the label's examples", "side": "right"}, "thickness": 14},
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="read by the probe", type="category")
    figure.update_yaxes(title_text="label", autorange="reversed", type="category")
    text = f"{model}: {probe} probe at {place}, {span} ({read_on}, n = {int(counts.to_numpy().sum())})"
    side = 300 + 44 * len(classes)
    options = {"model": model, "probe": probe, "span": span, "place": place, "read_on": read_on}
    figure.update_layout(meta=drawn_by(confusion, **options))
    return _dressed(figure, text, side + 120, side)


def patch_picture(result: Result, *, model: str) -> "go.Figure":
    """What a probe of the object reads at every patch of a picture, shaded by the probability of the label.

    A slider goes through the places.

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
                colorbar={"title": {"text": f"<br>probability of {label}", "side": "right"}, "thickness": 14},
            )
        )  # fmt: skip
    figure = go.Figure(maps)
    figure.update_layout(sliders=[_slider(found["places"])])
    which = which_picture(found.get("n_pictures", 1))
    text = f"{found['model']}, {found['probe']} probe of the object: {found['question']} {found['label']}{which}"
    lay_out(figure, picture, text)
    figure.update_layout(meta=drawn_by(patch_picture, model=model))
    return figure


def _slider(places: list[str]) -> dict[str, Any]:
    """Shows one place at a time."""
    shown = [{"visible": [other == number for other in range(len(places))]} for number in range(len(places))]
    steps = [
        {"method": "update", "label": _short(place), "args": [args]} for place, args in zip(places, shown, strict=True)
    ]
    return {"active": 0, "steps": steps, "currentvalue": {"prefix": "after block: "}, "pad": {"t": 24}}


# Parts


def _of_probe(result: Result, metric: str, probe: str, read_on: str) -> pd.DataFrame:
    summary = summary_of(result)
    chosen = (summary["metric"] == metric) & (summary["probe"] == probe) & (summary["read_on"] == read_on)
    if not np.asarray(chosen).any():
        raise UsageError(f"{result.name} has no {probe} probe read on {read_on} examples")
    return pd.DataFrame(summary[chosen])


def _order(result: Result) -> list[str]:
    """The places in the order of the forward pass, whatever order the table has."""
    names = list(result.table["place"].drop_duplicates())
    return sorted(names, key=lambda name: (list(STREAMS).index(name.split(".")[0]), _number(name)))


def _number(name: str) -> int:
    inside = name.partition("[")[2].rstrip("]")
    return int(inside) if inside else 0


def _short(place: str) -> str:
    """`llm 3`, `projector`: a place as a slider has room for it."""
    stream = place.split(".")[0]
    return f"{stream} {_number(place)}" if "[" in place else stream


def _grid(titles: list[list[str]]) -> "go.Figure":
    """Panels in rows and columns under their titles."""
    from plotly.subplots import make_subplots

    n_rows, n_columns = len(titles), len(titles[0])
    return make_subplots(
        rows=n_rows, cols=n_columns, shared_yaxes=True, horizontal_spacing=0.04, vertical_spacing=0.3 / n_rows,
        subplot_titles=[html.escape(str(name), quote=False) for row in titles for name in row],
    )  # fmt: skip


def _cell(number: int, n_columns: int) -> dict[str, int]:
    return {"row": number // n_columns + 1, "col": number % n_columns + 1}


def _line(
    figure: "go.Figure", where: dict[str, int], rows: pd.DataFrame, name: str, style: dict[str, Any], *, band: bool,
    group: str | None = None,
) -> None:  # fmt: skip
    """A line through the means; lines of a group have one place in the legend (`_legend_of`)."""
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
        figure.add_trace(edge, **where)
    hover = [
        f"{row.place}<br>{html.escape(name, quote=False)}: {row.mean:.3f} ({row.ci_low:.3f} to {row.ci_high:.3f})<br>"
        f"n {row.n}, baseline {row.baseline:.3f}"
        for row in rows.itertuples()
    ]
    line = go.Scatter(
        x=rows["place"], y=rows["mean"], mode="lines+markers" if band else "lines", name=name, line=style, text=hover,
        hovertemplate="%{text}<extra></extra>", legendgroup=group or name,
        showlegend=group is None and name not in known,
    )  # fmt: skip
    figure.add_trace(line, **where)


def _legend_of(figure: "go.Figure", group: str, style: dict[str, Any]) -> None:
    """One grey line in the legend for the lines of a group, in whatever colour."""
    import plotly.graph_objects as go

    style = {"color": GREY, "width": 1.2} | style
    figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=group, line=style, legendgroup=group))


def _flat(figure: "go.Figure", where: dict[str, int], values: pd.Series, name: str) -> None:
    import plotly.graph_objects as go

    style = {"color": "#BBBBBB", "width": 3}
    trace = go.Scatter(
        x=list(values.index), y=values.to_list(), mode="lines", name=name, line=style, legendgroup=name,
        showlegend=where == {"row": 1, "col": 1}, hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(trace, **where)


def _finished(figure: "go.Figure", places: list[str], title: str, note: str) -> "go.Figure":
    """One axis for the whole depth, with the streams marked off."""
    rows, columns = figure._get_subplot_rows_columns()
    ticks = places[:: max(1, -(-len(places) // MOST_TICKS))]
    labels = [f"{_number(each)}" if "[" in each else "proj." for each in ticks]
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=places, tickvals=ticks, ticktext=labels,
        range=[-0.5, len(places) - 0.5],
    )  # fmt: skip
    figure.update_xaxes(title_text="block, in the order of the forward pass", row=len(rows))
    # Below zero is room for the names of the streams.
    figure.update_yaxes(range=[-0.12, 1.03], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1])
    for row in rows:
        for column in columns:
            _mark_streams(figure, places, {"row": row, "col": column})
    figure.add_annotation(
        text=note, xref="paper", yref="paper", x=0, y=0, yshift=-72, showarrow=False, xanchor="left", font={"size": 11},
        name="caption",
    )  # fmt: skip
    width = max(560, len(columns) * (140 + WIDTH_A_PLACE * min(len(places), 30))) + 220
    return _dressed(figure, title, width, 220 + 320 * len(rows))


def _mark_streams(figure: "go.Figure", places: list[str], where: dict[str, int]) -> None:
    for stream, name in STREAMS.items():
        numbers = [number for number, place in enumerate(places) if place.startswith(stream)]
        if not numbers:
            continue
        if numbers[0]:
            figure.add_vline(x=numbers[0] - 0.5, line={"color": GREY, "width": 1}, **where)
        middle = (numbers[0] + numbers[-1]) / 2
        style = {"showarrow": False, "font": {"size": 11, "color": GREY}}
        figure.add_annotation(x=middle, y=-0.07, text=name if len(numbers) > 1 else "", **style, **where)


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
