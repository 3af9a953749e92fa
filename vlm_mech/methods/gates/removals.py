"""Whether what a claim is about matters too when it is removed in other ways: exchanged, averaged, drawn, zeroed."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.specification import Ablate, Intervention, Replace
from vlm_mech.results.claim import Claim, Gate
from vlm_mech.sweeps.measures import logit_diff
from vlm_mech.sweeps.sweep import Point, grid, sweep

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

OTHER_WAYS = "other removals"
COUNTERFACTUAL, ZERO = "counterfactual", "zero"
COUNTED = (COUNTERFACTUAL, "mean", "resample")
"""Ways in which the sign must be the same; zero is told and does not count: it is far from any natural state."""
WAYS = (*COUNTED, ZERO)
APART = ("layer", "head")
"""What tells the claims of one kind apart that are ranked against each other."""


@dataclass(frozen=True)
class Removed:
    """What a claim says is needed: states of a span at some sites, of some heads or all."""

    sites: tuple[Site, ...]
    span: Span
    heads: tuple[int, ...] | None = None
    exchanged: bool = False
    """Whether the claim's own edit exchanges them with the counterfactual's, so that this way says nothing more."""


RemovedOf = Callable[[Claim], Removed | None]
"""What a claim is about; None where that is no state."""


def in_other_ways(
    claims: Sequence[Claim],
    pool: Sequence[Claim],
    vlm: "VLM",
    pairs: "Pairs",
    removed_of: RemovedOf,
    *,
    batch: int = 32,
) -> tuple[Claim, ...]:
    """The claims with a gate: does the logit difference go the same way however the states are removed?

    A claim passes where the mean effect of the counterfactual's states, of their mean and of those of another example
    has its sign and its least size; an exchange that is the claim's own edit does not count. Its rank is told for each
    way, among claims of its kind that differ from it in layer and head.

    Args:
        pool: all that could have been claimed, for the ranks.
        pairs: some examples; about thirty are enough.
        removed_of: what a claim is about.
        batch: pairs a forward pass.

    Raises:
        UsageError: pairs without a counterfactual picture.
    """
    if any(pair.made == "none" for pair in pairs or ()):
        raise UsageError("there are no counterfactual pictures")
    kinds = {(claim.kind, _rest(claim)) for claim in claims}
    asked = [claim for claim in pool if (claim.kind, _rest(claim)) in kinds and removed_of(claim) is not None]
    effects = _effects(asked, vlm, pairs, removed_of, batch) if asked else {}
    places = {(claim.kind, repr(claim.about)): number for number, claim in enumerate(asked)}
    found = []
    for claim in claims:
        at = places.get((claim.kind, repr(claim.about)))
        gate = Gate(OTHER_WAYS, None, "not tried: no states by name")
        if at is not None:
            gate = _gate(claim, at, asked, effects, removed_of(claim))
        found.append(dataclasses.replace(claim, gates=(*claim.gates, gate)))
    return tuple(found)


def _rest(claim: Claim) -> str:
    return repr({name: value for name, value in claim.about.items() if name not in APART})


def _effects(
    asked: Sequence[Claim], vlm: "VLM", pairs: "Pairs", removed_of: RemovedOf, batch: int
) -> dict[tuple[int, str], float]:
    """The mean change of the logit difference by claim and way."""
    each: list[Any] = [removed_of(claim) for claim in asked]
    points = grid(claim=range(len(asked)), way=WAYS)
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    done = sweep(
        vlm, pairs, points, lambda point: _edit(each[point.claim], point, pairs), measure, batch=batch, check=0
    )
    name = measure.metric.name
    change = done.table[name] - done.table[f"{name}_baseline"]
    means = change.groupby([done.table["claim"], done.table["way"]]).mean()
    return {(int(number), str(way)): float(value) for (number, way), value in means.items()}  # type: ignore[misc]


def _edit(removed: Removed, point: Point, pairs: "Pairs") -> Intervention:
    if point.way == COUNTERFACTUAL:
        return Replace(removed.sites, removed.span, source=pairs.counterfactual, heads=removed.heads)
    return Ablate(removed.sites, removed.span, to=point.way, heads=removed.heads)


def _gate(
    claim: Claim, at: int, asked: Sequence[Claim], effects: dict[tuple[int, str], float], removed: Removed | None
) -> Gate:
    first = next((each for each in claim.conditions if each.less == "baseline"), claim.conditions[0])
    own_way = removed is not None and removed.exchanged
    counted = [way for way in COUNTED if way != COUNTERFACTUAL or not own_way]
    sign = first.sign
    alike = [n for n, each in enumerate(asked) if _alike(each, claim)]
    told, same = {}, True
    for way in WAYS:
        own = sign * effects[at, way]
        rank = 1 + sum(sign * effects[number, way] > own for number in alike)
        told[way] = {"effect": effects[at, way], "rank": rank, "of": len(alike)}
        same &= way not in counted or own > max(first.least, 0.0)
    listed = ", ".join(
        f"{way} {each['effect']:+.2f} (rank {each['rank']} of {each['of']})" for way, each in told.items()
    )
    left_out = f"zero{' and counterfactual, the edit itself,' * own_way} not counted"
    return Gate(OTHER_WAYS, same, f"change of logit_diff by way of removal: {listed}; {left_out}", told)


def _alike(one: Claim, other: Claim) -> bool:
    return one.kind == other.kind and _rest(one) == _rest(other)
