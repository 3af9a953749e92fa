"""What a run of visual decay says, in sentences made from its numbers."""

from collections.abc import Sequence

import pandas as pd

from vlm_mech.behaviour.blur_decay.blur import level_name
from vlm_mech.behaviour.blur_decay.claims import SPANS, swaps_of
from vlm_mech.behaviour.blur_decay.probes import CONTROLS, DECODED, PROBES
from vlm_mech.behaviour.blur_decay.study import COUNTERFACTUAL, FLOORS, OWN, WHOLE
from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.layer_swap.claims import words_of
from vlm_mech.methods.layer_swap.findings import what_it_does
from vlm_mech.methods.layer_swap.study import LOGIT_DIFF
from vlm_mech.results.claim import sentences
from vlm_mech.results.result import Result, told_share


def findings(result: Result, pairs: Pairs, levels: Sequence[str]) -> tuple[str, ...]:
    """How much stays unchanged under all decay, above which floor, for whom, and where the answer is read meanwhile."""
    nouns = nouns_of(pairs)
    found = [f"{len(pairs)} {nouns.many} of {pairs.name}."]
    summary = result.summary()
    views = ((OWN, pairs.answer), (COUNTERFACTUAL, pairs.counterfactual_answer))
    for view, right in views if pairs.made is None else views[:1]:
        answers = dict(zip([pair.id for pair in pairs], right, strict=True))
        found += _unchanged(result, summary, view, answers, levels[-1], nouns.one)
    unread = result.table[result.table["view"].isin(list(FLOORS)) & (result.table["unread"] == True)]  # noqa: E712
    if len(unread):
        found.append(f"{len(unread)} answers are unreadable and count as changed.")
    if guessed := result.provenance.get("guessing"):
        found.append(
            f"Chance: random options at every level would never change in {guessed['unchanged'][-1]:.2g}, and "
            f"match the clear image's answer at the last level in {guessed['same'][-1]:.3f}."
        )
    if pairs.made == "none":
        found.append("Items have no counterfactual image, so no states were patched (--counterfactual makes one).")
    return (*found, *reading(result), *_decoded(result))


def _unchanged(
    result: Result, summary: pd.DataFrame, view: str, answers: dict[str, str], last: str, one: str
) -> tuple[str, ...]:
    """What is said of the answers about one of the pictures."""
    floor = FLOORS[view]
    rows = {each: _row(summary, each, last, "unchanged") for each in (view, floor)}
    difference = result.contrast(*({"view": each, "level": last, "layer": WHOLE} for each in rows), "unchanged")
    table = result.table[(result.table["view"] == view) & (result.table["level"] == last)]
    by_clean = [
        f"{told_share(table[table['clean_right'] == right], 'unchanged')} of those {name}"
        for right, name in ((True, "correct on the clear image"), (False, "wrong on it"))
    ]
    asked = f"Answers about the {view}"
    found = [
        f"{asked}, unchanged at every level up to {last}: {_told(rows[view])}. Floor, the same question about another "
        f"{one}'s image: {_told(rows[floor])}. Difference {difference['mean']:+.3f} "
        f"({difference['ci_low']:+.3f} to {difference['ci_high']:+.3f}). Unchanged: {' and '.join(by_clean)}."
    ]
    kept = table[table["unchanged"] == 1]
    if len(kept):
        commonest = pd.Series(answers)[kept["example"]].value_counts().iloc[0]
        found.append(
            f"{asked}: {told_share(kept, 'correct')} of the unchanged are correct; always naming the majority answer "
            f"would be correct in {commonest / len(kept):.3f}."
        )
    return tuple(found)


def reading(result: Result) -> tuple[str, ...]:
    """At which layers a swap of the image, or of the last token, flips the answer, at each level: what is claimed."""
    swaps = swaps_of(result)
    if swaps is None:
        return ()
    found, made = [sentences(result.claims)[0]], [claim for claim in result.claims if claim.made]
    layers = swaps.table["layer"].unique().tolist()
    for level in swaps.table["level"].drop_duplicates():
        held = swaps.table[(swaps.table["level"] == level) & swaps.table["recovered"].notna()]
        n = len(set(held["example"]))
        if n < 2:
            found.append(f"At {level_name(level)} the model distinguishes the two images of {n} pair(s).")
        told, silent = [], []
        for span in SPANS.values():
            some = [claim for claim in made if (claim.about["level"], claim.about["span"]) == (level, span)]
            if some:
                told.append(f"patching {words_of(span)} {what_it_does(some, layers, LOGIT_DIFF.name)}")
            else:
                silent.append(words_of(span))
        told += [f"no claim is made about patching {' or '.join(silent)}"] if silent else []
        found.append(f"At {level_name(level)} (n = {n}): {'; '.join(told)}.")
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
            f"{view} after the {end} block: {_told(row)}"
            for view, two in ends.items()
            for end, (_, row) in zip(("first", "last"), two.iterrows(), strict=True)
        )
        worst = rows[rows["view"].isin(list(CONTROLS.values()))]["mean"].max()
        found.append(
            f"At {level_name(level)}, accuracy of probes fitted on clear images: {told}; with shuffled labels "
            f"at most {worst:.3f}, chance {rows['baseline'].iloc[0]:.3f}."
        )
    return tuple(found)


def _row(summary: pd.DataFrame, view: str, level: str, metric: str) -> pd.Series:
    chosen = (summary["view"] == view) & (summary["level"] == level) & (summary["metric"] == metric)
    return summary[chosen].iloc[0]


def _told(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"
