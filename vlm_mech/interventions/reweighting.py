"""Attention weights that are given another size: what is asked for, and the mask that makes a kernel compute it.

The two are worked out in different ways: what is asked for by moving weights, the mask by adding to scores. Receipts
hold one against the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.errors import UsageError
from vlm_mech.interventions.attention_plan import Reweighing


@dataclass(frozen=True, eq=False)
class Shift:
    """What one edit asks of the edges of a call: those at its `keys` are scaled, `to` gain (None: all others).

    `queries` are the positions of the queries. Edges are rows x heads x query x key, or have more axes in between;
    heads of size 1 where all are alike.
    """

    what: str
    scale: float
    how: str
    keys: Bool[Tensor, "rows ... query key"]
    to: Bool[Tensor, "rows ... query key"] | None
    queries: Sequence[int]

    def within(self, queries: Sequence[int], row: int | None = None) -> "Shift":
        """The same at some of the queries (by number), and in one of the rows if only that is meant."""
        rows, chosen = slice(None) if row is None else slice(row, row + 1), list(queries)
        to = None if self.to is None else self.to[rows][..., chosen, :]
        at = [self.queries[number] for number in chosen]
        return Shift(self.what, self.scale, self.how, self.keys[rows][..., chosen, :], to, at)

    def factor(self, weights: Float[Tensor, "rows ... query key"]) -> Float[Tensor, "rows ... query 1"]:
        """By what the weights of the keys that gain are multiplied.

        Raises:
            UsageError: nothing gains what is freed, or has what is needed.
        """
        named = self.keys.any(-1, keepdim=True)
        freed = (1 - self.scale) * (weights * self.keys).sum(-1, keepdim=True)
        held = (weights * self.gaining).sum(-1, keepdim=True)
        moved = named & (freed != 0)
        factor = torch.where(moved, 1 + freed / held.where(held > 0, 1.0), 1.0)
        self._check(moved & (held <= 0), "the keys that are to gain have no weight")
        self._check(factor < 0, f"the keys that are to give have too little weight for a scale of {self.scale:g}")
        return factor

    @property
    def gaining(self) -> Bool[Tensor, "rows ... query key"]:
        """The edges that gain; where a query has no edge scaled, it does not matter which."""
        return ~self.keys if self.to is None else self.to & ~self.keys

    def _check(self, wrong: Tensor, why: str) -> None:
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise UsageError(f"{self.what}: at query {self.queries[at[-2]]} of example {at[0]} {why}")


def shifts_of(
    edits: Sequence[Reweighing],
    prompts: Sequence[int],
    queries: range,
    keys: range,
    *,
    n_pos: int,
    device: torch.device,
) -> list[Shift]:
    """What edits of weights ask of a call with these positions as queries and keys; scores are scaled first.

    Args:
        prompts, n_pos: as for `Cut.blocked`.
    """
    at = {"n_pos": n_pos, "device": device}
    ordered = sorted(edits, key=lambda each: each.how == "weights")
    return [
        Shift(
            each.what,
            each.scale,
            each.how,
            each.blocked(prompts, queries, keys, **at),
            each.gaining(prompts, queries, keys, **at),
            queries,
        )
        for each in ordered
    ]


def asked_weights(scores: Float[Tensor, "rows ... query key"], shifts: Sequence[Shift]) -> Tensor:
    """The attention that is asked for, from scores that are -inf where nothing is attended to; fp32.

    Raises:
        UsageError: nothing gains what is freed, or has what is needed.
    """
    weights, softmaxed = scores, False
    for shift in shifts:
        if shift.how == "scores":
            weights = torch.where(shift.keys & weights.isfinite(), shift.scale * weights, weights)
            continue
        if not softmaxed:
            weights, softmaxed = weights_of(weights), True
        factor = shift.factor(weights)
        changed = torch.where(shift.keys, shift.scale * weights, weights)
        weights = torch.where(shift.gaining, factor * changed, changed)
    return weights if softmaxed else weights_of(weights)


def added_to_scores(scores: Float[Tensor, "rows ... query key"], shifts: Sequence[Shift]) -> Tensor:
    """What has to be added to scores (-inf where nothing is attended to) for the softmax to give what is asked for.

    Raises:
        UsageError: as for `asked_weights`.
    """
    added = torch.zeros_like(scores)
    for shift in shifts:
        if shift.how == "scores":
            # Several may scale the same score.
            before = torch.where(scores.isfinite(), scores + added, 0.0)
            added = added + torch.where(shift.keys, (shift.scale - 1) * before, 0.0)
            continue
        factor = shift.factor(weights_of(scores + added))
        scale = torch.tensor(shift.scale, dtype=scores.dtype, device=scores.device)
        added = added + torch.where(shift.keys, scale.log(), torch.where(shift.gaining, factor.log(), 0.0))
    return added


def weights_of(scores: Float[Tensor, "rows ... query key"]) -> Float[Tensor, "rows ... query key"]:
    """Attention, from scores that are -inf where nothing is attended to; none for padding, which may attend nowhere."""
    return scores.softmax(-1).nan_to_num(0.0)


def named_queries(shifts: Sequence[Shift]) -> list[int]:
    """Numbers of the queries any of whose edges are scaled."""
    found = set[int]()
    for shift in shifts:
        found |= set(shift.keys.flatten(0, -3).any(0).any(-1).nonzero()[:, 0].tolist())
    return sorted(found)


def keys_of(shifts: Sequence[Shift]) -> Bool[Tensor, "rows ... query key"]:
    """The edges whose weights are scaled by any of some edits."""
    return torch.stack(torch.broadcast_tensors(*(shift.keys for shift in shifts))).any(0)


def mean_mass(weights: Float[Tensor, "rows ... query key"], keys: Tensor) -> Float[Tensor, "rows"]:
    """Mean attention to some keys over the queries and heads that have any, for each row; NaN without any."""
    keys, each = keys.expand_as(weights), tuple(range(1, weights.ndim - 1))
    return (weights * keys).sum(-1).sum(each) / keys.any(-1).sum(each)


def over_examples(masses: Float[Tensor, "rows"]) -> float:
    """The mean over examples that have any such keys; 0 without any."""
    known = masses[~masses.isnan()]
    return float(known.mean()) if len(known) else 0.0
