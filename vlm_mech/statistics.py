"""Intervals and tests over examples: paired bootstrap, sign-flip test, correction over cells.

Examples are the rows of a matrix and cells its columns; all cells see the same resampled examples, so that differences
between cells are paired. Examples of one group (a scene, say) are drawn and flipped together.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import false_discovery_control

from vlm_mech.errors import UsageError

CORRECTIONS = ("holm", "benjamini-hochberg", "none")
CHUNK = 2**22
"""Numbers held at once while resampling."""


def _weights(groups: Int[np.ndarray, "example"], n_resamples: int, seed: int) -> Float[np.ndarray, "resample example"]:
    """How often each example is drawn in each resample of the groups."""
    rng = np.random.default_rng(seed)
    n_groups = int(groups.max()) + 1
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples)
    return drawn[:, groups].astype(np.float64)


def bootstrap_means(
    values: Float[np.ndarray, "example cell"], groups: Int[np.ndarray, "example"], *, n_resamples: int, seed: int
) -> Float[np.ndarray, "resample cell"]:
    """Means over resampled examples; missing values (NaN) are left out cell by cell."""
    held = ~np.isnan(values)
    filled = np.where(held, values, 0.0)
    weights = _weights(groups, n_resamples, seed)
    means = np.empty((n_resamples, values.shape[1]))
    step = max(1, CHUNK // max(1, values.shape[0]))
    for start in range(0, n_resamples, step):
        some = weights[start : start + step]
        with np.errstate(invalid="ignore"):
            means[start : start + step] = (some @ filled) / (some @ held.astype(np.float64))
    return means


def percentile_interval(
    values: Float[np.ndarray, "example cell"],
    groups: Int[np.ndarray, "example"],
    *,
    level: float,
    n_resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """Percentile bootstrap interval of each cell's mean; NaN where fewer than two groups have a value."""
    means = bootstrap_means(values, groups, n_resamples=n_resamples, seed=seed)
    with np.errstate(invalid="ignore"):
        low, high = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
        enough = np.array([len(set(groups[~np.isnan(column)])) >= 2 for column in values.T])
        if enough.any():
            tail = 100 * (1 - level) / 2
            low[enough], high[enough] = np.nanpercentile(means[:, enough], [tail, 100 - tail], axis=0)
    return low, high


def sign_flip_p(
    effects: Float[np.ndarray, "example cell"], groups: Int[np.ndarray, "example"], *, n_resamples: int, seed: int
) -> Float[np.ndarray, "cell"]:
    """Two-sided p of each cell's mean effect being zero, by flipping the signs of whole groups.

    Exact (every pattern of signs) where that takes no more than `n_resamples` patterns, otherwise by random signs with
    the observed pattern counted. NaN where fewer than two groups have a value.
    """
    filled = np.nan_to_num(effects, nan=0.0)
    n_groups = int(groups.max()) + 1
    sums = np.zeros((n_groups, effects.shape[1]))
    np.add.at(sums, groups, filled)
    observed = np.abs(sums.sum(0))
    # Flipped sums that equal the observed one up to rounding count as equal.
    limit = observed * (1 - 1e-12) - 1e-12
    exact = n_groups <= math.log2(max(2, n_resamples))
    hits, n_patterns = np.zeros(effects.shape[1]), 0
    for signs in _every_sign(n_groups) if exact else _random_signs(n_groups, n_resamples, seed):
        hits += (np.abs(signs @ sums) >= limit).sum(0)
        n_patterns += len(signs)
    found = hits / n_patterns if exact else (hits + 1) / (n_patterns + 1)
    enough = np.array([len(set(groups[~np.isnan(column)])) >= 2 for column in effects.T])
    return np.where(enough, found, np.nan)


def _every_sign(n_groups: int) -> Iterator[Float[np.ndarray, "pattern group"]]:
    yield np.array(list(itertools.product((-1.0, 1.0), repeat=n_groups)))


def _random_signs(n_groups: int, n_patterns: int, seed: int) -> Iterator[Float[np.ndarray, "pattern group"]]:
    rng, step = np.random.default_rng(seed), max(1, CHUNK // n_groups)
    for start in range(0, n_patterns, step):
        yield 1.0 - 2.0 * rng.integers(0, 2, (min(step, n_patterns - start), n_groups))


def corrected(p: Float[np.ndarray, "cell"], method: str) -> Float[np.ndarray, "cell"]:
    """p-values corrected over cells: `holm` (family-wise), `benjamini-hochberg` (false discoveries) or `none`."""
    if method not in CORRECTIONS:
        raise UsageError(f"correction {method!r} is not known; one of {', '.join(CORRECTIONS)} is")
    found, held = p.copy(), ~np.isnan(p)
    if method == "none" or not held.any():
        return found
    if method == "benjamini-hochberg":
        found[held] = false_discovery_control(p[held])
        return found
    order = np.argsort(p[held], kind="stable")
    n = len(order)
    steps = np.maximum.accumulate(p[held][order] * (n - np.arange(n))).clip(max=1.0)
    back = np.empty(n)
    back[order] = steps
    found[held] = back
    return found
