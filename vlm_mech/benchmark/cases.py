"""What is measured: the cells of each case, and the least that computing them can cost.

Cells are our own interventions; the rivals read from them what to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.specification import Intervention, Knockout, Replace, window

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

WINDOW = 9
"""Layers of a knockout, as in Zhang et al. (cross-modal information flow)."""
SWEEPS = {
    "knockout": "attention from `last` and from `question` to `image` cut, in windows of 9 around every layer",
    "knockout-last": "attention from `last` to `image` cut, in windows of 9 around every layer",
    "knockout-question": "attention from `question` to `image` cut, in windows of 9 around every layer",
    "swap": "resid_post of another image's run put in at every layer, at `image`, `question` or `last`",
    "swap-last": "resid_post of another image's run put in at every layer, at `last`",
    "knockout-answers": "the cells of `knockout`, log-probabilities of two answers of four tokens each",
    "swap-answers": "the cells of `swap`, log-probabilities of two answers of four tokens each",
    "tower": "resid_post of another image put in at every layer of the vision tower that is read",
}
OF_ANSWERS = "-answers"
"""How cases end in which whole answers are read."""
N_ANSWERS, N_TOKENS = 2, 4
"""Answers that are read there, and the tokens of each."""
EXTRACTION = "extraction"
PROBES = "probes"
CASES = {
    **SWEEPS,
    EXTRACTION: "mean resid_post of every layer at `image`, `question` and `last`, over a data set",
    PROBES: "MLP probes of made states of every layer, several seeds each; needs no model",
}


def cells(vlm: "VLM", case: str, donor: Encoded) -> list[Intervention]:
    """The cells of a sweep.

    Args:
        donor: the same prompts on other images, whose states are put in.

    Raises:
        UsageError: there is no such case.
    """
    if case not in SWEEPS:
        raise UsageError(f"case {case!r} is not known; one of {', '.join(CASES)} is")
    kind, _, only = case.removesuffix(OF_ANSWERS).partition("-")
    n_layers = vlm.n_layers("llm")
    if kind == "knockout":
        queries = (only,) if only else ("last", "question")
        windows = [window(layer, WINDOW, n_layers=n_layers) for layer in range(n_layers)]
        return [Knockout(query, "image", layers) for query in queries for layers in windows]
    if kind == "tower":
        sites = [Site("vision.resid_post", layer) for layer in range(vlm.vision_depth)]
        return [Replace(site, "image", source=donor) for site in sites]
    spans = (only,) if only else ("image", "question", "last")
    sites = [Site("llm.resid_post", layer) for layer in range(n_layers)]
    return [Replace(site, span, source=donor) for span in spans for site in sites]


def answered(vlm: "VLM", prompts: Encoded) -> Encoded:
    """The prompts followed by made answers, which part at once."""
    question = vlm.answer_tokens(prompts, [prompt.question for prompt in prompts.prompts])
    return followed(
        prompts, [tuple(ids[first : first + N_TOKENS] for ids in question) for first in range(1, 1 + N_ANSWERS)]
    )


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

    def blocks(self, entry: int, start: int) -> float:
        """All blocks from `entry` on, for the positions from `start` on; under causal attention, allowed edges only."""
        n_new = self.n_pos - start
        edges = (self.n_pos * (self.n_pos + 1) - start * (start + 1)) // 2
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


def lower_bound(vlm: "VLM", encoded: Encoded, interventions: Sequence[Intervention]) -> float:
    """The fewest plain forward passes' worth of products in which whole blocks can give all cells.

    One clean pass, one of the donor where states come from there, and for each cell the blocks above its entry at the
    positions that can change, once where cells have lost the same edges so far. As the swapped image is all in which
    the two runs differ, these are the positions after it: before them the cell is the donor's run. Computing parts of
    blocks only (no queries where nothing reads them) could do with less.

    Raises:
        UsageError: a cell is neither `Knockout` nor `Replace`.
    """
    each = sizes(vlm, encoded)
    swaps = any(isinstance(cell, Replace) and cell.site.stream == "llm" for cell in interventions)
    total = each.plain * (2 if swaps else 1)
    for cell in interventions:
        total += _cost(each, encoded, cell)
    total -= _again(each, encoded, [cell for cell in interventions if isinstance(cell, Knockout)])
    return total / each.plain


def _again(each: Sizes, encoded: Encoded, cuts: Sequence[Knockout]) -> float:
    """What is counted more than once: blocks of cells that have lost the same edges so far."""
    total = 0.0
    for query, key in {(cell.query, cell.key) for cell in cuts}:
        layers = [set(cell.each_layer) for cell in cuts if (cell.query, cell.key) == (query, key)]
        block = each.blocks(each.n_layers - 1, min(encoded.positions(query)))
        for layer in range(each.n_layers):
            pasts = [frozenset(range(layer + 1)) & one for one in layers if min(one) <= layer]
            total += block * (len(pasts) - len(set(pasts)))
    return total


def _cost(each: Sizes, encoded: Encoded, cell: Intervention) -> float:
    if isinstance(cell, Knockout):
        return each.head + each.blocks(min(cell.each_layer), min(encoded.positions(cell.query)))
    if not isinstance(cell, Replace):
        raise UsageError(f"a benchmark takes Knockout and Replace, not {type(cell).__name__}")
    site = cell.sites[0]
    if site.stream == "vision":
        # The rest of the tower is not counted.
        return each.head + each.blocks(0, min(encoded.positions("image")))
    changed = encoded.positions(cell.span)
    start = max(changed) + 1 if cell.span == "image" else min(changed)
    reaches = site.depth + 1 < each.n_layers or cell.span == "last"
    return (each.head if reaches else 0.0) + each.blocks(site.depth + 1, start)
