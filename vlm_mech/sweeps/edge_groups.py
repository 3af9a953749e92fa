"""Cells whose attention edges are edited alike in a block, and their weights before and after edges are cut."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.interventions.reweighting import Shift

NEAR = 5.0
"""Scores this far below the largest lose no precision to speak of when they are lowered by it."""


def grouped(
    edges: Bool[Tensor, "rows heads query pos"], n_groups: int
) -> Bool[Tensor, "rows groups 1 shared query pos"]:
    """Edges by key/value group, with an axis for cells; heads of size 1 stay so."""
    if edges.shape[1] == 1:
        return edges[:, :, None, None]
    return rearrange(edges, "b (g r) n p -> b g 1 r n p", g=n_groups)


def by_group(
    edges: Bool[Tensor, "rows heads query pos"], n_groups: int
) -> Bool[Tensor, "rows groups shared query pos"]:
    """As `grouped`, for one cell."""
    return grouped(edges, n_groups).squeeze(2)


@dataclass(frozen=True, eq=False)
class Group:
    """Numbers of cells whose edges are edited alike at a layer, in ascending order, counted from cell `first`.

    `blocked` are the edges that they lose, None without any; `shifts` is what is asked of the weights of others.
    """

    numbers: list[int]
    blocked: Bool[Tensor, "batch cut_heads query pos"] | None
    shifts: list[Shift]
    first: int = 0

    def by_group(self, n_groups: int) -> list[Shift]:
        """What is asked of weights by key/value group, for one cell."""
        kept = [(by_group(each.keys, n_groups), each.to) for each in self.shifts]
        return [
            replace(each, keys=keys, to=None if to is None else by_group(to, n_groups))
            for each, (keys, to) in zip(self.shifts, kept, strict=True)
        ]

    @property
    def of_wave(self) -> list[int]:
        """The same numbers counted over all cells."""
        return [self.first + number for number in self.numbers]

    def within(self, first: int, stop: int) -> "Group":
        """Those of the cells from `first` on and before `stop`."""
        return Group(
            [number - first for number in self.numbers if first <= number < stop], self.blocked, self.shifts, first
        )

    @property
    def cells(self) -> slice | list[int]:
        """What selects these cells: a slice where they follow one another, so that nothing is copied."""
        first, last = self.numbers[0], self.numbers[-1]
        return slice(first, last + 1) if last - first == len(self.numbers) - 1 else self.numbers


def lowered_by(
    held: list[tuple[Tensor, slice]], group: Group, top: Float[Tensor, "batch group cell shared query 1"]
) -> Float[Tensor, "batch group cell shared query 1"]:
    """What a group's scores are lowered by: the largest of all, or of those that stay where these are far below it.

    So one exponential serves for the weights before the cut and after it. Where it overflows for edges that are cut,
    they had all of the attention, to the last bit.
    """
    stay = []
    for part, side in held:
        blocked = grouped(group.blocked, part.shape[1])[..., side]
        stay.append(part[:, :, group.cells].masked_fill(blocked, -torch.inf).amax(-1, keepdim=True))
    of_those = torch.stack(stay).amax(0)
    return torch.where(top - of_those < NEAR, top, of_those)


def without(held: list[tuple[Tensor, slice]], group: Group) -> Float[Tensor, "batch group cell shared query 1"]:
    """Takes a group's cut edges out of its weights, in place, and returns the sums of what is left."""
    sums: Any = 0.0
    for part, side in held:
        blocked = grouped(group.blocked, part.shape[1])[..., side]
        some = part[:, :, group.cells]
        some.masked_fill_(blocked, 0.0)
        if not isinstance(group.cells, slice):
            part[:, :, group.cells] = some
        sums = sums + some.sum(-1, keepdim=True)
    return sums.where(sums > 0, 1.0)
