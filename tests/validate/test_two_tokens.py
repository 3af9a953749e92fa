"""Planted models with answers of two tokens: every method names what is planted, wherever the answer is told."""

import dataclasses
import functools

import numpy as np
import pytest

from experiments import validate
from tests.helpers import command, some_long
from tests.validate.test_grading import PLANTINGS
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.interventions.specification import Knockout, Replace
from vlm_mech.organism.planted import Planted, plant, true_effect
from vlm_mech.organism.planted_recipe import Answer
from vlm_mech.results.result import Result
from vlm_mech.validate import grading
from vlm_mech.validate.adapters import CONTROLS, EDITS, METHODS
from vlm_mech.validate.examination import Job, random_answers, shown
from vlm_mech.validate.grading import grade
from vlm_mech.validate.statements import WHOLE, Claims
from vlm_mech.validate.true_effects import planted_points, population

TWO: tuple[Answer, ...] = ("pieces", "article")
HEADS = ("head knockout", "head interchange", "attribution", "zero ablation")


@functools.cache
def made(name: str, answer: Answer) -> Planted:
    return plant(dataclasses.replace(PLANTINGS[name], answer=answer), check=False, n=16)


def told(name: str, answer: Answer, method: str) -> Claims:
    planted = made(name, answer)
    return (METHODS | CONTROLS)[method](planted, planted.pairs(32, seed=1))


@pytest.mark.parametrize("answer", TWO)
def test_two_hops_are_found_where_answers_have_two_tokens(answer):
    swap, cut, lens = (told("two-hop", answer, name) for name in ("layer swap", "knockout", "logit lens"))
    assert (swap.reading, swap.carrying, swap.writing, swap.route) == ((2,), (4,), (4,), "two-hop")
    assert (cut.reading, cut.carrying, cut.suppressing, cut.route) == ((2,), (4,), None, "two-hop")
    assert (lens.writing, lens.suppressing) == ((4,), ())
    for name in HEADS if answer == "article" else HEADS[1:3]:
        assert told("two-hop", answer, name).heads == ((2, 1), (4, 3)), name
    assert told("two-hop", answer, "probe, 1 % noise").readable["last"][0] == 5
    flow = told("two-hop", answer, "visual flow")
    assert (flow.reading, flow.carrying, flow.writing, flow.suppressing, flow.route) == (
        (2,),
        (4,),
        (4,),
        (),
        "two-hop",
    )


@pytest.mark.parametrize("answer", some_long(TWO, TWO[1:]))
def test_a_suppressor_is_found_where_answers_have_two_tokens(answer):
    assert told("suppressed", answer, "logit lens").suppressing == (5,)
    assert told("suppressed", answer, "layer swap").writing == (3,)
    flow = told("suppressed", answer, "visual flow")
    assert (flow.reading, flow.writing, flow.suppressing, flow.route) == ((3,), (3,), (5,), "direct")
    for name in HEADS:
        assert told("suppressed", answer, name).heads == ((3, 1),), name


def test_the_next_token_alone_tells_nothing_of_answers_that_begin_alike():
    cut, heads = (told("two-hop", "article", name) for name in CONTROLS)
    assert (cut.reading, cut.carrying, cut.route, heads.heads) == ((), (), "none", ())
    assert np.abs(np.concatenate([cut.cells["effect"], heads.cells["effect"]])).max() == 0
    cut, heads = (told("two-hop", "pieces", name) for name in CONTROLS)
    assert (cut.reading, cut.carrying, heads.heads) == ((2,), (4,), ((2, 1), (4, 3))), "the first piece tells a part"
    whole = told("two-hop", "pieces", "knockout").cells["effect"].min()
    assert 1.2 < whole / cut.cells["effect"].min() < 3


@pytest.mark.parametrize("answer", some_long(TWO, TWO[:1]))
def test_nothing_is_claimed_in_a_null_with_two_tokens(answer):
    planted = made("null", answer)
    pairs = random_answers(planted.pairs(24, seed=1), 0, planted.recipe.answers)
    assert set(pairs.answer) <= set(planted.recipe.answers)
    for name in ("layer swap", "knockout", "head interchange", "logit lens", "visual flow"):
        found = METHODS[name](planted, pairs)
        graded = grade(found, planted.truth, grading.SHARP, n_layers=6, n_heads=4)
        assert {each.value for each in graded.values()} == {0.0}, name


@pytest.mark.parametrize("answer", TWO)
def test_true_effects_are_those_of_the_whole_answer(answer):
    planted = made("two-hop", answer)
    points = planted_points(planted.truth, "layer swap", 6, "last+answer")
    assert [tuple(value for _, value in point.axes) for point in points] == [
        ("image", 2, WHOLE), ("question", 4, WHOLE), ("last+answer", 5, WHOLE)
    ]  # fmt: skip
    cut = planted_points(planted.truth, "knockout", 6, "last+answer")[1]
    found = population(planted, [(EDITS["layer swap"], points[2]), (EDITS["knockout"], cut)], n=24, seed="some")
    site, both = Site("llm.resid_pre", 5), ("last", "answer")
    swap = true_effect(planted, lambda pairs: Replace(site, both, source=pairs.counterfactual), n=24, seed="some")
    lost = true_effect(planted, lambda pairs: Knockout(both, "question", 4), n=24, seed="some")
    assert found == pytest.approx(np.array([swap.mean, lost.mean]), abs=1e-3)
    assert found[0] < -25 and found[1] < -10
    alone = true_effect(planted, lambda pairs: Replace(site, "last", source=pairs.counterfactual), n=24, seed="some")
    assert abs(alone.mean) < 0.1 if answer == "article" else swap.mean < alone.mean - 5
    whole = true_effect(
        planted,
        lambda pairs: Replace(site, both, source=pairs.counterfactual),
        n=24,
        seed="some",
        measure="logprob_diff",
    )
    assert whole.mean < swap.mean - 5 if answer == "pieces" else whole.mean == pytest.approx(swap.mean, abs=0.5)


def test_the_command_examines_models_with_two_tokens(tmp_path, capsys):
    options = ("--n", 1, "--first-seed", 0, "--workers", 1, "--examples", 16, "--population", 16, "--answer", "article")
    options += ("--sets", "plain", "--methods", "knockout", "knockout, next token", "--out", tmp_path / "out")
    assert command(validate, *options) == 0
    table = Result.load(tmp_path / "out").table.set_index(["method", "grade"])["score"]
    assert table["knockout", grading.READING] == 1 and table["knockout, next token", grading.READING] == 0
    assert "All answers are written as article, in two tokens." in Result.load(tmp_path / "out").provenance["question"]
    assert validate._jobs(validate.Config(answer="pieces"))[0].methods == (*METHODS, *CONTROLS)
    assert validate._jobs(validate.Config())[0].methods == tuple(METHODS)
    job = Job(grading.SHARP, 3, answer="pieces")
    assert set(shown(job, made("null", "pieces").recipe).answer) <= set(made("null", "pieces").recipe.answers)


@pytest.mark.usefixtures("untyped")
def test_answers_of_another_kind_are_refused():
    with pytest.raises(UsageError, match="answer 'rhyme' is not known; use one of word, pieces, article"):
        Job("plain", 0, answer="rhyme")  # pyright: ignore[reportArgumentType]
