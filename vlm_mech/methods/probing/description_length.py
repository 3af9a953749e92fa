"""Minimum description length of labels given hidden states: the online code of Voita & Titov (2020)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from vlm_mech.data.shared_pictures import components
from vlm_mech.errors import UsageError
from vlm_mech.methods.probing.crossfit import by_width, is_first, said, stacked_states
from vlm_mech.methods.probing.data import Features, Spot
from vlm_mech.methods.probing.descent import Recipe
from vlm_mech.methods.probing.training import Split, train

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Parts of the data after which the code trains anew. (Voita & Titov take eleven, from 0.1 % up; we have less data.)"""


@dataclass(frozen=True, eq=False)
class CodeLength:
    """Bits that the labels cost when sent portion by portion, each coded by a probe trained on all before it.

    `bits` is spot x label set, `uniform` what the labels cost without any probe; `trained` are the numbers of examples
    trained on before each portion after the first, and `accuracy` (spot x label set x portion) the learning curve.
    """

    spots: tuple[Spot, ...]
    bits: Float[np.ndarray, "spot variant"]
    uniform: float
    trained: tuple[int, ...]
    accuracy: Float[np.ndarray, "spot variant portion"]

    @property
    def compression(self) -> Float[np.ndarray, "spot variant"]:
        """How many times shorter the code is than without a probe; 1 for labels that cannot be predicted."""
        return self.uniform / self.bits


def online_code(
    features: Features,
    labels: Int[np.ndarray, "variant example"],
    recipe: Recipe,
    *,
    groups: Sequence[Any],
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    memory: int = 2**28,
) -> CodeLength:
    """The online code of Voita & Titov (2020): how soon, and how well, the labels can be predicted.

    Groups come in random order and are never torn; the first portion is sent without a probe, and a fifth of what has
    been sent is for early stopping.

    Raises:
        UsageError: fractions that do not rise to 1, or too few groups for the first.
    """
    if list(fractions) != sorted(set(fractions)) or fractions[-1] != 1 or fractions[0] <= 0:
        raise UsageError(f"fractions {tuple(fractions)} must rise from above 0 to 1")
    order, ends = _portions(groups, fractions, seed)
    n_classes, spots = int(labels.max()) + 1, tuple(features)
    bits = np.full((len(spots), len(labels)), ends[0] * math.log2(n_classes))
    curve = np.zeros((len(spots), len(labels), len(ends) - 1))
    for portion, (start, stop) in enumerate(itertools.pairwise(ends)):
        split = _sent(order, groups, start, stop, seed)
        for numbers in by_width(features):
            stacked = stacked_states(features, spots, numbers, "cpu")
            for entries, stack in train(
                stacked, torch.from_numpy(labels), [split], recipe, n_classes=n_classes, memory=memory
            ):
                for entry, found in said(entries, stack, [split]):
                    spot, classes = numbers[entries.features[entry]], labels[:, split.test]
                    own = np.take_along_axis(found, classes[..., None], -1)[..., 0]
                    bits[spot] -= np.log2(own.clip(1e-30)).sum(-1)
                    curve[spot, :, portion] = is_first(found, classes).mean(-1)
    return CodeLength(spots, bits, labels.shape[1] * math.log2(n_classes), tuple(ends[:-1]), curve)


def _portions(groups: Sequence[Any], fractions: Sequence[float], seed: int) -> tuple[np.ndarray, list[int]]:
    """The examples group by group, and where the portions end, at the ends of groups."""
    numbers = components([str(group) for group in groups])
    n_groups = int(numbers.max()) + 1
    rank = np.random.default_rng(seed).permutation(n_groups)[numbers]
    order = np.argsort(rank, kind="stable")
    counts = np.bincount(rank).cumsum()
    ends = [int(counts[max(0, math.ceil(fraction * n_groups) - 1)]) for fraction in fractions]
    if math.ceil(fractions[0] * n_groups) < 2 or len(set(ends)) < len(ends):
        raise UsageError(f"{n_groups} groups are too few for portions that begin with {fractions[0]:.3g} of them")
    return order, ends


def _sent(order: np.ndarray, groups: Sequence[Any], start: int, stop: int, seed: int) -> Split:
    """Train and validate on what was sent (whole groups), test on the next portion."""
    known = order[:start]
    # The order keeps groups together, so the last fifth begins where a group does.
    cut = max(1, round(0.8 * start))
    while cut < start and groups[known[cut]] == groups[known[cut - 1]]:
        cut += 1
    if cut == start:
        cut = next(at for at in range(start - 1, 0, -1) if groups[known[at]] != groups[known[at - 1]])
    return Split(known[:cut], known[cut:], order[start:stop], seed=seed)
