"""Timings as a table with medians and extremes, as sentences, and as a figure; everything from the result alone."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.benchmark.cases import EXTRACTION, PROBES
from vlm_mech.benchmark.compare import OURS, PLAIN
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Metric, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

BUSY = 0.3
"""Average load for each core from which on times are not to be trusted."""
METRICS = (
    Metric("forwards", "plain forwards", "time of all cells in units of one plain forward pass of the same repeat"),
    Metric("seconds", "s", "time of all cells; scaled by count for a rival that ran a part of them"),
    Metric("ratio", "times ours", "time in units of ours in the same repeat"),
    Metric("of_bound", "share", "least products needed, as plain forwards, over the plain forwards that ours takes"),
    Metric("operations", "times the bound", "our operations as counted by torch, over the least that are needed"),
    Metric("memory", "MiB", "peak memory above what was held before"),
    Metric(
        "difference",
        "relative",
        "largest difference to ours, relative to the largest logit (state) of ours; of probes, that of mean accuracies",
    ),
)
OF_FORWARDS = ("forwards", "of_bound", "operations")


def metrics(cases: Sequence[str]) -> tuple[Metric, ...]:
    """What there is to say of these cases: probes are not counted in forward passes."""
    return METRICS if set(cases) != {PROBES} else tuple(each for each in METRICS if each.name not in OF_FORWARDS)


def overview(result: Result) -> pd.DataFrame:
    """One row for each case and contender: medians over repeats with smallest and largest, as text."""
    rows = []
    for case, contender in result.cells.itertuples(index=False):
        chosen = result.table[(result.table["case"] == case) & (result.table["contender"] == contender)]
        reason = chosen["skipped"].iloc[0]
        rows.append(
            {
                "case": case,
                "contender": contender,
                "seconds": reason or _spread(chosen["seconds"]),
                "times ours": _spread(chosen["ratio"]),
                "plain forwards": _spread(chosen["forwards"]),
                "of bound": _spread(chosen["of_bound"], percent=True),
                "operations / bound": _text(chosen["operations"].iloc[0]),
                "peak MiB": _text(chosen["memory"].median()),
                "difference": _text(chosen["difference"].iloc[0]),
            }
        )
    return pd.DataFrame(rows)


def findings(result: Result, notes: list[dict[str, Any]]) -> tuple[str, ...]:
    """What each case costs and how the rivals stand to it, with the spread over repeats."""
    sentences = [_circumstances(result.provenance["machine"])] if "machine" in result.provenance else []
    for note in notes:
        rows = result.table[result.table["case"] == note["case"]]
        ours = rows[rows["contender"] == OURS]
        text = _cost(note, ours)
        for name in rows["contender"].unique():
            if name not in (OURS, PLAIN):
                own = rows[rows["contender"] == name]
                reason = own["skipped"].iloc[0]
                text += f"; {name} {reason}" if reason else f"; {name} takes {_spread(own['ratio'])} times as long"
        scaled = f", rivals scaled from {note['rival_cells']}" if note["rival_cells"] < note["n_cells"] else ""
        told = "once" if len(ours) == 1 else f"median, smallest to largest of {len(ours)} repeats"
        sentences.append(f"{text} ({told}{scaled})")
        sentences += [_agreement(note)] if note["case"] == PROBES else []
    return tuple(sentences)


def _cost(note: dict[str, Any], ours: pd.DataFrame) -> str:
    """What a case costs us."""
    if note["case"] == PROBES:
        size = note["size"]
        what = f"{size['n_layers']} layers x {size['n_seeds']} seeds, {size['n_examples']} x {size['width']} states"
        memory = f"{_spread(ours['memory'])} MiB beyond the states, of a budget of {_text(note['budget_mib'])}"
        return f"training {note['n_cells']} probes ({what}) takes {_spread(ours['seconds'])} s and {memory}"
    costs = _spread(ours["forwards"])
    if note["case"] == EXTRACTION:
        share = _spread(1 / ours["forwards"], percent=True)
        text = f"extraction of {note['n_cells']} batches takes {costs} times the plain forwards"
        return f"{text}, {share} of their throughput"
    bound = f"{_spread(ours['of_bound'], percent=True)} of the bound of {note['bound']:.2f}"
    if not np.isnan(ours["operations"].iloc[0]):
        bound += f" ({ours['operations'].iloc[0]:.2f} times its operations)"
    text = f"{note['case']} ({note['n_cells']} cells) costs {costs} plain forwards, {bound}"
    if note["planned_mib"] is not None:
        text += f"; its tensors are foreseen to take {_text(note['planned_mib'])} MiB at the peak, the process took "
        text += f"{_text(ours['memory'].median())} more than before"
    return text


def _agreement(note: dict[str, Any]) -> str:
    """How well the probes read, beside scikit-learn's, a linear probe's, and the commonest label."""
    found, between = note["accuracy"], ""
    if found["interval"] is not None:
        between = " ({:+.2f} to {:+.2f}, 95 % over probes)".format(*(100 * each for each in found["interval"]))
    return (
        f"test accuracy on the {note['rival_cells']} probes that both fitted, {found['n_test']} test examples each: "
        f"ours {found[OURS]:.4f}, scikit-learn {found['scikit-learn loop']:.4f}, theirs minus ours "
        f"{100 * found['difference']:+.2f} points{between}; a linear probe {found['ours, a linear probe']:.3f}, the "
        f"commonest label {found['commonest label']:.3f}"
    )


def _circumstances(machine: dict[str, Any]) -> str:
    where = machine["accelerator"] or f"{machine['cores']} cores"
    text = f"timed on {where} with {machine['threads']} thread(s) of torch, load {machine['load']} before the start"
    if machine["accelerator"] is None and machine["threads"] == 1:
        text += "; seconds are those of this process alone"
    busy = machine["load"] > BUSY * machine["cores"]
    return text + ("; others were using the machine, so that times may be too long" if busy else "")


def _spread(values: pd.Series, *, percent: bool = False) -> str:
    values = values * 100 if percent else values
    if values.isna().all():
        return "-"
    sign = " %" if percent else ""
    # A single measurement has no spread.
    between = f" ({_text(values.min())} to {_text(values.max())})" if len(values) > 1 else ""
    return f"{_text(values.median())}{between}{sign}"


def _text(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Bars, and the table as a figure."""
    return {"bars": bars(result, title=result.name), "table": as_figure(result)}


def bars(result: Result, *, title: str) -> "go.Figure":
    """Plain forwards of every case, one bar a contender on a logarithmic axis, from smallest to largest repeat.

    Cases that are not counted in forwards are in the table alone; if there are no others, bars are times of ours.
    """
    import plotly.graph_objects as go

    figure, table = go.Figure(), result.table
    metric, unit = (
        ("forwards", "plain forwards") if np.asarray(table["forwards"].notna()).any() else ("ratio", "times ours")
    )
    table = table[(table["contender"] != PLAIN) & table.groupby("case")[metric].transform("count").gt(0)]
    for number, name in enumerate(table["contender"].drop_duplicates()):
        grouped = table[table["contender"] == name].groupby("case", sort=False)[metric]
        middle = grouped.median()
        spread = {"array": grouped.max() - middle, "arrayminus": middle - grouped.min(), "symmetric": False}
        colour = COLOURS[number % len(COLOURS)]
        figure.add_bar(
            x=list(middle.index), y=middle, name=name, marker_color=colour, error_y={"type": "data", **spread}
        )
    figure.add_hline(y=1, line_dash="dot")
    # Places of annotations are logarithms here.
    what = {"text": "one plain forward" if metric == "forwards" else "ours", "showarrow": False}
    figure.add_annotation(x=1, xref="paper", xanchor="left", y=0, **what)
    figure.update_yaxes(type="log", title_text=f"{unit} (log scale)")
    meta = drawn_by(bars, title=title)
    figure.update_layout(template="plotly_white", barmode="group", title=title, width=960, height=480, meta=meta)
    return figure


def as_figure(result: Result) -> "go.Figure":
    """The overview as a figure, for the report."""
    import plotly.graph_objects as go

    table = overview(result)
    wrapped = [["<br>".join(textwrap.wrap(str(value), 26)) for value in table[name]] for name in table]
    figure = go.Figure(
        go.Table(
            header={"values": list(table), "align": "left", "font": {"size": 11}},
            cells={"values": wrapped, "align": "left", "font": {"size": 11}},
            columnwidth=[1, 1.3, 1.4, 1.2, 1.2, 1.3, 0.8, 0.6, 0.7],
        )
    )
    meta, lines = (
        drawn_by(as_figure),
        sum(max(text.count("<br>") + 1 for text in row) for row in zip(*wrapped, strict=True)),
    )
    height = max(400, 15 * lines + 14 * len(table) + 200)
    figure.update_layout(title=result.name, width=1200, height=height, margin={"l": 20, "r": 20}, meta=meta)
    return figure
