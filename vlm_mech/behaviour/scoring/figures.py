"""Figures of a scoring run, drawn from its `Result` alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.behaviour.answering.by_category import categories, has_categories
from vlm_mech.behaviour.scoring.comparisons import same_verdicts
from vlm_mech.behaviour.scoring.measures import RANDOM, STARTS, SUBSTRING
from vlm_mech.behaviour.scoring.study import BEST, BOTH, BY_CATEGORY, MEAN, OWN, floor_in
from vlm_mech.data.nouns import nouns_in
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


# Figures


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Accuracies by scoring, the prompts apart, the bias of order, and where scorings agree."""
    found = {"accuracies": accuracies(result), "prompts": prompts(result)}
    if result.table["position_bias"].notna().to_numpy().any():
        found["order_bias"] = order_bias(result)
    if has_categories(result):
        found["categories"] = categories(result, **BY_CATEGORY, named=["model", "scoring"])
    return found | {"agreement": agreement(result)}


def accuracies(result: Result) -> "go.Figure":
    """Dots with intervals: each scoring over its prompts, on own and on another pair's pictures, beside chance."""
    titles = {
        "individual": "images correct", "pair": "both of a pair correct", "set": "all of a set correct",
        "relaxed": "pairs matched",
    }  # fmt: skip
    summary = result.summary()
    shown = summary[(summary["order"] == BOTH) & summary["prompt"].isin([MEAN, BEST]) & (summary["n"] > 0)]
    titles = {name: title for name, title in titles.items() if name in set(shown["metric"])}
    marks = {
        "own, mean of prompts": (OWN, MEAN, COLOURS[0], "circle", 0.17),
        "own, best prompt on validation": (OWN, BEST, COLOURS[1], "diamond", 0.0),
        "another's, mean of prompts": (floor_in(shown), MEAN, "#777777", "circle-open", -0.17),
    }
    figure = _panels(titles.values())
    labels = _labels(result, shown)
    for column, metric in enumerate(titles, 1):
        for name, (view, prompt, colour, symbol, shift) in marks.items():
            chosen = (shown["metric"] == metric) & (shown["view"] == view) & (shown["prompt"] == prompt)
            _dots(figure, shown[chosen], labels, name, colour, symbol, shift, column)
        chance = shown[shown["metric"] == metric]["baseline"].mean()
        figure.add_vline(x=chance, line={"dash": "dot", "color": "#888888"}, row=1, col=column)
    figure.update_xaxes(range=[-0.04, 1.04], dtick=0.25, title_text="share")
    counts = f"n = {int(shown['n'].max())} {_noun(result)}; bars: 95 % interval; dotted: {_chance(shown)}"
    return _styled(figure, labels, "the same answers, scored in several ways", counts, accuracies, width=1100)


def order_bias(result: Result) -> "go.Figure":
    """Dots with intervals: how much oftener an option is chosen when it is listed first, by scoring and prompt."""
    summary = result.summary("position_bias")
    shown = summary[(summary["n"] > 0) & (summary["view"] == OWN) & ~summary["prompt"].isin([MEAN, BEST])]
    shown = shown[~shown["scoring"].isin([SUBSTRING, STARTS, RANDOM])]
    if len(set(shown["prompt"])) > 1:
        shown = shown.assign(scoring=shown["scoring"] + ", " + shown["prompt"].map(_short))
    labels, figure = _labels(result, shown), _panels([""])
    _dots(figure, shown, labels, "bias", COLOURS[0], "circle", 0.0, 1)
    figure.add_vline(x=0, line={"dash": "dot", "color": "#888888"})
    figure.update_xaxes(range=[-1.05, 1.05], title_text="chosen when first minus when second")
    counts = f"n = {int(shown['n'].max())} {_noun(result)}; bars: 95 % interval over {_noun(result)}"
    return _styled(figure, labels, "position bias of options", counts, order_bias).update_layout(showlegend=False)


def prompts(result: Result) -> "go.Figure":
    """Share of single pictures right by scoring and prompt, averaged over orders."""
    summary = result.summary("individual")
    shown = summary[(summary["view"] == OWN) & (summary["order"] == BOTH) & ~summary["prompt"].isin([BEST])]
    labels = _labels(result, shown)
    across = [each for each in dict.fromkeys(shown["prompt"]) if each != MEAN] + [MEAN]
    values = _square(shown, labels, across)
    return _matrix(values, across, labels, "accuracy by prompt (share of images)", prompts, shown, _noun(result))


def agreement(result: Result) -> "go.Figure":
    """Share of pictures on which two scorings give the same verdict, each with its first prompt, options as given."""
    cells, values, n_pairs = same_verdicts(result)
    labels = _labels(result, pd.DataFrame(cells))
    names = [labels[cell["model"], cell["scoring"]] for cell in cells]
    shown = pd.DataFrame({"n": [n_pairs]})
    title = "same verdict on an image (share)"
    return _matrix(values, names, dict.fromkeys(names), title, agreement, shown, _noun(result), down=names)


def _noun(result: Result) -> str:
    return nouns_in(result.provenance).many


def _chance(shown: pd.DataFrame) -> str:
    """What the dotted lines are."""
    return "chance of two options" if set(shown[shown["metric"] == "individual"]["baseline"]) == {0.5} else "chance"


def _labels(result: Result, shown: pd.DataFrame) -> dict[tuple[str, str], str]:
    """What each model's scoring is called: without the model where there is one only."""
    several = len(set(result.table["model"])) > 1
    pairs = shown[["model", "scoring"]].drop_duplicates().to_numpy()
    return {
        (str(one), str(two)): f"{str(one).rpartition('/')[2]}: {two}" if several else str(two) for one, two in pairs
    }


def _panels(titles: Any) -> "go.Figure":
    from plotly.subplots import make_subplots

    titles = list(titles)
    return make_subplots(cols=len(titles), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)


def _dots(
    figure: "go.Figure", rows: pd.DataFrame, labels: Mapping[tuple[str, str], str], name: str, colour: str, symbol: str,
    shift: float, column: int,
) -> None:  # fmt: skip
    import plotly.graph_objects as go

    places = {key: number for number, key in enumerate(labels)}
    keys = [(str(row["model"]), str(row["scoring"])) for _, row in rows.iterrows()]
    error = {"type": "data", "array": rows["ci_high"] - rows["mean"], "arrayminus": rows["mean"] - rows["ci_low"]}
    figure.add_trace(
        go.Scatter(
            x=rows["mean"], y=[places[key] - shift for key in keys], error_x=error | {"thickness": 1.5, "width": 3},
            mode="markers", marker={"color": colour, "symbol": symbol, "size": 9}, name=name, legendgroup=name,
            showlegend=column == 1, text=[labels[key] for key in keys],
            hovertemplate="%{text}: %{x:.3f}<extra></extra>",
        ), row=1, col=column,
    )  # fmt: skip


def _square(
    shown: pd.DataFrame, labels: Mapping[tuple[str, str], str], across: Sequence[str]
) -> Float[np.ndarray, "down across"]:
    values = {(str(row["model"]), str(row["scoring"]), str(row["prompt"])): row["mean"] for _, row in shown.iterrows()}
    return np.array([[values.get((*key, prompt), np.nan) for prompt in across] for key in labels])


def _matrix(
    values: Float[np.ndarray, "down across"], across: Sequence[str], labels: Mapping[Any, str | None], title: str,
    function: "Callable[..., go.Figure]", shown: pd.DataFrame, noun: str, *, down: Sequence[str] | None = None,
) -> "go.Figure":  # fmt: skip
    import plotly.graph_objects as go

    rows = list(labels.values()) if down is None else list(down)
    text = [["" if np.isnan(one) else f"{one:.2f}" for one in row] for row in values]
    heat = go.Heatmap(
        x=list(range(len(across))), y=rows, z=np.where(np.isnan(values), None, values), text=text,
        texttemplate="%{text}", colorscale="Viridis", zmin=0, zmax=1, xgap=2, ygap=2, hoverongaps=False,
    )  # fmt: skip
    figure = go.Figure(heat)
    # Shortened names may be alike: places are numbers.
    figure.update_xaxes(tickvals=list(range(len(across))), ticktext=[_short(each) for each in across], tickangle=90)
    figure.update_yaxes(type="category")
    made = _styled(figure, dict.fromkeys(rows), title, f"n = {int(shown['n'].max())} {noun}", function)
    return made.update_yaxes(autorange="reversed", tickmode="auto", range=None)


def _short(text: str) -> str:
    return text if len(text) <= 44 else f"{text[:41]}..."


def _styled(
    figure: "go.Figure",
    labels: Mapping[Any, str | None],
    title: str,
    caption: str,
    function: "Callable[..., go.Figure]",
    *,
    width: int = 760,
) -> "go.Figure":
    rows = len(labels)
    text = {"text": title, "x": 0.01, "y": 0.98, "yanchor": "top", "font": {"size": 17}}
    figure.update_layout(
        template="plotly_white", title=text | {"subtitle": {"text": caption, "font": {"size": 11}}}, width=width,
        height=230 + 42 * rows, font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        margin={"l": 20, "r": 30, "t": 100, "b": 110}, meta=drawn_by(function),
        legend={"orientation": "h", "y": 0.01, "yref": "container", "yanchor": "bottom", "x": 0},
    )  # fmt: skip
    if not all(labels.values()):
        return figure
    return figure.update_yaxes(
        tickmode="array", tickvals=list(range(rows)), ticktext=list(labels.values()), range=[rows - 0.5, -0.5],
        automargin=True,
    )  # fmt: skip
