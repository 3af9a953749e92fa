"""Figures of a tuning towards looking: answers before and after, and the tuning itself; pictures with their answers."""

from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from vlm_mech.behaviour.debias.data import IN_CONFLICT
from vlm_mech.behaviour.debias.study import BASE, PRIOR, TRUTH, TUNED
from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.image import side_by_side
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

LOW = 0.12
STYLE: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 13},
    "height": 470,
    "margin": {"l": 80, "r": 30, "t": 90, "b": 100},
}


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Both figures."""
    return {"before_after": before_after(result), "training": training(result)}


def pictures(result: Result, pairs: Pairs, *, n: int = 4) -> tuple[tuple[str, Image.Image], ...]:
    """Some pictures in conflict with the question, the true answer, and what was said before and after."""
    table, shown = result.table[result.table["task"] == IN_CONFLICT], []
    for pair in list(pairs)[:n]:
        rows = table[table["example"] == f"{IN_CONFLICT}/{pair.id}"]
        before, after = (rows[rows["state"] == state]["answer"].iloc[0] for state in (BASE, TUNED))
        shown.append((f"{pair.question} {pair.answer} (before: {before}; after: {after})", side_by_side(pair.images)))
    return tuple(shown)


def before_after(result: Result) -> "go.Figure":
    """Shares of true answers by task and of the prior's answer in conflict, by state, with 95 % intervals."""
    from plotly.subplots import make_subplots

    n_tasks = result.table["task"].nunique()
    figure = make_subplots(
        cols=2, column_widths=[n_tasks / (n_tasks + 1.2), 1.2 / (n_tasks + 1.2)], horizontal_spacing=0.09,
        subplot_titles=["true answers", "prior answers"],
    )  # fmt: skip
    for number, state in enumerate(result.table["state"].unique()):
        for column, metric in ((1, TRUTH), (2, PRIOR)):
            rows = result.summary(metric.name)
            rows = rows[(rows["state"] == state) & (rows["n"] > 0)]
            figure.add_trace(_bars(rows, state, COLOURS[number], shown=column == 1), row=1, col=column)
    figure.update_yaxes(range=[0, 1.05])
    figure.update_yaxes(title_text="share of answers", col=1)
    counts = sorted({int(n) for n in result.summary(TRUTH.name)["n"] if n > 0})
    n = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
    _caption(figure, f"{n} per bar; 95 % intervals over examples")
    return figure.update_layout(
        **STYLE, width=980, barmode="group", title={"text": "answers before and after fine-tuning", "x": 0.01},
        legend={"orientation": "h", "y": 1.1, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        meta=drawn_by(before_after),
    )  # fmt: skip


def _bars(rows: pd.DataFrame, state: str, colour: str, *, shown: bool) -> "go.Bar":
    import plotly.graph_objects as go

    spread = {"array": rows["ci_high"] - rows["mean"], "arrayminus": rows["mean"] - rows["ci_low"]}
    return go.Bar(
        x=rows["task"],
        y=rows["mean"],
        name=state,
        legendgroup=state,
        showlegend=shown,
        marker={"color": colour},
        error_y={"type": "data", "symmetric": False, "thickness": 1.5, **spread},
        # A number has no room in a low bar; hovering shows it.
        text=[f"{mean:.2f}" if mean > LOW else "" for mean in rows["mean"]],
        textposition="inside",
        insidetextanchor="start",
        hovertemplate="%{x}: %{y:.3f}<extra></extra>",
    )


def training(result: Result) -> "go.Figure":
    """Along the steps: the loss or the mean reward of sampled answers, and correct answers on the validation pairs."""
    from plotly.subplots import make_subplots

    told = result.provenance["training"]
    history = pd.DataFrame(told["history"])
    rewarded = "reward_conflict" in history
    first = "mean reward of sampled answers" if rewarded else "cross-entropy of true answers (nats per token)"
    figure = make_subplots(cols=2, horizontal_spacing=0.1, subplot_titles=[first, "validation accuracy"])
    lines = {"loss": "loss"}
    if rewarded:
        lines = {"reward_conflict": "reward, in conflict", "reward": "reward, all"}
    for number, (column, name) in enumerate(lines.items()):
        figure.add_trace(_line(history["step"], history[column], name, COLOURS[3 + number]), row=1, col=1)
    held = pd.concat([pd.DataFrame([{"step": 0, **told["before"]}]), history[history["conflict"].notna()]])
    for number, (column, name) in enumerate((("conflict", IN_CONFLICT), ("usual", "usual"))):
        if column not in held:
            continue
        trace = _line(held["step"], held[column], f"validation, {name}", COLOURS[number])
        # Of one group alone there is no interval.
        ends = [each or (value, value) for each, value in zip(held[f"{column}_ends"], held[column], strict=True)]
        trace.error_y = {
            "type": "data", "symmetric": False, "thickness": 1.2,
            "array": [high - value for (_, high), value in zip(ends, held[column], strict=True)],
            "arrayminus": [value - low for (low, _), value in zip(ends, held[column], strict=True)],
        }  # fmt: skip
        figure.add_trace(trace, row=1, col=2)
    figure.add_vline(x=told["chosen"], line={"dash": "dot", "color": "#888888"}, row=1, col=2)  # pyright: ignore
    figure.update_yaxes(range=[-0.03, 1.06], col=2)
    figure.update_yaxes(**({"range": [-0.03, 1.06]} if rewarded else {"rangemode": "tozero"}), col=1)
    figure.update_xaxes(title_text="steps")
    _caption(figure, f"dotted: the checkpoint chosen; right: 95 % intervals, n = {int(held['n'].iloc[0])}")
    return figure.update_layout(
        **STYLE, width=1080, title={"text": f"fine-tuning, objective: {told['recipe']['objective']}", "x": 0.01},
        meta=drawn_by(training),
    )  # fmt: skip


def _line(xs: pd.Series, ys: pd.Series, name: str, colour: str) -> "go.Scatter":
    import plotly.graph_objects as go

    mode = "lines+markers" if len(xs) < 60 else "lines"
    return go.Scatter(x=xs, y=ys, mode=mode, name=name, line={"color": colour, "width": 2})


def _caption(figure: "go.Figure", text: str) -> None:
    figure.add_annotation(
        text=text, xref="paper", yref="paper", x=0, y=0, yshift=-80, showarrow=False, xanchor="left", font={"size": 11},
        name="caption",
    )  # fmt: skip
