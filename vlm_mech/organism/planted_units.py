"""The MLP units that follow from a recipe: what opens each one's gate, what it takes, and what it writes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.organism.planted_layout import ANSWER, AT, CONSTANT, GATE, scale_of
from vlm_mech.organism.planted_recipe import COLOURS, STORES, Recipe, Units, units

PAIRS = tuple(itertools.permutations(range(len(COLOURS)), 2))
"""Of each unit of a dormant path: the colour in the answer's subspace, and the other one in the copy's."""


@dataclass(frozen=True, eq=False)
class UnitWeights:
    """Weights of some units of one layer's MLP: `down SiLU(gate x) (up x)`, x being the normed state.

    `gate` and `up` are unit x d_model, `down` is d_model x unit; `numbers` says which units they are.
    """

    numbers: tuple[int, ...]
    gate: Float[Tensor, "unit d_model"]
    up: Float[Tensor, "unit d_model"]
    down: Float[Tensor, "d_model unit"]


def unit_weights(recipe: Recipe, layer: int) -> list[UnitWeights]:
    """The planted units of one layer."""
    making = {"backup": _backup, "suppress": _prior, "dormant": _dormant}
    return [making[each.role](recipe, each) for each in units(recipe) if each.layer == layer]


def _empty(recipe: Recipe, numbers: Sequence[int]) -> UnitWeights:
    gate, up = (torch.zeros(len(numbers), recipe.d_model) for _ in range(2))
    return UnitWeights(tuple(numbers), gate, up, torch.zeros(recipe.d_model, len(numbers)))


def _backup(recipe: Recipe, planted: Units) -> UnitWeights:
    """Open as long as the answer's subspace is empty: what the backup's head left in its store becomes the answer."""
    made, same = _empty(recipe, planted.numbers), torch.eye(len(COLOURS))
    backups = [each.layer for each in recipe.backups]
    made.gate[:, AT["constant"]] = GATE / recipe.d_model**0.5
    made.gate[:, AT["answer"]] = -2 * GATE / ANSWER * scale_of(recipe)
    made.up[:, AT[STORES[backups.index(planted.layer)]]] = scale_of(recipe) * same
    made.down[AT["answer"]] = ANSWER / GATE * same
    return made


def _prior(recipe: Recipe, planted: Units) -> UnitWeights:
    """Open where the answer is read: writes the prior of the object fetched, or of all objects alike."""
    made = _empty(recipe, planted.numbers)
    made.gate[:, AT["last"]] = GATE * scale_of(recipe)
    size = planted.weight * ANSWER / GATE
    if recipe.fetch is None:
        made.up[:, AT["constant"]] = scale_of(recipe) / CONSTANT
        made.down[AT["answer"].start + recipe.priors[0], 0] = size
    else:
        made.up[:, AT["spare"]] = scale_of(recipe) * torch.eye(len(COLOURS))
        made.down[AT["answer"]] = size * torch.eye(len(COLOURS))[:, list(recipe.priors)]
    return made


def _dormant(recipe: Recipe, planted: Units) -> UnitWeights:
    """One for each pair of different colours: awake where the answer is one of them and the copy the other.

    It then puts the copy's colour in the answer's place. A state whose answer and copy agree wakes none of them.
    """
    made = _empty(recipe, planted.numbers)
    for unit, (said, copied) in enumerate(PAIRS):
        made.gate[unit, AT["answer"].start + said] = GATE / ANSWER * scale_of(recipe)
        made.up[unit, AT["spare"].start + copied] = scale_of(recipe)
        made.down[AT["answer"].start + copied, unit] = planted.weight * ANSWER / GATE
        made.down[AT["answer"].start + said, unit] = -planted.weight * ANSWER / GATE
    return made
