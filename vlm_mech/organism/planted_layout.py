"""How planted models are laid out: sizes, magnitudes, and where each named direction of the residual stream lies."""

import torch

from vlm_mech.organism.planted_recipe import COLOURS, Recipe

SIDE, PATCH = 4, 8
TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 32, 3, 4
FEED_FORWARD = 64
ROPE_THETA = 1e8
SATURATION = 0.6
CORNERS = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]]).float()
"""The colours at the corners of the RGB cube, colour x channel, from -1 to 1."""

CONSTANT, TOWER_CONSTANT = 10.0, 20.0
MATCH, SINK = 11.0, 7.0
ANSWER, UNEMBEDDING = 1.0, 15.0
TURN = 45.0
"""Logits by which it is settled which token of an answer comes now: more than any colour's."""
SHARPNESS, THRESHOLD, STEP = 20.0, 2 * SATURATION, 4.0
GATE = 8.0
TOWER_NOISE = 10.0
MARK = 2.0
LARGEST_TEXTURE = 0.3

_SIZES = dict.fromkeys(("constant", "bos", "image", "coloured", "question", "last"), 1)
_SIZES |= {name: len(COLOURS) for name in ("colour", "carrier", "object", "answer", "spare", "unseen")} | {"texture": 3}
# Of answers of two tokens alone: that none of it is said yet, and that all of it is.
_SIZES |= {"begin": 1, "end": 1}
# Of the image token to which sinks attend, where there are any.
_SIZES |= {"marked": 1}
N_DIRECTIONS = sum(_SIZES.values())


def _places() -> dict[str, slice]:
    found, start = {}, 0
    for name, size in _SIZES.items():
        found[name] = slice(start, start + size)
        start += size
    return found


AT = _places()
"""Where each named direction or subspace of the residual stream lies before the rotation."""


def scale_of(recipe: Recipe) -> float:
    """What RMSNorm divides by where the constant outweighs all else."""
    return CONSTANT / recipe.d_model**0.5


def sink_patch(recipe: Recipe) -> int:
    """Number of the patch, row by row, to whose token sinks attend."""
    return recipe.seed % SIDE**2
