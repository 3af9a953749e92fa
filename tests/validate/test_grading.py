"""Grades by hand on made-up findings; every adapter on real plantings; what is wrong on purpose is graded as wrong."""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.methods.probing.data import Spot
from vlm_mech.organism.planted import Planted, plant
from vlm_mech.organism.planted_recipe import Edge, Head, Recipe, Truth, matched_null
from vlm_mech.validate import grading, heads
from vlm_mech.validate.adapters import METHODS
from vlm_mech.validate.examination import random_answers
from vlm_mech.validate.grading import (  # fmt: skip
    CARRYING,
    HEADS,
    MATCHED,
    RANKS,
    READ_IMAGE,
    READ_LAST,
    READING,
    ROUTE,
    SHARP,
    SUPPRESSING,
    TOP,
    WRITING,
    grade,
)
from vlm_mech.validate.probes import blurred, dealt
from vlm_mech.validate.statements import COLUMNS, Claims, counted

TWO_HOP = Recipe(3, 6, reads=(Head(2, 1),), carries=(Head(4, 3),), decoys=(Head(1, 0, 0),), priors=(3, 1, 0, 5, 4, 2))
PLANTINGS = {
    "two-hop": TWO_HOP,
    "suppressed": dataclasses.replace(TWO_HOP, reads=(Head(3, 1),), carries=(), suppressor=Head(5, 0, 2.5)),
    "backup": dataclasses.replace(TWO_HOP, carries=(), backup=Head(4, 3)),
    "null": matched_null(TWO_HOP),
    "hard": Recipe(
        4, 6, reads=(Head(1, 0, 0.5), Head(1, 2, 0.3), Head(3, 1, 0.2)), n_cells=3, superposed=True, jitter=0.1,
        texture=0.3, decoys=(Head(2, 0, 0),), decoy_gain=0.2,
    ),
}  # fmt: skip


@functools.cache
def made(name: str) -> Planted:
    return plant(PLANTINGS[name])


@functools.cache
def told(name: str, method: str) -> Claims:
    planted = made(name)
    # Of 16 pairs 8 test claims, too few for as many as these methods declare.
    many = ("layer swap", "visual flow", "logit lens", "attribution", "head interchange", "zero ablation")
    return METHODS[method](planted, planted.pairs(32 if method in many or method.startswith("probe") else 16, seed=1))


def scores(name: str, found: Claims, kind: str = "plain", true: pd.DataFrame | None = None) -> dict[str, float]:
    graded = grade(found, made(name).truth, kind, n_layers=6, n_heads=4, true=true)
    return {each: score.value for each, score in graded.items()}


def cells(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))


# Grading by hand

NOTHING = cells(("last", 0, 0, 0.0, -0.1, 0.1, 1.0))
READS = (
    Edge("read", "question", "image", 1, 0, 0.6),
    Edge("read", "question", "image", 2, 1, 0.3),
    Edge("read", "question", "image", 2, 2, 0.1),
)
MADE_UP = Truth(
    (*READS, Edge("carry", "last", "question", 4, 0, 1.0), Edge("decoy", "last", "image", 3, 3, 0.0)), "picture", 1, 9
)


def by_hand(found: Claims, kind: str = "hard", true: pd.DataFrame | None = None) -> dict[str, grading.Score]:
    return grade(found, MADE_UP, kind, n_layers=6, n_heads=4, true=true)


def test_layers_are_right_only_when_all_of_them_and_no_others_are_named():
    right = Claims(NOTHING, (1, 2), (4,), (4,), (), "two-hop")
    assert {name: score.value for name, score in by_hand(right).items()} == {
        READING: 1, WRITING: 1, CARRYING: 1, ROUTE: 1, grading.UNSUPPRESSED: 0
    }  # fmt: skip
    wrong = Claims(NOTHING, (1, 2, 3), (), (3, 4), (5,), "direct")
    assert {name: score.value for name, score in by_hand(wrong).items()} == {
        READING: 0, WRITING: 0, CARRYING: 0, ROUTE: 0, grading.UNSUPPRESSED: 1
    }  # fmt: skip
    assert by_hand(Claims(NOTHING, (1,)))[READING].value == 0
    assert by_hand(right)[READING].chance == pytest.approx(1 / math.comb(6, 2))
    assert not by_hand(Claims(NOTHING)), "what a method does not say is not graded"


def test_a_planted_prior_has_a_layer_to_be_named():
    truth = dataclasses.replace(MADE_UP, edges=(*MADE_UP.edges, Edge("suppress", "last", "question", 5, 1, 2.5)))
    for said, value in (((5,), 1), ((4,), 0), ((), 0)):
        graded = grade(Claims(NOTHING, suppressing=said), truth, "hard", n_layers=6, n_heads=4)
        assert {name: score.value for name, score in graded.items()} == {SUPPRESSING: value}


def test_what_can_be_read_is_graded_by_the_first_block_and_over_all_of_the_image():
    every = tuple(range(7))
    for last, image, wanted in (((5, 6), every, (1, 1)), ((4, 5), every[1:], (0, 0)), ((), (), (0, 0))):
        graded = by_hand(Claims(NOTHING, readable={"last": last, "image": image}))
        assert (graded[READ_LAST].value, graded[READ_IMAGE].value) == wanted
        assert graded[READ_LAST].chance == 1 / 8
        null = by_hand(Claims(NOTHING, readable={"last": last, "image": image}), MATCHED)
        assert null[READ_LAST].value == (not last) and grading.CLAIMS not in null


def test_an_effect_in_a_null_is_significant_large_or_claimed():
    assert grading.LEAST == 0.75, "a twentieth of 15 logits"
    for row, wanted in (
        (("last", 0, 0, 0.9, 0.8, 1.0, 0.01), (1, 1)),
        (("last", 0, 0, -0.9, -1.0, -0.8, 0.01), (1, 1)),
        (("last", 0, 0, 0.9, 0.7, 1.1, 0.01), (1, 0)),
        (("last", 0, 0, 0.9, 0.8, 1.0, 0.06), (0, 0)),
    ):
        for kind, name in ((SHARP, grading.FALSE), (MATCHED, grading.TRACE)):
            graded = by_hand(Claims(cells(row)), kind)
            assert (graded[name].value, graded[grading.BEYOND].value) == wanted
            assert set(graded) == {name, grading.BEYOND, grading.CLAIMS}
            assert graded[grading.FALSE].chance == 0.05 if kind == SHARP else math.isnan(graded[name].chance)


def test_heads_are_graded_as_a_set_by_top_k_and_by_rank():
    strengths = {(1, 0): 5.0, (2, 1): 4.0, (2, 2): 0.5, (4, 0): 9.0, (3, 3): 1.0}
    graded = by_hand(Claims(NOTHING, heads=((1, 0), (2, 1), (4, 0)), strengths=strengths))
    assert graded[HEADS].value == 0
    assert (graded[TOP].hits, graded[TOP].n, graded[TOP].chance) == (3, 4, 4 / 24), "the decoy (3, 3) is the fourth"
    assert graded[RANKS].value == pytest.approx(1.0)
    turned = by_hand(Claims(NOTHING, heads=(), strengths=strengths | {(1, 0): 0.1, (2, 2): 6.0}))
    assert turned[RANKS].value == pytest.approx(-1.0)
    every = ((1, 0), (2, 1), (2, 2), (4, 0))
    assert by_hand(Claims(NOTHING, heads=every, strengths=strengths))[HEADS].value == 1


def test_ties_count_against_the_method():
    assert grading.strongest({(0, 0): 1.0, (0, 1): 1.0, (0, 2): 2.0}, 2) == ((0, 2),)
    assert grading.strongest({(0, 0): 0.0, (0, 1): 0.0}, 2) == ((0, 0), (0, 1))
    alike = dict.fromkeys(((1, 0), (2, 1), (2, 2), (4, 0), (3, 3)), 1.0)
    graded = by_hand(Claims(NOTHING, heads=(), strengths=alike))
    assert (graded[TOP].value, graded[RANKS].value) == (0, 0)


def test_coverage_counts_true_effects_within_their_intervals():
    found = cells(("last", 1, 0, 0, -1.0, 1.0, 1), ("last", 2, 0, 0, 2.0, 3.0, 1), ("image", 2, 0, 0, -1.0, 1.0, 1))
    true = pd.DataFrame(
        [("last", 1, 0, 1.0), ("last", 2, 0, 1.9), ("image", 2, 0, 0.0)], columns=["place", "layer", "head", "true"]
    )
    score = grading.coverage(found, true)
    assert (score.hits, score.n, score.chance) == (2, 3, 0.95)
    gone = true.assign(layer=true["layer"] + 7)
    assert grading.coverage(found, gone).hits == 0, "a cell that was not measured is not covered"


def test_a_null_is_graded_by_false_alarms_alone():
    tiny = cells(("last", 0, 0, 0.001, 0.0005, 0.002, 0.01))
    graded = by_hand(Claims(tiny, (), (), route="none", heads=()), "matched null")
    assert {name: score.value for name, score in graded.items()} == {
        grading.TRACE: 1, grading.BEYOND: 0, grading.CLAIMS: 0
    }  # fmt: skip
    graded = by_hand(Claims(NOTHING, (1,), (), route="direct", heads=()), "matched null, random answers")
    assert {name: score.value for name, score in graded.items()} == {
        grading.FALSE: 0, grading.BEYOND: 0, grading.CLAIMS: 1
    }  # fmt: skip


def test_an_effect_is_significant_and_large_enough():
    found = cells(
        ("last", 0, 0, 0.2, 0, 1, 0.01), ("last", 1, 0, -0.6, 0, 1, 0.049), ("last", 2, 0, 5.0, 0, 1, 0.05),
        ("last", 3, 0, 0.09, 0, 1, 0.0),
    )  # fmt: skip
    assert counted(found, 0.0)["layer"].tolist() == [0, 1]
    assert counted(found, -10.0)["layer"].tolist() == [1], "5 % of 10 logits are 0.5"


# Methods on plantings


def test_two_hops_are_found():
    swap, cut, lens = (told("two-hop", name) for name in ("layer swap", "knockout", "logit lens"))
    assert (swap.reading, swap.carrying, swap.writing, swap.route) == ((2,), (4,), (4,), "two-hop")
    assert (cut.reading, cut.carrying, cut.suppressing, cut.route) == ((2,), (4,), None, "two-hop")
    assert (lens.writing, lens.suppressing) == ((4,), ())
    for name in ("head knockout", "head interchange", "attribution", "zero ablation"):
        assert told("two-hop", name).heads == ((2, 1), (4, 3))


def test_a_suppressor_is_found_where_a_method_can_see_it():
    assert told("suppressed", "logit lens").suppressing == (5,)
    assert told("suppressed", "layer swap").suppressing is told("suppressed", "knockout").suppressing is None
    assert told("suppressed", "layer swap").reading == told("suppressed", "knockout").reading == (3,)
    assert told("suppressed", "layer swap").route == "direct"


def test_a_backup_hides_the_reading_head_from_cuts_and_ablations_only():
    for name in ("head interchange", "attribution"):
        assert told("backup", name).heads == ((2, 1),)
    assert told("backup", "layer swap").reading == (2,)
    assert (told("backup", "knockout").reading, told("backup", "knockout").route) == ((), "none")
    assert told("backup", "head knockout").heads == told("backup", "zero ablation").heads == ()


@pytest.mark.parametrize("method", METHODS)
def test_no_method_claims_an_effect_in_a_null(method):
    found = told("null", method)
    assert not found.claims and list(found.cells.columns) == list(COLUMNS)
    if found.readable is None:
        assert np.abs(found.cells["effect"].to_numpy()).max() < 0.1 and not found.beyond(0.1)
        graded = scores("null", found, MATCHED)
        assert (graded[grading.CLAIMS], graded[grading.BEYOND]) == (0, 0)


@pytest.mark.parametrize("method", ["layer swap", "head interchange", "probe"])
def test_nothing_is_significant_where_answers_have_nothing_to_do_with_pictures(method):
    planted = made("null")
    found = METHODS[method](planted, random_answers(planted.pairs(16, seed=1), 0, planted.recipe.answers))
    graded = scores("null", found, SHARP)
    assert set(graded.values()) == {0.0} and grading.FALSE in graded and grading.TRACE not in graded


def test_probes_name_the_block_that_writes_the_answer_when_traces_are_blurred():
    """The states themselves hold a trace of the colour from the first block on, which a probe reads as well."""
    for name, first in (("two-hop", 5), ("suppressed", 4), ("backup", 3)):
        found = told(name, "probe, 1 % noise")
        assert found.readable["last"][0] == first and found.readable["image"] == tuple(range(7))
        graded = scores(name, found)
        assert (graded[READ_LAST], graded[READ_IMAGE], graded[grading.POWER], graded[grading.FALSE_RUN]) == (1, 1, 1, 0)
        assert all(claim.made for claim in found.told or ()), "what is graded is what is claimed"
        assert told(name, "probe").readable["last"][0] < first
        assert scores(name, told(name, "probe"))[READ_LAST] == 0
    null = scores("null", told("null", "probe, 1 % noise"), MATCHED)
    assert null == {READ_LAST: 1, READ_IMAGE: 1}, "the colour is in the image, whether it is used or not"
    assert scores("null", told("null", "probe"), MATCHED)[READ_LAST] == 0


def test_folds_that_lack_a_label_are_drawn_again_and_rare_labels_left_out():
    base = made("two-hop").pairs(32)
    names = sorted({*base.answer, *base.counterfactual_answer})
    # One label on a single pair: whatever the folds, the one that tests it does not train on it.
    others = [pair for pair in base if names[0] not in (pair.answer, pair.counterfactual_answer)]
    lone = next(pair for pair in base if pair.answer == names[0])
    kept, numbers, groups, splits = dealt(dataclasses.replace(base, pairs=(*others, lone)))
    assert len(kept) <= len(others) and lone not in list(kept) and len(groups) == len(numbers) == 2 * len(kept)
    assert all(len(set(numbers[split.train])) == len(set(numbers)) for split in splits)
    assert dealt(base)[0] is base, "nothing is left out without need"


def test_noise_is_relative_to_the_norm_of_each_state():
    states = torch.ones(2000, 64) * torch.tensor([1.0, 100.0]).repeat(1000)[:, None]
    features = {Spot(Site("llm.resid_pre", 0), "last"): states}
    (seen,) = blurred(features, 0.01).values()
    share = (seen - states).norm(dim=1) / states.norm(dim=1)
    assert share.numpy() == pytest.approx(0.01, rel=0.5) and float(share.mean()) == pytest.approx(0.01, rel=0.01)
    assert torch.equal(seen, *blurred(features, 0.01).values())


@pytest.mark.parametrize("method", ["head knockout", "head interchange", "attribution", "zero ablation"])
def test_heads_of_a_hard_model_are_ranked(method):
    graded = scores("hard", told("hard", method), "hard")
    assert graded[RANKS] == pytest.approx(1.0) and graded[TOP] == 1


def test_a_head_that_writes_noise_is_not_among_the_strongest():
    rows = (("last", 1, 0, -0.8, -0.9, -0.7, 0.01), ("last", 2, 0, -1.1, -3.0, 0.9, 1.0), ("last", 3, 0, 2, 1, 3, 0.01))
    assert heads._sure(cells(*rows)) == {(1, 0): 0.7, (2, 0): 0.0, (3, 0): 0.0}


def test_wrong_methods_are_graded_as_failing():
    """A swap that is off by one layer, and heads off by one."""
    swap, heads = told("two-hop", "layer swap"), told("two-hop", "head interchange")
    alarms = (grading.UNSUPPRESSED, grading.FALSE_RUN, grading.FALSE_CLAIMS)
    assert all(value == (name not in alarms) for name, value in scores("two-hop", swap).items())
    shifted = [tuple(layer + 1 for layer in each or ()) for each in (swap.reading, swap.carrying, swap.writing)]
    graded = scores("two-hop", Claims(swap.cells, *shifted, route="direct"))
    assert set(graded.values()) == {0.0} and set(graded) == {READING, CARRYING, WRITING, ROUTE}
    moved = {(layer, head - 1): value for (layer, head), value in heads.strengths.items()}
    graded = scores("two-hop", Claims(heads.cells, heads=tuple(moved), strengths=moved))
    assert (graded[HEADS], graded[TOP]) == (0, 0)
