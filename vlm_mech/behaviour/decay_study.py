"""What blurring does to answers, and to where they are read: the table, findings and pictures of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
from PIL import Image

from vlm_mech import figures
from vlm_mech.behaviour.decay import NONE, answers_at, compared, decayed, resized, with_images
from vlm_mech.behaviour.decay_probes import CONTROLS, DECODED, PROBES
from vlm_mech.data.pairs import Pairs, partners
from vlm_mech.image import load_image
from vlm_mech.result import Metric, Result
from vlm_mech.site import Site
from vlm_mech.statistics import share_interval
from vlm_mech.swap import RECOVERED, swap_states

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from vlm_mech.model import VLM

AXES = ("view", "level", "layer")
OWN, STRANGER = "picture", "another's picture"
TWIN, STRANGE_TWIN = "counterfactual", "another's counterfactual"
FLOORS = {OWN: STRANGER, TWIN: STRANGE_TWIN}
"""What is asked about: the pictures of the pairs, and beside them what shows how much never changes anyhow."""
SWAPS = {"image": "swap of image", "last": "swap of last"}
WHOLE = -1
"""Layer of what is asked of the whole model."""
SAME = Metric(
    "same",
    "share",
    "E: share of answers that are the answer to the picture as it is; no answer is never the same",
    against="clear picture",
)
UNCHANGED = Metric(
    "unchanged", "share", "C: share of answers that were that answer at every level so far", against="clear picture"
)
CORRECT = Metric("correct", "share", "share of right answers", against="clear picture")
CORRECT_UNCHANGED = Metric(
    "correct_unchanged", "share", "share of right answers among those unchanged so far", against="clear picture"
)
METRICS = (UNCHANGED, SAME, CORRECT, CORRECT_UNCHANGED, RECOVERED, DECODED)


def decay(
    vlm: "VLM",
    pairs: Pairs,
    levels: Sequence[str],
    *,
    seed: int = 0,
    mechanism: Sequence[str] = (),
    letters: bool = False,
    max_new_tokens: int = 8,
    memory: int | str | None = None,
) -> pd.DataFrame:
    """One batch at every level: answers about both pictures of its pairs and about those of another pair, and swaps.

    Args:
        seed: which other pair of the batch lends its pictures for the floor of what is unchanged.
        mechanism: levels at which the states of one picture of each pair are swapped into the run on the other, both at
            that level (see `swap.swap_states`), whatever is answered.
        letters: whether answers are letters of options.

    Returns:
        One row per example and cell of `AXES`; what a view does not measure is missing.

    Raises:
        UsageError: there is one pair alone.
    """
    others = partners(len(pairs), seed=seed)
    answers: dict[str, dict[str, list[str]]] = {view: {} for two in FLOORS.items() for view in two}
    swaps = []
    for level in levels:
        if level == NONE:
            texts = answers_at(vlm, pairs, [None] * len(pairs), max_new_tokens=max_new_tokens)
            answers = {view: held | {level: texts} for view, held in answers.items()}
            continue
        shown = with_images(pairs, level)
        first, second = ([load_image(each.image) for each in some] for some in (shown.base, shown.counterfactual))
        for (view, floor), pictures in zip(FLOORS.items(), (first, second), strict=True):
            answers[view][level] = answers_at(vlm, pairs, pictures, max_new_tokens=max_new_tokens)
            strange = [pictures[other] for other in others]
            answers[floor][level] = answers_at(vlm, pairs, strange, max_new_tokens=max_new_tokens)
        if level in mechanism:
            swaps.append(_swapped(vlm, shown, memory).assign(level=level))
    tables = []
    names = [pair.id for pair in pairs]
    for (view, floor), right in zip(FLOORS.items(), (pairs.answer, pairs.counterfactual_answer), strict=True):
        for each in (view, floor):
            table = compared(answers[each], answers[view][levels[0]], right, letters=letters)
            tables.append(table.assign(view=each, layer=WHOLE, example=names * len(levels)))
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat([*tables, *swaps], ignore_index=True)
    table["level"] = pd.Categorical(table["level"], list(levels), ordered=True)
    return table.assign(group=table["example"].map(groups), skipped=table["skipped"].fillna("") if mechanism else "")


def _swapped(vlm: "VLM", pairs: Pairs, memory: int | str | None) -> pd.DataFrame:
    sites = [Site("llm.resid_post", layer) for layer in vlm.llm_layers]
    table, _ = swap_states(vlm, pairs, sites, tuple(SWAPS), directions=("noising",), only_correct=False, memory=memory)
    kept = table[["example", "layer", "recovered", "recovered_baseline", "skipped"]]
    return kept.assign(view=table["span"].map(SWAPS))


# What follows


def findings(result: Result, pairs: Pairs, levels: Sequence[str]) -> tuple[str, ...]:
    """How much stays unchanged under all decay, above which floor, for whom, and where the answer is read meanwhile."""
    found = [f"{len(pairs)} examples of {pairs.name}."]
    summary = result.summary()
    for view, right in ((OWN, pairs.answer), (TWIN, pairs.counterfactual_answer)):
        answers = dict(zip([pair.id for pair in pairs], right, strict=True))
        found += _unchanged(result, summary, view, answers, levels[-1])
    unread = result.table[result.table["view"].isin(list(FLOORS)) & (result.table["unread"] == True)]  # noqa: E712
    if len(unread):
        found.append(f"{len(unread)} answers say nothing and count as changed.")
    return (*found, *_reading(result), *_decoded(result))


def _unchanged(result: Result, summary: pd.DataFrame, view: str, answers: dict[str, str], last: str) -> tuple[str, ...]:
    """What is said of the answers about one of the pictures."""
    floor = FLOORS[view]
    rows = {each: _row(summary, each, last, "unchanged") for each in (view, floor)}
    difference = result.contrast(*({"view": each, "level": last, "layer": WHOLE} for each in rows), "unchanged")
    table = result.table[(result.table["view"] == view) & (result.table["level"] == last)]
    by_clean = [
        f"{_share(table.loc[table['clean_right'] == right, 'unchanged'])} of those {name}"
        for right, name in ((True, "right on the clear picture"), (False, "wrong there"))
    ]
    asked = f"answers about the {view}"
    found = [
        f"{asked}, unchanged at every level to the last ({last}): {_told(rows[view])}; the floor, another pair's "
        f"picture at every level but the same question: {_told(rows[floor])}; above it by {difference['mean']:+.3f} "
        f"({difference['ci_low']:+.3f} to {difference['ci_high']:+.3f}); unchanged are {' and '.join(by_clean)}."
    ]
    kept = table[table["unchanged"] == 1]
    if len(kept):
        commonest = pd.Series(answers)[kept["example"]].value_counts().iloc[0]
        found.append(
            f"{asked}, of the unchanged {_share(kept['correct'])} are right; always naming their commonest right "
            f"answer would be right in {commonest / len(kept):.3f}."
        )
    return tuple(found)


def _reading(result: Result) -> tuple[str, ...]:
    """From which layer on the last token holds the answer, and until which the image does, at each level."""
    found = []
    table = pd.DataFrame(result.table[result.table["view"].isin(list(SWAPS.values()))])
    for level in table["level"].drop_duplicates():
        held = table[(table["level"] == level) & table["recovered"].notna()]
        n = len(set(held["example"]))
        if n < 2:
            found.append(
                f"at {_level(level)} the two pictures of {n} pair(s) are told apart; nothing is said of layers."
            )
            continue
        ends = []
        for view, rising in ((SWAPS["image"], False), (SWAPS["last"], True)):
            at = result.crossing({"view": view, "level": level}, "layer", 0.5, rising=rising, metric="recovered")
            ends.append(" to ".join("none" if at[end] is None else str(at[end]) for end in ("low", "high")))
            ends[-1] = f"{'none' if at['at'] is None else at['at']} ({ends[-1]})"
        found.append(
            f"at {_level(level)} (n = {n}): a swap of the image no longer turns the answer from layer {ends[0]} on, "
            f"one of the last token does from layer {ends[1]} on."
        )
    return tuple(found)


def _decoded(result: Result) -> tuple[str, ...]:
    """What probes fitted on clear pictures find after the first and the last block, at each level."""
    if DECODED not in result.metrics:
        return ()
    summary = result.summary(DECODED.name)
    held = summary[summary["n"] > 0]
    found = []
    for level in held["level"].drop_duplicates():
        rows = held[held["level"] == level]
        ends = {view: rows[rows["view"] == view].sort_values("layer").iloc[[0, -1]] for view in PROBES.values()}
        told = "; ".join(
            f"{view} after block {row['layer']} {_told(row)}" for view, two in ends.items() for _, row in two.iterrows()
        )
        worst = rows[rows["view"].isin(list(CONTROLS.values()))]["mean"].max()
        found.append(
            f"at {_level(level)}, share of answers found by probes of clear pictures: {told}; with shuffled labels at "
            f"most {worst:.3f}, chance {rows['baseline'].iloc[0]:.3f}."
        )
    return tuple(found)


def _level(level: str) -> str:
    return f"kernel {level}" if level.isdigit() else level


def _row(summary: pd.DataFrame, view: str, level: str, metric: str) -> pd.Series:
    chosen = (summary["view"] == view) & (summary["level"] == level) & (summary["metric"] == metric)
    return summary[chosen].iloc[0]


def _told(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"


def _share(values: pd.Series) -> str:
    n = len(values)
    if not n:
        return "none (n = 0)"
    hits = int(values.sum())
    low, high = share_interval(hits, n)
    return f"{hits / n:.3f} ({low:.3f} to {high:.3f}, n = {n})"


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Curves of the answers by level, and of the swaps by layer, a panel a level."""
    behaviour = {"view": [each for two in FLOORS.items() for each in two], "layer": WHOLE}
    titles = {
        "unchanged": "answers that never changed (C)", "same": "answers as on the clean picture (E)",
        "correct": "right answers", "correct_unchanged": "right answers among the unchanged",
    }  # fmt: skip
    found = {
        name: figures.lines(result, x="level", colour="view", metric=name, where=behaviour, title=title)
        for name, title in titles.items()
    }
    if set(SWAPS.values()) & set(result.table["view"]):
        found["read_layers"] = figures.lines(
            result, x="layer", colour="level", metric="recovered", facet="view", where={"view": list(SWAPS.values())},
            title="where the answer is read as the pictures decay: recovered fraction",
        )  # fmt: skip
    if set(PROBES.values()) & set(result.table["view"]):
        views = [*PROBES.values(), *CONTROLS.values()]
        found["decoded"] = figures.lines(
            result, x="layer", colour="level", metric=DECODED.name, facet="view", where={"view": views},
            title="what probes of clear pictures read as the pictures decay: share of answers",
        )  # fmt: skip
    return found


def ladder(pairs: Pairs, levels: Sequence[str], *, n: int = 3) -> tuple[tuple[str, Image.Image], ...]:
    """The pictures of some pairs at every level."""
    shown = []
    for pair in list(pairs)[:n]:
        whole = resized(load_image(pair.image))
        for level in levels:
            if level != NONE:
                shown.append((f"{pair.question} {pair.answer}: {_level(level)}", decayed(whole, level)))
    return tuple(shown)
