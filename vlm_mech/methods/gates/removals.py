"""Whether what a claim is about matters too when it is removed in other ways: exchanged, averaged, drawn, zeroed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vlm_mech.architectures.site import Site
from vlm_mech.data.derived_pairs import turned
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.specification import Ablate, Intervention, Replace, Together
from vlm_mech.results.claim import Claim, Condition, Gate
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


HALF = 0.5
"""Share of the way to the other picture's answer that no removal may go where a claim denies an effect."""


@dataclass(frozen=True)
class Removed:
    """What a claim says is needed: states of a span at some sites, of some heads or all, and `more` such."""

    sites: tuple[Site, ...]
    span: "Span | SpanOf"
    heads: tuple[int, ...] | None = None
    exchanged: bool = False
    """Whether the claim's own edit exchanges them with the counterfactual's, so that this way says nothing more."""
    more: "tuple[Removed, ...]" = ()
    """What is removed with them; of these only sites, span and heads count."""
    turned: bool = False
    """Whether the counterfactual picture is asked about: the edit is that of the pairs turned."""
    denied: bool = False
    """Whether the claim says that the edit does not go half of the way to the other picture's answer."""
    condition: Condition | None = None
    """Whose sign and least size a removal must have; by default the first that is about a change from the baseline."""


SpanOf = Callable[["Pairs"], "Span | str"]
"""Tokens that differ from example to example, of some pairs; or why there are none."""
RemovedOf = Callable[[Claim], Removed | str | None]
"""What a claim is about, or why it is removed in no other way; None where it is about no state."""
NO_STATES = "no states by name"


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
    way, among claims of its kind that differ from it in layer and head. A claim that denies an effect passes where none
    of these goes `HALF` of the way to the other picture's answer.

    The same states are removed once, however many claims are about them.

    Args:
        pool: all that could have been claimed, for the ranks.
        pairs: some examples; about thirty are enough.
        removed_of: what a claim is about.
        batch: pairs per forward pass.

    Raises:
        UsageError: pairs without a counterfactual picture.
    """
    if any(pair.made == "none" for pair in pairs or ()):
        raise UsageError("there are no counterfactual images")
    kinds = {(claim.kind, _rest(claim)) for claim in claims}
    each = {_place(claim): removed_of(claim) for claim in [*pool, *claims]}
    states = {place: _settled(one, pairs) for place, one in each.items() if isinstance(one, Removed)}
    asked = [
        claim
        for claim in pool
        if (claim.kind, _rest(claim)) in kinds and isinstance(states.get(_place(claim)), Removed)
    ]
    removed = [states[_place(claim)] for claim in asked]
    effects = _effects([one for one in removed if isinstance(one, Removed)], vlm, pairs, batch) if asked else {}
    places = {_place(claim): number for number, claim in enumerate(asked)}
    found = []
    for claim in claims:
        why = each[_place(claim)]
        why = states[_place(claim)] if isinstance(why, Removed) else why
        gate = Gate(OTHER_WAYS, None, f"not tried: {why if isinstance(why, str) else NO_STATES}")
        if isinstance(why, Removed) and _place(claim) in places:
            gate = _gate(claim, places[_place(claim)], asked, effects, why)
        found.append(dataclasses.replace(claim, gates=(*claim.gates, gate)))
    return tuple(found)


def _place(claim: Claim) -> tuple[str, str]:
    return claim.kind, repr(claim.about)


def _rest(claim: Claim) -> str:
    return repr({name: value for name, value in claim.about.items() if name not in APART})


def _settled(removed: Removed, pairs: "Pairs") -> Removed | str:
    """What is removed with the tokens of these pairs, or why there are none."""
    spans = [one.span(pairs) if callable(one.span) else one.span for one in (removed, *removed.more)]
    why = next((span for one, span in zip((removed, *removed.more), spans, strict=True) if _is_reason(one, span)), None)
    if isinstance(why, str):
        return why
    more = tuple(dataclasses.replace(one, span=span) for one, span in zip(removed.more, spans[1:], strict=True))
    return dataclasses.replace(removed, span=spans[0], more=more)


def _is_reason(removed: Removed, span: Any) -> bool:
    """Whether what was found instead of tokens is why there are none; a span by name is a text too."""
    return callable(removed.span) and isinstance(span, str)


WHOLE = "the other picture"
"""Stands among the effects for showing it."""


def _effects(asked: Sequence[Removed], vlm: "VLM", pairs: "Pairs", batch: int) -> dict[tuple[int | str, str], float]:
    """The mean change of the logit difference by number of what is removed and way; and for `WHOLE` by side."""
    keys = [_states(one) for one in asked]
    found: dict[tuple[int | str, str], float] = {}
    for other_side in dict.fromkeys(one.turned for one in asked):
        faced = turned(pairs) if other_side else pairs
        numbers = [number for number, one in enumerate(asked) if one.turned == other_side]
        first = {keys[number]: number for number in reversed(numbers)}
        points = grid(number=sorted(first.values()), way=WAYS)
        if any(asked[number].denied for number in numbers):
            points = (*points, *grid(number=[-1], way=[COUNTERFACTUAL]))
        measure = logit_diff(faced.answer, faced.counterfactual_answer)
        source = faced.counterfactual
        whole = Removed((Site("llm.resid_pre", 0),), "all")
        if faced.is_text:
            # The other text may have other tokens; after the last block the last one's state is the other answer.
            whole = Removed((Site("llm.resid_post", vlm.n_layers("llm") - 1),), "last")

        def edit(point: Point, source: Any = source, whole: Removed = whole) -> Intervention:
            return _edit(whole if point.number < 0 else asked[point.number], point.way, source)

        done = sweep(vlm, faced, points, edit, measure, batch=batch, check=0)
        name = measure.metric.name
        change = done.table[name] - done.table[f"{name}_baseline"]
        means = change.groupby([done.table["number"], done.table["way"]]).mean().to_dict()
        for number in numbers:
            for way in WAYS:
                found[number, way] = float(means[first[keys[number]], way])
        if (-1, COUNTERFACTUAL) in means:
            found[WHOLE, str(other_side)] = float(means[-1, COUNTERFACTUAL])
    return found


def _states(removed: Removed) -> Any:
    """Tells what is removed apart, whatever claims say of it."""
    return removed.turned, tuple((one.sites, one.span, one.heads) for one in (removed, *removed.more))


def _edit(removed: Removed, way: str, source: Any) -> Intervention:
    parts: list[Intervention] = []
    for one in (removed, *removed.more):
        span: Any = one.span
        if way == COUNTERFACTUAL:
            parts.append(Replace(one.sites, span, source=source, heads=one.heads))
        else:
            parts.append(Ablate(one.sites, span, to=cast(Any, way), heads=one.heads))
    return parts[0] if len(parts) == 1 else Together(parts=tuple(parts))


def _gate(
    claim: Claim,
    at: int,
    asked: Sequence[Claim],
    effects: Mapping[tuple[int | str, str], float],
    removed: Removed,
) -> Gate:
    first = removed.condition or next(
        (each for each in claim.conditions if each.less == "baseline"), claim.conditions[0]
    )
    counted = [way for way in COUNTED if way != COUNTERFACTUAL or not removed.exchanged]
    whole = effects.get((WHOLE, str(removed.turned)), float("nan"))
    sign = -1 if removed.denied else first.sign
    alike = [n for n, each in enumerate(asked) if _alike(each, claim)]
    told, same = {}, True
    for way in WAYS:
        own = sign * effects[at, way]
        rank = 1 + sum(sign * effects[number, way] > own for number in alike)
        told[way] = {"effect": effects[at, way], "rank": rank, "of": len(alike)}
        passed = own < HALF * sign * whole if removed.denied else own > max(first.least, 0.0)
        same &= way not in counted or passed
    listed = ", ".join(
        f"{way} {each['effect']:+.2f} (rank {each['rank']} of {each['of']})" for way, each in told.items()
    )
    left_out = f"zero{' and counterfactual, the edit itself,' * removed.exchanged} not counted"
    if removed.denied:
        listed += f"; the other image {whole:+.2f}, of which none may do half"
        told[WHOLE] = {"effect": whole}
    return Gate(OTHER_WAYS, same, f"change of logit_diff by way of removal: {listed}; {left_out}", told)


def _alike(one: Claim, other: Claim) -> bool:
    return one.kind == other.kind and _rest(one) == _rest(other)
