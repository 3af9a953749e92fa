"""What a scoring run says: sentences from its numbers, any two scorings or models compared, and its figures."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.behaviour.scoring import GENERATION, LETTERS, OPTIONS, RANDOM, SIMILARITY, STARTS, SUBSTRING, relaxed
from vlm_mech.behaviour.scoring_study import AS_GIVEN, AXES, BEST, BOTH, CHANCE, MEAN, OWN, SCORES, STRANGER
from vlm_mech.classify.findings import Paired, mcnemar
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.figures import COLOURS
from vlm_mech.result import Result
from vlm_mech.statistics import corrected

if TYPE_CHECKING:
    import plotly.graph_objects as go

Cell = dict[str, str]
UNDECIDED = (RANDOM,)
"""Scorings whose verdicts are expected values, which McNemar's test does not take."""


@dataclass(frozen=True)
class Compared:
    """Two cells on the same pairs: McNemar's exact test of a verdict, and the paired difference of its share."""

    one: Cell
    other: Cell
    metric: str
    counts: Paired
    difference: Mapping[str, float]
    p_corrected: float = float("nan")


def compared(result: Result, one: Cell, other: Cell, metric: str = "pair") -> Compared:
    """Any two scorings, prompts, orders or models compared on the same pairs.

    Returns:
        How many pairs only one of them has right with McNemar's exact two-sided p, and `one - other` with its paired
        bootstrap interval.

    Raises:
        UsageError: a cell that does not exist, or holds shares instead of verdicts.
    """
    difference = result.contrast(one, other, metric)
    values, cells = result.matrix(metric), result.cells
    verdicts = []
    for cell in (one, other):
        held = values[:, (cells[list(cell)] == pd.Series(cell)).all(axis=1).to_numpy()][:, 0]
        if not np.isin(held, (0, 1)).all():
            raise UsageError(f"{metric} of {cell} is no verdict of 0 or 1 for every pair; McNemar's test needs one")
        verdicts.append(held.astype(bool))
    return Compared(one, other, metric, mcnemar(*verdicts), difference)


def comparisons(result: Result) -> list[Compared]:
    """Each scoring against the model's word-boundary reading, and each model against the first; Holm over all.

    Both pictures of a pair have to be right. Each scoring is taken with its first prompt, options as given: what was
    fixed before looking.
    """
    held = [cell for cell in _decided(result) if cell["scoring"] not in UNDECIDED]
    found = []
    for one, other in itertools.combinations(held, 2):
        models, scorings = one["model"] == other["model"], one["scoring"] == other["scoring"]
        contrastive = SIMILARITY in (one["scoring"], other["scoring"])
        loose = one["scoring"] in (SUBSTRING, STARTS)
        if (one["scoring"] == GENERATION and (models or contrastive)) or (scorings and not models and not loose):
            found.append(compared(result, other, one))
    if not found:
        return []
    adjusted = corrected(np.array([each.counts.p for each in found]), "holm")
    return [Compared(each.one, each.other, each.metric, each.counts, each.difference, float(p))
            for each, p in zip(found, adjusted, strict=True)]  # fmt: skip


def _decided(result: Result) -> list[Cell]:
    """For each model and scoring the cell of its first prompt, options as given where they are listed."""
    cells = result.cells
    cells = cells[(cells["view"] == OWN) & ~cells["prompt"].isin([MEAN, BEST])]
    found = []
    for _, rows in cells.groupby(["model", "scoring"], sort=False):
        rows = rows[rows["prompt"] == rows["prompt"].iloc[0]]
        given = rows[rows["order"] == AS_GIVEN]
        found.append({str(name): str(value) for name, value in (given if len(given) else rows).iloc[0].items()})
    return found


# Sentences


def findings(
    result: Result, pairs: Pairs, best: Mapping[tuple[str, str], str], n_validation: int, left_out: Sequence[str]
) -> tuple[str, ...]:
    """Each scoring with its interval, chance and floor; the best prompt; matching; looser rules; order; comparisons."""
    summary = result.summary()
    found = [
        f"{len(pairs)} pairs of {pairs.name}. Chance between two options is "
        f"{CHANCE['individual']} a picture, {CHANCE['pair']} for both of a pair and {CHANCE['relaxed']} for matching a "
        "pair; ties count against the model; intervals are 95 % bootstrap over pairs."
    ]
    found += left_out
    if len(pairs) < 2:
        return tuple(found)
    for model, scoring in _tested(result):
        found.append(f"{model}, {scoring}: {_accuracy(summary, model, scoring, best, n_validation)}")
    for model, scoring in _tested(result):
        found += _matching(result, summary, model, scoring)
    for model in dict.fromkeys(result.table["model"]):
        found += [*_looser(summary, str(model)), *_order(summary, str(model))]
    return (*found, *_comparisons(result))


def _tested(result: Result) -> list[tuple[str, str]]:
    cells = result.cells[["model", "scoring"]].drop_duplicates()
    wanted = (GENERATION, OPTIONS, LETTERS, SIMILARITY)
    return [(str(model), str(scoring)) for model, scoring in cells.to_numpy() if scoring in wanted]


def _at(summary: pd.DataFrame, metric: str, model: str, scoring: str, **where: str) -> str:
    """Mean and interval of a cell; of the mean over prompts and both orders unless `where` says otherwise."""
    wanted = {"model": model, "view": OWN, "scoring": scoring, "order": BOTH, "prompt": MEAN, "metric": metric} | where
    rows = summary[(summary[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    if rows.empty or not rows["n"].iloc[0]:
        return "none"
    row = rows.iloc[0]
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"


def _accuracy(
    summary: pd.DataFrame, model: str, scoring: str, best: Mapping[tuple[str, str], str], n_validation: int
) -> str:
    one, two = (_at(summary, metric, model, scoring) for metric in ("individual", "pair"))
    floors = [_at(summary, metric, model, scoring, view=STRANGER) for metric in ("individual", "pair")]
    text = (
        f"{one} of pictures and {two} of pairs right, mean of prompts; about another pair's pictures {floors[0]} and "
    )
    text += f"{floors[1]}."
    if (model, scoring) in best and scoring != SIMILARITY:
        chosen = [_at(summary, metric, model, scoring, prompt=BEST) for metric in ("individual", "pair")]
        text += f" With the prompt best on {n_validation} validation pairs, {best[model, scoring]!r}: "
        text += f"{chosen[0]} and {chosen[1]}."
    return text


def _matching(result: Result, summary: pd.DataFrame, model: str, scoring: str) -> list[str]:
    """Relaxed scoring beside strict, and what the sign as printed would have said."""
    told = _at(summary, "relaxed", model, scoring)
    if told == "none":
        return []
    floor, strict = _at(summary, "relaxed", model, scoring, view=STRANGER), _at(summary, "pair", model, scoring)
    text = (
        f"{model}, {scoring}: {told} of pairs matched in one decision (chance 0.5; floor {floor}), for {strict} with "
    )
    text += "both pictures right. "
    if scoring == SIMILARITY:
        missing = result.table[(result.table["scoring"] == scoring) & (result.table["view"] == OWN)]
        missing = int(missing[missing["prompt"] == MEAN]["relaxed_ratio"].isna().sum())
        ratio = _at(summary, "relaxed_ratio", model, scoring)
        refused = f"; {missing} pairs with a similarity of 0 or less have none" if missing else ""
        return [f"{text}That is the sum of cosines; their ratio matches {ratio}{refused}."]
    cell = next(each for each in _decided(result) if each["model"] == model and each["scoring"] == scoring)
    rows = result.table[(result.table[list(AXES)] == pd.Series(cell)).all(axis=1)]
    scores = rows[list(SCORES)].to_numpy().reshape(-1, 2, 2)
    ours, printed = (relaxed(scores, kind="perplexity", as_printed=sign).mean() for sign in (False, True))
    return [
        f"{text}With prompt {cell['prompt']!r} alone {ours:.3f}; the inequality as the paper prints it would have "
        f"given {printed:.3f}, the pairs that are not matched."
    ]


def _looser(summary: pd.DataFrame, model: str) -> list[str]:
    told = _at(summary, "individual", model, GENERATION)
    if told == "none":
        return []
    names = {
        SUBSTRING: "as a plain substring", STARTS: "if the option begins with the answer's first word or there is none",
        RANDOM: "when an unread answer is worth a random option",
    }  # fmt: skip
    each = [f"{_at(summary, 'individual', model, scoring)} {words}" for scoring, words in names.items()]
    shown = "; ".join(one for one in each if not one.startswith("none"))
    unread = _at(summary, "unread", model, GENERATION)
    return [
        f"{model}: by looser rules, of the same generated answers {shown}; by whole words {told}. {unread} of answers "
        "name no option, or several, and count as not right."
    ]


def _order(summary: pd.DataFrame, model: str) -> list[str]:
    each = [
        f"{scoring} {told}"
        for scoring in (GENERATION, OPTIONS, LETTERS)
        if (told := _at(summary, "position_bias", model, scoring)) != "none"
    ]
    if not each:
        return []
    return [f"{model}: an option is chosen more often when it is listed first than second by {'; '.join(each)}."]


def _comparisons(result: Result) -> list[str]:
    """Those that judge a pair unlike in a sentence each, the others in one."""
    made = comparisons(result)
    found, same = [], []
    for each in made:
        names = [f"{cell['scoring']} of {cell['model']} ({cell['prompt']!r})" for cell in (each.one, each.other)]
        if not each.counts.only_one + each.counts.only_other:
            same.append(f"{names[0]} as {names[1]}")
            continue
        by = each.difference
        found.append(
            f"pairs with both pictures right: only by {names[0]} {each.counts.only_one}, only by {names[1]} "
            f"{each.counts.only_other}; difference {by['mean']:+.3f} ({by['ci_low']:+.3f} to {by['ci_high']:+.3f}, "
            f"n = {by['n']}), McNemar's exact p {_p(each.p_corrected)} (Holm over {len(made)})."
        )
    return [*found, f"the same verdict on every pair: {'; '.join(same)}."] if same else found


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


# Figures


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Accuracies by scoring, the prompts apart, the bias of order, and where scorings agree."""
    found = {"accuracies": accuracies(result), "prompts": prompts(result)}
    if result.table["position_bias"].notna().to_numpy().any():
        found["order_bias"] = order_bias(result)
    return found | {"agreement": agreement(result)}


def accuracies(result: Result) -> "go.Figure":
    """Dots with intervals: each scoring over its prompts, on own and on another pair's pictures, beside chance."""
    titles = {"individual": "pictures right", "pair": "both of a pair right", "relaxed": "pairs matched"}
    summary = result.summary()
    shown = summary[(summary["order"] == BOTH) & summary["prompt"].isin([MEAN, BEST]) & (summary["n"] > 0)]
    marks = {
        "own, mean of prompts": (OWN, MEAN, COLOURS[0], "circle", 0.17),
        "own, best prompt on validation": (OWN, BEST, COLOURS[1], "diamond", 0.0),
        "another pair's, mean of prompts": (STRANGER, MEAN, "#777777", "circle-open", -0.17),
    }
    figure = _panels(titles.values())
    labels = _labels(result, shown)
    for column, metric in enumerate(titles, 1):
        for name, (view, prompt, colour, symbol, shift) in marks.items():
            chosen = (shown["metric"] == metric) & (shown["view"] == view) & (shown["prompt"] == prompt)
            _dots(figure, shown[chosen], labels, name, colour, symbol, shift, column)
        figure.add_vline(x=CHANCE[metric], line={"dash": "dot", "color": "#888888"}, row=1, col=column)
    figure.update_xaxes(range=[-0.04, 1.04], dtick=0.25, title_text="share")
    counts = f"n = {int(shown['n'].max())} pairs; bars: 95 % interval; dotted: chance of two options"
    return _styled(figure, labels, "ways of scoring the same pairs", counts, "accuracies", width=1100)


def order_bias(result: Result) -> "go.Figure":
    """Dots with intervals: how much oftener an option is chosen when it is listed first, by scoring and prompt."""
    summary = result.summary("position_bias")
    shown = summary[(summary["n"] > 0) & (summary["view"] == OWN) & ~summary["prompt"].isin([MEAN, BEST])]
    shown = shown.assign(scoring=shown["scoring"] + ", " + shown["prompt"])
    shown = shown[~shown["scoring"].str.startswith((SUBSTRING, STARTS, RANDOM))]
    labels, figure = _labels(result, shown), _panels([""])
    _dots(figure, shown, labels, "bias", COLOURS[0], "circle", 0.0, 1)
    figure.add_vline(x=0, line={"dash": "dot", "color": "#888888"})
    figure.update_xaxes(range=[-1.05, 1.05], title_text="chosen when listed first, less when listed second (share)")
    counts = f"n = {int(shown['n'].max())} pairs; bars: 95 % interval over pairs"
    return _styled(figure, labels, "does the order of the options decide?", counts, "order_bias").update_layout(
        showlegend=False
    )


def prompts(result: Result) -> "go.Figure":
    """Share of single pictures right by scoring and prompt, averaged over orders."""
    summary = result.summary("individual")
    shown = summary[(summary["view"] == OWN) & (summary["order"] == BOTH) & ~summary["prompt"].isin([BEST])]
    labels = _labels(result, shown)
    across = [each for each in dict.fromkeys(shown["prompt"]) if each != MEAN] + [MEAN]
    values = _square(shown, labels, across)
    return _matrix(values, across, labels, "right answers by prompt (share of pictures)", "prompts", shown)


def agreement(result: Result) -> "go.Figure":
    """Share of pictures on which two scorings give the same verdict, each with its first prompt, options as given."""
    cells = [cell for cell in _decided(result) if cell["scoring"] not in UNDECIDED]
    table = result.table
    verdicts = []
    for cell in cells:
        rows = table[(table[list(AXES)] == pd.Series(cell)).all(axis=1)]
        verdicts.append(rows.set_index("example")[["right_1", "right_2"]].to_numpy().ravel())
    labels = _labels(result, pd.DataFrame(cells))
    names = [labels[cell["model"], cell["scoring"]] for cell in cells]
    values = np.array([[float((one == other).mean()) for other in verdicts] for one in verdicts])
    shown = pd.DataFrame({"n": [len(verdicts[0]) // 2]})
    title = "same verdict on a picture (share)"
    return _matrix(values, names, dict.fromkeys(names), title, "agreement", shown, down=names)


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
    name: str, shown: pd.DataFrame, *, down: Sequence[str] | None = None,
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
    made = _styled(figure, dict.fromkeys(rows), title, f"n = {int(shown['n'].max())} pairs", name)
    return made.update_yaxes(autorange="reversed", tickmode="auto", range=None)


def _short(text: str) -> str:
    return text if len(text) <= 44 else f"{text[:41]}..."


def _styled(
    figure: "go.Figure", labels: Mapping[Any, str | None], title: str, caption: str, name: str, *, width: int = 760
) -> "go.Figure":
    rows = len(labels)
    text = {"text": title, "x": 0.01, "y": 0.98, "yanchor": "top", "font": {"size": 17}}
    figure.update_layout(
        template="plotly_white", title=text | {"subtitle": {"text": caption, "font": {"size": 11}}}, width=width,
        height=230 + 42 * rows, font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        margin={"l": 20, "r": 30, "t": 100, "b": 110}, meta={"drawn_by": f"{__name__}:{name}", "options": {}},
        legend={"orientation": "h", "y": 0.01, "yref": "container", "yanchor": "bottom", "x": 0},
    )  # fmt: skip
    if not all(labels.values()):
        return figure
    return figure.update_yaxes(
        tickmode="array", tickvals=list(range(rows)), ticktext=list(labels.values()), range=[rows - 0.5, -0.5],
        automargin=True,
    )  # fmt: skip
