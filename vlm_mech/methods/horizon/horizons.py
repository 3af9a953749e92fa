"""The horizon: the first layer from which on nothing is lost but what a tolerance allows, with how sure that is.

The rule asks layers from the last one down. One passes if two upper 95 % bounds (one-sided) lie within the tolerance:
that of the mean divergence (bootstrap over groups of examples) and that of the share of answers lost (exact binomial,
over groups: where none of few is lost, a bootstrap would give no width). The first that does not pass ends it. The
horizon is the layer after it. As all layers above must pass, and layers are asked in a fixed order, no correction for
their number is due: the chance that a horizon is told too low is at most that of one test, whatever their number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import beta, binom

from vlm_mech.errors import UsageError
from vlm_mech.methods.horizon.data import Scan
from vlm_mech.methods.horizon.study import KL, LOST
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import expanded_tail, percentile_interval

LEVEL = 0.05
"""The chance of each upper bound to lie too low."""
N_BOUND, N_RESAMPLES = 1000, 200
"""Resamples of a bound, and of examples for the interval of a horizon (there a bound has fewer)."""
N_INNER = 200
AT_NONE = "at none"
"""What tables say where the image is needed to the last layer."""


@dataclass(frozen=True)
class Tolerance:
    """What may be lost: a mean divergence in nats, and a share of the answers."""

    kl: float = 0.1
    lost: float = 0.05

    def __post_init__(self) -> None:
        if not self.kl > 0 or not 0 < self.lost < 1:
            raise UsageError(
                f"the tolerance is {self.kl} nats and {self.lost} of the answers; a number above 0 and a share between "
                "0 and 1 are needed"
            )

    @property
    def needed(self) -> int:
        """Groups of which a horizon can be told: of fewer the bound is too high even where no answer is lost."""
        return max(2, math.ceil(math.log(LEVEL) / math.log(1 - self.lost)))

    def __str__(self) -> str:
        return f"{self.kl:g} nats and {100 * self.lost:g} % of the answers"


Losses = tuple[Float[np.ndarray, "example layer"], Float[np.ndarray, "example layer"], Int[np.ndarray, "example"]]
"""Divergences and lost answers of the examples that count, and the numbers of their groups."""


def losses(result: Result, scan: Scan, arm: str) -> Losses:
    """What is lost in an arm, at the layers where something is edited."""
    cells = {tuple(cell): number for number, cell in enumerate(result.cells.itertuples(index=False, name=None))}
    at = [cells[arm, layer] for layer in scan.layers(arm)]
    divergence, lost = (result.matrix(metric.name)[:, at] for metric in (KL, LOST))
    held = ~np.isnan(divergence).any(1)
    groups = np.unique(result.groups()[held], return_inverse=True)[1]
    return divergence[held], lost[held], groups


def upper_kl(
    divergence: Float[np.ndarray, "example layer"],
    groups: Int[np.ndarray, "example"],
    *,
    seed: int = 0,
    n_resamples: int = N_BOUND,
) -> Float[np.ndarray, "layer"]:
    """Upper 95 % bound of the mean divergence at each layer, in nats; infinite from fewer than two groups.

    Args:
        groups: number of each example's group.
        seed: draws the resamples, of which there are `n_resamples`.
    """
    if len(groups) < 2 or groups.max() < 1:
        return np.full(divergence.shape[1], np.inf)
    how = {"level": 1 - 2 * LEVEL, "n_resamples": n_resamples, "seed": seed}
    return percentile_interval(divergence, groups, **how)[1]


def counted(
    lost: Float[np.ndarray, "example layer"], groups: Int[np.ndarray, "example"]
) -> tuple[Int[np.ndarray, "layer"], int]:
    """In how many groups any answer is lost at each layer, and how many groups there are."""
    n = int(groups.max()) + 1 if len(groups) else 0
    hits = np.zeros((n, lost.shape[1]))
    np.maximum.at(hits, groups, lost)
    return hits.sum(0).astype(int), n


def upper_lost(
    lost: Float[np.ndarray, "example layer"], groups: Int[np.ndarray, "example"]
) -> Float[np.ndarray, "layer"]:
    """Exact (Clopper-Pearson) upper 95 % bound of the share of groups in which an answer is lost, at each layer."""
    hits, n = counted(lost, groups)
    return np.where(hits < n, beta.ppf(1 - LEVEL, hits + 1, np.maximum(n - hits, 1)), 1.0)


def first_within(
    found: Losses, layers: Sequence[int], tolerance: Tolerance, *, seed: int = 0, n_resamples: int = N_BOUND
) -> int:
    """The horizon by the rule; the layer after the last one where that does not pass itself.

    Args:
        layers: those of the columns, ascending.
        seed, n_resamples: of the bootstrap bound.
    """
    divergence, lost, groups = found
    passed = upper_kl(divergence, groups, seed=seed, n_resamples=n_resamples) <= tolerance.kl
    passed &= upper_lost(lost, groups) <= tolerance.lost
    failed = np.flatnonzero(~passed)
    if not len(failed):
        return layers[0]
    return layers[failed[-1] + 1] if failed[-1] + 1 < len(layers) else layers[-1] + 1


def p_of_losses(lost: Float[np.ndarray, "example layer"], groups: Int[np.ndarray, "example"], allowed: float) -> float:
    """Exact p of so few groups with a lost answer if their share were as large as is allowed: the largest of a layer's.

    Args:
        allowed: the share.
    """
    hits, n = counted(lost, groups)
    return float(binom.cdf(hits, n, allowed).max()) if n else 1.0


@dataclass(frozen=True)
class Horizon:
    """Of one arm: what half of the examples declares with its interval, what the other half says, and all of them.

    `end` stands for "at none": the image is needed as it is to the last layer at which that matters. It is no layer of
    the arm, and tables and figures never show it. `n_groups`, `n_other` and `n_all` are the groups of each; of fewer
    than `needed` nothing can be told. `kl_below` and `lost_below` are the upper 95 % bounds of the other half, the
    largest of the declared layer and those above; NaN where there is no horizon.
    """

    arm: str
    declared: int
    low: int
    high: int
    other_half: int
    all: int
    end: int
    n_groups: int
    kl_below: float
    lost_below: float
    n_other: int
    n_all: int
    needed: int

    @property
    def found(self) -> bool:
        """Whether there is a layer from which on nothing more is lost."""
        return self.declared < self.end

    @property
    def told(self) -> bool:
        """Whether the selection half has groups enough for a horizon."""
        return self.n_groups >= self.needed

    def word(self, layer: int, n: int | None = None) -> int | str:
        """A layer as tables have it: in words where it stands for none, or where so few groups can tell none.

        Args:
            n: groups that tell it; those of the selection half by default.
        """
        n = self.n_groups if n is None else n
        if n < self.needed:
            return f"not determined from {n}"
        return layer if layer < self.end else AT_NONE

    def __str__(self) -> str:
        if not self.told:
            return f"no horizon can be determined from n = {self.n_groups}; {self.needed} are needed"
        return f"from layer {self.declared} on" if self.found else f"{AT_NONE}: even the last layer loses something"

    def as_row(self) -> dict[str, Any]:
        """What a table has: the horizon in words, and the numbers, with words where they stand for no layer."""
        low, high = (self.word(self.low), self.word(self.high)) if self.told else ("", "")
        return {
            "arm": self.arm, "horizon": str(self), "declared": self.word(self.declared), "low": low, "high": high,
            "other half": self.word(self.other_half, self.n_other), "all examples": self.word(self.all, self.n_all),
            "groups": self.n_groups,
            "kl below": self.kl_below if self.found else None, "lost below": self.lost_below if self.found else None,
        }  # fmt: skip


def horizon_of(
    result: Result, parts: tuple[Result, Result], scan: Scan, arm: str, tolerance: Tolerance, *, seed: int = 0
) -> Horizon:
    """The horizon of an arm by the rule: of the selection half, with the interval of its resamples, and others.

    The interval is the expanded 95 % percentile one of the horizons of resampled groups of the selection half.

    Args:
        parts: the result on the selection half, and on the other one.
        seed: draws the resamples.
    """
    layers = scan.layers(arm)
    own, other, whole = (losses(each, scan, arm) for each in (*parts, result))
    declared, tested, every = (first_within(each, layers, tolerance, seed=seed) for each in (own, other, whole))
    n_groups, *n_others = (int(each[2].max()) + 1 if len(each[2]) else 0 for each in (own, other, whole))
    low = high = declared
    if n_groups >= tolerance.needed:
        members = [np.flatnonzero(own[2] == group) for group in range(n_groups)]
        rng, drawn = np.random.default_rng(seed), []
        for number in range(N_RESAMPLES):
            some = [members[group] for group in rng.integers(0, n_groups, n_groups)]
            rows, groups = np.concatenate(some), np.repeat(np.arange(n_groups), [len(each) for each in some])
            again = own[0][rows], own[1][rows], groups
            drawn.append(first_within(again, layers, tolerance, seed=number, n_resamples=N_INNER))
        tail = 100 * expanded_tail(n_groups, 0.95)
        low, high = (int(end) for end in np.percentile(drawn, [tail, 100 - tail], method="nearest"))
    above = np.array(layers) >= declared
    bounds = (upper_kl(other[0], other[2], seed=seed), upper_lost(other[1], other[2]))
    below = (float(each[above].max(initial=-np.inf)) if above.any() else float("nan") for each in bounds)
    ends = min(low, declared), max(high, declared), tested, every, layers[-1] + 1
    return Horizon(arm, declared, *ends, n_groups, *below, *n_others, tolerance.needed)
