"""How much of the damage done in the tower the free decoder makes up for.

The compensated share is ours: a formula of Takishita et al. (2025, arXiv 2506.05439) for it could not be found.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Float

from vlm_mech.errors import UsageError
from vlm_mech.methods.compensation.study import ANSWER, LOGIT_DIFF, RECIPROCAL, difference_of
from vlm_mech.methods.compensation.variants import CUTS, NONE
from vlm_mech.results.result import N_RESAMPLES, Result
from vlm_mech.results.statistics import Estimate, bootstrap_means, estimate, expanded_tail
from vlm_mech.sweeps.measures import Comparison

UP = ("reciprocal_rank", *get_args(Comparison), "hit@1", "hit@5", "hit@10")
"""Metrics of which more is better."""
BEFORE_DECODER = "projector.out"


@dataclass(frozen=True)
class Compensation:
    """The compensated share of one cut, `1 - free / blocked`, with everything it is made of.

    `free` is the damage `m(none) - m(V)` that a cut in the tower does while the decoder is free, `blocked` the same
    damage `m(L) - m(V+L)` while the decoder lacks the same edges. 1: the decoder makes up for all, 0: for nothing;
    other values are possible. `share` is None, with the reason, unless the interval of `blocked` lies above 0 and the
    site is one that cuts in the decoder can reach.
    """

    cut: str
    layers: str
    site: str
    metric: str
    n: int
    means: dict[str, float]
    free: Estimate
    blocked: Estimate
    share: Estimate | None
    reason: str = ""


def compensation(
    result: Result, cut: str, *, layers: str, site: str, metric: str, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Compensation:
    """The compensated share of a cut (`part`, `obj` or `self`) over a range of layers, bootstrapped over groups.

    Raises:
        UsageError: a metric of which less is better, cells that were not measured, or fewer than two groups.
    """
    if metric not in UP:
        raise UsageError(f"metric {metric!r} does not grow with the effect; one of {', '.join(UP)} does")
    cells = result.cells
    at = cells[cells["site"] == site]
    clean = at[at["variant"] == NONE.name]
    edited = at[at["layers"] == layers]
    columns = {"none": clean.index.tolist()}
    for name in (f"V-{cut}", f"L-{cut}", f"V+L-{cut}"):
        columns[name] = edited[edited["variant"] == name].index.tolist()
    for name, found in columns.items():
        if len(found) != 1:
            raise UsageError(f"{name} over layers {layers!r} at {site!r} was not measured; the share needs all four")
    values = result.matrix(metric)[:, [found[0] for found in columns.values()]]
    held = ~np.isnan(values).any(1)
    _, groups = np.unique(result.groups()[held], return_inverse=True)
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise UsageError(f"{n_groups} group(s) have all four values; at least two are needed")
    means = values[held].mean(0)
    draws = bootstrap_means(values[held], groups, n_resamples=n_resamples, seed=seed)
    signs = np.array([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    free, blocked = (estimate(float(means @ each), draws @ each, n_groups=n_groups) for each in signs)
    share, reason = None, ""
    if site == BEFORE_DECODER:
        reason = "the site precedes the decoder, so no knockout there can change it"
    elif blocked.low > 0:
        tail = expanded_tail(n_groups, 0.95)
        share = _share(free.value / blocked.value, draws @ signs[0], draws @ signs[1], tail)
    elif blocked.high >= 0:
        reason = "the damage with a blocked decoder is not distinguishable from 0"
    else:
        reason = "with a blocked decoder the knockout helps instead of damaging"
    return Compensation(
        cut=cut,
        layers=layers,
        site=site,
        metric=metric,
        n=int(held.sum()),
        means=dict(zip(columns, means.tolist(), strict=True)),
        free=free,
        blocked=blocked,
        share=share,
        reason=reason,
    )


def _share(ratio: float, free: Float[np.ndarray, "draw"], blocked: Float[np.ndarray, "draw"], tail: float) -> Estimate:
    """One minus the ratio; the few draws in which nothing is damaged say nothing and so widen both ends.

    Args:
        tail: share of the draws to leave out at each end.
    """
    damaged = blocked > 0
    shares = 1 - np.divide(free, blocked, out=np.zeros_like(free), where=damaged)
    low = np.percentile(np.where(damaged, shares, -np.inf), 100 * tail, method="nearest")
    high = np.percentile(np.where(damaged, shares, np.inf), 100 - 100 * tail, method="nearest")
    return Estimate(1 - ratio, float(low), float(high))


def every_compensation(result: Result, site: str) -> tuple[Compensation, ...]:
    """The share of every cut and range that was measured: parts at a site, and by how much the answer is ahead."""
    asked = ((site, RECIPROCAL.name), (site, LOGIT_DIFF.name), (ANSWER, difference_of(result)), (ANSWER, "hit@1"))
    measured = set(result.cells[["layers", "variant"]].itertuples(index=False, name=None))
    ranges = list(dict.fromkeys(result.cells["layers"]))
    return tuple(
        compensation(result, cut, layers=layers, site=where, metric=metric)
        for where, metric in asked
        for layers in ranges
        for cut in CUTS
        if all((layers, f"{prefix}-{cut}") in measured for prefix in ("V", "L", "V+L"))
    )
