"""Figures of a page, drawn from its result alone: one a part."""

import dataclasses
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.methods.arbitration_page.crossover import LENS
from vlm_mech.methods.arbitration_page.data import CONFLICT, CROSSOVER, HEADS, NO_HEAD, PATCHING, USUAL
from vlm_mech.methods.arbitration_page.patching import ZERO
from vlm_mech.methods.arbitration_page.study import asked_in, outcomes
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL
from vlm_mech.results import figures
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["crossover", "curves", "drawn"]

TITLES = {
    "encoding": ("What probes read from images in conflict", "share", "site (V vision, P projector, L decoder)"),
    "arbiter": ("Lost pairs answered with what is shown, by ablated part", "share restored", "ablated part"),
    "heads": ("Groups of heads set to zero at the last token", "share flipped (two logits)", "group of heads"),
    "steering": ("Steering: images in conflict answered with what is shown", "share", "dose (state norms)"),
    "context": ("Image tokens that name an answer in the contextual lens", "share of images", "layer (-1: input)"),
    "horizon": ("Image tokens edited from each layer on", "KL to the unedited run (nats)", "from layer"),
}  # fmt: skip
BARS = ("heads", "arbiter")
LINEAR = ("steering",)
"""Parts whose x is a number."""


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """A figure for each part that was asked, patching with its controls in a second one.

    Args:
        result: of a page.
    """
    parts, found = asked_in(result), {CROSSOVER: crossover(result)}
    if PATCHING in parts:
        where: dict[str, Any] = {"head": NO_HEAD, "donor": COUNTERFACTUAL, "run": [CONFLICT, USUAL]}
        found[PATCHING] = figures.lines(
            result, x="layer", colour="span", facet="run", metric="flip", where=where,
            title="Share of pairs flipped by the other image's states, by span",
        )  # fmt: skip
        controls = where | {"span": ["image", "last"], "run": CONFLICT}
        del controls["donor"]
        donors = [each for each in dict.fromkeys(result.table["donor"]) if each in _donors(result)]
        if len(donors) > 1:
            found["patching_controls"] = figures.lines(
                result, x="layer", colour="donor", facet="span", metric="flip", where=controls | {"donor": donors},
                title="The same in the run in conflict, with control states",
            )  # fmt: skip
    if HEADS in parts:
        at = {"donor": ZERO, "run": CONFLICT, "span": "last"}
        title = "Lost pairs restored, by ablated head"
        found["heads_zeroed"] = figures.heatmap(result, x="head", y="layer", metric="restored", where=at, title=title)
    told = pd.DataFrame(result.provenance["curves"])
    for part in () if told.empty else dict.fromkeys(told["part"]):
        found[str(part)] = curves(result, part=str(part))
    return found


def _donors(result: Result) -> set[str]:
    """Whose states are put in by span."""
    some = result.table[(result.table["span"] == "image") & (result.table["run"] == CONFLICT)]
    return set(some["donor"])


def crossover(result: Result) -> "go.Figure":
    """The lead of what is shown over the prior in the lens by depth, of pairs won and lost, and the distance of states.

    Args:
        result: of a page.
    """
    from plotly.subplots import make_subplots

    won = outcomes(result)
    titles = ("lens at the last token: shown answer minus prior", "distance between the two images' last-token states")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    lens = result.table[result.table["donor"] == LENS]
    groups = {
        f"in conflict, won (n = {int(won.sum())})": (CONFLICT, won[won].index),
        f"in conflict, lost (n = {int((~won).sum())})": (CONFLICT, won[~won].index),
        f"usual image (n = {len(won)})": (USUAL, won.index),
    }
    for number, (name, (run, some)) in enumerate(groups.items()):
        rows = lens[(lens["run"] == run) & lens["example"].isin(set(some))]
        for column, metric in ((1, "lead"), (2, "distance")):
            if len(some) and (column == 1 or run == CONFLICT):
                part = dataclasses.replace(result, table=rows.reset_index(drop=True), known={})
                summary = part.summary(metric)
                for trace in _banded(summary["layer"], summary, name, COLOURS[number]):
                    trace.showlegend = column == 1 and trace.mode != "none" and trace.fill is None
                    figure.add_trace(trace, row=1, col=column)
    figure.add_hline(y=0, line={"color": "#888888", "dash": "dot"}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(title_text="layer (-1: the decoder's input)")
    figure.update_yaxes(title_text="logits", col=1)
    figure.update_yaxes(title_text="norm", rangemode="tozero", col=2)
    return _laid_out(figure, "Crossover: where the lens comes to prefer what is shown", drawn_by(crossover))


def curves(result: Result, *, part: str) -> "go.Figure":
    """What a part that is a whole method told, as lines or bars with 95 % intervals (of random ones their range).

    Args:
        result: of a page.
        part: its name.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    told = pd.DataFrame(result.provenance["curves"])
    rows = told[told["part"] == part]
    panels = list(dict.fromkeys(rows["panel"]))
    title, y, x = TITLES[part]
    names = panels if len(panels) > 1 else None
    figure = make_subplots(1, len(panels), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.06)
    lines = list(dict.fromkeys(rows["line"]))
    for column, panel in enumerate(panels, 1):
        for number, line in enumerate(lines):
            some = rows[(rows["panel"] == panel) & (rows["line"] == line)]
            summary = some.rename(columns={"low": "ci_low", "high": "ci_high"}).astype(
                {"mean": float, "ci_low": float, "ci_high": float}
            )
            colour = COLOURS[number % len(COLOURS)]
            at = some["x"].astype(float) if part in LINEAR else some["x"]
            if part in BARS:
                ends = {
                    "array": summary["ci_high"] - summary["mean"],
                    "arrayminus": summary["mean"] - summary["ci_low"],
                }
                figure.add_trace(
                    go.Bar(
                        x=some["x"], y=summary["mean"], name=line, marker={"color": colour}, legendgroup=line,
                        error_y={"type": "data", **ends}, showlegend=column == 1,
                    ),
                    row=1, col=column,
                )  # fmt: skip
                continue
            for trace in _banded(at, summary, line, colour, spread="range" in line):
                trace.showlegend = column == 1 and trace.fill is None
                figure.add_trace(trace, row=1, col=column)
    order = list(dict.fromkeys(rows["x"]))
    if part in LINEAR:
        figure.update_xaxes(title_text=x, type="linear")
    else:
        figure.update_xaxes(title_text=x, type="category", categoryorder="array", categoryarray=order)
    figure.update_yaxes(title_text=y, col=1)
    counts = sorted({int(each) for each in rows["n"].dropna()})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    return _laid_out(figure, f"{title} ({n})", drawn_by(curves, part=part))


def _banded(x: Any, summary: pd.DataFrame, name: str, colour: str, *, spread: bool = False) -> list[Any]:
    """A line with its 95 % interval; the range of many (`spread`) is outlined, dotted, and its middle dashed."""
    import plotly.graph_objects as go

    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    held = summary["ci_low"].notna()
    xs, low, high = (list(each[held]) for each in (x, summary["ci_low"], summary["ci_high"]))
    return [
        go.Scatter(
            x=[*xs, *xs[::-1]], y=[*high, *low[::-1]], mode="lines", fill="toself", hoverinfo="skip", legendgroup=name,
            fillcolor=f"rgba({red},{green},{blue},{0.05 if spread else 0.18})",
            line={"color": colour, "width": 1, "dash": "dot"} if spread else {"width": 0},
        ),
        go.Scatter(
            x=list(x), y=list(summary["mean"]), mode="lines+markers", name=name, legendgroup=name,
            line={"color": colour, "width": 2.5, "dash": "dash" if spread else "solid"},
        ),
    ]  # fmt: skip


def _laid_out(figure: "go.Figure", title: str, recipe: dict[str, Any]) -> "go.Figure":
    figure.update_layout(
        template="plotly_white", width=1120, height=430, title={"text": title, "x": 0.01, "xanchor": "left"},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12}, barmode="group", meta=recipe,
        legend={"orientation": "h", "y": -0.22}, margin={"b": 90, "t": 80},
    )  # fmt: skip
    return figure
