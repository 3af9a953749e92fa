"""What can be said of an image that is removed, frozen or exchanged: from where on nothing is lost, and where it costs.

That something costs nothing is a claim of no effect: means must lie below a tolerance, at the layer and at all above,
and be surely below. It is asked of one layer an arm, the horizon that the selection half has, and from `fewest` groups
on. That it costs is asked of every layer.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.methods.gates.gated import Asked, Options, through_gates
from vlm_mech.methods.gates.manifold import ClaimEdit
from vlm_mech.methods.gates.removals import Removed
from vlm_mech.methods.horizon.data import EXCHANGED, FROZEN, IMAGE, REMOVED, Scan, edit_at, source_of
from vlm_mech.methods.horizon.horizons import (
    Horizon,
    Tolerance,
    horizon_of,
    losses,
    p_of_losses,
    upper_kl,
    upper_lost,
)
from vlm_mech.methods.horizon.study import KL, LOGPROB, LOST
from vlm_mech.results.claim import LEVEL, SMALLEST, Claim, Condition, Gate, p_of
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.gates import SHUFFLED, TWIN, Pool, pool_with
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import corrected

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.methods.gates.gated import Measured
    from vlm_mech.models.vlm import VLM

FREE, COSTS, LOSES = "not needed", "costs", "loses answers"
"""What is claimed: nothing is lost from a layer on; the answer becomes less probable; answers are lost."""
FEWEST = 128
"""Groups that must count, whatever the tolerance, where it is claimed that nothing is lost (see docs/claims.md)."""
BY_DESIGN = "not tried: a model that ignores the image loses nothing by design"
STAYS = "the image's states stay, or come from the same run"
LESS_PROBABLE = "change of the answer's log-probability:"


def kind_of(arm: str, what: str) -> str:
    """The kind of claims about an arm."""
    return f"{arm} {what}"


def what_of(claim: Claim) -> str:
    """What a claim says: one of `FREE`, `COSTS`, `LOSES`."""
    return next(what for what in (FREE, COSTS, LOSES) if claim.kind.endswith(f" {what}"))


def done_to(arm: str) -> str:
    """What is done to the image in an arm, in words, without its layer."""
    if arm == REMOVED:
        return "removing the image"
    if arm == FROZEN:
        return "freezing the image"
    return f"giving the image the states that enter layer {source_of(arm)}"


def fewest(scan: Scan, tolerance: Tolerance) -> int:
    """Groups that must count where it is claimed that nothing is lost: fewer could not say so, even if none lost any.

    The exact p of no lost answer on half of them must be below `LEVEL`, corrected over the arms.
    """
    half = math.log(LEVEL / len(scan.asked)) / math.log(1 - tolerance.lost)
    return max(FEWEST, 2 * math.ceil(half))


def pool(result: Result, *, scan: Scan, tolerance: Tolerance, horizons: Mapping[str, int]) -> tuple[Claim, ...]:
    """Every arm and layer at which something is edited, both ways of costing; and each horizon that is given.

    Args:
        horizons: the layer by arm from which on nothing is said to be lost.
    """
    found = []
    for arm in scan.asked:
        for layer in scan.layers(arm):
            cell = {"arm": arm, "layer": layer}
            where = f"at the input of layer {layer}" if arm.startswith(EXCHANGED) else f"from layer {layer} on"
            place = f"{done_to(arm)} {where}"
            diverges = Condition(KL.name, cell, "above", bound=tolerance.kl, says="KL divergence in nats:")
            falls = Condition(LOGPROB.name, cell, "below", SMALLEST, less="baseline")
            says = f"{place} makes the answer less likely"
            found.append(Claim(kind_of(arm, COSTS), cell, says, (falls, diverges), LOGPROB.unit))
            gone = Condition(LOST.name, cell, "above", bound=tolerance.lost)
            says = f"{place} loses more than {100 * tolerance.lost:g} % of the answers"
            falls = dataclasses.replace(falls, says=LESS_PROBABLE)
            found.append(Claim(kind_of(arm, LOSES), cell, says, (gone, diverges, falls), LOST.unit))
        if arm in horizons:
            found.append(_free(arm, horizons[arm], scan, tolerance))
    return tuple(found)


def _free(arm: str, first: int, scan: Scan, tolerance: Tolerance) -> Claim:
    conditions = []
    for layer in (layer for layer in scan.layers(arm) if layer >= first):
        cell = {"arm": arm, "layer": layer}
        named = ("", "answers lost there:") if layer == first else ("", "")
        for metric, most, says in zip((KL, LOST), (tolerance.kl, tolerance.lost), named, strict=True):
            conditions.append(Condition(metric.name, cell, "below", bound=most, says=says))
    says = f"from layer {first} on the image may be {arm}: less than {tolerance} are lost"
    return Claim(kind_of(arm, FREE), {"arm": arm, "layer": first}, says, tuple(conditions), KL.unit)


def declared_and_tested(
    result: Result, parts: tuple[Result, Result], scan: Scan, tolerance: Tolerance, *, seed: int = 0
) -> tuple[tuple[Claim, ...], tuple[Horizon, ...], Pool]:
    """What half of the examples declares and the other half tests, the horizon of each arm, and all that could be said.

    A claim that nothing is lost has the largest p of its conditions' and of the exact test of how few answers are lost
    on the held-out half; and it needs that the rule of the horizon holds there too. Holm's correction is over all that
    was declared.

    Args:
        seed: draws resamples.
    """
    how = {"seed": seed}
    horizons = tuple(horizon_of(result, parts, scan, arm, tolerance, **how) for arm in scan.asked)
    n_groups = sum(len(set(losses(part, scan, REMOVED)[2].tolist())) for part in parts)
    asked = {each.arm: each.declared for each in horizons if each.found and n_groups >= fewest(scan, tolerance)}
    possible = partial(pool, scan=scan, tolerance=tolerance, horizons=asked)
    found = claimed(possible(parts[0]), parts[0], parts=parts, **how)
    found = tuple(
        _within(claim, parts[1], scan, tolerance, seed) if what_of(claim) == FREE else claim for claim in found
    )
    raw = [p_of(claim.tested) for claim in found]
    p = corrected(np.array(raw), "holm") if raw else []
    found = tuple(dataclasses.replace(claim, p=float(each)) for claim, each in zip(found, p, strict=True))
    return found, horizons, possible


def _within(claim: Claim, result: Result, scan: Scan, tolerance: Tolerance, seed: int) -> Claim:
    """A claim of no loss with p of its conditions also by the rule on the held-out half.

    That of lost answers is the exact one of so few, where larger; it is 1 of what has its upper bound beyond the
    tolerance.
    """
    arm, every = claim.about["arm"], scan.layers(claim.about["arm"])
    divergence, lost, groups = losses(result, scan, arm)
    beyond = {KL.name: upper_kl(divergence, groups, seed=seed) > tolerance.kl}
    beyond |= {LOST.name: upper_lost(lost, groups) > tolerance.lost}
    tested = []
    for one, told in zip(claim.conditions, claim.tested, strict=True):
        at = every.index(one.cell["layer"])
        p = 1.0 if beyond[one.metric][at] else told.p
        if one.metric == LOST.name:
            p = max(p, p_of_losses(lost[:, [at]], groups, tolerance.lost))
        tested.append(dataclasses.replace(told, p=p))
    return dataclasses.replace(claim, tested=tuple(tested))


def gated(
    config: Asked,
    vlm: "VLM",
    pairs: "Pairs",
    result: Result,
    scan: Scan,
    tolerance: Tolerance,
    measured: "Callable[[Scan], Measured]",
) -> tuple[tuple[Claim, ...], tuple[Horizon, ...]]:
    """The claims with what became of them at each gate, and the horizons; none of a result of too few examples.

    Claims that nothing is lost meet no random twins and no shuffled answers: there nothing is lost by design.

    Args:
        config: how claims are tested.
        measured: gives what does the same analysis, of these arms alone, of other pairs or another model.
    """
    parts = halves(result, seed=config.seed)
    if parts is None:
        return (), ()
    found, horizons, possible = declared_and_tested(result, parts, scan, tolerance, seed=config.seed)
    every = tuple(pool_with(possible(result), found))
    ways = partial(edit_of, scan=scan), partial(removed_of, scan=scan)
    free = tuple(claim for claim in found if what_of(claim) == FREE)
    costs = tuple(claim for claim in found if what_of(claim) != FREE)

    def tried(asked: Asked, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        """Of the arms of which something holds; claims of others are of other kinds."""
        some = dataclasses.replace(scan, only=tuple({claim.about["arm"]: None for claim in claims if claim.made}))
        return through_gates(asked, claims, vlm, pairs, result, lambda _: every, measured(some), *ways)

    costs = tried(config, costs)
    others = Options(config.gates, 0, config.seed, config.batch, getattr(config, "other_wordings", ()))
    free = tuple(_without_nulls(claim) for claim in tried(others, free))
    return (*free, *costs), horizons


def _without_nulls(claim: Claim) -> Claim:
    gates = (Gate(each.name, None, BY_DESIGN) if each.name in (TWIN, SHUFFLED) else each for each in claim.gates)
    return dataclasses.replace(claim, gates=tuple(gates))


def edit_of(claim: Claim, pairs: "Pairs", *, scan: Scan) -> ClaimEdit:
    """The edit of a claim."""
    made = edit_at(claim.about["arm"], claim.about["layer"], scan.n_layers)
    return ClaimEdit(made, denied=what_of(claim) == FREE)


def removed_of(claim: Claim, *, scan: Scan) -> Removed | str:
    """The image states that enter the layer of a claim that the image is removed; of others there is nothing to say."""
    if claim.about["arm"] != REMOVED:
        return STAYS
    falls = next((each for each in claim.conditions if each.metric == LOGPROB.name), None)
    site = Site("llm.resid_pre", claim.about["layer"])
    return Removed((site,), IMAGE, denied=what_of(claim) == FREE, condition=falls)


def as_table(horizons: Sequence[Horizon], claims: Sequence[Claim]) -> pd.DataFrame:
    """A row an arm: its horizon, and whether the other half agrees that nothing is lost from there on."""
    said = {claim.about["arm"]: claim for claim in claims if what_of(claim) == FREE}
    rows = []
    for each in horizons:
        claim = said.get(each.arm)
        held = "not tested" if claim is None else "holds" if claim.made else "does not hold"
        rows.append(each.as_row() | {"claim": held, "p": float("nan") if claim is None else claim.p})
    return pd.DataFrame(rows)
