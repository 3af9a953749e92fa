"""Figures of a run of contrastive decoding, drawn from its saved `Result` alone."""

from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.behaviour.answering.by_category import categories, has_categories
from vlm_mech.behaviour.decoding.both_pictures import BY_CATEGORY
from vlm_mech.behaviour.decoding.data import DOSES, GREEDY, TEST, VALIDATION, label
from vlm_mech.behaviour.decoding.study import DEPENDENCY, OWN, STRANGER, USUAL, WHOLE
from vlm_mech.results import figures
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Rates by method on test, curves of the dose on validation, and the dependency along the answer.

    Where both pictures of all pairs were asked about, accuracy by method.
    """
    if any(each.name == "individual" for each in result.metrics):
        found = {"accuracies": accuracies(result)}
        named = {"categories": categories(result, **BY_CATEGORY, named=["method"])} if has_categories(result) else {}
        return found | named
    found = {"methods": methods(result)}
    table = result.table
    for kind in DOSES:
        if any(each.startswith(kind) for each in table["method"].tolist()):
            found |= {
                f"dose_{kind.lower()}_{name}": doses(result, kind=kind, metric=name) for name in ("truth", "prior")
            }
    if DEPENDENCY in result.metrics:
        found["dependency"] = along(result)
    return found


def methods(result: Result) -> "go.Figure":
    """Right and usual answers on test by setting with 95 % intervals, about their own, others' and usual pictures."""
    from plotly.subplots import make_subplots

    summary = pd.concat([result.summary(name) for name in ("truth", "prior")])
    summary = summary[(summary["split"] == TEST) & (summary["step"] == WHOLE) & (summary["n"] > 0)]
    summary = summary.assign(label=[label(*each) for each in zip(summary["method"], summary["dose"], strict=True)])
    names = list(summary["label"].drop_duplicates())
    pictures = [each for each in (OWN, STRANGER, USUAL) if each in set(summary["picture"])]
    figure = make_subplots(
        cols=len(pictures), shared_yaxes=True, subplot_titles=tuple(pictures), horizontal_spacing=0.04
    )
    for column, picture in enumerate(pictures, 1):
        for number, (metric, told) in enumerate((("truth", "right"), ("prior", "the usual answer"))):
            rows = summary[(summary["picture"] == picture) & (summary["metric"] == metric)]
            trace = _dots(rows, [names.index(each) for each in rows["label"]], told, number)
            figure.add_trace(trace.update(showlegend=column == 1), row=1, col=column)
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.4, -0.6])
    figure.update_xaxes(title_text="share of test answers", range=[-0.04, 1.04])
    n = int(summary["n"].max())
    title = f"answers where a prior competes with the image (n = {n}; bars: 95 % interval)"
    figure.update_layout(
        template="plotly_white", width=1180, height=220 + 34 * len(names),
        title={"text": title, "x": 0.01, "y": 0.98, "yanchor": "top", "font": {"size": 17}},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        margin={"l": 280, "r": 30, "t": 90, "b": 90},
        legend={"orientation": "h", "y": 0.01, "yref": "container", "yanchor": "bottom", "x": 0},
        meta=drawn_by(methods),
    )  # fmt: skip
    return figure


def accuracies(result: Result) -> "go.Figure":
    """Pictures and pairs right by method, with 95 % intervals, about their own pictures and others'; chance dotted."""
    from plotly.subplots import make_subplots

    summary = result.summary()
    names = list(dict.fromkeys(summary["method"]))
    titles = {"individual": "images correct", "pair": "both of a pair correct"}
    titles = {name: title for name, title in titles.items() if name in set(summary["metric"])}
    figure = make_subplots(
        cols=len(titles), shared_yaxes=True, subplot_titles=list(titles.values()), horizontal_spacing=0.04
    )
    for column, metric in enumerate(titles, 1):
        for number, picture in enumerate((OWN, STRANGER)):
            rows = summary[(summary["picture"] == picture) & (summary["metric"] == metric)]
            trace = _dots(
                rows.assign(label=rows["method"]), [*map(names.index, rows["method"])], picture, number, "chance"
            )
            figure.add_trace(trace.update(showlegend=column == 1), row=1, col=column)
        chance = summary[summary["metric"] == metric]["baseline"].mean()
        figure.add_vline(x=chance, line={"dash": "dot", "color": "#888888"}, row=1, col=column)
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.4, -0.6], automargin=True
    )
    figure.update_xaxes(title_text="share", range=[-0.04, 1.04])
    title = f"answers by method (n = {int(summary['n'].max())}; bars: 95 % interval; dotted: chance)"
    return figure.update_layout(
        template="plotly_white", width=960, height=210 + 44 * len(names), title={"text": title, "x": 0.01},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13}, margin={"t": 90, "b": 60},
        meta=drawn_by(accuracies),
    )  # fmt: skip


def _dots(rows: pd.DataFrame, places: list[int], name: str, number: int, against: str = "greedy") -> "go.Scatter":
    import plotly.graph_objects as go

    told = [
        f"{row['label']}: {row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}), {against} "
        f"{row['baseline']:.3f}"
        for row in rows.to_dict("records")
    ]
    return go.Scatter(
        x=rows["mean"],
        y=[place - 0.12 + 0.24 * number for place in places],
        error_x={"array": rows["ci_high"] - rows["mean"], "arrayminus": rows["mean"] - rows["ci_low"]},
        mode="markers",
        marker={"color": figures.COLOURS[number], "size": 9, "symbol": ("circle", "diamond")[number]},
        name=name,
        text=told,
        hovertemplate="%{text}<extra></extra>",
    )


def doses(result: Result, *, kind: str, metric: str) -> "go.Figure":
    """Right or usual answers on validation against lambda or a, with greedy dotted."""
    methods = [each for each in result.table["method"].drop_duplicates() if each.startswith(kind)]
    what = {"truth": "correct answers", "prior": "usual answers"}[metric]
    figure = figures.lines(
        result, x="dose", colour="method", metric=metric, title=f"{kind}: {what} on validation by {DOSES[kind]}",
        where={"split": VALIDATION, "picture": OWN, "step": WHOLE, "method": methods},
    )  # fmt: skip
    _renamed(figure, "greedy").update_xaxes(title_text=DOSES[kind])
    recipe = drawn_by(doses, kind=kind, metric=metric)
    return figure.update_layout(width=820, meta=recipe)


def along(result: Result) -> "go.Figure":
    """The dependency on the picture at each token of the plain greedy answer, with how many answers got so far."""
    steps = sorted(set(result.table["step"]) - {WHOLE})
    held = result.table.loc[result.table["dependency"].notna()]
    where = {"split": TEST, "method": GREEDY, "step": [step for step in steps if step in set(held["step"])]}
    figure = figures.lines(
        result, x="step", colour="picture", metric="dependency", where=where,
        title="dependency on the image along the answer (PDM)",
    )  # fmt: skip
    counts = held[held["picture"] == OWN].groupby("step")["example"].nunique()
    ticks = [f"{step + 1}<br>n = {counts.get(step, 0)}" for step in where["step"]]
    _renamed(figure, "no dependency").update_xaxes(
        title_text="token of the answer", tickvals=where["step"], ticktext=ticks
    )
    # Ticks of two lines push the title of the axis down to where the caption is otherwise.
    figure.update_annotations(selector={"name": "caption"}, yshift=-98)
    return figure.update_layout(width=820, margin={"b": 130}, meta=drawn_by(along))


def _renamed(figure: "go.Figure", name: str) -> "go.Figure":
    """What the unedited run stands for in these figures."""
    for trace in figure.data:
        if trace.name == "unedited":
            trace.name, trace.hovertemplate = name, f"{name}: %{{y:.3g}}<extra></extra>"
    return figure
