"""What a run says of an image that is removed, frozen or exchanged, in sentences made from its numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.data.nouns import nouns_of
from vlm_mech.errors import TooFewError
from vlm_mech.methods.horizon.claims import COSTS, FREE, LOSES, fewest, what_of
from vlm_mech.methods.horizon.data import EXCHANGED, HALF, OTHER, REMOVED, TEXT, Scan
from vlm_mech.methods.horizon.horizons import Horizon, Tolerance
from vlm_mech.methods.horizon.study import KL, SAID, WRONG, same_texts
from vlm_mech.results.claim import Claim, sentences
from vlm_mech.results.claimed_layers import numbers, placed, runs
from vlm_mech.results.generated_answers import told
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

WORDS = {
    REMOVED: "without the image",
    HALF: "without a random half of the image tokens",
    TEXT: "without random text tokens",
    OTHER: "with the other image's tokens",
}


def findings(
    result: Result, pairs: "Pairs", scan: Scan, tolerance: Tolerance, horizons: Sequence[Horizon]
) -> tuple[str, ...]:
    """How many examples count, the floor, what is claimed arm by arm, and what generated answers say.

    Raises:
        TooFewError: fewer than two examples count, so that nothing can be said.
    """
    found = [
        used(result, pairs),
        of_floors(result),
        sentences(result.claims)[0],
        *few(result, scan, tolerance, horizons),
    ]
    found += [each for arm in scan.asked for each in of_arm(result, scan, arm, horizons)]
    spoken = told(result.table, result.axes, result.metrics[-1].name)
    return (*found, *spoken, *same(result))


def used(result: Result, pairs: "Pairs") -> str:
    """How many examples count, in a sentence.

    Raises:
        TooFewError: fewer than two do.
    """
    first = result.table.drop_duplicates("example")
    wrong, what = int((first["skipped"] == WRONG).sum()), nouns_of(pairs).many
    n = len(first) - wrong
    if n < 2:
        raise TooFewError(
            f"{n} of {len(first)} {what} of {pairs.name} are answered correctly; at least two are needed "
            "(only_correct=False, or --all of the command, keeps the others too)"
        )
    left = f"; {wrong} are excluded because they are {WRONG}" if wrong else ""
    return f"{n} of {len(first)} {what} of {pairs.name} are used{left}."


def of_floors(result: Result) -> str:
    """What is left where the image is never seen, of the controls, and with the other picture: all from the start."""
    summary = {name: result.summary(name).set_index(list(result.axes)) for name in (SAID.name, KL.name)}
    texts = []
    for arm, words in WORDS.items():
        if (arm, 0) in summary[SAID.name].index:
            share, apart = summary[SAID.name].loc[(arm, 0)], summary[KL.name].loc[(arm, 0)]
            interval = f"{100 * share['ci_low']:.0f} to {100 * share['ci_high']:.0f}"
            texts.append(f"{words} {100 * share['mean']:.0f} % ({interval}; KL {apart['mean']:.2f} nats)")
    before = 100 * float(summary[SAID.name]["baseline"].iloc[0])
    return f"Share with the answer, edited from the first layer: {', '.join(texts)}; unedited {before:.0f} %."


def few(result: Result, scan: Scan, tolerance: Tolerance, horizons: Sequence[Horizon]) -> tuple[str, ...]:
    """Why nothing can be claimed to be lost nowhere, or no horizon be told, where there are too few examples for it."""
    held = result.table[result.table["skipped"] == ""]
    n, needed = len(set(held["group"])), fewest(scan, tolerance)
    if n >= needed:
        return ()
    text = f"A claim that at most {tolerance} are lost needs {needed} groups of examples; this run has {n}"
    short = next((each for each in horizons if not each.told), None)
    if short is not None:
        return (f"{text}. The selection half has a horizon, but {short} in that half.",)
    return (f"{text} (with fewer, the rule finds a later horizon or none).",)


def of_arm(result: Result, scan: Scan, arm: str, horizons: Sequence[Horizon]) -> tuple[str, ...]:
    """What is claimed of an arm: from where on nothing is lost, and at which layers it costs."""
    made = [claim for claim in result.claims if claim.made and claim.about["arm"] == arm]
    found = [free(claim, horizons) for claim in made if what_of(claim) == FREE]
    for what, label in ((LOSES, "answers lost"), (COSTS, "log-probability changes by")):
        some = [claim for claim in made if what_of(claim) == what]
        if some:
            layers, every = [claim.about["layer"] for claim in some], list(scan.layers(arm))
            does = "this loses answers" if what == LOSES else "this makes the answer less likely"
            at = placed(runs(layers, every), first=every[0], last=every[-1])
            begun = "done" if arm.startswith(EXCHANGED) else "begun"
            found.append(f"{arm}: {begun} {at}, {does} ({numbers(some, label)}).")
    return tuple(found) or (f"No claim is made about {arm}.",)


def free(claim: Claim, horizons: Sequence[Horizon]) -> str:
    """From where on nothing is lost, with the bounds of the held-out half and the horizons of both, in a sentence."""
    own = next(each for each in horizons if each.arm == claim.about["arm"])
    sure = f"{own.kl_below:.2g} nats and {100 * own.lost_below:.1f} %"
    other = own.word(own.other_half, own.n_other)
    of_halves = f"{own.declared}, 95 % interval {own.low} to {own.word(own.high)}; on the held-out half {other}"
    lost = f"; fails {', '.join(claim.lost)}" if claim.lost else ""
    text = f"{claim.says} (upper 95 % bounds on the held-out half: {sure}; p = {claim.p:.2g}{lost}). Horizon on the "
    return f"{text[0].upper()}{text[1:]}selection half {of_halves}."


def same(result: Result) -> tuple[str, ...]:
    """How many generated answers are those of the unedited run to the letter, in a sentence."""
    table = same_texts(result.table)
    if table is None:
        return ()
    row = pd.Series({"low": table["same text"].min(), "high": table["same text"].max()})
    ends = f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %"
    return (f"Generated answers are identical to the unedited ones in {ends}, depending on the cell (generated.csv).",)
