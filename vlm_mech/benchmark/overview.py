"""Timings as a table with medians and extremes, as sentences, and as a figure; everything from the result alone."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.benchmark.compare import OURS, PLAIN
from vlm_mech.figures import COLOURS
from vlm_mech.result import Metric, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

BUSY = 0.3
"""Average load for each core from which on times are not to be trusted."""
METRICS = (
    Metric("forwards", "plain forwards", "time of all cells in units of one plain forward pass of the same repeat"),
    Metric("seconds", "s", "time of all cells; for a rival that ran a part of them, scaled by their number"),
    Metric("ratio", "times ours", "time in units of ours in the same repeat"),
    Metric("of_bound", "share", "least products needed, as plain forwards, over the plain forwards that ours takes"),
    Metric("memory", "MiB", "peak memory above what was held before"),
    Metric("difference", "relative", "largest difference to ours, relative to the largest logit (state) of ours"),
)


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
        n_repeats = len(ours)
        unit = "batches" if note["case"] == "extraction" else "cells"
        text = f"{note['case']} ({note['n_cells']} {unit}) costs {_spread(ours['forwards'])} plain forwards"
        if note["case"] == "extraction":
            text = f"extraction of {note['n_cells']} batches takes {_spread(ours['forwards'])} times the plain forwards"
            text += f", {_spread(1 / ours['forwards'], percent=True)} of their throughput"
        else:
            text += f", {_spread(ours['of_bound'], percent=True)} of the bound of {note['bound']:.2f}"
        compared = []
        for name in rows["contender"].unique():
            if name not in (OURS, PLAIN):
                own = rows[rows["contender"] == name]
                reason = own["skipped"].iloc[0]
                compared.append(f"{name} {reason}" if reason else f"{name} takes {_spread(own['ratio'])} times as long")
        scaled = f", rivals scaled from {note['rival_cells']}" if note["rival_cells"] < note["n_cells"] else ""
        text += "".join(f"; {each}" for each in compared)
        sentences.append(f"{text} (median, smallest to largest of {n_repeats} repeats{scaled})")
    return tuple(sentences)


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
    return f"{_text(values.median())} ({_text(values.min())} to {_text(values.max())}){sign}"


def _text(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bars(result: Result, *, title: str) -> "go.Figure":
    """Plain forwards of every case, one bar a contender on a logarithmic axis, from smallest to largest repeat."""
    import plotly.graph_objects as go

    figure = go.Figure()
    contenders = list(result.table["contender"].drop_duplicates())
    for number, name in enumerate(each for each in contenders if each != PLAIN):
        grouped = result.table[result.table["contender"] == name].groupby("case", sort=False)["forwards"]
        middle = grouped.median()
        spread = {"array": grouped.max() - middle, "arrayminus": middle - grouped.min(), "symmetric": False}
        colour = COLOURS[number % len(COLOURS)]
        figure.add_bar(
            x=list(middle.index), y=middle, name=name, marker_color=colour, error_y={"type": "data", **spread}
        )
    figure.add_hline(y=1, line_dash="dot", annotation_text="one plain forward")
    figure.update_yaxes(type="log", title_text="plain forwards (log scale)")
    meta = {"drawn_by": f"{__name__}:bars", "options": {"title": title}}
    figure.update_layout(template="plotly_white", barmode="group", title=title, width=960, height=480, meta=meta)
    return figure


def as_figure(result: Result) -> "go.Figure":
    """The overview as a figure, for the report."""
    import plotly.graph_objects as go

    table = overview(result)
    wrapped = [["<br>".join(textwrap.wrap(str(value), 44)) for value in table[name]] for name in table]
    figure = go.Figure(
        go.Table(
            header={"values": list(table), "align": "left"},
            cells={"values": wrapped, "align": "left"},
            columnwidth=[1, 1.3, 1.6, 1.2, 1.2, 1.2, 0.6, 0.6],
        )
    )
    meta = {"drawn_by": f"{__name__}:as_figure", "options": {}}
    figure.update_layout(title=result.name, width=1300, height=max(400, 34 * len(table) + 160), meta=meta)
    return figure
