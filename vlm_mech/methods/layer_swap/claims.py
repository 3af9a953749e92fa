"""What a layer swap could say: where patching some tokens flips the answer, and where it does not.

Every layer is asked, none is selected: Holm's correction over all that is declared holds for all claims at once, and so
for whatever is read off several of them, such as the last layer up to which all flip the answer.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Replace
from vlm_mech.methods.gates.manifold import ClaimEdit, EditOf
from vlm_mech.methods.gates.removals import Removed, RemovedOf
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL, DONOR, OTHER, SAME
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.claiming import FEWEST, least
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

TURNS, NO_LONGER, NOT_YET, MOVES, CARRIES = "turns", "no longer", "not yet", "moves", "carries"
DOES = {
    NOT_YET: "does not yet flip the answer",
    TURNS: "flips the answer",
    NO_LONGER: "no longer flips the answer",
    MOVES: "shifts the answer",
    CARRIES: "also flips the answer",
}
"""What is claimed: that it goes more than half of the way to the other one; less; or that it moves. The last is claimed
of states of another object, which so carry the answer from one question to another."""
RECOVERED, HALF = "recovered", 0.5
ENDS = {"image": NO_LONGER, "subject_last": NO_LONGER, "last": NOT_YET, "last+answer": NOT_YET}
"""Spans for which claims also say where they do not flip the answer: below others that do, or above."""
WORDS = {
    "image": "the image tokens",
    "question": "the question tokens",
    "subject": "the tokens of the subject",
    "subject_last": "the last token of the subject",
    "class": "the class token",
    "last": "the last token alone",
    "last+answer": "the last token and the answer's tokens",
}
THERE = "minus the effect of states with the same answer:"
"""What is told of a swap beside the same one with the states of another pair that has the run's own answer."""


def pool_of(layers: Sequence[int]) -> Pool:
    """What can be said of a result, at layers where no swap's effect is known beforehand (`data.open_layers`)."""
    return partial(pool, layers=layers)


def claimable(spans: Sequence[str]) -> tuple[str, ...]:
    """The spans of which something can be claimed; a swap of `all` gives the other run at any layer."""
    return tuple(span for span in spans if "all" not in span.split("+"))


def kind_of(span: str, kind: str) -> str:
    """The kind of claims about a span."""
    return f"{span} {kind}"


def does_of(claim: Claim) -> str:
    """What a claim says that a swap does: one of `DOES`."""
    return next(does for does in DOES if claim.kind.endswith(f" {does}"))


def words_of(span: str, donor: str = COUNTERFACTUAL) -> str:
    """What is swapped, in words, and for whose states where these are of no counterfactual."""
    words = WORDS.get(span, f"the tokens of {span}")
    return words if donor == COUNTERFACTUAL else f"{words} from another object's run"


def edit_of(sites: Sequence[Site]) -> EditOf:
    """The swap of a claim in the decoder; one towards the own picture (denoising) is that of the pairs turned."""

    def made(claim: Claim, pairs: "Pairs") -> ClaimEdit | str:
        removed = _swapped(sites, claim)
        if isinstance(removed, str):
            return removed
        edit = Replace(removed.sites, joined(claim.about["span"]), source=pairs.counterfactual)
        return ClaimEdit(edit, removed.turned, removed.denied)

    return made


def removed_of(sites: Sequence[Site]) -> RemovedOf:
    """The states that such a swap exchanges."""
    return partial(_swapped, sites)


def _swapped(sites: Sequence[Site], claim: Claim) -> Removed | str:
    """The states that the swap of a claim exchanges, or why these are not asked about."""
    known = {site.layer: site for site in sites if site.stream == "llm"}
    does, about = claim.kind.removeprefix(f"{claim.about['span']} "), claim.about
    if about["layer"] not in known:
        return "the patch is not in the decoder"
    if "answer" in about["span"].split("+"):
        return "tokens of answers are in no prompt"
    how = {"turned": about["direction"] == "denoising", "denied": does in (NO_LONGER, NOT_YET)}
    return Removed((known[about["layer"]],), joined(about["span"]), exchanged=True, **how)


def pool(result: Result, *, layers: Sequence[int] | None = None) -> tuple[Claim, ...]:
    """Every direction, span and layer.

    Patching flips the answer where the mean recovered fraction is above a half, and the difference of the answers falls
    by more than `claiming.least`: fractions of a gap that has no meaning, as in a random model, can be large. It does
    not where the fraction is below a half, and the difference falls less, by as much, than at the layer where it should
    fall most: the first for the image, the last for the last token. Other spans may shift the answer without flipping
    it, as may all of pairs that have no recovered fraction. With a control of the same answer in the run, what flips or
    shifts the answer must do so by more than the same swap with the states of the control, by `claiming.least` too.
    With a control of another object, it is also asked where that object's states flip the answer.

    Args:
        layers: those of which something can be said; by default all.
    """
    if "layer" not in result.axes:
        return ()
    enough, found = least(result, result.metrics[1].name), []
    held = _held(result)
    for about in result.table[[*result.axes[:-1]]].drop_duplicates().to_dict("records"):
        span, donor = about["span"], about.get(DONOR, COUNTERFACTUAL)
        if claimable((span,)) and donor != SAME:
            rows = result.table[(result.table[[*about]] == pd.Series(about)).all(axis=1)]
            every = sorted(rows["layer"].unique().tolist())
            some = [layer for layer in every if layers is None or layer in layers]
            has_fraction = rows.loc[rows[RECOVERED].notna(), _group(rows)].nunique() >= FEWEST
            kinds = (TURNS, ENDS.get(span, MOVES)) if has_fraction else (MOVES,)
            if donor == OTHER:
                kinds = (CARRIES,) if has_fraction else ()
            for kind in kinds:
                ends = {NO_LONGER: every[0], NOT_YET: every[-1]}
                asked = [about | {"layer": layer} for layer in some if layer != ends.get(kind)]
                found += [_claim(result, kind, each, ends.get(kind), enough, held) for each in asked]
    return tuple(found)


def _held(result: Result) -> frozenset[tuple[Any, ...]]:
    """The cells in which the difference of the answers has a mean over several examples."""
    values = result.table[result.table[result.metrics[1].name].notna()]
    sizes = values.groupby(list(result.axes), sort=False).size()
    return frozenset(sizes[sizes > 1].index)


def _group(rows: pd.DataFrame) -> str:
    return "group" if "group" in rows else "example"


def _claim(
    result: Result, kind: str, about: dict[str, Any], end: int | None, enough: float, held: Collection[tuple[Any, ...]]
) -> Claim:
    """A claim about a cell.

    Args:
        end: the layer that a cell is compared with, in which a swap of its span flips the answer most.
        held: the cells that a cell can be compared with.
    """
    metric = result.metrics[1]
    cell = {axis: about[axis] for axis in result.axes}
    words = words_of(about["span"], about.get(DONOR, COUNTERFACTUAL))
    says = f"{about['direction']}: patching {words} at layer {about['layer']} {DOES[kind]}"
    lowers = Condition(metric.name, cell, "below", enough, less="baseline", says=f"{metric.name} changes by")
    half = Condition(RECOVERED, cell, "above" if kind in (TURNS, CARRIES) else "below", bound=HALF)
    if end is None:
        conditions = (lowers,) if kind == MOVES else (half, lowers)
        control = cell | {DONOR: SAME}
        if DONOR in cell and tuple(control[axis] for axis in result.axes) in held:
            conditions = (*conditions, Condition(metric.name, cell, "below", enough, less=control, says=THERE))
    else:
        less = f"{metric.name} minus that after patching layer {end}:"
        conditions = (half, Condition(metric.name, cell, "above", enough, less=cell | {"layer": end}, says=less))
    unit = metric.unit if kind == MOVES else result.metric(RECOVERED).unit
    return Claim(kind_of(about["span"], kind), about, says, conditions, unit)
