"""What blurring does to answers, and to where they are read: the table, findings and pictures of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import binomtest

from vlm_mech import figures
from vlm_mech.behaviour.decay import NONE, answers_at, compared, decayed, resized, strangers, with_images
from vlm_mech.behaviour.decay_probes import CONTROLS, DECODED, PROBES
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.image import load_image
from vlm_mech.result import Metric, Result
from vlm_mech.site import Site
from vlm_mech.swap import RECOVERED, swap_states

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from vlm_mech.model import VLM

AXES = ("view", "level", "layer")
OWN, STRANGER = "answers", "answers about another's picture"
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
    others: Sequence[Pair],
    levels: Sequence[str],
    *,
    mechanism: Sequence[str] = (),
    letters: bool = False,
    max_new_tokens: int = 8,
    memory: int | str | None = None,
) -> pd.DataFrame:
    """One batch at every level: answers about its pictures, about those of `others`, and layer swaps at some levels.

    Args:
        others: a pair for each, whose picture takes the place of its own; the floor of what is unchanged.
        mechanism: levels at which both pictures of each pair are brought to that level and the states of one are
            swapped into the run on the other (see `swap.swap_states`), whatever is answered.
        letters: whether answers are letters of options.

    Returns:
        One row per example and cell of `AXES`; what a view does not measure is missing.
    """
    own, stranger = (
        {level: answers_at(vlm, some, level, max_new_tokens=max_new_tokens) for level in levels}
        for some in (pairs, strangers(pairs, others))
    )
    clean, right = own[levels[0]], pairs.answer
    names = [pair.id for pair in pairs]
    tables = []
    for view, answers in ((OWN, own), (STRANGER, stranger)):
        table = compared(answers, clean, right, letters=letters)
        tables.append(table.assign(view=view, layer=WHOLE, example=names * len(levels)))
    for level in mechanism:
        tables.append(_swapped(vlm, with_images(pairs, level), memory).assign(level=level))
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat(tables, ignore_index=True)
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
    last = levels[-1]
    summary = result.summary()
    found = [f"{len(pairs)} examples of {pairs.name}; {len(pairs.refused)} could not be read."]
    rows = {view: _row(summary, view, last, "unchanged") for view in (OWN, STRANGER)}
    difference = result.contrast(*({"view": view, "level": last, "layer": WHOLE} for view in rows), "unchanged")
    found.append(
        f"unchanged at every level to the last ({last}): {_told(rows[OWN])} of answers; the floor, another's picture "
        f"at every level but the same question: {_told(rows[STRANGER])}; above it by {difference['mean']:+.3f} "
        f"({difference['ci_low']:+.3f} to {difference['ci_high']:+.3f})."
    )
    table = result.table[(result.table["view"] == OWN) & (result.table["level"] == last)]
    for right, name in ((True, "answered right on the clean picture"), (False, "answered wrong there")):
        some = table[table["clean_right"] == right]
        found.append(f"of those {name}: {_share(some['unchanged'])} unchanged.")
    kept = table[table["unchanged"] == 1]
    if len(kept):
        answers = pd.Series(dict(zip([pair.id for pair in pairs], pairs.answer, strict=True)))
        commonest = answers[kept["example"]].value_counts().iloc[0]
        found.append(
            f"of the unchanged, {_share(kept['correct'])} are right; always naming their commonest answer would be "
            f"right in {commonest / len(kept):.3f}."
        )
    unread = result.table[(result.table["view"] == OWN) & (result.table["unread"] == True)]  # noqa: E712
    if len(unread):
        found.append(f"{len(unread)} answers say nothing and count as changed.")
    return (*found, *_reading(result), *_decoded(result))


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
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return f"{hits / n:.3f} ({interval.low:.3f} to {interval.high:.3f}, n = {n})"


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Curves of the answers by level, and of the swaps by layer, a panel a level."""
    behaviour = {"view": [OWN, STRANGER], "layer": WHOLE}
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


def partners(pairs: Pairs, *, seed: int) -> list[Pair]:
    """For each pair another one, drawn so that every picture is used once and none meets its own question."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    found: dict[int, Any] = {
        int(one): list(pairs)[int(other)] for one, other in zip(order, np.roll(order, 1), strict=True)
    }
    return [found[number] for number in range(len(pairs))]
