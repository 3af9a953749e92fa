"""Planted models into whose states a sink is written by hand: the truth that sinks are graded by."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from vlm_mech.architectures.site import Site
from vlm_mech.extraction.sink_rule import normed
from vlm_mech.interventions.trace import read
from vlm_mech.organism.planted import Planted, plant
from vlm_mech.organism.planted_layout import sink_patch
from vlm_mech.organism.planted_recipe import Head, Recipe

PLAIN = Recipe(3, 7, reads=(Head(3, 1),), decoys=(Head(1, 0, 0), Head(4, 2, 0)), priors=(3, 1, 0, 5, 4, 2))
RECIPES = {"plain": PLAIN, "sink": dataclasses.replace(PLAIN, sinks=(Head(2, 2), Head(5, 0)))}


@functools.cache
def planted(name: str) -> Planted:
    """A model without heads that attend to one patch, or with two."""
    return plant(RECIPES[name], n=16, check=False)


def sink_token(model: Planted) -> int:
    """The number in the prompt of the patch's token to which sinks attend, padding not counted."""
    encoded = model.vlm.encode(model.pairs(1).base)
    row = encoded.rows[0]
    return row.present.index(row.image[sink_patch(model.recipe)])


@functools.cache
def dims_of(name: str) -> tuple[int, int]:
    """The two dimensions in which the states of a model are smallest as it is: those that are written."""
    model = planted(name)
    site = Site("llm.resid_pre", 3)
    means = normed(read(model.vlm, model.pairs(4).base, site)[site]).abs().mean((0, 1))
    one, other = means.argsort()[:2].tolist()
    return one, other


@contextlib.contextmanager
def written(name: str, token: int, strength: float = 1.2) -> Iterator[None]:
    """Meanwhile two dimensions of the first token's state, and of that token's, are as long as all others together."""
    model, dims = planted(name), dims_of(name)
    block = model.vlm.model.model.language_model.layers[0]

    def write(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        states = given[0].clone()
        for at in (0, token):
            length = states[:, at].norm(dim=-1)
            for dim in dims:
                states[:, at, dim] = strength * length
        return (states, *given[1:])

    handle = block.register_forward_pre_hook(write)
    try:
        yield
    finally:
        handle.remove()
