"""Likeness of images and who tells them apart: formulas, ties, captions, and the experiment."""

import dataclasses
import itertools
import json
import random
from math import comb

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from experiments import erroneous_agreement
from tests.data.readers.made import shown, whatsup
from tests.helpers import assert_help_tells, command, killed_at
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.answering.by_category import by_category
from vlm_mech.behaviour.erroneous_agreement import figures, study
from vlm_mech.behaviour.erroneous_agreement.data import (
    RELATIONS,
    Asked,
    Case,
    Cases,
    answerable,
    check_enough,
    load_cases,
    sample_sets,
)
from vlm_mech.behaviour.erroneous_agreement.similarity import (
    alignment,
    alignment_with_floor,
    answer_scores,
    contrastive_view,
    cosines,
    patch_cosine,
    picks,
    rank_correlations,
    tower_patches,
)
from vlm_mech.data.scene_questions import questions
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import read, run
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.results.figures import ending
from vlm_mech.results.result import N_RESAMPLES, Result
from vlm_mech.results.saved_figures import redraw
from vlm_mech.results.statistics import expanded_tail, point_biserial


@pytest.fixture(scope="module")
def clip():
    return DualEncoder.load("clip")


def states(seed, n=12, width=5):
    return np.random.default_rng(seed).normal(size=(n, width))


def hsic_by_sums(one, other):
    """Unbiased HSIC written out as sums over distinct indices (Song et al. 2012), without matrix products."""
    n = len(one)
    pairs = [(i, j) for i, j in itertools.permutations(range(n), 2)]
    first = sum(one[i, j] * other[i, j] for i, j in pairs) / (n * (n - 1))
    triples = itertools.permutations(range(n), 3)
    third = sum(one[i, j] * other[i, q] for i, j, q in triples) / (n * (n - 1) * (n - 2))
    fours = itertools.permutations(range(n), 4)
    second = sum(one[i, j] * other[q, r] for i, j, q, r in fours) / (n * (n - 1) * (n - 2) * (n - 3))
    return first + second - 2 * third


def test_the_toy_of_the_paper():
    one, other = np.array([[10.0, 11, 12]]), np.array([[12.0, 11, 10]])
    assert cosines(one, other)[0, 0] == pytest.approx(361 / 365, abs=1e-12) and round(361 / 365, 3) == 0.989
    assert rank_correlations(one, other)[0, 0] == pytest.approx(-1, abs=1e-12)


def test_ranks_with_ties_are_those_of_scipy():
    one, other = np.random.default_rng(0).integers(0, 5, (2, 4, 30)).astype(float)
    found = rank_correlations(one, other)
    for row, column in itertools.product(range(4), range(4)):
        assert found[row, column] == pytest.approx(spearmanr(one[row], other[column]).statistic, abs=1e-12)
    with pytest.raises(WorkError, match="no cosine"):
        rank_correlations(np.ones((1, 3)), np.array([[1.0, 2, 3]]))


def test_patches_are_compared_place_by_place():
    one = torch.tensor([[1.0, 0], [0, 2]])
    assert patch_cosine(one, torch.tensor([[3.0, 0], [1, 1]])) == pytest.approx((1 + 0.5**0.5) / 2)
    assert patch_cosine(one, one.flip(0)) == pytest.approx(0)
    assert np.isnan(patch_cosine(one, torch.ones(3, 2)))


def test_alignment_by_hand():
    one, other = np.array([[0.0], [1], [2], [3]]), np.array([[0.0], [1], [0], [1]])
    # Centred products: one'other = 1, one'one = 5, other'other = 1.
    assert alignment(one, other) == pytest.approx(1 / 5)
    assert alignment(one + 100, 7 * other) == pytest.approx(1 / 5), "neither place nor scale matters"
    assert np.isnan(alignment(one, np.ones((4, 2))))
    with pytest.raises(UsageError, match="needs 4 examples; there are 3"):
        alignment(one[:3], other[:3])


@pytest.mark.parametrize("debiased", [False, True])
def test_rotations_are_aligned(debiased):
    one = states(1)
    rotation, _ = np.linalg.qr(states(2, 5, 5))
    assert alignment(one, one @ rotation, debiased=debiased) == pytest.approx(1, abs=1e-12)
    assert alignment(one, one @ np.diag([5, 1, 1, 1, 0.1]), debiased=debiased) < 0.99


def test_debiased_alignment_is_sums_over_distinct_examples():
    one, other = states(3, 7), states(4, 7, 3)
    grams = [each @ each.T for each in (one, other)]
    expected = hsic_by_sums(*grams) / (hsic_by_sums(grams[0], grams[0]) * hsic_by_sums(grams[1], grams[1])) ** 0.5
    assert alignment(one, other, debiased=True) == pytest.approx(expected, abs=1e-10)


def test_bias_is_what_shuffled_pairings_show():
    one, other = states(5, 30, 100), states(6, 30, 100)
    assert alignment(one, other) > 0.7 and abs(alignment(one, other, debiased=True)) < 0.15
    related = alignment_with_floor(one, one + 0.3 * other, np.arange(30))
    assert related.floor_low < 0 < related.floor_high < 0.5 < related.low < related.value < related.high
    unrelated = alignment_with_floor(one, other, np.arange(30))
    assert unrelated.low < 0 < unrelated.high and abs(unrelated.floor) < 0.05


def test_the_jackknife_leaves_out_whole_groups():
    one, other = np.repeat(states(7, 8), 2, 0), np.repeat(states(7, 8) + 0.5 * states(8, 8), 2, 0)
    alone, together = (alignment_with_floor(one, other, groups) for groups in (np.arange(16), np.arange(16) // 2))
    assert together.high - together.low > 1.2 * (alone.high - alone.low)


def test_ties_are_wrong_in_both_directions():
    scores = np.array([[0.9, 0.1, 0.0], [0.5, 0.5, 0.2], [0.1, 0.6, 0.3]])
    assert picks(scores).tolist() == [True, False, False]
    assert picks(scores.T).tolist() == [True, False, True]
    assert picks(np.ones((2, 2)) + np.array([[1e-9, 0], [0, 1e-3]])).tolist() == [False, True]


def test_accuracy_of_pairs_and_sets():
    right = [np.array([True, True, True, False]), np.array([True] * 4)]
    found = study.accuracies(right)
    assert found["individual"].tolist() == [1, 0.5, 1, 1] and found["pair"].tolist() == [1, 0, 1, 1]
    assert np.array_equal(found["set"], [0, np.nan, 1, np.nan], equal_nan=True)
    chance = [found[f"{name}_baseline"][0] for name in ("individual", "pair", "set")]
    assert chance == [1 / 4, 1 / 16, 1 / 256]
    two = study.accuracies([np.array([True, False])])
    assert (two["individual_baseline"][0], two["pair_baseline"][0]) == (1 / 2, 1 / 4) and np.isnan(two["set"]).all()


def test_correlation_with_being_right():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=40), np.arange(40)
    right = (values + rng.normal(size=40) > 0).astype(float)
    value, low, high = point_biserial(values, right, groups, n_resamples=N_RESAMPLES)
    assert value == pytest.approx(pearsonr(values, right).statistic) and -1 < low < value < high < 1
    some, said = values[:8], np.array([1.0, 0, 1, 0, 0, 1, 0, 0])
    drawn = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=N_RESAMPLES)
    rows = [np.repeat(np.arange(8), counts) for counts in drawn]
    found = [pearsonr(some[row], said[row]).statistic for row in rows if len(set(said[row])) == 2]
    tail = 100 * expanded_tail(8, 0.95)
    expected = np.percentile(found, [tail, 100 - tail])
    assert point_biserial(some, said, np.arange(8), n_resamples=N_RESAMPLES)[1:] == pytest.approx(expected, abs=1e-9)
    assert np.isnan(point_biserial(values, np.ones(40), groups, n_resamples=N_RESAMPLES)).all()


def test_what_models_see_is_what_a_trace_reads(clip, vlm):
    images, captions = [picture(1, 96, 96), picture(2, 120, 80)], ["a red circle", "a blue star left of a red cross"]
    view = contrastive_view(clip, images, captions)
    encoded = clip.encode(images, captions)
    logits = cosines(view.images, view.captions) * clip.model.logit_scale.exp().item()
    assert np.allclose(logits, run(clip, encoded).logits.numpy(), atol=1e-4)
    penultimate = Site("vision.resid_post", len(clip.vision_layers) - 2)
    found = read(clip, encoded, penultimate)[penultimate]
    assert [torch.equal(patches, found[row, 1:]) for row, patches in enumerate(view.patches)] == [True, True]
    assert view.states["class token"].shape == (2, 4, 128)
    assert np.allclose(view.states["class token"][:, 2], found[:, 0])
    assert np.allclose(view.states["mean of patches"][:, 2], found[:, 1:].mean(1), atol=1e-6)
    site = Site("projector.in")
    prompts = [Prompt("what is this?", image) for image in images]
    assert torch.equal(torch.stack(tower_patches(vlm, images)), read(vlm, prompts, site)[site])


def test_answers_of_one_token_are_scored_by_it(vlm):
    prompts = [Prompt("what colour is the circle?", picture(seed)) for seed in (1, 2)]
    answers = [("red", "blue"), ("blue", "red")]
    scores, said = answer_scores(vlm, prompts, answers, ["red", "red"])
    encoded = vlm.encode(prompts)
    last = torch.log_softmax(run(vlm, encoded).last.double(), -1)
    red, blue = (vlm.answer_ids(encoded, [word] * 2)[0] for word in ("red", "blue"))
    expected = [[last[0, red], last[0, blue]], [last[1, blue], last[1, red]]]
    assert np.allclose(scores, expected, atol=1e-6)
    assert said.tolist() == [bool(last[row].argmax() == red) for row in range(2)]


NAMES = ["colour", "kind", "presence", "left-right", "front-behind", "count", "part", "phrases"]


@pytest.mark.parametrize("name", NAMES)
def test_captions_are_true_of_one_image(name):
    cases = load_cases(f"scenes/{name}", n=12, seed=0, split="test", template="")
    assert len(cases.cases) == 12 and not cases.refused
    for case in cases.cases:
        answers = case.asked[0].answers
        if answers[0] in RELATIONS:
            bare = {told.replace(RELATIONS[answer], "") for told, answer in zip(case.captions, answers, strict=True)}
            assert len(bare) == 1, case.captions
        if name == "colour":
            assert all(answer in caption for answer, caption in zip(answers, case.captions, strict=True))


def test_sets_show_four_relations_of_the_same_two_things():
    expected = {"left-right": ("left", "right"), "above-below": ("above", "below")}
    for scenes in sample_sets(6, seed=0, split="test"):
        assert all(each.split != "train" for each in scenes)
        one, other = scenes[0].things
        for number, scene in enumerate(scenes):
            assert [(thing.kind, thing.colour) for thing in scene.things] == [
                (thing.kind, thing.colour) for thing in (one, other)
            ]
            type_ = "left-right" if number < 2 else "above-below"
            asked = {each.about: each.answer for each in questions(scene, ("left-right", "above-below"))}
            assert asked == {
                (one.kind, other.kind): expected[type_][number % 2],
                (other.kind, one.kind): expected[type_][1 - number % 2],
            }
    case = load_cases("scenes/relations", n=1, seed=0, split="test", template="").cases[0]
    assert [caption.split()[3] for caption in case.captions] == ["left", "right", "above", "below"]


def case(number, answers=("red", "blue"), captions=("a red circle", "a blue circle")):
    images = picture(number), picture(number + 50)
    return Case(f"c{number}", images, captions, (Asked("what?", answers),), f"g{number}")


def test_cases_that_cannot_be_used_are_counted(vlm):
    found = answerable(vlm, Cases("some", (case(1), case(2, ("red", "red star")))))
    assert [each.id for each in found.cases] == ["c1"] and "do not part: one begins the other" in found.refused[
        0
    ].reason
    with pytest.raises(UsageError, match=r"gives 1 cases of .* at least 4 .* 1 were refused, .* do not part"):
        check_enough([found])
    with pytest.raises(UsageError, match="two captions are"):
        case(3, captions=("a circle", "a circle"))


def written(folder, *, n=5, **changes):
    """A folder of pairs, the first changed."""
    folder.mkdir()
    rng = random.Random(0)
    for number in range(n):
        for side in "ab":
            picture(rng.randrange(10**6), 96, 80 if side == "a" else 96).save(folder / f"{number}{side}.png")
        row = {"id": f"p{number}", "image": f"{number}a.png", "counterfactual_image": f"{number}b.png"}
        row |= {"question": "what colour is the circle?", "answer": "red", "counterfactual_answer": "blue"}
        row |= {"caption": f"a {'red' if number else 'green'} circle"} if number < 2 else {}
        row |= {"counterfactual_caption": "a blue circle"} if number < 2 else {}
        row = {name: value for name, value in (row | (changes if not number else {})).items() if value is not None}
        with (folder / "pairs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return folder


def test_captions_of_a_folder(tmp_path):
    folder = written(tmp_path / "some")
    (folder / "4b.png").write_bytes(b"no picture")
    cases = load_cases(str(folder), n=None, seed=0, split="test", template="the {answer} one: {question}")
    told = [each.captions for each in cases.cases]
    assert told[:2] == [("a green circle", "a blue circle"), ("a red circle", "a blue circle")]
    assert told[2][1] == "the blue one: what colour is the circle" and len(told) == 4
    assert [each.id for each in cases.refused] == ["p4"] and "cannot be read" in cases.refused[0].reason
    with pytest.raises(UsageError, match="has no {answer}"):
        load_cases(str(folder), n=None, seed=0, split="test", template="a picture")


def test_pairs_that_make_sets_are_cases_of_four(tmp_path):
    """What'sUp among four captions; of the set that lacks a picture nothing is counted."""
    folder = whatsup(tmp_path, (("circle", "star"), ("ring", "heart"), ("fish", "frog")))
    (folder / "data" / "controlled_clevr" / "ring_behind_heart.jpeg").unlink()
    options = {"n": None, "seed": 0, "split": "test", "template": "{question} {answer}"}
    cases = load_cases(f"whatsup-four:{folder}", **options)
    assert len(cases.cases) == 5 and [len(each.images) for each in cases.cases] == [4] * 5
    one = next(case for case in cases.cases if case.captions[2] == "A circle on a star")
    assert one.captions[:2] == ("A circle to the left of a star", "A circle to the right of a star")
    assert one.captions[3] == "A circle under a star" and one.asked[0].answers == ("left", "right", "on", "under")
    # Pictures are numbered in the order on, under, left, right.
    assert [shown(image) for image in one.images] == [3, 4, 1, 2]
    reasons = [each.reason for each in cases.refused]
    assert len(reasons) == 2 and "cannot be counted" in reasons[1]
    two_way = load_cases(f"whatsup:{folder}", **options)
    assert len(two_way.cases) == 11 and {len(each.images) for each in two_way.cases} == {2}
    worded = load_cases(f"whatsup:{folder}", **options | {"template": "a photo of {caption}"})
    told = {f"a photo of {caption}" for each in two_way.cases for caption in each.captions}
    assert {caption for each in worded.cases for caption in each.captions} == told
    assert len(load_cases(f"whatsup-four:{folder}", **options | {"n": 4}).cases) == 4
    right = [np.array([True] * 4), np.array([True, True, False, True])]
    found = study.accuracies(right)
    assert found["set"][::2].tolist() == [1, 0] and found["pair"].tolist() == [1, 1, 1, 0]


def test_accuracy_is_told_by_pattern(clip, vlm):
    """The captions of one pattern are each picture's own, those of the other are exchanged."""
    captions = ("a red circle", "a blue circle")
    cases = [
        dataclasses.replace(case(number, captions=captions), categories=("ab"[number % 2],)) for number in range(4)
    ]
    images = study.looked_at(clip, vlm, cases, cases[0]).assign(data="some", n_layers=4)
    scores = {"a": [[1.0, 0.0], [0.0, 1.0]], "b": [[0.0, 1.0], [1.0, 1.0]]}
    images["captions"] = [np.array(scores["ab"[row // 2 % 2]][row % 2]) for row in range(8)]
    table, _ = study.pair_table(images, tau=0.5)
    told = by_category(Result("r", table, study.AXES, study.METRICS), **study.BY_CATEGORY)
    told = told.set_index(["view", "category", "metric"])["mean"]
    for view in (study.TO_TEXT, study.TO_IMAGE):
        assert told.loc[(view, "a")].to_dict() == {"individual": 1, "pair": 1}
        assert told.loc[(view, "b")].to_dict() == {"individual": 0, "pair": 0}, "one is wrong, a tie is too"


def test_the_experiment_on_the_embedded_models(tmp_path, monkeypatch, capsys):
    data = ["scenes/left-right", "scenes/relations", str(written(tmp_path / "own"))]
    given = ["--data", *data, "--n", "5", "--batch", "3"]
    assert command(erroneous_agreement, *given, "--out", tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert "20 pairs of 3 data sets" in said and "could not be used" not in said and "McNemar's exact test" in said
    result = Result.load(tmp_path / "one")
    assert set(result.provenance["floors"][0]) >= {"low", "median", "high", "above_tau", "n"}
    assert len(result.provenance["alignment"]) == 3 * 2 * 4
    known = result.table.dropna(subset=["similarity"])
    assert known.groupby("data")["example"].nunique().to_dict() == {data[0]: 5, data[1]: 10, data[2]: 5}
    both = known.pivot(index="example", columns="view", values="similarity")
    tower = both[[study.PATCHES, study.READ]].to_numpy()
    assert np.allclose(tower[:, 0], tower[:, 1], atol=1e-6), "the organism reads the tower of the contrastive model"
    right = result.table[result.table["data"] == data[0]].pivot(index="example", columns="view", values="pair")
    right = right[[study.AMONG, study.TO_TEXT]].dropna().to_numpy()
    test = study.paired_test(result, data[0])
    alone = [int(((right[:, one] == 1) & (right[:, 1 - one] == 0)).sum()) for one in (0, 1)]
    assert [test["n"], test["vlm"], test["contrastive"]] == [5, *alone] and sum(alone) > 0
    assert test["p"] == pytest.approx(
        min(1, 2 * sum(comb(sum(alone), k) for k in range(min(alone) + 1)) / 2 ** sum(alone))
    )
    sets = result.summary("set").query("n > 0")
    assert set(sets["n"]) == {5} and np.allclose(sets["baseline"], 1 / 256)
    assert "set" in redraw(tmp_path / "one") and len(redraw(tmp_path / "one")) == 7
    killed_at(monkeypatch, study, "looked_at", 3)
    assert command(erroneous_agreement, *given, "--out", tmp_path / "two") == 130
    assert command(erroneous_agreement, *given, "--out", tmp_path / "two", "--resume") == 0
    for name in ("result.parquet", "summary.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_floors_are_images_of_other_groups(clip, vlm):
    captions = ("a red circle", "a blue circle")
    cases = [dataclasses.replace(case(number, captions=captions), group=f"g{number // 2}") for number in range(8)]
    images = study.looked_at(clip, vlm, cases, cases[0]).assign(data="some", n_layers=4)
    table, floors = study.pair_table(images, tau=0.3)
    embedded = np.stack(list(images["embedding"])).astype(float)
    embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
    own = table[table["view"] == study.POOLED].to_dict("list")
    every = []
    for row in range(8):
        others = [embedded[2 * row] @ embedded[2 * other + 1] for other in range(8) if other // 2 != row // 2]
        every += others
        assert own["similarity"][row] == pytest.approx(embedded[2 * row] @ embedded[2 * row + 1])
        assert own["similarity_baseline"][row] == pytest.approx(np.mean(others))
        assert own["above_tau_baseline"][row] == pytest.approx(np.mean(np.array(others) > 0.3))
    assert own["place"][3] == pytest.approx(np.mean(np.array(every) < own["similarity"][3]))
    assert floors[0]["n"] == len(every) == 8 * 6
    patches = tower_patches(vlm, [cases[7].images[0], cases[0].images[1]])
    for view, axis in ((study.TO_TEXT, 1), (study.TO_IMAGE, 0)):
        scores = np.stack(list(images["captions"])).reshape(8, 2, 2)
        right = [np.array_equal(each.argmax(axis), [0, 1]) for each in scores]
        assert table[table["view"] == view]["pair"].tolist() == right
    floor = table[table["view"] == study.READ]["similarity_baseline"].to_numpy()
    assert floor[7] == pytest.approx(patch_cosine(*patches), abs=1e-6)
    assert np.isnan(floor).tolist() == [True, False] * 4, "the next case is of the same group every other time"


def test_what_models_have_no_words_for_is_told(tmp_path, capsys):
    """One caption of six is refused and counted; the question of the first is asked with an unknown token."""
    folder = written(tmp_path / "some", n=6, caption="a picture of zebras")
    other = written(tmp_path / "other", question="what colour is the zebra?")
    given = ["--caption", "a {answer} circle", "--out", tmp_path / "one"]
    assert command(erroneous_agreement, "--data", folder, other, *given) == 0
    told = capsys.readouterr().out
    assert "10 pairs of 2 data sets" in told and "holds 'zebras', which clip has no token for" in told
    sentence = f"{other}: 1 of 5 questions hold words that organism has no token for, such as 'zebra'; they are used"
    assert sentence in told and told.count("hold words that") == 1


@pytest.mark.parametrize("n_data", [1, 2, 5])
def test_titles_are_clear_of_the_tools_and_captions_fit(n_data):
    names = [f"whatsup:/somewhere/with/many/long/folders/{at}/controlled_images_dataset.json" for at in range(n_data)]
    rows = [
        {"example": f"{name}/{pair}", "group": f"{name}/{pair}", "data": name, "view": view, "pair": float(pair % 2),
         "similarity": 0.9}
        for name in names for pair in range(6) for view in (study.TO_TEXT, study.AMONG, study.POOLED)
    ]  # fmt: skip
    table = pd.DataFrame(rows).assign(pair_baseline=0.25, similarity_baseline=0.1)
    every = table[["example", "group"]].drop_duplicates().merge(table[list(study.AXES)].drop_duplicates(), how="cross")
    table = every.merge(table, how="left", on=["example", "group", *study.AXES])
    floors = [{"data": name, "view": study.POOLED, "n": 30, "low": 0.1, "high": 0.3} for name in names]
    aligned = {"pooled": "class token", "layer": 0, "n": 6, "value": 0.5, "low": 0.4, "high": 0.6}
    alignment = [aligned | {"data": name, "floor_low": -0.1, "floor_high": 0.1} for name in names]
    told = {"floors": floors, "tau": 0.95, "alignment": alignment}
    result = Result("agreement", table, study.AXES, (study.PAIR, study.SIMILARITY), provenance=told)
    dots = figures.dots(result, metric="pair", views=[study.TO_TEXT, study.AMONG], title="both images of a pair right")
    who = figures.who_is_right(result, view=study.POOLED, title="are pairs missed because they are similar?")
    layers = figures.aligned_layers(result, title="both images along the contrastive vision encoder")
    short = [ending(name, 38) for name in names]
    assert all(each.startswith("whatsup:…") and each.endswith("images_dataset.json") for each in short)
    assert list(dots.layout.yaxis.ticktext) == short
    assert [trace.name for trace in layers.data if trace.name != "shuffled pairings"] == short
    headings = [each for each in who.layout.annotations if each.hovertext]
    assert [each.text.split("<br>")[0] for each in headings] == short and [each.hovertext for each in headings] == names
    for figure in (dots, who, layers):
        [caption] = [each for each in figure.layout.annotations if each.name == "caption"]
        assert 5.6 * len(caption.text) <= figure.layout.width - 190
        # Plotly's tools take 280 pixels of the upper right corner.
        assert 8 * len(figure.layout.title.text) < figure.layout.width - 280
    # The legend has a row of 30 pixels for each entry.
    assert dots.layout.height - 180 >= 30 * 3


def test_wrong_use_is_one_line(tmp_path, capsys):
    lacking = written(tmp_path / "lacking", n=1, counterfactual_image=None)
    few = written(tmp_path / "few", n=3)
    unknown = written(tmp_path / "unknown", n=4, caption="a picture of zebras")
    for given, message in (
        (["--tau", "1.5"], "tau is 1.5; a cosine above 0"),
        (["--batch", "0"], "batch is 0; it must be above 0"),
        (["--tau", "0"], "tau is 0; a cosine above 0"),
        (["--data", "scenes/colour", "scenes/colour"], "data 'scenes/colour' is given twice"),
        (["--data", "scenes/colour", "--n", "3"], "at least 4 are needed"),
        (["--data", lacking], "counterfactual_image is missing"),
        (["--data", unknown], "which clip has no token for"),
        (["--data", unknown, "scenes/colour"], "has no token for; leave it out (--data scenes/colour)"),
        (["--data", "scenes/colour", few, "scenes/kind"], "; leave it out (--data scenes/colour scenes/kind)"),
        (["--n", "4", "--contrastive", "organism"], "is not a contrastive model"),
        (["--n", "4", "--model", "clip"], "is a contrastive model without a decoder"),
    ):
        assert command(erroneous_agreement, *given, "--out", tmp_path / "none") == 2, given
        error = capsys.readouterr().err
        # What loading a model shows of its progress comes before.
        assert message in error.splitlines()[-1] and error.count("error: ") == 1, error


def test_help_tells_its_options():
    assert_help_tells(erroneous_agreement, ("--contrastive", "--tau"))
