"""What a steering run says, in sentences made from its numbers."""

from typing import Any

import pandas as pd

from vlm_mech.methods.steering.study import ENOUGH_RANDOM
from vlm_mech.results.claim import sentences
from vlm_mech.results.result import Result

SHOWN = {"against": "images that show the other answer", "toward": "images that show its answer"}
CONTROLS = {
    "random": "random directions of equal norm",
    "shuffled": "directions from shuffled labels",
    "orthogonal": "orthogonal directions",
}


def findings(result: Result, slopes: pd.DataFrame, effects: pd.DataFrame, *, claiming: bool = True) -> tuple[str, ...]:
    """Everything a run says: the direction, its claims, slopes beside those of controls, and side effects.

    Args:
        slopes: as `study.slopes` gives them.
        effects: rows of `side_effects.COLUMNS`.
        claiming: whether any claim was looked for.
    """
    told = result.provenance["direction"]
    parts = told["n_pairs"]
    found = [
        f"The direction for {told['contrast']} was computed on {parts['train']} pairs; span, layer and dose were "
        f"chosen on {parts['validation']} validation pairs. All results are on {parts['test']} test pairs."
    ]
    n_random = slopes.loc[slopes["direction"].astype(str).str.startswith("random"), "direction"].nunique()
    if n_random < ENOUGH_RANDOM:
        found.append(
            f"Only {n_random} random directions were run; below {ENOUGH_RANDOM} no claim is made and no p is given."
        )
    elif claiming:
        found += sentences(result.claims)
    return (*found, *sloped(slopes, result.metrics[0].unit), *accuracies(result), *besides(effects))


def sloped(slopes: pd.DataFrame, unit: str) -> tuple[str, ...]:
    """The slope of the difference over doses, and how many controls have one as large, a sentence a picture."""
    found = []
    for picture in slopes["picture"].drop_duplicates() if len(slopes) else ():
        rows = slopes[slopes["picture"] == picture]
        (own,) = rows[rows["direction"] == "found"].to_dict("records")
        text = f"{SHOWN[picture].capitalize()}: a dose of one state norm changes the difference by {own['slope']:+.2f} "
        text += f"({own['low']:+.2f} to {own['high']:+.2f}) {unit} on average over doses. The slope is negative in "
        text += f"{100 * own['anti_steerable']:.0f} % of {own['n']} examples. Mean Spearman correlation of dose and "
        text += f"difference: {own['spearman']:.2f}"
        beside = [_beside(rows, kind, own) for kind in CONTROLS if rows["direction"].str.startswith(kind).any()]
        found.append(f"{text}{'. Controls with a slope as large: ' if beside else ''}{', '.join(beside)}.")
    return tuple(found)


def _beside(rows: pd.DataFrame, kind: str, own: dict[str, Any]) -> str:
    """How many controls of a kind have a slope as large as the found direction."""
    some = rows.loc[rows["direction"].str.startswith(kind), "slope"]
    rank = f"; p = {own['beaten_by']:.2g}" if kind == "random" and own["beaten_by"] == own["beaten_by"] else ""
    larger = int((some >= own["slope"]).sum())
    return f"{larger} of {len(some)} {CONTROLS[kind]} ({some.min():+.2f} to {some.max():+.2f}{rank})"


def accuracies(result: Result) -> tuple[str, ...]:
    """Accuracy and the share that says the direction's answer under the dose chosen, both ways, by picture."""
    told, found = result.provenance["direction"], []
    table = result.table[(result.table["direction"] == "found") & (result.table["span"] == told["span"])]
    table = table[(table["layer"] == told["layer"]) & (table["dose"].abs() == told["dose"])]
    each: Any = table.groupby(["picture", "dose"], sort=True)
    for (picture, dose), rows in each:
        says, right = (f"{100 * rows[name].mean():.0f} %" for name in ("says_toward", "right"))
        before, known = (f"{100 * rows[f'{name}_baseline'].mean():.0f} %" for name in ("says_toward", "right"))
        found.append(
            f"{SHOWN[str(picture)].capitalize()}, dose {dose:+g}: the model gives the direction's answer in {says} "
            f"(unsteered {before}) and the correct one in {right} ({known}), n = {rows['example'].nunique()}."
        )
    return tuple(found)


def besides(effects: pd.DataFrame) -> tuple[str, ...]:
    """What the largest doses do to other questions, and to text."""
    found = []
    cells: Any = effects.groupby(["what", "questions", "dose"], sort=False)
    for (what, questions, dose), rows in cells:
        largest = effects.loc[(effects["what"] == what) & (effects["questions"] == questions), "dose"].abs().max()
        if abs(dose) < largest:
            continue
        each = [
            f"{row['direction']} {row['change']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
            for row in rows.to_dict("records")
        ]
        name = {"accuracy": "change of accuracy", "kl": "KL divergence of the next token (nats)"}.get(
            str(what), "change of repetition in generated text"
        )
        found.append(f"Side effects, {questions}, dose {dose:+g}: {name} {', '.join(each)}, n = {rows['n'].iloc[0]}.")
    return tuple(found)
