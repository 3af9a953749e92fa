"""Classification: comparisons with other models, frequency, two hops, tuning."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.behaviour.test_classify import prompts, scenes_of
from tests.zoo import ZOO
from tests.zoo.tiny import picture, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.answering.class_name_scores import names_after, score_names
from vlm_mech.behaviour.answering.prompts import STYLES
from vlm_mech.behaviour.classify import frequency
from vlm_mech.behaviour.classify.baselines import contrastive_scores
from vlm_mech.behaviour.classify.table import CLASSES, MEAN, OPEN, Cell, score_rows
from vlm_mech.behaviour.classify.tuning import Tuning, tune, with_answers
from vlm_mech.behaviour.classify.two_hops import (
    NAMED,
    TWO_HOP,
    UNSEEN,
    Asked,
    answered,
    load_questions,
    scene_questions,
)
from vlm_mech.data.image_classes import Labelled, load_classes
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Patches
from vlm_mech.interventions.trace import run
from vlm_mech.methods.probing.controls import read_without_image, takes_text_alone
from vlm_mech.methods.probing.data import Examples, Spot
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.models.vlm import VLM
from vlm_mech.results.statistics import mcnemar

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
    phrases = list(frequency.training_texts("organism-phrases", 60, seed=1))
    assert sum(text.startswith("where is the ") for text in phrases) > 30
    assert not any(text.startswith("where is the ") for text in asked + texts)
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
    path.write_text("class,count\nred circle,5\nred_Circle,6\n")
    with pytest.raises(UsageError, match="lines 2 and 3 are both about 'red_Circle'"):
        frequency.read_counts(path, ["red circle"])
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
    asked = load_questions(path, STYLES["plain"]).asked
    assert asked[1].question == "what colour is the cat? answer with one of: red, blue."
    assert asked[4].question.startswith("The object is a cat. what is there? answer")
    assert [each.task for each in asked[:3]] == [TWO_HOP, NAMED, UNSEEN]
    drawn = [load_questions(path, STYLES["plain"], n=1, seed=seed) for seed in range(8)]
    assert {len(each.asked) for each in drawn} == {3} and {each.asked[0].answer for each in drawn} == {"blue", "green"}
    assert drawn[0].drawn == "1 of 2 rows, drawn with seed 0"
    with path.open("a") as lines:
        lines.write(json.dumps(told | {"image": "none.png"}) + "\n")
    found = load_questions(path, STYLES["plain"])
    assert len(found.asked) == 6 and [each.id for each in found.refused] == ["4"], "one bad line, the rest is asked"
    assert "does not exist" in found.refused[0].reason
    for change, text in (
        ({"answer": "green"}, "answer 'green' is none of the options red, blue"),
        ({"answer": "red", "options": ["red"]}, "only the class red"),
        ({"answer": "red", "options": "red"}, "a list of texts is needed"),
        ({"answer": "red", "image": "no.png"}, "does not exist"),
        ({}, "lacks 'answer'"),
    ):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(UsageError, match=f"line 1.*{text}"):
            load_questions(path, STYLES["plain"])
    path.write_text("{")
    with pytest.raises(UsageError, match="line 1 is not JSON"):
        load_questions(path, STYLES["plain"])


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
    told = tune(vlm, data.train, data.validation, lambda image: Prompt("what is there?", image), tuning)
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
    assert tune(again, data.train, data.validation, lambda image: Prompt("what is there?", image), tuning) == told


def test_answers_stand_after_their_prompts(vlm):
    encoded = vlm.encode(prompts())
    inputs, targets = with_answers(vlm, encoded, [(7, 8), (9,), (10, 11, 12)])
    assert targets[1].tolist() == [-100] * encoded.n_pos + [9, -100, -100]
    assert inputs["input_ids"][0, -3:].tolist() == [7, 8, 0] and inputs["attention_mask"][0, -3:].tolist() == [1, 1, 0]
    assert Tuning("lora", n_steps=100, rate=1.0).rate_at(0) < Tuning("lora", n_steps=100, rate=1.0).rate_at(2) == 1.0
    with pytest.raises(UsageError, match="must be at least 1 and the rate above 0"):
        Tuning("projector", n_steps=0)


@pytest.mark.parametrize("family", ["blip2", "instructblip"])
def test_families_that_need_a_picture_in_every_pass_are_asked_with_one(family, tmp_path):
    """Their prompts encode without a picture, but their models do not run so."""
    model = VLM(*ZOO[family]("eager", 0), name=family)
    question = Prompt("what is this ?")
    assert not takes_text_alone(model, question)
    asked = [Asked("1", UNSEEN, None, "what is this ?", ("red", "blue"), "red"),
             Asked("2", TWO_HOP, picture(1), "what is this ?", ("red", "blue"), "red")]  # fmt: skip
    assert set(answered(model, asked, "m", n_new=2, batch=2)["task"]) == {TWO_HOP}
    prompts = tuple(Prompt("what is this ?", picture(number)) for number in range(2))
    names, span = ("a", "b"), Patches(((0, 0),))
    examples = Examples("some", names, prompts, names, names, (span, span), ("", ""))
    spot = Spot(Site("llm.resid_post", 0), "last")
    states, how = read_without_image(model, examples, [spot], folder=tmp_path)
    assert how == {"last": "blank"} and len(states[spot]) == 2
