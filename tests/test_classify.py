"""Classification: name scores from one cache, reading of answers, calibration, frequency, two hops, tuning, the run."""

import dataclasses
import json
import random

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import classify
from tests.conftest import picture
from tests.helpers import assert_help_is_light, command, killed_at
from tests.tiny import tiny_model, tiny_processor
from tests.zoo import ZOO
from vlm_mech import figures
from vlm_mech.classify import frequency, job, study
from vlm_mech.classify.answers import (
    WORDINGS,
    Reading,
    candidates,
    check_known,
    longest,
    read_answer,
    stemmed,
    too_long,
)
from vlm_mech.classify.findings import mcnemar
from vlm_mech.classify.names import Names, names_after, score_names
from vlm_mech.classify.others import contrastive_scores
from vlm_mech.classify.questions import NAMED, TWO_HOP, UNSEEN, Asked, answered, load_questions, scene_questions
from vlm_mech.classify.study import calibrated, design_of, score_tables
from vlm_mech.classify.table import (
    AXES,
    CLASSES,
    GENERATION,
    MEAN,
    METRICS,
    OPEN,
    SUM,
    Cell,
    best,
    completed,
    score_rows,
)
from vlm_mech.classify.tuning import Tuning, tune, with_answers
from vlm_mech.contrastive import DualEncoder
from vlm_mech.data.classes import Classes, Labelled, class_names, from_splits, load_classes, normalised
from vlm_mech.errors import UsageError
from vlm_mech.model import VLM
from vlm_mech.prompt import Prompt
from vlm_mech.result import Result
from vlm_mech.trace import run

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


@pytest.mark.parametrize("family", list(ZOO))
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
    begun = stemmed(vlm, prompts()[0], "the colour is")
    assert begun.text is not None and begun.text.endswith("ASSISTANT: the colour is")
    assert stemmed(vlm, prompts()[0], " ") is prompts()[0] or stemmed(vlm, prompts()[0], "").text is None
    names = names_after(vlm, [begun], ["red", "blue"])
    logits = run(vlm, begun).last[0].log_softmax(-1)
    assert torch.allclose(score_names(vlm, [begun], names)[0], logits[[ids[0] for ids in names.ids]], atol=1e-5)


# Answers


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("A category.", "cat", Reading(True, ())),
        ("It is a Cat!", "cat", Reading(True, ("cat",))),
        ("a cat fish", "cat", Reading(True, ("cat fish",))),
        ("a cat and a cat fish", "cat", Reading(True, ("cat", "cat fish"))),
        ("cat dog", "cat", Reading(True, ("cat", "dog"))),
        ("cats", "cat", Reading(True, ())),
        ("the cat_fish", "cat fish", Reading(False, ("cat fish",))),
        ("cat, dog, cat fish, sea lion", "dog", Reading(True, ("cat", "dog", "cat fish", "sea lion"))),
        ("", "cat", Reading(False, ())),
    ],
)
def test_answers_are_read_as_whole_words(answer, label, expected):
    found = read_answer(answer, label, ["cat", "dog", "cat fish", "sea lion"])
    assert found == expected
    assert found.only == (expected.named[0] if len(expected.named) == 1 else "")


def test_candidates_hold_the_class_and_differ_in_order_alone():
    names, example = [f"c{number}" for number in range(30)], Labelled("x", picture(0), "c7")
    for k in (2, 5, 30):
        mixed, fixed = (candidates(example, names, k, seed=1, order=order) for order in ("random", "fixed"))
        assert 7 in fixed and len(set(fixed)) == k and list(fixed) == sorted(mixed)
        assert mixed == candidates(example, names, k, seed=1, order="random")
    others = {candidates(Labelled(str(n), "", "c7"), names, 5, seed=1, order="fixed") for n in range(20)}
    places = {candidates(Labelled(str(n), "", "c7"), names, 5, seed=1, order="random").index(7) for n in range(40)}
    assert len(others) > 15 and places == set(range(5))
    with pytest.raises(UsageError, match="31 candidates are asked for among 30 classes; 2 to 30 can be"):
        candidates(example, names, 31, seed=1, order="random")


def test_a_prompt_too_long_for_the_model_is_foreseen(vlm):
    prompt = Prompt("what is there?", picture(1))
    asked = WORDINGS["plain"].among("what is there?", ["red star"] * 80)
    n_tokens = vlm.encode(Prompt(asked, picture(1))).n_pos
    assert too_long(vlm, prompt, asked, 4).startswith(f"{n_tokens + 4} tokens")
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
    wording = dataclasses.replace(WORDINGS["plain"], questions=QUESTIONS)
    design = design_of(vlm, scenes_of(4), wording, ks=("2", "all"), n_new=4)
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
    wording, data = dataclasses.replace(WORDINGS["plain"], questions=QUESTIONS), scenes_of(4)
    for ks, text in (
        (("5",), "--k 5 is no number of candidates among 4 classes; 2 to 4 or all is"),
        (("1",), "--k 1 is no number"),
        (("many",), "--k many is no number"),
        (("4", "all"), "names 4 candidates twice"),
    ):
        with pytest.raises(UsageError, match=text):
            design_of(vlm, data, wording, ks=ks)
    with pytest.raises(UsageError, match="'what is this\\?' holds 'this', which .* has no token for"):
        design_of(vlm, data, WORDINGS["plain"])
    with pytest.raises(UsageError, match="--k 4 makes a prompt of .* tokens with the answer, for 256 positions"):
        design_of(vlm, data, wording, ks=("4",), n_new=240)
    left = design_of(vlm, data, wording, n_new=240)
    assert left.ks == (2, 4) and left.closed == () and set(left.left_out) == {2, 4}


# Comparisons


def test_the_contrastive_model_is_scored_by_its_own_similarities():
    encoder = DualEncoder.load("clip", check=False)
    data = load_classes("scenes/beetles", n=8, n_train=1, n_validation=1)
    scores = contrastive_scores(encoder, data.test, data.names, "a {class}", batch=3)
    texts = [f"a {name}" for name in data.names]
    logits = run(encoder, encoder.encode([each.image for each in data.test], texts)).logits.double().numpy()
    assert np.allclose(np.corrcoef(scores.ravel(), logits.ravel())[0, 1], 1, atol=1e-6)
    assert (scores.argmax(1) == logits.argmax(1)).all()
    with pytest.raises(UsageError, match="caption 'a thing' has no {class}"):
        contrastive_scores(encoder, data.test, data.names, "a thing")
    with pytest.raises(UsageError, match="'photo', which clip has no token for"):
        contrastive_scores(encoder, data.test, data.names, "a photo of a {class}")


def test_mcnemar_is_the_binomial_of_what_differs():
    one, other = np.array([1, 1, 1, 1, 1, 0, 0, 1], bool), np.array([0, 0, 0, 0, 0, 1, 0, 1], bool)
    found = mcnemar(one, other)
    assert (found.only_one, found.only_other, found.n) == (5, 1, 8)
    assert found.p == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar(one, one).p == 1.0


# Frequency


def test_counting_follows_its_rule():
    texts = [
        "A red banana, a red banana",
        "is the banana red?",
        "red bananas",
        "the category of a cat",
        "",
        "cat fish.",
    ]
    names = ["red banana", "cat", "cat fish", "dog"]
    assert frequency.counted(texts, names, rule="contiguous").tolist() == [1, 2, 1, 0]
    assert frequency.counted(texts, names, rule="together").tolist() == [2, 2, 1, 0]


def test_training_texts_are_those_the_organism_was_trained_on():
    texts = list(frequency.training_texts("organism", 20, seed=0))
    assert len(texts) == 20 * 8 and texts == list(frequency.training_texts("organism", 20, seed=0))
    asked = [text for text in frequency.training_texts("organism", 150, seed=1) if "banana" in text]
    usual, other = (sum(text.endswith(colour) for text in asked) for colour in ("yellow", "purple"))
    assert usual > 5 * max(1, other)
    with pytest.raises(UsageError, match="training texts of 'clip' are not known"):
        next(frequency.training_texts("clip", 1, seed=0))


def table_of(accuracies: dict[str, float], method: str) -> pd.DataFrame:
    names = list(accuracies)
    rows = [Labelled(f"{name} {number}", "", name) for name in names for number in range(4)]
    right = [number < 4 * accuracies[name] for name in names for number in range(4)]
    cell = Cell(CLASSES, "as loaded", "q", OPEN, "-", method, len(names))
    scores = np.array(
        [
            np.where(np.array(names) == each.label, 1.0 if hit else -1.0, 0.0)
            for each, hit in zip(rows, right, strict=True)
        ]
    )
    return score_rows(cell, rows, names, scores, seed=0)


def test_correlation_with_frequency_is_found_and_only_where_it_is():
    counts = {f"c{number}": 10**number for number in range(5)}
    rising = {name: number / 4 for number, name in enumerate(counts)}
    table = pd.concat([table_of(rising, "rises"), table_of(dict.fromkeys(counts, 0.5), "flat")], ignore_index=True)
    found = {each["method"]: each for each in frequency.correlations(table, counts)}
    assert found["rises"]["spearman"] == pytest.approx(1.0) and found["rises"]["pearson"] > 0.99
    assert found["rises"]["spearman_low"] > 0.9 and found["flat"]["spearman"] is None
    bins = [each for each in frequency.binned(table, counts) if each["method"] == "rises"]
    assert [each["accuracy"] for each in bins] == [0, 0.25, 0.5, 0.75, 1] and bins[0]["low"] is None
    few = {name: 100 + number for number, name in enumerate(counts)}
    assert len([each for each in frequency.binned(table, few) if each["method"] == "rises"]) == 4
    with pytest.raises(UsageError, match="2 classes were tested"):
        frequency.correlations(table_of({"a": 1.0, "b": 0.0}, "x"), {"a": 1, "b": 2})


def test_counts_of_the_users_own(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("class,count\nRed_Circle,5\n blue ,0\n")
    assert frequency.read_counts(path, ["blue", "red circle"]).tolist() == [0, 5]
    with pytest.raises(UsageError, match="no line for the class 'green'"):
        frequency.read_counts(path, ["green"])
    path.write_text("red,many\n")
    with pytest.raises(UsageError, match="line 1 is 'red,many'; class,count is needed"):
        frequency.read_counts(path, ["red"])


# Two hops


def test_two_hops_are_asked_of_the_same_picture_with_and_without_the_name():
    asked = scene_questions(3, seed=0)
    assert len(asked) == 12 and len({each.id for each in asked}) == 3
    for number in range(3):
        first, hop, named, unseen = asked[4 * number : 4 * number + 4]
        assert (
            hop.question == "where does the beetle live?" and named.question == f"where does the {first.answer} live?"
        )
        assert hop.answer == named.answer == unseen.answer and hop.image is named.image and unseen.image is None


def test_questions_of_the_users_own(vlm, tmp_path):
    picture(1).save(tmp_path / "a.png")
    row = {"image": "a.png", "class": "cat", "question": "what colour is this object?", "options": ["red", "blue"]}
    path = tmp_path / "qa.jsonl"
    told = row | {"question": "what is there?", "options": ["red", "blue", "green"], "answer": "green"}
    path.write_text(json.dumps(row | {"answer": "blue"}) + "\n\n" + json.dumps(told) + "\n")
    asked = load_questions(path, WORDINGS["plain"])
    assert asked[1].question == "what colour is the cat? answer with one of: red, blue."
    assert asked[4].question.startswith("The object is a cat. what is there? answer")
    assert [each.task for each in asked[:3]] == [TWO_HOP, NAMED, UNSEEN] and len(
        load_questions(path, WORDINGS["plain"], n=1)
    ) == 3
    for change, text in (
        ({"answer": "green"}, "answer 'green' is none of the options red, blue"),
        ({"answer": "red", "options": ["red"]}, "only the class red"),
        ({"answer": "red", "options": "red"}, "a list of texts is needed"),
        ({"answer": "red", "image": "no.png"}, "does not exist"),
        ({}, "lacks 'answer'"),
    ):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(UsageError, match=f"line 1.*{text}"):
            load_questions(path, WORDINGS["plain"])
    path.write_text("{")
    with pytest.raises(UsageError, match="line 1 is not JSON"):
        load_questions(path, WORDINGS["plain"])


def test_answers_to_questions_are_read_among_their_options(vlm):
    options = [("red star", "blue"), ("cat", "dog and cat and dog", "star")]
    asked = [
        Asked(
            f"{task} {number}",
            task,
            None if task == "without" else picture(number),
            "what is there?",
            options[number % 2],
            options[number % 2][0],
        )
        for task in ("with", "without")
        for number in range(5)
    ]
    table = answered(vlm, asked, "m", n_new=3, batch=2)
    assert set(table["task"]) == {"with", "without"} and len(table) == 20 and (table["k"] == 0).all()
    for number, each in enumerate(asked[:5]):
        names = names_after(vlm, [Prompt(each.question, each.image)], each.options)
        scores = score_names(vlm, [Prompt(each.question, each.image)], names)[0] / torch.tensor(names.lengths)
        row = table[(table["example"] == each.id) & (table["method"] == MEAN)].iloc[0]
        assert row["predicted"] == each.options[int(scores.argmax())] and row["accuracy_baseline"] == 1 / len(
            each.options
        )
        assert row["accuracy"] == (row["predicted"] == each.answer), number


# Tuning


@pytest.mark.parametrize("what", ["projector", "lora"])
def test_tuning_changes_what_it_says_and_leaves_an_ordinary_model(what):
    vlm = VLM(tiny_model(), tiny_processor(), check=False)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    data = scenes_of(3)
    tuning = Tuning(what, n_steps=12, rate=1e-2, batch=4, rank=2)
    told = tune(vlm, data.train, data.validation, "what is there?", tuning)
    assert told["last_loss"] < 0.8 * told["first_loss"]
    after = vlm.model.state_dict()
    assert list(after) == list(before) and all(each.requires_grad for each in vlm.model.parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    projector = {name for name in changed if name.startswith(vlm.family.projector)}
    decoder = {name for name in changed if name.startswith(f"{vlm.family.llm.path}.") and "norm" not in name}
    assert projector and changed == projector | decoder and bool(decoder) == (what == "lora")
    encoded = vlm.encode(prompts()[:1])
    with torch.no_grad():
        plain = vlm.model(**encoded.inputs).logits
    assert (run(vlm, encoded).logits - plain).abs().max() == 0
    again = VLM(tiny_model(), tiny_processor(), check=False)
    assert tune(again, data.train, data.validation, "what is there?", tuning) == told


def test_answers_stand_after_their_prompts(vlm):
    encoded = vlm.encode(prompts())
    inputs, targets = with_answers(vlm, encoded, [(7, 8), (9,), (10, 11, 12)])
    assert targets[1].tolist() == [-100] * encoded.n_pos + [9, -100, -100]
    assert inputs["input_ids"][0, -3:].tolist() == [7, 8, 0] and inputs["attention_mask"][0, -3:].tolist() == [1, 1, 0]
    assert Tuning("lora", n_steps=100, rate=1.0).rate_at(0) < Tuning("lora", n_steps=100, rate=1.0).rate_at(2) == 1.0
    with pytest.raises(UsageError, match="must be at least 1 and the rate above 0"):
        Tuning("projector", n_steps=0)


# Data


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Three classes; one picture is broken."""
    folder = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(("red_circle", "blue", "green triangle")):
        (folder / name).mkdir()
        for each in range(10):
            picture(10 * number + each).save(folder / name / f"{each}.png")
    (folder / "blue" / "3.png").write_text("no picture")
    return folder


def test_a_folder_is_dealt_out_and_broken_pictures_are_told(data_folder):
    data = load_classes(str(data_folder))
    assert data.names == ("blue", "green triangle", "red circle")
    sizes = [len(part) for part in (data.train, data.validation, data.test)]
    assert sizes in ([17, 6, 6], [18, 5, 6], [18, 6, 5])
    assert [each.id for each in data.refused] == ["blue/3.png"] and "cannot be read" in data.refused[0].reason
    ids = [each.id for part in (data.train, data.validation, data.test) for each in part]
    assert len(ids) == len(set(ids)) == 29
    few = load_classes(str(data_folder), n=3, n_train=6, seed=1)
    assert {each.label for each in few.test} == set(data.names) and len(few.train) == 6
    assert few.digest != data.digest and data.digest == load_classes(str(data_folder)).digest


def test_a_folder_may_have_parts_and_names_of_its_own(tmp_path):
    for part in ("train", "val", "test"):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            picture(1).save(tmp_path / part / name / "a.png")
    table = tmp_path / "names.csv"
    table.write_text('n01,red circle\nn02,"blue star"\n')
    data = load_classes(str(tmp_path), names=table)
    assert (
        data.names == ("red circle", "blue star") and [each.label for each in data.test] and len(data.validation) == 2
    )
    table.write_text("n01,red circle\n")
    with pytest.raises(UsageError, match="no line for the class 'n02'"):
        load_classes(str(tmp_path), names=table)
    table.write_text("n01,red circle\nn02,Red  Circle\n")
    with pytest.raises(UsageError, match="'red circle' and 'Red  Circle' are the same words"):
        load_classes(str(tmp_path), names=table)


def test_folders_that_hold_no_classes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="neither a folder, nor hf:owner/name, nor one of scenes/things"):
        load_classes(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="holds no folder of a class"):
        load_classes(str(tmp_path))
    (tmp_path / "red").mkdir()
    with pytest.raises(UsageError, match="class folder .*red' holds no picture"):
        load_classes(str(tmp_path))
    for number in range(3):
        picture(number).save(tmp_path / "red" / f"{number}.png")
    with pytest.raises(UsageError, match="there is only the class red; at least two are needed"):
        load_classes(str(tmp_path))
    for other, text in (
        ("Red_", "are the same words 'red'"),
        ("...", "holds no picture|holds no word"),
        ("blue", "'blue' has 1 picture"),
    ):
        (tmp_path / other).mkdir()
        for number in range(1 if other == "blue" else 3):
            picture(number).save(tmp_path / other / f"{number}.png")
        if other != "...":
            with pytest.raises(UsageError, match=text):
                load_classes(str(tmp_path))
        for path in (tmp_path / other).iterdir():
            path.unlink()
        (tmp_path / other).rmdir()
    with pytest.raises(UsageError, match="0 test pictures are asked for"):
        load_classes("scenes/beetles", n=0)


def test_generated_classes_are_balanced_and_never_of_the_training_split():
    data = load_classes("scenes/things", n=128, n_train=3, n_validation=2)
    assert len(data.names) == 128 == len({each.label for each in data.test}) and len(data.train) == 3
    again = load_classes("scenes/things", n=128, n_train=3, n_validation=2)
    assert data.digest == again.digest
    assert len({each.id.split()[-1] for part in (data.train, data.validation, data.test) for each in part}) == 133
    slots = {part: {int(each.id.split()[-1], 16) % 10 for each in getattr(data, part)} for part in ("train", "test")}
    # The last two tenths of the scenes by their key, which the embedded models were not trained on.
    assert slots == {"train": {8}, "test": {9}}
    assert class_names("scenes/beetles")[0] == "alva" and normalised("Sea-Lion_2 ") == "sea lion 2"


def test_a_dataset_of_the_hub_takes_the_same_path():
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["red_circle", "blue"])})
    made = {
        name: datasets.Dataset.from_dict(
            {"img": [picture(number) for number in range(8)], "fine": [0, 1] * 4}, features=features
        )
        for name in ("train", "test")
    }
    table = made["test"].cast_column("img", datasets.Image(decode=False)).to_list()
    table[0]["img"]["bytes"] = b"no picture"
    made["test"] = datasets.Dataset.from_list(table, features=features)
    data = from_splits("hf:a/b", datasets.DatasetDict(made), {"train": None, "validation": None, "test": None}, seed=0)
    assert data.names == ("red circle", "blue") or data.names == ("blue", "red circle")
    assert len(data.train) + len(data.validation) == 8 and len(data.test) == 7 and data.refused[0].id == "test 0"
    assert (
        np.abs(np.asarray(data.test[0].image, int) - np.asarray(picture(int(data.test[0].id.split()[1])), int)).max()
        < 3
    )
    with pytest.raises(UsageError, match="one called train is needed"):
        from_splits("x", {"test": made["test"]}, {}, seed=0)
    with pytest.raises(UsageError, match="no column of type ClassLabel"):
        from_splits("x", {"train": made["train"].remove_columns("fine")}, {}, seed=0)


# The run


@pytest.fixture(scope="module")
def model_folder(vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def asked_of(model_folder, data_folder, out, *more):
    words = ["--questions", *QUESTIONS, "--new-tokens", "4", "--batch", "8", "--positions", "3"]
    return ["--model", model_folder, "--data", data_folder, "--out", out, *words, *more]


@pytest.fixture(scope="module")
def finished(model_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "counts.csv").write_text("red circle,5\nblue,0\ngreen triangle,100\n")
    more = ("--counts", folder / "counts.csv", "--tune", "projector", "--tune-steps", "3")
    assert command(classify, *asked_of(model_folder, data_folder, folder / "first", *more)) == 0
    return folder / "first"


def test_a_run_leaves_every_method_with_its_chance_and_draws_from_the_file_alone(finished):
    result = Result.load(finished)
    assert result.axes == AXES and [each.name for each in result.metrics] == [each.name for each in METRICS]
    methods = set(result.table["method"])
    assert {
        GENERATION,
        SUM,
        MEAN,
        "sum less no image",
        "mean less mean image",
        "probe, tower mean",
        "probe, last token",
    } <= methods
    assert set(result.table["model"]) == {"as loaded", "tuned (projector)"} and set(result.table["question"]) == {
        *QUESTIONS,
        "average",
    }
    table = result.table
    assert np.allclose(table["accuracy_baseline"].dropna(), 1 / table.loc[table["accuracy_baseline"].notna(), "k"])
    closed = table[(table["world"] == "closed") & (table["order"] == "fixed") & (table["k"] == 3)]
    assert set(closed["method"]) == {GENERATION} and closed["answer"].notna().all()
    asked = table[table["method"].isin([GENERATION, SUM]) & table["accuracy"].notna()]
    assert asked.groupby("model").size().nunique() == 1
    about = result.provenance
    assert about["refused"][0]["id"] == "blue/3.png" and about["tuned"]["n_trained"] > 0
    assert about["frequency"]["counts"] == {"blue": 0, "green triangle": 100, "red circle": 5}
    assert all(each["p_corrected"] >= each["p"] for each in about["comparisons"])
    drawn = figures.redraw(finished)
    assert set(drawn) == {"accuracy", "candidates", "frequency", "positions", "tuning"}
    for name, figure in drawn.items():
        assert json.loads(figure.to_json()) == json.loads((finished / "figures" / f"{name}.json").read_text()), name
    assert any("could not be read (blue/3.png" in each for each in result.findings)
    assert any(each.startswith("Tuned: projector") for each in result.findings)


def test_a_killed_run_goes_on_to_the_same_bytes(model_folder, data_folder, finished, tmp_path, monkeypatch):
    options = asked_of(model_folder, data_folder, tmp_path / "out", "--config", finished / "config.json")
    with monkeypatch.context() as patch:
        killed_at(patch, job, "score_tables", 2)
        assert command(classify, *options) == 130
    calls = killed_at(monkeypatch, job, "generated", -1)
    assert command(classify, *options, "--resume") == 0
    assert not calls, "no answer is generated again"
    assert (tmp_path / "out" / "result.parquet").read_bytes() == (finished / "result.parquet").read_bytes()
    assert (tmp_path / "out" / "summary.csv").read_bytes() == (finished / "summary.csv").read_bytes()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--k", "7"), "--k 7 is no number of candidates among 3 classes"),
        (("--questions", "what zebra is this?"), "'zebra', which"),
        (("--n-qa", "0"), "--n-qa 0 must be at least 1"),
        (("--wording", "paper"), "has no token for"),
        (("--counts", "none.csv"), "counts 'none.csv' cannot be read"),
        (("--qa", "none.jsonl"), "questions 'none.jsonl' cannot be read"),
        (("--n-train", "1"), "has no training picture; raise --n-train"),
        (("--contrastive", "no/such/model"), "no/such/model"),
    ],
)
def test_wrong_use_is_one_line(model_folder, data_folder, tmp_path, capsys, more, text):
    options = asked_of(model_folder, data_folder, tmp_path / "out")
    if more[0] == "--wording":
        options = [each for each in options if each not in ("--questions", *QUESTIONS)]
    assert command(classify, *options, *more) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and text in said[-1] and not any("Traceback" in line for line in said)


def test_help_is_light():
    assert_help_is_light(classify, ["--tune", "--contrastive", "--k", "--qa"])


def test_a_table_is_completed_with_what_was_asked_of_others():
    names = ["a", "b"]
    one = score_rows(Cell(CLASSES, "m", "q", OPEN, "-", SUM, 2), [Labelled("1", "", "a")], names, np.eye(2)[:1], seed=0)
    two = score_rows(
        Cell("two-hop", "m", "q", OPEN, "-", MEAN, 2), [Labelled("2", "", "b")], names, np.eye(2)[:1], seed=0
    )
    whole = completed(pd.concat([two, one], ignore_index=True))
    assert len(whole) == 4 and whole["accuracy"].notna().sum() == 2
    assert whole["task"].iloc[0] == CLASSES and set(whole[whole["accuracy"].isna()]["skipped"]) == {
        "asked of other pictures"
    }
