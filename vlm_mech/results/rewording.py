"""Whether claims are made again when the same questions are put in other words."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_mech.results.claim import Claim, Gate
from vlm_mech.results.claiming import means_on
from vlm_mech.results.gates import SHARE_MADE, Pool, mean_jaccard
from vlm_mech.results.result import Result

WORDINGS = "wordings"
FEWEST_WORDINGS = 3
"""Other wordings without which the gate is not tried."""

Known = dict[tuple[str, str], Claim]
"""Claims by their kind and what they are about."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reworded:
    """The same analysis of the same examples in another wording.

    `right` is the share of them that is answered correctly, None where that is not known.
    """

    result: Result
    right: float | None = None


def over_other_wordings(
    claims: Sequence[Claim],
    possible: Sequence[Claim],
    pool: Pool,
    own: Result,
    others: Mapping[str, Reworded],
    left_out: Mapping[str, str] | None = None,
    *,
    right: float | None = None,
) -> tuple[Claim, ...]:
    """The claims with a gate: are they made again in other wordings?

    In a wording a claim is made again where each of its conditions is met by the mean over all examples: its sign, and
    the least size, which follows from the unedited difference in that wording (`pool`). Significance is not asked: the
    examples are few, and the same each time. A claim passes that is made again in `SHARE_MADE` of the wordings in which
    it is measured, which is in all of three or four. Below `FEWEST_WORDINGS` it is not tried.

    Beside it stands, for kinds with several claims that could be made, the mean Jaccard index of the sets of claims
    that two wordings make, the own one among them, and what sets of these sizes drawn at random would have.

    Args:
        possible: all that could be said of the result that the claims are about.
        own: the same analysis in the own wording, of the same examples.
        others: that of other wordings, by what these are.
        left_out: why further wordings do not count, by what they are.
        right: the share of examples that is answered correctly in the own wording.
    """
    left_out = left_out or {}
    if len(others) < FEWEST_WORDINGS:
        told = "".join(f"; {wording!r}: {why}" for wording, why in left_out.items())
        says = f"not tried: {len(others)} other wording(s) are usable, {FEWEST_WORDINGS} are needed{told}"
        return tuple(_with_gate(claim, Gate(WORDINGS, None, says, {"left_out": dict(left_out)})) for claim in claims)
    pools: list[Known] = [_known(pool(each.result)) for each in others.values()]
    told = [_told(each.result, known) for each, known in zip(others.values(), pools, strict=True)]
    own_pool = _known(possible)
    sets = [_told(own, own_pool), *told]
    jaccard = {}
    for kind in {claim.kind for claim in claims}:
        places = [place for place in own_pool if place[0] == kind]
        made = np.array([[found.get(place, (False,))[0] for place in places] for found in sets], dtype=bool)
        jaccard[kind] = mean_jaccard(made)
    found = []
    for claim in claims:
        place = claim.kind, repr(claim.about)
        here = {wording: each.get(place) for wording, each in zip(others, told, strict=True)}
        numbers = {
            "by_wording": {
                wording: {"made": None if one is None else one[0], "means": None if one is None else one[1]}
                | {"right": others[wording].right}
                for wording, one in here.items()
            },
            "left_out": dict(left_out),
            "right": right,
            "jaccard": jaccard[claim.kind][0],
            "jaccard_at_random": jaccard[claim.kind][1],
        }
        found.append(_with_gate(claim, _gate(here, left_out, numbers, jaccard[claim.kind])))
    return tuple(found)


Told = tuple[bool, list[float]]
"""Whether a claim's conditions are met, and their means."""


def _gate(
    here: Mapping[str, Told | None], left_out: Mapping[str, str], numbers: dict[str, Any], jaccard: tuple[float, float]
) -> Gate:
    """The gate of a claim.

    Args:
        here: by wording what was found; None where it is not measured.
    """
    measured = {wording: one for wording, one in here.items() if one is not None}
    if len(measured) < FEWEST_WORDINGS:
        says = f"not tried: the measure exists in {len(measured)} other wording(s), {FEWEST_WORDINGS} are needed"
        return Gate(WORDINGS, None, says, numbers)
    again = [wording for wording, (made, _) in measured.items() if made]
    says = f"made again in {len(again)} of {len(measured)} other wordings"
    not_again = [wording for wording in measured if wording not in again]
    says += f", not in {', '.join(map(repr, not_again))}" if not_again else ""
    says += f"; not counted: {', '.join(map(repr, left_out))}" if left_out else ""
    if math.isfinite(jaccard[0]):
        says += f"; mean Jaccard index of such claims {jaccard[0]:.2f}, by chance {jaccard[1]:.2f}"
    share = len(again) / len(measured)
    return Gate(WORDINGS, share >= SHARE_MADE, says, numbers | {"share": share})


def _known(pool: Sequence[Claim]) -> Known:
    return {(claim.kind, repr(claim.about)): claim for claim in pool}


def _told(result: Result, known: Known) -> dict[tuple[str, str], Told]:
    """What each claim's conditions say of a result; claims with a condition that has no mean are left out."""
    found = {}
    if not known:
        return found
    for (place, claim), means in zip(known.items(), means_on(list(known.values()), result), strict=True):
        if not any(map(math.isnan, means)):
            found[place] = (claim.met_by(means), means)
    return found


def _with_gate(claim: Claim, gate: Gate) -> Claim:
    return dataclasses.replace(claim, gates=(*claim.gates, gate))
