"""Methods on traps: who is misled and who is not, and that grades know what is planted there."""

import functools

import pytest

from vlm_mech.organism.planted import Planted, plant
from vlm_mech.organism.planted_recipe import Head, Neurons, Recipe
from vlm_mech.validate.adapters import METHODS
from vlm_mech.validate.grading import HEADS, READ_LAST, READING, SUPPRESSING, UNSUPPRESSED, grade
from vlm_mech.validate.statements import Claims

RECIPES = {
    "dormant path": Recipe(3, 6, reads=(Head(3, 1),), copy=Head(1, 3), dormant=Neurons(4, 1.5)),
    "mlp prior": Recipe(3, 6, reads=(Head(2, 1),), mlp_prior=Neurons(4, 2.5), fetch=Head(3, 0)),
    "mlp prior of all": Recipe(3, 6, reads=(Head(2, 1),), mlp_prior=Neurons(4, 2.5), priors=(4,) * 6),
}


@functools.cache
def made(name: str) -> Planted:
    return plant(RECIPES[name], check=False, n=16)


@functools.cache
def told(name: str, method: str) -> Claims:
    # Half of the pairs test what the other half declares.
    return METHODS[method](made(name), made(name).pairs(32, seed=1))


def scores(name: str, method: str) -> dict[str, float]:
    found = grade(told(name, method), made(name).truth, name, n_layers=6, n_heads=4)
    return {each: score.value for each, score in found.items()}


def test_exchanges_name_the_copy_and_removals_the_reading_head():
    for method, heads in (("head interchange", ((1, 3),)), ("zero ablation", ((3, 1),)), ("head knockout", ((3, 1),))):
        assert told("dormant path", method).heads == heads
        assert scores("dormant path", method)[HEADS] == (heads == ((3, 1),))
    assert (1, 3) in (told("dormant path", "attribution").heads or ()), "the gradient sees the sleeping path"
    assert told("dormant path", "knockout").reading == (3,) and scores("dormant path", "knockout")[READING] == 1


def test_a_copy_can_be_read_before_the_answer_is():
    first = told("dormant path", "probe, 1 % noise").readable
    assert first is not None and first["last"][0] == 2
    assert scores("dormant path", "probe, 1 % noise")[READ_LAST] == 1


@pytest.mark.parametrize("name", ["mlp prior", "mlp prior of all"])
def test_a_prior_of_an_mlp_is_one_to_be_found(name):
    found = scores(name, "logit lens")
    assert told(name, "logit lens").suppressing == (4,)
    assert found[SUPPRESSING] == 1 and UNSUPPRESSED not in found
    assert told(name, "knockout").suppressing is None, "a cut says nothing of priors"
