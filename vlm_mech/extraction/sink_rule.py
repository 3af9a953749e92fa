"""Which tokens are sinks, by their states alone: the dimension rule in the decoder, the norm rule in the tower.

After Kang et al. 2025 (VAR, arXiv 2503.03321), who know the sink dimensions of LLaMA-2 and call a token a sink, in
layers from 2 on, where its state divided by its root mean square exceeds 20 there. That the first token shows the
dimensions, and the relative threshold, are ours: 20 means another thing in a model of another width, and labels
ordinary tokens where residual norms grow.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.architectures.site import Site, sites
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.trace import read

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

FIRST_LAYER, N_DIMS, FIXED = 2, 2, 20.0
"""Of Kang et al.: the first layer that has sinks, how many dimensions show them, and the fixed threshold."""
SHARE = FIXED**2 / 4096
"""Of a state's squared length that one dimension of a sink holds: what `FIXED` is in LLaMA-2-7B, whatever the width."""
NEAR, OUTLIER = 0.5, 5.0
"""A sink reaches this share of the first token's value, and so many times the median over the tokens of its example."""
TOWER_OUTLIER = 2.0
"""A sink of the tower is so many times as long as the median patch of its picture. The 100 of arXiv 2510.08510 is a
number of CLIP, where most patches are shorter than 60."""

Threshold = Literal["relative"] | float
"""`relative`, or the fixed value that sinks exceed."""


def normed(states: Float[Tensor, "*token width"]) -> Float[Tensor, "*token width"]:
    """States divided by their root mean square, without gain, in single precision."""
    states = states.float()
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def floor_of(width: int) -> float:
    """The least value of a sink dimension in a model of that width, by `SHARE`; 20 where the width is 4096."""
    return float((SHARE * width) ** 0.5)


def leading_dims(first: Float[Tensor, "*token width"], n: int = N_DIMS) -> tuple[int, ...]:
    """The dimensions with the largest mean |RMSNorm(h)| over states of first tokens, the largest first.

    Those whose mean is below `floor_of` are none, so that there may be fewer, or none at all.

    Args:
        first: states of first tokens, of pictures and layers in any order.
        n: how many at most.
    """
    means = normed(first).abs().flatten(0, -2).mean(0)
    order = means.argsort(descending=True, stable=True)[:n].tolist()
    return tuple(dim for dim in order if means[dim] > floor_of(first.shape[-1]))


def values_at(states: Float[Tensor, "*token width"], dims: tuple[int, ...]) -> Float[np.ndarray, "*token"]:
    """The largest |RMSNorm(h)| over some dimensions, of each token; 0 without dimensions."""
    if not dims:
        return np.zeros(tuple(states.shape[:-1]))
    return normed(states)[..., list(dims)].abs().amax(-1).double().cpu().numpy()


def is_sink(
    values: Float[np.ndarray, "layer token"], width: int, threshold: Threshold = "relative"
) -> Bool[np.ndarray, "layer token"]:
    """Which tokens of an example are sinks, by layer.

    By the relative threshold a token is one where its value exceeds `floor_of` the width, half of the first token's
    value there, and five times the median over all tokens there: what most tokens reach marks none, and where the first
    token is no sink, no other is.

    Args:
        values: as `values_at` gives them, the first token first.
        width: of the states.
        threshold: a number for that value of Kang et al. in its place.
    """
    if threshold != "relative":
        return values > float(threshold)
    first, median = values[:, :1], np.median(values, 1, keepdims=True)
    large = (values > floor_of(width)) & (values > OUTLIER * median)
    return large & large[:, :1] & (values >= NEAR * first)


@dataclass(frozen=True, eq=False)
class SinkStates:
    """What labels are made from, of some examples.

    `first` are the states of each example's first token in the layers `layers`; `values` for each example those of
    `values_at`, layer x token of the prompt (padding not counted); `tower` for each example the length of the longest
    patch behind each image token beside the median patch of its picture: NaN where an image token stands for none.
    """

    layers: tuple[int, ...]
    dims: tuple[int, ...]
    first: Float[Tensor, "example layer width"]
    values: tuple[Float[np.ndarray, "layer token"], ...]
    tower: tuple[Float[np.ndarray, "image"], ...]

    def sinks(self, example: int, threshold: Threshold = "relative") -> Bool[np.ndarray, "layer token"]:
        """Which tokens of an example are sinks of the decoder, by layer (see `is_sink`)."""
        return is_sink(self.values[example], self.first.shape[-1], threshold)

    def tower_sinks(self, example: int) -> Bool[np.ndarray, "image"]:
        """Which image tokens of an example stand for a patch that is a sink of the tower (see `TOWER_OUTLIER`)."""
        return self.tower[example] > TOWER_OUTLIER


def sink_layers(vlm: "VLM") -> tuple[int, ...]:
    """The layers of the decoder that can have sinks: those whose input at least two blocks have made."""
    return tuple(vlm.llm_layers)[FIRST_LAYER:]


def read_sinks(
    vlm: "VLM", encoded: Encoded, dims: tuple[int, ...] | None = None, *, n_dims: int = N_DIMS, tower: bool = True
) -> SinkStates:
    """The states of a batch as far as labels need them, from one pass.

    Args:
        encoded: the batch.
        dims: the sink dimensions; by default those that lead at the first tokens of this batch. In a causal decoder a
            first token that comes before the picture has the same state whatever is shown, so that one example does.
        n_dims: how many at most, where they are found here.
        tower: whether the tower is read too.
    """
    layers = sink_layers(vlm)
    wanted = list(sites("llm.resid_pre", layers))
    of_tower = Site("vision.resid_post", vlm.vision_depth - 1)
    has_tower = tower and "pixel_values" in encoded.inputs
    found = read(vlm, encoded, [*wanted, *([of_tower] if has_tower else [])])
    if not wanted:
        width = vlm.width(Site("llm.resid_pre", 0))
        empty = tuple(np.zeros((0, len(row.present))) for row in encoded.rows)
        first = torch.zeros(len(encoded), 0, width)
        return SinkStates(layers, dims or (), first, empty, _tower(encoded, found[of_tower] if has_tower else None))
    states = torch.stack([found[site] for site in wanted], 1)
    present = [list(row.present) for row in encoded.rows]
    first = torch.stack([states[row, :, each[0]] for row, each in enumerate(present)])
    dims = leading_dims(first, n_dims) if dims is None else dims
    values = tuple(values_at(states[row, :, each], dims) for row, each in enumerate(present))
    return SinkStates(
        layers, dims, first.float().cpu(), values, _tower(encoded, found[of_tower] if has_tower else None)
    )


def _tower(encoded: Encoded, states: Tensor | None) -> tuple[Float[np.ndarray, "image"], ...]:
    """Of each image token the length of its longest patch, relative to the median patch of its picture."""
    lengths = None if states is None else states.float().norm(dim=-1).double().cpu().numpy()
    found = []
    for row in encoded.rows:
        each = np.full(len(row.image), np.nan)
        number = {position: index for index, position in enumerate(row.image)}
        for picture in row.images:
            if lengths is None:
                break
            for view in picture.layout.views:
                there = view.patches[..., 0] >= 0
                of_view = lengths[view.patches[..., 0], view.patches[..., 1]]
                median = np.median(of_view[there])
                longest = np.where(there, of_view, -np.inf).max(1)
                for slot, length in zip(view.slots, longest, strict=True):
                    each[number[picture.positions[slot]]] = length / median
        found.append(each)
    return tuple(found)
