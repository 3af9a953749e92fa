"""Figures of a classification run, drawn from a saved `Result` alone, and pictures with what was said of them."""

import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from vlm_mech.behaviour.classify.baselines import AT, PROBES
from vlm_mech.behaviour.classify.frequency import per_class
from vlm_mech.behaviour.classify.study import MEAN_IMAGE
from vlm_mech.behaviour.classify.table import CLASSES, CLOSED, CONTRASTIVE, GENERATION, LOADED, OPEN, SUM
from vlm_mech.data.image_classes import Labelled
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.results import figures
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

GREY, N_SHOWN = "#888888", 6
CALIBRATED = f"{SUM} less {MEAN_IMAGE}"
DRAWN = (GENERATION, SUM, CALIBRATED, CONTRASTIVE, PROBES["tower"], PROBES["last"])
"""Methods that figures with many parts are about; the table has all."""
A_ROW = 30


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Accuracy by method and by candidates; frequency, positions and tuning where a run has them."""
    asked = {"question": first_question(result)}
    found = {"accuracy": accuracy_bars(result, **asked), "candidates": candidate_lines(result, **asked)}
    if result.provenance["frequency"]:
        found["frequency"] = frequency_scatter(result, **asked)
    if _positions(result).any():
        found["positions"] = position_lines(result, **asked)
    if result.provenance["tuned"]:
        found["tuning"] = tuning_dots(result)
    return found


def pictures(result: Result, examples: Sequence[Labelled]) -> tuple[tuple[str, Image.Image], ...]:
    """Some test pictures with what each model generates in the open."""
    table, question = result.table, first_question(result)
    rows = table[(table["question"] == question) & (table["world"] == OPEN) & (table["method"] == GENERATION)]
    shown = []
    for each in examples[:N_SHOWN]:
        said = rows[rows["example"] == each.id]
        texts = [f"{row['model']}: {row['answer']!r}" for _, row in said.iterrows()]
        shown.append((f"{each.label}; {', '.join(texts)}", load_image(each.image)))
    return tuple(shown)


def first_question(result: Result) -> str:
    """The question that everything is compared on."""
    return result.provenance["wording"]["questions"][0]


def accuracy_bars(result: Result, *, question: str, title: str | None = None) -> "go.Figure":
    """Accuracy of every method among all classes, with 95 % intervals, chance, and the paper's substring count beside.

    Raises:
        UsageError: nothing was asked in these words.
    """
    import plotly.graph_objects as go

    chosen = _chosen(result, task=CLASSES, world=OPEN, question=question)
    part = _part(result, chosen & (result.table["k"] == _n_classes(result)) & ~_positions(result), question)
    figure = go.Figure()
    rows = part.summary("accuracy")
    rows["name"] = [html.escape(_name(row), quote=False) for _, row in rows.iterrows()]
    _dots(figure, rows, rows["name"].tolist(), "whole words, or highest score", COLOURS[0], "circle")
    said = part.summary("substring")
    held = said["n"] > 0
    _dots(figure, said[held], rows["name"][held.to_numpy()].tolist(), "substring (paper)", COLOURS[1], "diamond-open")
    figure.add_vline(x=float(rows["baseline"].iloc[0]), line={"color": GREY, "dash": "dot", "width": 1.5})
    figure.update_yaxes(autorange="reversed", type="category", categoryarray=rows["name"].tolist())
    figure.update_xaxes(title_text="accuracy (share of test images)", range=[-0.02, 1.02])
    note = f"n = {rows['n'].min()}; bars: 95 % interval over images; dotted: chance"
    figure.update_layout(meta=drawn_by(accuracy_bars, question=question, title=title))
    return _dressed(figure, title or f"what is in the image? {_n_classes(result)} classes", note, len(rows))


def candidate_lines(result: Result, *, question: str, title: str | None = None) -> "go.Figure":
    """Accuracy against the number of candidates: generation in each order, scores, contrastive model and probes.

    Raises:
        UsageError: nothing was asked among candidates.
    """
    table = result.table
    chosen = _chosen(result, task=CLASSES, model=LOADED, question=question) & table["method"].isin(DRAWN)
    # In the open nothing is offered, so generated answers there are not among k.
    chosen &= ~((table["method"] == GENERATION) & (table["world"] == OPEN))
    part = _part(result, chosen, question)
    names = part.table["method"].where(part.table["world"] != CLOSED, "generation, " + part.table["order"] + " order")
    shown = part.table.assign(method=names, k=part.table["k"].astype(str))
    order = sorted(set(part.table["k"]))
    shown["k"] = pd.Categorical(shown["k"], [str(k) for k in order], ordered=True).astype(str)
    shown = shown.sort_values("k", key=lambda values: values.astype(int), kind="stable")
    narrowed = dataclasses.replace(part, table=shown, axes=("method", "k"), metrics=part.metrics[:1])
    figure = figures.lines(narrowed, x="k", colour="method", metric="accuracy")
    for trace in figure.data:
        # Chance is the baseline of every line.
        trace.name = "chance" if trace.name == "unedited" else trace.name
        trace.hovertemplate = (trace.hovertemplate or "").replace("unedited run", "chance") or None
    figure.update_xaxes(title_text="candidates", type="category")
    figure.update_layout(
        title_text=html.escape(title or "accuracy by number of candidates"),
        meta=drawn_by(candidate_lines, question=question, title=title), width=900,
    )  # fmt: skip
    return figure


def frequency_scatter(result: Result, *, question: str, title: str | None = None) -> "go.Figure":
    """Accuracy on each class against its count in the training text, a panel a method; larger dots are more classes.

    Raises:
        UsageError: the run counted no classes.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    frequency = result.provenance.get("frequency")
    if not frequency:
        raise UsageError(f"{result.name} counted no classes; run it with --counts FILE")
    every = per_class(result.table, frequency["counts"])
    every = every[(every["question"] == question) & every["method"].isin(DRAWN)]
    methods = list(every["method"].drop_duplicates())
    told = {(each["method"], each["question"]): each for each in frequency["correlations"]}
    n_columns = min(3, len(methods))
    titles = [html.escape(f"{name} ({_rho(told[name, question])})", quote=False) for name in methods]
    n_lines = -(-len(methods) // n_columns)
    figure = make_subplots(
        rows=n_lines, cols=n_columns, subplot_titles=titles, shared_xaxes=True, shared_yaxes=True,
        horizontal_spacing=0.03, vertical_spacing=0.12,
    )  # fmt: skip
    for number, method in enumerate(methods):
        some = every[every["method"] == method]
        dots = some.groupby(["count", "accuracy"], as_index=False).agg(n=("label", "size"), names=("label", ", ".join))
        trace = go.Scatter(
            x=dots["count"] + 1, y=dots["accuracy"], mode="markers", showlegend=False,
            marker={"size": 5 + 3 * dots["n"] ** 0.5, "color": COLOURS[0], "opacity": 0.6},
            text=[_short(names) for names in dots["names"]],
            hovertemplate="%{text}<br>count + 1: %{x}<br>accuracy %{y:.2f}<extra></extra>",
        )  # fmt: skip
        where = {"row": 1 + number // n_columns, "col": 1 + number % n_columns}
        figure.add_trace(trace, **where)
        figure.add_trace(_bins(frequency["bins"], method, question), **where)
    figure.update_xaxes(type="log", dtick=1)
    figure.update_xaxes(title_text="count + 1", row=n_lines)
    figure.update_yaxes(range=[-0.06, 1.06])
    figure.update_yaxes(title_text="accuracy on the class", col=1)
    figure.update_layout(meta=drawn_by(frequency_scatter, question=question, title=title))
    note = f"{len(frequency['counts'])} classes, counted {frequency['rule']}; orange: binned means, 95 % intervals"
    _dressed(figure, title or "are classes mentioned more often named better?", note, 0)
    return figure.update_layout(width=260 * n_columns + 160, height=240 * n_lines + 180)


def position_lines(result: Result, *, question: str, title: str | None = None) -> "go.Figure":
    """Accuracy of a probe at some positions of the prompt, in the last block, with the token each stands for.

    Raises:
        UsageError: no position was probed.
    """
    import plotly.graph_objects as go

    chosen = _chosen(result, task=CLASSES, question=question) & _positions(result)
    rows = _part(result, chosen, question).summary("accuracy")
    places = [int(name.removeprefix(AT)) for name in rows["method"]]
    figure = go.Figure(
        go.Scatter(
            x=places, y=rows["mean"], mode="lines+markers", line={"color": COLOURS[0], "width": 2},
            error_y=_errors(rows), hovertemplate="position %{x}: %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_hline(y=float(rows["baseline"].iloc[0]), line={"color": GREY, "dash": "dot", "width": 1.5})
    image = result.provenance.get("image_positions")
    if image:
        figure.add_vrect(
            x0=image[0] - 0.5, x1=image[1] + 0.5, fillcolor=COLOURS[2], opacity=0.12, line_width=0,
            annotation_text="image tokens", annotation_position="top left",
        )  # fmt: skip
    figure.update_xaxes(title_text="position in the prompt")
    figure.update_yaxes(title_text="accuracy", range=[-0.04, 1.04])
    figure.update_layout(meta=drawn_by(position_lines, question=question, title=title))
    note = f"n = {rows['n'].min()}; bars: 95 % interval over images; dotted: chance"
    return _dressed(figure, title or "probe accuracy at each position, last block", note, 10)


def tuning_dots(result: Result, *, title: str | None = None) -> "go.Figure":
    """Generated answers before and after tuning: in the open, among candidates, and to other questions.

    Raises:
        UsageError: nothing was tuned.
    """
    import plotly.graph_objects as go

    if len(set(result.table["model"])) < 2:
        raise UsageError(f"{result.name} fine-tuned nothing; run it with --tune projector")
    rows = result.summary("accuracy")
    rows = rows[(rows["method"] == GENERATION) & (rows["n"] > 0)]
    names = [html.escape(_task(row), quote=False) for _, row in rows.iterrows()]
    rows = rows.assign(name=names)
    # Only what both were asked.
    both = set.intersection(*(set(some["name"]) for _, some in rows.groupby("model")))
    rows, figure = rows[rows["name"].isin(both)], go.Figure()
    symbols = ("circle-open", "circle")
    for number, (model, some) in enumerate(rows.groupby("model", sort=False)):
        _dots(figure, some, some["name"].tolist(), str(model), COLOURS[number], symbols[number % 2])
    first = rows.drop_duplicates("name")
    chance = go.Scatter(
        x=first["baseline"], y=first["name"], mode="markers", name="chance",
        marker={"symbol": "line-ns-open", "size": 12, "color": GREY}, hoverinfo="skip",
    )  # fmt: skip
    figure.add_trace(chance)
    figure.update_yaxes(autorange="reversed", type="category", categoryarray=first["name"].tolist())
    figure.update_xaxes(title_text="accuracy of generated answers", range=[-0.02, 1.02])
    figure.update_layout(meta=drawn_by(tuning_dots, title=title))
    note = "bars: 95 % interval over images; grey: chance"
    return _dressed(figure, title or "before and after fine-tuning on the classes", note, len(first))


# Parts


def _chosen(result: Result, **wanted: str) -> pd.Series:
    chosen = pd.Series(True, index=result.table.index)
    for axis, value in wanted.items():
        chosen &= result.table[axis] == value
    # What was asked of other pictures is no part of these cells.
    return chosen & (result.table["label"] != "")


def _positions(result: Result) -> pd.Series:
    return result.table["method"].str.startswith(AT)


def _n_classes(result: Result) -> int:
    return int(result.table[result.table["task"] == CLASSES]["k"].max())


def _part(result: Result, chosen: pd.Series, question: str) -> Result:
    if not chosen.any():
        raise UsageError(f"{result.name} has nothing of this kind asked as {question!r}")
    return dataclasses.replace(result, table=result.table[chosen].reset_index(drop=True))


def _name(row: Any) -> str:
    return str(row["method"]) if row["model"] == LOADED else f"{row['method']}, {row['model']}"


def _task(row: Any) -> str:
    if row["task"] != CLASSES:
        return str(row["task"])
    if row["world"] == OPEN:
        return f"open: {row['question']}"
    return f"closed, K = {row['k']}, {row['order']} order"


def _errors(rows: pd.DataFrame) -> dict[str, Any]:
    up, down = rows["ci_high"] - rows["mean"], rows["mean"] - rows["ci_low"]
    return {"type": "data", "array": up.tolist(), "arrayminus": down.tolist(), "thickness": 1.5, "width": 4}


def _dots(figure: "go.Figure", rows: pd.DataFrame, names: list[str], name: str, colour: str, symbol: str) -> None:
    import plotly.graph_objects as go

    hover = [
        f"{each}<br>{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})<br>"
        f"n {row['n']}, chance {row['baseline']:.3f}"
        for each, (_, row) in zip(names, rows.iterrows(), strict=True)
    ]
    trace = go.Scatter(
        x=rows["mean"], y=names, mode="markers",
        name=html.escape(name, quote=False), error_x=_errors(rows),
        marker={"color": colour, "size": 10, "symbol": symbol}, text=hover, hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(trace)


def _bins(bins: list[dict[str, Any]], method: str, question: str) -> "go.Scatter":
    import plotly.graph_objects as go

    some = [each for each in bins if each["method"] == method and each["question"] == question]
    middle = [((1 + each["least"]) * (1 + each["most"])) ** 0.5 for each in some]
    ends = [
        (each["accuracy"] if each["low"] is None else each["low"], each["high"] or each["accuracy"]) for each in some
    ]
    up = [high - each["accuracy"] for each, (_, high) in zip(some, ends, strict=True)]
    down = [each["accuracy"] - low for each, (low, _) in zip(some, ends, strict=True)]
    return go.Scatter(
        x=middle, y=[each["accuracy"] for each in some], mode="lines+markers", showlegend=False,
        line={"color": COLOURS[1], "width": 2}, marker={"size": 7},
        error_y={"type": "data", "array": up, "arrayminus": down, "thickness": 1.5, "width": 4},
        hovertemplate="mean of a bin: %{y:.3f}<extra></extra>",
    )  # fmt: skip


def _rho(told: dict[str, Any]) -> str:
    return "no spread" if told["spearman"] is None else f"ρ {told['spearman']:.2f}"


def _short(names: str, most: int = 60) -> str:
    return html.escape(names if len(names) <= most else names[:most] + " ...", quote=False)


def _dressed(figure: "go.Figure", title: str, note: str, n_rows: int) -> "go.Figure":
    figure.add_annotation(
        text=note, xref="paper", yref="paper", x=0, y=0, yshift=-72, showarrow=False, xanchor="left", font={"size": 11},
        name="caption",
    )  # fmt: skip
    return figure.update_layout(
        template="plotly_white",
        title={"text": html.escape(title, quote=False), "x": 0.01, "xanchor": "left", "font": {"size": 17}},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12},
        width=900,
        height=190 + A_ROW * max(n_rows, 6),
        margin={"l": 80, "r": 40, "t": 90, "b": 100},
    )
