"""Classification: name scores from one cache, reading of answers, calibration, frequency, two hops, tuning, the run."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from tests.zoo import FAMILIES, ZOO
from tests.zoo.tiny import picture
from vlm_mech.behaviour.answering.class_name_scores import Names, names_after, score_names
from vlm_mech.behaviour.answering.prompts import (
    STYLES,
    candidates,
    longest,
    stemmed,
    too_long,
)
from vlm_mech.behaviour.classify import study
from vlm_mech.behaviour.classify.data import design_of
from vlm_mech.behaviour.classify.study import calibrated, score_tables
from vlm_mech.behaviour.classify.table import CLASSES, MEAN, OPEN, SUM, Cell, best, score_rows
from vlm_mech.behaviour.classify.tuning import with_answers
from vlm_mech.data.image_classes import Classes, Labelled
from vlm_mech.data.reading import mentions, read_answer
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.special_tokens import check_known
from vlm_mech.interventions.trace import run
from vlm_mech.models.vlm import VLM

NAMES = (
    "red circle",
    "red star",
    "blue",
    "green triangle left of",
    "green triangle",
    "green dog",
    "cat and dog and cat",
)
QUESTIONS = ("what is there?", "what is the shape?")


def prompts() -> list[Prompt]:
    """Of unequal length, on pictures of unequal shape."""
    return [
        Prompt("what colour is the circle?", picture(1)),
        Prompt("is the red star left of the blue circle?", picture(2, 80, 56)),
        Prompt("what is this?", picture(3, 56, 96)),
    ]


def one_by_one(vlm: VLM, some: list[Prompt], names: Names) -> torch.Tensor:
    """The reference: a whole forward, without cache, for every prompt with every name after it."""
    found = torch.zeros(len(some), len(names.ids))
    for row, prompt in enumerate(some):
        encoded = vlm.encode(prompt)
        for place, ids in enumerate(names.ids):
            inputs, _ = with_answers(vlm, encoded, [ids])
            with torch.no_grad():
                out = getattr(vlm.model(**inputs, use_cache=False), vlm.family.readout)[0].float().log_softmax(-1)
            found[row, place] = sum(out[-len(ids) - 1 + step, token] for step, token in enumerate(ids))
    return found


# Names after a prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_names_scored_from_one_cache_equal_whole_forwards(family):
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False)
    some = prompts()[1:]
    names = names_after(vlm, some, NAMES)
    assert len(set(names.lengths)) > 2
    # Two rows a lot, so that lots follow each other on the same cache, the last one with spare rows.
    found = score_names(vlm, some, names, rows=2 * len(some))
    assert torch.allclose(found, one_by_one(vlm, some, names), atol=1e-4)


def test_names_do_not_depend_on_what_is_scored_with_them(tiny_vlm):
    vlm = tiny_vlm(attn="eager")
    names = names_after(vlm, prompts(), NAMES)
    whole = score_names(vlm, prompts(), names)
    for rows in (1, 4, 1000):
        assert torch.allclose(score_names(vlm, prompts(), names, rows=rows), whole, atol=1e-5)
    turned = names_after(vlm, prompts(), NAMES[::-1])
    assert torch.allclose(score_names(vlm, prompts(), turned).flip(1), whole, atol=1e-5)
    for place, name in enumerate(NAMES):
        alone = score_names(vlm, prompts()[1:2], names_after(vlm, prompts()[1:2], [name]))
        assert torch.allclose(alone[0, 0], whole[1, place], atol=1e-5)
    with pytest.raises(UsageError, match="rows is 0; at least one is needed"):
        score_names(vlm, prompts(), names, rows=0)


def test_stems_are_run_once_and_every_name_has_its_own():
    rng = random.Random(0)
    for _ in range(50):
        ids = tuple({tuple(rng.randrange(3) for _ in range(rng.randint(1, 4))) for _ in range(12)})
        names = Names(tuple(map(str, ids)), ids)
        for one in names.stems:
            assert not any(other != one and other[: len(one)] == one for other in names.stems)
        placed = [place for places in names.homes() for place in places]
        assert sorted(placed) == [place for place, each in enumerate(ids) if len(each) > 1]
        for stem, places in zip(names.stems, names.homes(), strict=True):
            assert all(ids[place][:-1] == stem[: len(ids[place]) - 1] for place in places)
    # 16 kinds in 8 colours: eight beginnings of one token, not 128 names of two.
    grid = Names(("",) * 128, tuple((colour, kind) for colour in range(8) for kind in range(16)))
    assert len(grid.stems) == 8


def test_names_that_cannot_be_scored_are_refused(vlm):
    for names, text in (
        ([" "], "becomes no token"),
        (["zebra"], "'zebra' is not in the model's vocabulary"),
        (["red star", "red  Star"], "'red star' and 'red  Star' become the same tokens"),
    ):
        with pytest.raises(UsageError, match=text):
            names_after(vlm, prompts(), names)
    with pytest.raises(UsageError, match="caption 'a zebra' holds 'zebra', which .* has no token for"):
        check_known(vlm, ["a cat", "a zebra"], "caption")


def test_a_stem_begins_the_answer(vlm):
    begun = stemmed(prompts()[0], "the colour is")
    assert vlm.encode(begun).rows[0].text.endswith("ASSISTANT: the colour is")
    assert stemmed(prompts()[0], " ").prefix is None
    assert stemmed(begun, " red or").prefix == "the colour is red or"
    names = names_after(vlm, [begun], ["red", "blue"])
    logits = run(vlm, begun).last[0].log_softmax(-1)
    assert torch.allclose(score_names(vlm, [begun], names)[0], logits[[ids[0] for ids in names.ids]], atol=1e-5)


# Answers


@pytest.mark.parametrize(
    ("answer", "label", "mentioned", "named"),
    [
        ("A category.", "cat", True, ()),
        ("It is a Cat!", "cat", True, ("cat",)),
        ("a cat fish", "cat", True, ("cat fish",)),
        ("a cat and a cat fish", "cat", True, ("cat", "cat fish")),
        ("cat dog", "cat", True, ("cat", "dog")),
        ("cats", "cat", True, ()),
        ("the cat_fish", "cat fish", False, ("cat fish",)),
        ("cat, dog, cat fish, sea lion", "dog", True, ("cat", "dog", "cat fish", "sea lion")),
        ("", "cat", False, ()),
    ],
)
def test_answers_are_read_as_whole_words(answer, label, mentioned, named):
    names = ["cat", "dog", "cat fish", "sea lion"]
    found = read_answer(answer, names)
    assert tuple(names[number] for number in found.named) == named and mentions(answer, label) == mentioned
    assert found.only == (found.named[0] if len(named) == 1 else None)


def test_candidates_hold_the_class_and_differ_in_order_alone():
    names, example = [f"c{number}" for number in range(30)], Labelled("x", picture(0), "c7")
    for k in (2, 5, 30):
        mixed, fixed = (candidates(example, names, k, seed=1, order=order) for order in ("random", "fixed"))
        assert 7 in fixed and len(set(fixed)) == k and list(fixed) == sorted(mixed)
        assert mixed == candidates(example, names, k, seed=1, order="random")
    others = {candidates(Labelled(str(n), "", "c7"), names, 5, seed=1, order="fixed") for n in range(20)}
    places = {candidates(Labelled(str(n), "", "c7"), names, 5, seed=1, order="random").index(7) for n in range(40)}
    assert len(others) > 15 and places == set(range(5))
    with pytest.raises(UsageError, match="31 candidates were requested among 30 classes; 2 to 30 can be"):
        candidates(example, names, 31, seed=1, order="random")


def test_a_prompt_too_long_for_the_model_is_foreseen(vlm):
    prompt = Prompt("what is there?", picture(1))
    asked = STYLES["plain"].among("what is there?", ["red star"] * 80)
    n_tokens = 270  # 80 names of two words, 79 commas, and 31 others
    assert too_long(vlm, prompt, asked, 4).startswith(f"{n_tokens + 4} tokens")
    with pytest.raises(UsageError, match=f"has {n_tokens} tokens; .* has positions for 256"):
        vlm.encode(Prompt(asked, picture(1)))
    assert too_long(vlm, prompt, "what is there?", 4) == ""
    assert longest(["a", "b", "c"], [1, 3, 2], 2) == ["b", "c"]


# Scores


def test_ties_count_against_the_model_and_only_candidates_count():
    scores = np.array([[1.0, 1.0, 0.0], [2.0, 1.0, 3.0], [0.0, 5.0, 9.0]])
    assert best(scores, [0, 0, 1])[0].tolist() == [False, False, False]
    offered = np.array([[True, False, True], [True, True, False], [True, True, False]])
    hits, first = best(scores, [0, 0, 1], offered)
    assert hits.tolist() == [True, True, True] and first.tolist() == [0, 0, 1]
    with pytest.raises(UsageError, match="score of class number 2 is not finite"):
        best(np.array([[0.0, 1.0, np.nan]]), [0])


def test_fewer_candidates_are_those_of_the_closed_world():
    names = [f"c{number}" for number in range(10)]
    examples = [Labelled(str(number), "", names[number]) for number in range(10)]
    scores = np.random.default_rng(0).normal(size=(10, 10))
    cell = Cell(CLASSES, "m", "q", OPEN, "-", SUM, 3)
    table = score_rows(cell, examples, names, scores, seed=4)
    for number, each in enumerate(examples):
        offered = candidates(each, names, 3, seed=4, order="random")
        expected = max(offered, key=lambda place: scores[number, place])
        assert table["predicted"][number] == names[expected]
        assert table["accuracy"][number] == (expected == number)
    assert (table["accuracy_baseline"] == 1 / 3).all() and table["substring"].isna().all()


def test_the_coefficient_takes_the_prior_off_and_no_more():
    rng = np.random.default_rng(0)
    own = rng.integers(0, 8, 200)
    prior, signal = rng.normal(0, 6, 8), np.eye(8)[own]
    coefficient, accuracy = calibrated(signal + 1.3 * prior, prior, own.tolist())
    assert coefficient == pytest.approx(1.3, abs=0.11) and accuracy == 1.0
    assert calibrated(20 * signal, prior * 0.01, own.tolist()) == (0.0, 1.0)


def scenes_of(n_classes: int, *, name: str = "made") -> Classes:
    names = NAMES[:n_classes]
    parts = {
        part: tuple(Labelled(f"{part} {n}", picture(100 * place + n), names[n % n_classes]) for n in range(6))
        for place, part in enumerate(("train", "validation", "test"))
    }
    return Classes(name, names, **parts)


def test_sum_mean_and_priors_are_what_they_say(vlm, monkeypatch):
    # A prior taken off many times over decides alone.
    monkeypatch.setattr(study, "COEFFICIENTS", (20.0,))
    style = dataclasses.replace(STYLES["plain"], questions=QUESTIONS)
    design = design_of(vlm, scenes_of(4), style, ks=("2", "all"), n_new=4)
    made = study.all_scores(vlm, design)
    table, notes = score_tables(design, "m", made)
    lengths = np.array(design.names.lengths)
    sums = made["test/0"].numpy()
    reference = one_by_one(vlm, [Prompt(QUESTIONS[0], each.image) for each in design.data.test], design.names)
    assert np.allclose(sums, reference.numpy(), atol=1e-4)
    for method, scores in ((SUM, sums), (MEAN, sums / lengths)):
        rows = table[(table["method"] == method) & (table["question"] == QUESTIONS[0]) & (table["k"] == 4)]
        assert rows["predicted"].tolist() == [design.data.names[number] for number in scores.argmax(1)]
    alone = score_names(vlm, [Prompt(QUESTIONS[1])], design.names)
    assert torch.allclose(made["no image/1"], alone.cpu())
    # What is said of other pictures, so that the two parts' means are far apart.
    torch.manual_seed(0)
    made = {name: torch.randn(value.shape) for name, value in made.items()}
    table, notes = score_tables(design, "m", made)
    sides = ("test", "validation")
    averages = {part: np.mean([made[f"{part}/{n}"].numpy() / lengths for n in (0, 1)], 0) for part in sides}
    expected = averages["test"] - 20 * averages["validation"].mean(0)
    rows = table[(table["method"] == "mean less mean image") & (table["question"] == "average")]
    assert rows["predicted"].tolist() == [design.data.names[number] for number in expected.argmax(1)]
    assert {each.coefficient for each in notes} == {20.0} and len(notes) == 3 * 4


def test_designs_that_cannot_be_are_refused(vlm):
    style, data = dataclasses.replace(STYLES["plain"], questions=QUESTIONS), scenes_of(4)
    for ks, text in (
        (("5",), "--k 5 is not a number of candidates among 4 classes; use 2 to 4, or all"),
        (("1",), "--k 1 is not a number"),
        (("many",), "--k many is not a number"),
        (("4", "all"), "names 4 candidates twice"),
    ):
        with pytest.raises(UsageError, match=text):
            design_of(vlm, data, style, ks=ks)
    with pytest.raises(UsageError, match="'what is this\\?' holds 'this', which .* has no token for"):
        design_of(vlm, data, STYLES["plain"])
    with pytest.raises(UsageError, match="--k 4 makes a prompt of .* tokens with the answer, for 256 positions"):
        design_of(vlm, data, style, ks=("4",), n_new=240)
    left = design_of(vlm, data, style, n_new=240)
    assert left.ks == (2, 4) and left.closed == () and set(left.left_out) == {2, 4}
