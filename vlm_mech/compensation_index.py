"""How much of the damage done in the tower the free decoder makes up for, and what a run says, in sentences.

The compensated share is ours: a formula of Takishita et al. (2025, arXiv 2506.05439) for it could not be found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.compensation import ANSWER, LOGIT_DIFF, RECIPROCAL
from vlm_mech.compensation_data import Examples
from vlm_mech.compensation_variants import BACKGROUND, CUTS, NONE
from vlm_mech.errors import UsageError
from vlm_mech.result import N_RESAMPLES, Result
from vlm_mech.statistics import bootstrap_means

UP = ("reciprocal_rank", "logit_diff", "hit@1", "hit@5", "hit@10")
"""Metrics of which more is better."""
CONTROLS = ("random_patches", "background", "other_label")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Compensation:
    """The compensated share of one cut, `1 - free / blocked`, with everything it is made of.

    `free` is the damage `m(none) - m(V)` that a cut in the tower does while the decoder is free, `blocked` the same
    damage `m(L) - m(V+L)` while the decoder lacks the same edges. 1: the decoder makes up for all, 0: for nothing;
    other values are possible. `share` is None, with the reason, unless the interval of `blocked` lies above 0.
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
    if len(set(groups.tolist())) < 2:
        raise UsageError(f"{len(set(groups.tolist()))} group(s) have all four values; at least two are needed")
    means = values[held].mean(0)
    draws = bootstrap_means(values[held], groups, n_resamples=n_resamples, seed=seed)
    signs = np.array([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    free, blocked = (_estimate(float(means @ each), draws @ each) for each in signs)
    share, reason = None, ""
    if blocked.low > 0:
        share = _share(free.value / blocked.value, draws @ signs[0], draws @ signs[1])
    elif blocked.high >= 0:
        reason = "the damage with a blocked decoder is not told from 0"
    else:
        reason = "with a blocked decoder the cut does good, not damage"
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


def _estimate(value: float, draws: Float[np.ndarray, "draw"]) -> Estimate:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _share(ratio: float, free: Float[np.ndarray, "draw"], blocked: Float[np.ndarray, "draw"]) -> Estimate:
    """One less the ratio; the few draws in which nothing is damaged say nothing and so widen both ends."""
    damaged = blocked > 0
    shares = 1 - np.divide(free, blocked, out=np.zeros_like(free), where=damaged)
    low = np.percentile(np.where(damaged, shares, -np.inf), 2.5, method="nearest")
    high = np.percentile(np.where(damaged, shares, np.inf), 97.5, method="nearest")
    return Estimate(1 - ratio, float(low), float(high))


def every_compensation(result: Result, site: str) -> tuple[Compensation, ...]:
    """The share of every cut and range that was measured: parts at a site, and the answer's logit difference."""
    asked = ((site, RECIPROCAL.name), (site, LOGIT_DIFF.name), (ANSWER, LOGIT_DIFF.name), (ANSWER, "hit@1"))
    measured = set(result.cells[["layers", "variant"]].itertuples(index=False, name=None))
    ranges = list(dict.fromkeys(result.cells["layers"]))
    return tuple(
        compensation(result, cut, layers=layers, site=where, metric=metric)
        for where, metric in asked
        for layers in ranges
        for cut in CUTS
        if all((layers, f"{prefix}-{cut}") in measured for prefix in ("V", "L", "V+L"))
    )


# Sentences


def told(
    result: Result, examples: Examples, site: str, chosen_on: str, shares: Sequence[Compensation]
) -> tuple[str, ...]:
    """What a run says: examples, whether parts are named at all, what each cut does, how much is made up for."""
    ranges = list(dict.fromkeys(result.cells["layers"]))
    summary = result.summary()
    damages = [*_damage(summary, site, RECIPROCAL.name, ranges[0])]
    for layers in ranges:
        damages += _damage(summary, ANSWER, LOGIT_DIFF.name, layers)
    main = ((site, RECIPROCAL.name), (ANSWER, LOGIT_DIFF.name))
    said = [sentence(each) for each in shares if each.layers == ranges[0] and (each.site, each.metric) in main]
    return (used(examples), *named(result, summary, site, chosen_on), *damages, *said)


def used(examples: Examples) -> str:
    """How many examples count."""
    n, n_refused = len(examples.examples), len(examples.refused)
    return f"{n} of {n + n_refused} examples of {examples.name} are used."


def named(result: Result, summary: pd.DataFrame, site: str, chosen_on: str) -> tuple[str, ...]:
    """Whether the unedited run names parts at their patches, against all controls; and how it answers."""
    row, hit = (_row(summary, metric, site) for metric in (RECIPROCAL.name, "hit@1"))
    text = (
        f"unedited, parts are named at {site} ({chosen_on}) with a mean reciprocal rank of {_interval(row)}, at rank 1 "
        f"in {_interval(hit)} of {row['n']} examples"
    )
    differences = {name: _difference(result, name, site) for name in CONTROLS}
    against = [
        f"{name.replace('_', ' ')} {_row(summary, name, site)['mean']:.3f}, difference {difference}"
        for name, difference in differences.items()
    ]
    better = all(difference.low > 0 for difference in differences.values())
    verdict = "parts are named better than every control" if better else "parts are not named better than every control"
    answer = _row(summary, "hit@1", ANSWER)
    return (
        f"{text}; controls: {'; '.join(against)}; {verdict}.",
        f"unedited, {_interval(answer)} of {answer['n']} questions about parts are answered right.",
    )


def _row(summary: pd.DataFrame, metric: str, site: str) -> Any:
    """The unedited run's row."""
    chosen = (summary["metric"] == metric) & (summary["variant"] == NONE.name) & (summary["site"] == site)
    return summary[chosen].iloc[0]


def _interval(row: Any) -> str:
    return f"{row['mean']:.3f} (95 % interval {row['ci_low']:.3f} to {row['ci_high']:.3f})"


def _difference(result: Result, control: str, site: str) -> Estimate:
    """Reciprocal rank of the parts less a control, paired."""
    cells = result.cells
    column = cells[(cells["variant"] == NONE.name) & (cells["site"] == site)].index[0]
    values = (result.matrix(RECIPROCAL.name) - result.matrix(control))[:, [column]]
    draws = bootstrap_means(values, result.groups(), n_resamples=N_RESAMPLES, seed=0)
    return _estimate(float(values.mean()), draws[:, 0])


def _damage(summary: pd.DataFrame, site: str, metric: str, layers: str) -> tuple[str, ...]:
    """What every variant over these layers changes at a site; the same edges of background patches as control."""
    at = (summary["metric"] == metric) & (summary["site"] == site) & (summary["layers"] == layers)
    here = summary.loc[at & (summary["variant"] != NONE.name)]
    what = "the answer's logit difference" if site == ANSWER else f"the reciprocal rank at {site}"
    controls = here["variant"].str.endswith(BACKGROUND)
    found = []
    for rows, edges in ((here.loc[~controls], "cut"), (here.loc[controls], "cut at background patches instead")):
        if len(rows):
            each = [
                f"{row['variant'].removesuffix(BACKGROUND)} {row['effect']:+.3f} ({row['effect_low']:+.3f} to "
                f"{row['effect_high']:+.3f})"
                for _, row in rows.iterrows()
            ]
            n = int(rows["n"].min())
            found.append(
                f"{edges} in layers {layers!r}, {what} changes by (95 % interval, n = {n}): {', '.join(each)}."
            )
    return tuple(found)


def sentence(each: Compensation) -> str:
    """A share with what it is made of, or why there is none."""
    where = "the answer" if each.site == ANSWER else each.site
    text = (
        f"{each.cut}, {each.metric} at {where}, layers {each.layers!r}, n = {each.n}: the cut in the tower costs "
        f"{each.free} with a free decoder and {each.blocked} with a blocked one"
    )
    if each.share is None:
        return f"{text}; no compensated share is given, because {each.reason}."
    return f"{text}; compensated share {each.share}."
