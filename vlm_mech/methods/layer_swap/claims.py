"""What a layer swap could say: where a swap of some tokens turns the answer, and where it does not.

Every layer is asked, none is chosen: Holm's correction over all that is declared holds for all claims at once, and so
for whatever is read off several of them, such as the last layer up to which all turn the answer.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Replace
from vlm_mech.methods.gates.manifold import EditOf
from vlm_mech.methods.gates.removals import Removed, RemovedOf
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.claiming import FEWEST, least
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

TURNS, NO_LONGER, NOT_YET, MOVES = "turns", "no longer", "not yet", "moves"
DOES = {
    NOT_YET: "does not yet turn the answer",
    TURNS: "turns the answer",
    NO_LONGER: "no longer turns the answer",
    MOVES: "moves the answer",
}
"""What is claimed: that it goes more than half of the way to the other one; less; or that it moves."""
RECOVERED, HALF = "recovered", 0.5
ENDS = {"image": NO_LONGER, "last": NOT_YET, "last+answer": NOT_YET}
"""Spans of which it is claimed too where they do not turn the answer: below others that do, or above."""
WORDS = {
    "image": "the image tokens",
    "question": "the question tokens",
    "class": "the class token",
    "last": "the last token alone",
    "last+answer": "the last token and those of the answer",
}


def pool_of(layers: Sequence[int]) -> Pool:
    """What can be said of a result, at layers where no swap's effect is known beforehand (`data.open_layers`)."""
    return partial(pool, layers=layers)


def claimable(spans: Sequence[str]) -> tuple[str, ...]:
    """The spans of which something can be claimed; a swap of `all` gives the other run at any layer."""
    return tuple(span for span in spans if "all" not in span.split("+"))


def kind_of(span: str, kind: str) -> str:
    """The kind of claims about a span."""
    return f"{span} {kind}"


def words_of(span: str) -> str:
    """What is swapped, in words."""
    return WORDS.get(span, f"the tokens of {span}")


def edit_of(sites: Sequence[Site]) -> EditOf:
    """The swap of a claim that says what one does, towards the other picture, in the decoder."""

    def made(claim: Claim, pairs: "Pairs") -> Replace | None:
        removed = removed_of(sites)(claim)
        return None if removed is None else Replace(removed.sites, removed.span, source=pairs.counterfactual)

    return made


def removed_of(sites: Sequence[Site]) -> RemovedOf:
    """The states that such a swap exchanges."""
    known = {site.layer: site for site in sites if site.stream == "llm"}

    def found(claim: Claim) -> Removed | None:
        does, about = claim.kind.removeprefix(f"{claim.about['span']} "), claim.about
        asked = does in (TURNS, MOVES) and about["direction"] == "noising"
        # Tokens of answers are in no prompt.
        if not asked or about["layer"] not in known or "answer" in about["span"].split("+"):
            return None
        return Removed((known[about["layer"]],), joined(about["span"]), exchanged=True)

    return found


def pool(result: Result, *, layers: Sequence[int] | None = None) -> tuple[Claim, ...]:
    """Every direction, span and layer.

    A swap turns the answer where the mean recovered fraction is above a half, and the difference of the answers falls
    by more than `claiming.least`: fractions of a gap that has no meaning, as in a random model, can be large. It does
    not where the fraction is below a half, and the difference falls less, by as much, than at the layer where it should
    fall most: the first for the image, the last for the last token. Other spans may move the answer without turning it,
    as may all of pairs that have no recovered fraction.

    Args:
        layers: those of which something can be said; by default all.
    """
    if "layer" not in result.axes:
        return ()
    enough, found = least(result, result.metrics[1].name), []
    spans = result.table[["direction", "span"]].drop_duplicates().to_numpy().tolist()
    for direction, span in spans:
        if claimable((span,)):
            rows = result.table[(result.table["direction"] == direction) & (result.table["span"] == span)]
            every = sorted(rows["layer"].unique().tolist())
            some = [layer for layer in every if layers is None or layer in layers]
            about = {"direction": direction, "span": span}
            has_fraction = rows.loc[rows[RECOVERED].notna(), _group(rows)].nunique() >= FEWEST
            kinds = (TURNS, ENDS.get(span, MOVES)) if has_fraction else (MOVES,)
            for kind in kinds:
                ends = {NO_LONGER: every[0], NOT_YET: every[-1]}
                asked = [layer for layer in some if layer != ends.get(kind)]
                found += [_claim(result, kind, about | {"layer": each}, ends.get(kind), enough) for each in asked]
    return tuple(found)


def _group(rows: pd.DataFrame) -> str:
    return "group" if "group" in rows else "example"


def _claim(result: Result, kind: str, about: dict[str, Any], end: int | None, enough: float) -> Claim:
    """A claim about a cell.

    Args:
        end: the layer that a cell is compared with, in which a swap of its span turns the answer most.
    """
    metric = result.metrics[1]
    cell = {axis: about[axis] for axis in result.axes}
    says = f"{about['direction']}: swapping {words_of(about['span'])} at layer {about['layer']} {DOES[kind]}"
    lowers = Condition(metric.name, cell, "below", enough, less="baseline", says=f"{metric.name} changes by")
    half = Condition(RECOVERED, cell, "above" if kind == TURNS else "below", bound=HALF)
    if end is None:
        conditions = (half, lowers) if kind == TURNS else (lowers,)
    else:
        less = f"{metric.name} less that after a swap at layer {end}:"
        conditions = (half, Condition(metric.name, cell, "above", enough, less=cell | {"layer": end}, says=less))
    unit = metric.unit if kind == MOVES else result.metric(RECOVERED).unit
    return Claim(kind_of(about["span"], kind), about, says, conditions, unit)
