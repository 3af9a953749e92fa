"""The least that computing the cells of a case can cost, in products counted by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.specification import Intervention, Knockout, Replace, StateEdit

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True)
class Sizes:
    """What a forward pass of one prompt computes, in numbers of the products `2 m n k`.

    `block` are the weights of one decoder block, `heads` the width of all its query heads together. `tower` is what
    the linear layers before the decoder cost (the tower's attention is left out), `head` the last position's logits.
    """

    n_layers: int
    n_pos: int
    block: int
    heads: int
    tower: float
    head: float

    def blocks(self, entry: int, start: int, stop: int | None = None) -> float:
        """All blocks from `entry` on, for the positions from `start` on; under causal attention, allowed edges only.

        Args:
            stop: the position after the last one; that after the prompt by default.
        """
        stop = self.n_pos if stop is None else stop
        n_new = stop - start
        edges = (stop * (stop + 1) - start * (start + 1)) // 2
        # Scores and weighted values are a product each.
        return max(0, self.n_layers - entry) * (2.0 * n_new * self.block + 4.0 * edges * self.heads)

    @property
    def plain(self) -> float:
        """One plain forward pass."""
        return self.tower + self.blocks(0, 0) + self.head


def sizes(vlm: "VLM", encoded: Encoded) -> Sizes:
    """What a forward pass over one prompt of the batch computes."""
    llm, towers = vlm.blocks("llm"), vlm.blocks("vision")
    block = vlm.model.get_submodule(f"{llm.path}.0")
    rows, patches = encoded.shape("vision")
    in_tower = sum(_weights(each) for each in vlm.model.get_submodule(towers.path).children()) * rows * patches
    in_projector = _weights(vlm.model.get_submodule(vlm.family.projector)) * len(encoded.positions("image"))
    attention = block.get_submodule(f"{llm.attention}.{llm.out}")
    head = vlm.model.get_submodule(vlm.family.head)
    return Sizes(
        n_layers=vlm.n_layers("llm"),
        n_pos=encoded.n_pos,
        block=_weights(block),
        heads=int(attention.in_features),
        tower=2.0 * (in_tower / len(encoded) + in_projector),
        head=2.0 * _weights(head),
    )


def _weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def lower_bound(vlm: "VLM", encoded: Encoded, interventions: Sequence[Intervention], *, n_new: int = 0) -> float:
    """The fewest plain forward passes' worth of products in which whole blocks can give all cells.

    One clean pass, one of the donor where states come from there, and for each cell the blocks from its entry on at the
    positions from the first that can change, once where cells have lost the same edges so far, and the logits. Where
    the swapped image is all in which two runs differ, positions that can change are those after it: before them the
    cell is the donor's run. Computing parts of blocks only (no queries where nothing reads them) could do with less.

    Args:
        n_new: tokens that are generated in each cell and without an edit: one after another through all blocks, the
            first of which costs nothing more.

    Raises:
        UsageError: a cell is no edit that has a bound.
    """
    each = sizes(vlm, encoded)
    parts = [part for cell in interventions for part in cell.flat()]
    # A mean over the batch itself, or states drawn from it, are those of the clean pass.
    donor = any(isinstance(part, Replace) and part.sites[0].stream == "llm" for part in parts)
    total = each.plain * (2 if donor else 1)
    total += sum(_cost(each, encoded, cell) for cell in interventions)
    total -= _again(each, encoded, [cell for cell in interventions if isinstance(cell, Knockout)])
    if n_new:
        new = sum(each.blocks(0, each.n_pos + step, each.n_pos + step + 1) for step in range(n_new - 1))
        total += (len(interventions) + 1) * (new + (n_new - 1) * each.head)
    return total / each.plain


def _again(each: Sizes, encoded: Encoded, cuts: Sequence[Knockout]) -> float:
    """What is counted more than once: blocks of cells that have lost the same edges so far."""
    total = 0.0
    for ends in {(cell.query, cell.key, cell.heads) for cell in cuts}:
        layers = [set(cell.each_layer) for cell in cuts if (cell.query, cell.key, cell.heads) == ends]
        block = each.blocks(each.n_layers - 1, min(encoded.positions(ends[0])))
        for layer in range(each.n_layers):
            pasts = [frozenset(range(layer + 1)) & one for one in layers if min(one) <= layer]
            total += block * (len(pasts) - len(set(pasts)))
    return total


def _cost(each: Sizes, encoded: Encoded, cell: Intervention) -> float:
    parts = cell.flat()
    entries, starts = zip(*(_place(encoded, part, alone=len(parts) == 1) for part in parts), strict=True)
    # After the last block nothing flows from other positions to the last one.
    reaches = min(entries) < each.n_layers or any(getattr(part, "span", "last") == "last" for part in parts)
    return (each.head if reaches else 0.0) + each.blocks(min(entries), min(starts))


def _place(encoded: Encoded, part: Intervention, *, alone: bool) -> tuple[int, int]:
    """The block at which an edit enters, and the first position that it changes."""
    if isinstance(part, Knockout):
        return min(part.each_layer), min(encoded.positions(part.query))
    if not isinstance(part, StateEdit):
        raise UsageError(f"there is no bound for {type(part).__name__}")
    site, changed = part.sites[0], encoded.positions(part.span)
    if site.stream != "llm":
        # The rest of the tower is not counted.
        return 0, min(changed)
    after = site.point == "resid_post"
    taken = alone and after and isinstance(part, Replace) and part.span == "image"
    return site.depth + after, max(changed) + 1 if taken else min(changed)
