"""What an attribution could say: exchanging the states of a cell lowers the measure, or raises it.

Estimates choose cells and are never claimed. A cell that is asked about must not be chosen on the pairs that test it:
those of the largest estimates on one half of the pairs are, their true effects on that half declare, and those on the
other half test.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vlm_mech.inputs.span import Span
from vlm_mech.interventions.specification import Replace
from vlm_mech.methods.attribution.data import Cell
from vlm_mech.methods.gates.removals import Removed
from vlm_mech.results.claim import SMALLEST, Claim, Condition, Side
from vlm_mech.results.claiming import enough_of
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

LOWERS, RAISES = "exchange lowers", "exchange raises"
"""Kinds of claims: the measure is lower with the states of the other image, or higher."""
WAYS: tuple[tuple[str, Side, str], ...] = ((LOWERS, "below", "lowers"), (RAISES, "above", "raises"))
EFFECT = "effect"
ASKED, UNEDITED = "asked", "unedited"
"""Columns of a re-checked table: whether half of the pairs chose the cell, and the measure of the run before the edit.
"""
LOGARITHMIC = ("logits", "nats", "nats per token")
"""Units in which `SMALLEST` says what is too small to count, whatever the measure is without an edit."""


def pool(checked: Result) -> tuple[Claim, ...]:
    """Both ways for every cell that half of the pairs chose (the column `asked`).

    An effect counts from a twentieth of the mean of the measure without an edit on (in the run that is patched, so by
    direction), and from 0.1 on where the measure is in logits or nats.

    Args:
        checked: of an `Attribution`.
    """
    unit, name = checked.metric(EFFECT).unit, str(checked.config["measure"])
    table = checked.table
    smallest = SMALLEST if unit in LOGARITHMIC else 0.0
    enough = {
        direction: enough_of(float(rows.drop_duplicates("example")[UNEDITED].mean()), smallest)
        for direction, rows in table.groupby("direction")
    }
    found = []
    for cell in table.loc[table[ASKED], list(checked.axes)].drop_duplicates().to_dict("records"):
        about: dict[str, Any] = {str(axis): value for axis, value in cell.items()}
        for kind, side, does in WAYS:
            condition = Condition(EFFECT, about, side, enough[about["direction"]])
            says = f"{about['direction']}: patching {_named(about)} {does} {name}"
            found.append(Claim(kind, about, says, (condition,), unit))
    return tuple(found)


def _named(about: dict[str, Any]) -> str:
    """A cell in words."""
    place = f" at layer {about['layer']}" if "layer" in about else ""
    place += f" head {about['head']}" if "head" in about else ""
    return f"{about['site']}{place}, span {about['span']},"


def edit_of(spots: Sequence[Cell]) -> "Callable[[Claim, Pairs], Replace | str]":
    """The exchange of a claim, towards the other picture, in the decoder; why there is none for others."""

    def made(claim: Claim, pairs: "Pairs") -> Replace | str:
        spot = _spot(spots, claim)
        if isinstance(spot, str):
            return spot
        return Replace(spot.site, spot.span, heads=_heads(spot), source=pairs.counterfactual)

    return made


def removed_of(spots: Sequence[Cell]) -> Callable[[Claim], Removed | str]:
    """The states that such a claim's own edit exchanges."""

    def found(claim: Claim) -> Removed | str:
        spot = _spot(spots, claim)
        return spot if isinstance(spot, str) else Removed((spot.site,), spot.span, _heads(spot), exchanged=True)

    return found


def _heads(spot: Cell) -> tuple[int, ...] | None:
    return None if spot.head is None else (spot.head,)


def _spot(spots: Sequence[Cell], claim: Claim) -> Cell | str:
    """The cell of a claim about noising in the decoder, of tokens that prompts have; why another is not asked about."""
    here = next(spot for spot in spots if spot.axes.items() <= claim.about.items())
    if claim.about["direction"] != "noising":
        return "the patch is made in the run on the other image"
    if here.site.stream != "llm" or here.site.layer is None:
        return "the patch is not in the decoder"
    return "the tokens of answers are in no prompt" if _of_answer(here.span) else here


def _of_answer(span: Span) -> bool:
    return any(map(_of_answer, span)) if isinstance(span, tuple) else span == "answer"
