"""Where a tensor lives in a vision-language model, and when it appears in the forward pass.

A `Site` names one tensor: stream, point and layer. Layers count from 0; `resid_pre` of layer `l` is the input of block
`l` and `resid_post` its output, so `resid_post` of `l` equals `resid_pre` of `l + 1`. Hidden states are never indexed
bare, because Hugging Face's `hidden_states[i]` is the input of block `i` and its last entry is already normed.
"""

import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from vlm_mech.errors import UsageError

STREAMS = ("vision", "projector", "text", "llm")
BLOCK_POINTS = ("resid_pre", "head_out", "attn_out", "mlp_out", "resid_post")
PROJECTOR_POINTS = ("in", "out")
EMBED_POINTS = ("embed",)
ABOVE_ALL = sys.maxsize
"""Stands for the layer of what comes after all blocks."""


def _of_blocks(*streams: str) -> tuple[str, ...]:
    return tuple(f"{stream}.{point}" for stream in streams for point in BLOCK_POINTS)


VLM_SITES = (*_of_blocks("vision", "llm"), "projector.in", "projector.out")
DUAL_SITES = (*_of_blocks("vision", "text"), "vision.embed", "text.embed")
NAMES = tuple(dict.fromkeys(VLM_SITES + DUAL_SITES))


@dataclass(frozen=True)
class Site:
    """One tensor of the model, such as `Site("llm.resid_post", 7)` or `Site("projector.out")`.

    Shapes: `resid_pre`, `attn_out`, `mlp_out`, `resid_post` are row x pos x d_model; `head_out` is
    row x pos x (head d_head), the output of each attention head before the output projection (TransformerLens'
    `hook_z`); `projector.in` and `projector.out` are row x token x width. Rows are the batch in the decoder and tiles
    in the tower; towers that pack all images into one sequence have one row. `attn_out` and `mlp_out` are what is added
    to the residual stream: after the norm of architectures that norm it once more, before the learned scale of towers
    with layer scale.

    Contrastive models (`DualEncoder`) have `text` in place of `projector` and `llm`, and the layerless `vision.embed`
    and `text.embed`, row x 1 x width: the projected embeddings before they are normalised.
    """

    name: str
    layer: int | None = None

    def __post_init__(self) -> None:
        point = self.name.partition(".")[2]
        if self.name not in NAMES:
            raise UsageError(f"site {self.name!r} is not known; sites: {', '.join(NAMES)}")
        if point not in BLOCK_POINTS and self.layer is not None:
            raise UsageError(f"site {self.name!r} has no layers, but layer {self.layer} was given")
        if point in BLOCK_POINTS and self.layer is None:
            raise UsageError(f"site {self.name!r} needs a layer, such as Site({self.name!r}, 0)")
        if self.layer is not None:
            if not isinstance(self.layer, Integral):
                raise UsageError(f"layer {self.layer!r} of site {self.name!r}; a whole number is needed, such as 0")
            object.__setattr__(self, "layer", operator.index(self.layer))

    @property
    def stream(self) -> str:
        """`vision`, `projector`, `text` or `llm`."""
        return self.name.partition(".")[0]

    @property
    def point(self) -> str:
        """Which tensor of the block (or of the projector, or the embedding)."""
        return self.name.partition(".")[2]

    @property
    def place(self) -> str:
        """Whose rows and positions the tensor has: a stream with layers, or the site's own name where it has none."""
        return self.stream if self.point in BLOCK_POINTS else self.name

    @property
    def depth(self) -> int:
        """Sorts sites of one stream: the layer, and after all layers what is made from the last."""
        return ABOVE_ALL if self.point in EMBED_POINTS else self.layer or 0

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts sites by when they appear in one forward pass."""
        points = BLOCK_POINTS + PROJECTOR_POINTS + EMBED_POINTS
        return STREAMS.index(self.stream), self.depth, points.index(self.point)

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}[{self.layer}]"


def sites(name: str, layers: int | Iterable[int]) -> tuple[Site, ...]:
    """The sites of that name at each of the layers, in the order given."""
    return tuple(Site(name, layer) for layer in (layers if isinstance(layers, Iterable) else (layers,)))


def listed_sites(given: Any, what: str) -> tuple[Site, ...]:
    """Sites given one alone or several together, as a tuple.

    Args:
        what: that they are given to, for the error.

    Raises:
        UsageError: something else is among them, such as the name of a site.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str)
    found: tuple[Any, ...] = tuple(given) if several else (given,)
    for each in found:
        if not isinstance(each, Site):
            name = each if isinstance(each, str) and each in NAMES else "llm.resid_post"
            layer = ", 3" if name.partition(".")[2] in BLOCK_POINTS else ""
            raise UsageError(f"{what} is given {each!r:.60} as a site; a Site is needed: Site({name!r}{layer})")
    return found
