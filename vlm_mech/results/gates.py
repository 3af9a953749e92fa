"""Ways in which a claim could have been lost: the same analysis where nothing is to be found, and other examples.

After arXiv 2512.18792 (p and Z over models with other weights, and over shuffled labels) and 2510.00845 (how often
resamples of the examples find the same; mean pairwise Jaccard index of sets).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, t

from vlm_mech.results.claim import LEVEL, Claim, Condition, Gate
from vlm_mech.results.claiming import matrix, means_on
from vlm_mech.results.result import Result

TWIN, SHUFFLED, STABLE = "random twin", "shuffled answers", "stability"
N_RESAMPLES = 200
"""Bootstrap resamples of which it is counted in how many a claim is made again."""
SHARE_MADE = 0.8
"""The share of resamples in which a claim must be made again (the bar of arXiv 2510.00845 for Jaccard indices)."""
N_COMPARED = 50
"""Resamples whose sets of claims are compared pair by pair."""

FEWEST_FOR_Z = 5
"""Nulls without which no Z is told."""

FRACTION = "fraction"
"""The unit of metrics that are shares of a gap between two runs."""

Pool = Callable[[Result], Sequence[Claim]]
"""All that a method could say of a result."""


def against_nulls(
    claims: Sequence[Claim], pool: Pool, nulls: Mapping[str, Sequence[Result]], possible: Sequence[Claim] = ()
) -> tuple[Claim, ...]:
    """The claims with a gate for each kind of null.

    T of a null compares it with the claim, whatever the units of its conditions: for each claim of the same kind that
    the pool could make there, on all of the null's examples, the least over the conditions of how far the null's mean
    lies beyond the bound, over how far the claim's own does on the half that tested it; then the largest of these. The
    claim's own T is 1, and a null reaches it with 1 or more: it meets each condition by as much. p = (1 + the number
    of nulls that do) / (B + 1), of the B in which something of the kind was measured; Z is 1 minus the nulls' mean over
    their standard deviation. A claim passes if p is below `LEVEL`, or if none of fewer nulls than could say so reaches
    it.

    Conditions on fractions of a gap are left out on both sides: in a null the gap has no meaning. Left is how far the
    answers' difference moves, in its own unit.

    Args:
        nulls: results of the same analysis by the kind of null.
        possible: all that could be said of the result itself, which is asked of a null too where its own pool lacks it.
    """
    found = list(claims)
    for name, results in nulls.items():
        met = [_met(pool_with(pool(result), possible), result) for result in results]
        kinds = {claim.kind: [each.get(claim.kind, []) for each in met] for claim in claims}
        found = [
            dataclasses.replace(claim, gates=(*claim.gates, _null_gate(claim, name, kinds[claim.kind], results)))
            for claim in found
        ]
    return tuple(found)


Met = dict[str, float]
"""By how much conditions are met, by what they are about but for the place."""


def _about(condition: Condition) -> str:
    return repr((condition.metric, condition.side, condition.says, condition.less == "baseline"))


def pool_with(pool: Sequence[Claim], possible: Sequence[Claim]) -> list[Claim]:
    """A pool, and those of other possible claims that it lacks, distinguished by kind and by what they are about."""
    known = {(claim.kind, repr(claim.about)) for claim in pool}
    return [*pool, *(claim for claim in possible if (claim.kind, repr(claim.about)) not in known)]


def _comparable(claim: Claim, result: Result) -> tuple[Condition, ...]:
    """The conditions that mean something where there is nothing to be found: not those on fractions of a gap."""
    return tuple(one for one in claim.conditions if result.metric(one.metric).unit != FRACTION)


def _met(pool: Sequence[Claim], result: Result) -> dict[str, list[Met]]:
    """By how much each claim's conditions are met, by the kind of claim; claims without a mean are left out."""
    pool = [dataclasses.replace(claim, conditions=_comparable(claim, result)) for claim in pool]
    pool = [claim for claim in pool if claim.conditions]
    found: dict[str, list[Met]] = {}
    for claim, means in zip(pool, means_on(pool, result), strict=True):
        if not any(map(math.isnan, means)):
            found.setdefault(claim.kind, []).append(_least(claim.conditions, means))
    return found


def _least(conditions: Sequence[Condition], means: Sequence[float]) -> Met:
    """By how much conditions are met; the least of those that differ in their place alone."""
    found: Met = {}
    for one, mean in zip(conditions, means, strict=True):
        met = one.sign * (mean - one.bound)
        found[_about(one)] = min(met, found.get(_about(one), met))
    return found


def _null_gate(claim: Claim, name: str, found: Sequence[Sequence[Met]], results: Sequence[Result]) -> Gate:
    """The gate of a claim.

    Args:
        found: for each null, by how much the conditions of each claim of the same kind are met there.
        results: the nulls.
    """
    asked = {_about(one) for result in results for one in _comparable(claim, result)}
    own = _least(claim.conditions, [told.mean for told in claim.tested])
    whole, own = len(own), {about: met for about, met in own.items() if about in asked}
    if results and not own:
        return Gate(name, None, "not tried: a fraction of the answer gap has no meaning there")
    # A null may lack a control, and so the condition about it.
    each = [
        max(
            (min(met[name] / own[name] for name in own if name in met) for met in null if set(met) & set(own)),
            default=None,
        )
        for null in found
    ]
    nulls = [value for value in each if value is not None]
    if not nulls:
        return Gate(name, None, "not tried: the claim's measure does not exist there")
    reached = sum(value >= 1 for value in nulls)
    p = (1 + reached) / (len(nulls) + 1)
    spread = float(np.std(nulls, ddof=1)) if len(nulls) >= FEWEST_FOR_Z else float("nan")
    z = (1 - float(np.mean(nulls))) / spread if spread > 0 else float("nan")
    says = f"{reached} of {len(nulls)} nulls reach the effect (p = {p:.2g}"
    says += ", the smallest p that so few can give" if not reached and len(nulls) < 1 / LEVEL else ""
    says += f"; Z = {z:.1f})" if math.isfinite(z) else ")"
    says += f"; {len(found) - len(nulls)} more lack the measure" if len(nulls) < len(found) else ""
    says += "; compared in logits or nats, not as a fraction" if len(own) < whole else ""
    numbers = {"T_null": each, "p": p, "Z": z}
    # Too few nulls cannot give a small p; then none may reach it.
    return Gate(name, p < LEVEL if len(nulls) >= 1 / LEVEL else reached == 0, says, numbers)


def with_stability(
    claims: Sequence[Claim], pool: Sequence[Claim], result: Result, *, seed: int = 0
) -> tuple[Claim, ...]:
    """The claims with how often they are made again in bootstrap resamples of all examples.

    In a resample a claim counts as made where each of its conditions is of the least size and significant by Student's
    test over groups (two-sided, uncorrected). Beside it stands, for claims of a kind of which several are made, the
    mean Jaccard index of the sets that two resamples make, and what sets of these sizes drawn from the pool would have.
    """
    if not claims:
        return ()
    made = _made_again(pool, result, seed)
    places = {(claim.kind, repr(claim.about)): number for number, claim in enumerate(pool)}
    kinds = np.array([claim.kind for claim in pool])
    jaccard = {kind: mean_jaccard(made[:, kinds == kind]) for kind in {claim.kind for claim in claims}}
    found = []
    for claim in claims:
        share = float(made[:, places[claim.kind, repr(claim.about)]].mean())
        index, chance = jaccard[claim.kind]
        low, high = interval_of(share)
        says = f"made again in {100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f} %) of bootstrap resamples"
        if math.isfinite(index):
            says += f"; mean Jaccard index of such claims {index:.2f}, by chance {chance:.2f}"
        numbers = {
            "share": share,
            "low": low,
            "high": high,
            "jaccard": index,
            "jaccard_at_random": chance,
            "n_resamples": N_RESAMPLES,
        }
        found.append(dataclasses.replace(claim, gates=(*claim.gates, Gate(STABLE, share >= SHARE_MADE, says, numbers))))
    return tuple(found)


def interval_of(share: float, n: int = N_RESAMPLES) -> tuple[float, float]:
    """The exact (Clopper-Pearson) 95 % interval of a share of n resamples.

    It is that of drawing n resamples and no more; what other examples would say is what the resamples themselves ask.
    """
    found = binomtest(round(share * n), n).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def _made_again(pool: Sequence[Claim], result: Result, seed: int) -> Bool[np.ndarray, "resample claim"]:
    conditions = [condition for claim in pool for condition in claim.conditions]
    bounds, signs, least = (
        np.array(each) for each in zip(*((one.bound, one.sign, max(one.least, 0.0)) for one in conditions), strict=True)
    )
    values, groups = matrix(conditions, result) - bounds, result.groups()
    sums, counts = _by_group(values, groups), _by_group((~np.isnan(values)).astype(float), groups)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    rng, rows = np.random.default_rng(seed), []
    for _ in range(N_RESAMPLES):
        drawn = means[rng.integers(0, len(means), len(means))]
        held = ~np.isnan(drawn)
        n = held.sum(0)
        mean = np.where(held, drawn, 0).sum(0) / np.maximum(n, 1)
        deviation = np.where(held, drawn - mean, 0)
        error = np.sqrt((deviation**2).sum(0) / np.maximum(n - 1, 1) / np.maximum(n, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            p = 2 * t.sf(np.abs(mean) / error, np.maximum(n - 1, 1))
        rows.append((n > 1) & (p < LEVEL) & (signs * mean > least))
    each, ends = np.stack(rows), np.cumsum([0, *(len(claim.conditions) for claim in pool)])
    return np.stack([each[:, start:end].all(1) for start, end in itertools.pairwise(ends)], 1)


def _by_group(
    values: Float[np.ndarray, "example column"], groups: Int[np.ndarray, "example"]
) -> Float[np.ndarray, "group column"]:
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, np.nan_to_num(values, nan=0.0))
    return sums


def mean_jaccard(made: Bool[np.ndarray, "resample claim"]) -> tuple[float, float]:
    """Mean Jaccard index of the sets of some pairs of resamples, and what sets of their sizes at random would have.

    Two sets of a and b of N share ab/N at random. NaN where a kind has a single claim, or no set has any.
    """
    sets = [row for row in made[:N_COMPARED] if row.any()]
    if made.shape[1] < 2 or len(sets) < 2:
        return float("nan"), float("nan")
    found, chance = [], []
    for one, other in itertools.combinations(sets, 2):
        found.append((one & other).sum() / (one | other).sum())
        shared = one.sum() * other.sum() / made.shape[1]
        chance.append(shared / (one.sum() + other.sum() - shared))
    return float(np.mean(found)), float(np.mean(chance))
