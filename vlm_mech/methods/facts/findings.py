"""What a page about facts says, in sentences made from its numbers; layers are named by claims alone."""

from collections.abc import Mapping, Sequence

from vlm_mech.methods.facts.data import Known
from vlm_mech.methods.facts.study import AGREEING, Reading, agreed
from vlm_mech.results.claim import LEVEL, Claim
from vlm_mech.results.result import Result


def findings(
    result: Result, known: Known, found: Sequence[Reading], claims: Mapping[str, Sequence[Claim]]
) -> tuple[str, ...]:
    """What is known, where each method says that the answer is read, whether they agree, and what is claimed.

    Args:
        claims: by part.
    """
    return (of_known(result, known), *where(found), agreement(found), *claimed(claims), *not_asked(result))


def of_known(result: Result, known: Known) -> str:
    """How much the model knows, and of how many pairs that is told, in a sentence."""
    counts = known.counts
    text = (
        f"The model answers {counts['right']} of {counts['questions']} questions of {known.pairs.name} correctly "
        f"({counts['known']} of {counts['subjects']} subjects in some wording; answers.csv)"
    )
    n = result.table["example"].nunique()
    groups = result.table.drop_duplicates("example")["group"].nunique()
    asked = "whatever its answers" if known.everything else "with both answers known"
    return f"{text}; {n} pairs of subjects are used, {asked} (n = {groups} groups with disjoint subjects)."


def where(found: Sequence[Reading]) -> tuple[str, ...]:
    """Where each method says that the answer is read, a sentence a method that claims it."""
    texts = []
    for each in found:
        if each.layer is None or each.layer not in each.claimed:
            continue
        text = f"{each.rule.part}: {each.rule.what} layer {each.layer} (95 % of resamples: {each.low} to {each.high})"
        late = "as reported for other models" if each.late else "earlier than reported for other models"
        half = "the upper half" if each.late else "the lower half"
        texts.append(f"{text}, in {half} of the decoder, {late}.")
    silent = [f"{each.rule.part} ({each.rule.line})" for each in found if not each.claimed]
    return (*texts, f"No claim about where the answer is read: {', '.join(silent)}.") if silent else tuple(texts)


def agreement(found: Sequence[Reading]) -> str:
    """Whether the methods that change the run agree, in a sentence."""
    asked = [each for each in found if each.rule.part in AGREEING]
    names = list(dict.fromkeys(each.rule.part for each in asked))
    if len(names) < 2:
        return "Agreement needs at least two of knockout, swap, heads and attribution."
    if not any(each.claimed for each in asked):
        return f"None of {', '.join(names)} claims where the answer is read."
    layers = agreed(found)
    if layers:
        told = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
        return f"Agreement: the intervals of {', '.join(names)} have {told} in common."
    silent = list(dict.fromkeys(each.rule.part for each in asked if not each.claimed))
    if silent:
        return f"No full agreement: {', '.join(silent)} makes no claim about where the answer is read."
    return f"No agreement: the intervals of {', '.join(names)} have no layer in common."


def claimed(claims: Mapping[str, Sequence[Claim]]) -> tuple[str, ...]:
    """How many claims each method declared, and how many hold, in a sentence; all are in claims.json."""
    texts = []
    for part, some in claims.items():
        made = [claim for claim in some if claim.made]
        text = f"{part}: {len(made)} of {len(some)}"
        if any(claim.gates for claim in made):
            text += f" ({sum(not claim.lost for claim in made)} pass every gate that was run)"
        texts.append(text)
    return (
        "Claims confirmed on held-out pairs, of those selected (sign-flip test, p < "
        f"{LEVEL}, Holm within each method): {', '.join(texts)} (claims.json).",
    )


def not_asked(result: Result) -> tuple[str, ...]:
    """Which parts could not be asked, and why."""
    return tuple(f"The part {name} could not be run: {why}." for name, why in result.provenance["not asked"].items())
