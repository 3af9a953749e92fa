"""Pictures with a class of official files and of items, and ImageWikiQA's questions with letters."""

import numpy as np
import pytest

from experiments import classify
from tests.data.readers.made import save, shown, write_json, write_lines
from tests.helpers import command
from vlm_mech.behaviour.answering.prompts import STYLES
from vlm_mech.behaviour.classify import two_hops
from vlm_mech.behaviour.classify.table import GENERATION
from vlm_mech.behaviour.classify.two_hops import (
    NAMED,
    THOUGHT,
    TWO_HOP,
    UNSEEN,
    Asked,
    last_letter,
    load_item_questions,
)
from vlm_mech.data.export.__main__ import export
from vlm_mech.data.image_classes import load_classes
from vlm_mech.data.items import load_items
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.results.result import Result


def lines(folder, rows, names=("crane", "sea lion", "rose")):
    for number in range(1, 1 + len(rows)):
        save(folder / "images" / f"{number}.jpg", number)
    write_lines(folder / "birds.jsonl", [{"image": f"{at}.jpg"} | row for at, row in enumerate(rows, 1)])
    write_json(folder / "birds_classes.json", list(names))
    return folder


ROWS = [
    {"label": "crane", "split": "train"}, {"label": 1, "split": "train"}, {"label": "crane", "split": "valid"},
    {"label": "sea lion", "split": "valid"}, {"label": 0, "split": "test"}, {"label": "sea lion", "split": "test"},
    {"label": "tulip", "split": "test"}, {"label": 7, "split": "test"}, {"label": "crane", "split": "dev set"},
]  # fmt: skip


def test_lines_with_a_class_and_a_part(tmp_path):
    data = load_classes(f"vlmclassifier:{lines(tmp_path, ROWS)}")
    assert data.names == ("crane", "sea lion"), "in the order of the list; no image of the third"
    parts = [[(each.label, shown(each.image)) for each in part] for part in (data.train, data.validation, data.test)]
    assert [sorted(part) for part in parts] == [
        [("crane", 1), ("sea lion", 2)], [("crane", 3), ("sea lion", 4)], [("crane", 5), ("sea lion", 6)],
    ]  # fmt: skip
    reasons = [each.reason for each in data.refused]
    assert len(reasons) == 3 and "'tulip', which is not a name of a class" in reasons[0]
    assert "label is 7; the list of classes has 3 names" in reasons[1] and "split is 'dev set'" in reasons[2]
    assert load_classes(str(tmp_path)).digest == data.digest, "known by its files"
    with pytest.raises(
        UsageError, match=r"holds pictures with a class \(vlmclassifier\), neither pairs nor items; classify"
    ):
        load_items(tmp_path)


def test_numbers_keep_classes_of_one_name_apart_and_names_cannot(tmp_path):
    listed = ("crane", "rose", "crane")
    rows = [{"label": at, "split": split} for split in ("train", "valid", "test") for at in range(3)]
    data = load_classes(f"vlmclassifier:{lines(tmp_path / 'numbers', rows, listed)}")
    assert data.names == ("crane (0)", "rose", "crane (2)") and data.said == listed
    assert sorted((each.label, shown(each.image)) for each in data.test) == [
        ("crane (0)", 7), ("crane (2)", 9), ("rose", 8),
    ]  # fmt: skip
    assert data.notes == ("classes of one name are numbered: crane (0), crane (2)",)
    rows = [row | {"label": listed[row["label"]]} for row in rows]
    data = load_classes(f"vlmclassifier:{lines(tmp_path / 'names', rows, listed)}")
    assert data.names == ("crane", "rose") and data.said == ()
    assert data.notes == ("the list has several classes of one name, one class as labels are names: crane",)
    rows = [{"label": at, "split": split} for split in ("train", "valid", "test") for at in (1, 2)]
    data = load_classes(f"vlmclassifier:{lines(tmp_path / 'one', rows, listed)}")
    assert data.names == ("rose", "crane (2)") and data.said == ("rose", "crane"), "the number is that of the list"


def test_a_missing_part_is_dealt_out_of_the_training_part(tmp_path):
    rows = [{"label": ("crane", "rose")[at % 2], "split": "train"} for at in range(12)]
    rows += [{"label": name, "split": "test"} for name in ("crane", "rose")]
    data = load_classes(f"vlmclassifier:{lines(tmp_path, rows)}", seed=2)
    assert len(data.train) + len(data.validation) == 12 and len(data.validation) >= 2 and len(data.test) == 2
    assert data.notes == ("validation: dealt out of the training split with seed 2",)
    write_json(tmp_path / "other_classes.json", ["a", "b"])
    assert load_classes(f"vlmclassifier:{tmp_path}").names == ("crane", "rose"), "the list of the file's own name"


def test_answers_of_items_are_classes(tmp_path):
    rows = []
    for number in range(1, 13):
        save(tmp_path / f"{number}.png", number)
        rows.append({"image": f"{number}.png", "question": "what?", "answer": ("red", "blue")[number % 2]})
    rows.append({"images": ["1.png", "2.png"], "question": "what?", "answer": "red"})
    write_lines(tmp_path / "items.jsonl", rows)
    data = load_classes(str(tmp_path))
    assert data.names == ("blue", "red") and data.refused[0].reason == "it shows 2 images; one has a class"
    every = [*data.train, *data.validation, *data.test]
    assert len(every) == 12 and all(each.label == ("red", "blue")[shown(each.image) % 2] for each in every)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("It is B.", "B"), ("A heron (C), not (B)", "B"), ("first (B), then A or C", "B"),
        ("A bird. The answer is D", "D"), ("Perhaps A, or D, so C", "C"), ("because of ABBA", ""), ("", ""),
        ("the answer:C. That is it", "C"), ("E", ""),
    ],
)  # fmt: skip
def test_the_letter_that_is_mentioned_last(answer, letter):
    assert last_letter(answer, tuple("ABCD")) == letter


def test_questions_of_items_with_letters_and_without(tmp_path):
    export("imagewikiqa", tmp_path / "made", n=4)
    items = load_items(f"imagewikiqa:{tmp_path / 'made'}")
    found = load_item_questions(f"imagewikiqa:{tmp_path / 'made'}", STYLES["plain"], lettered=True, thought=THOUGHT)
    assert [each.task for each in found.asked] == [TWO_HOP, NAMED, UNSEEN] * 4
    first, named, unseen = found.asked[:3]
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", items[0].options, strict=True))
    end = f"\n{options}\nChoose A, B, C, or D. Let's think step by step."
    assert first.question == f"{items[0].question}{end}" and first.letters == tuple("ABCD")
    assert named.question == unseen.question and str(items[0].category) in named.question and unseen.image is None
    assert first.answer == items[0].answer and shown_alike(first.image, items[0].image)
    plain = load_item_questions(f"imagewikiqa:{tmp_path / 'made'}", STYLES["plain"], lettered=False)
    assert plain.asked[0].letters == () and plain.asked[0].question.endswith(", ".join(items[0].options) + ".")
    save(tmp_path / "pope" / "1.png", 1)
    row = {"image": "1.png", "text": "q", "label": "yes", "question_id": 1}
    write_lines(tmp_path / "pope" / "coco_pope.json", [row])
    with pytest.raises(UsageError, match="holds none: it has no category, which is the class"):
        load_item_questions(f"pope:{tmp_path / 'pope'}", STYLES["plain"], lettered=True)


def shown_alike(one, other):
    return load_image(one).tobytes() == load_image(other).tobytes()


def test_what_names_no_letter_is_wrong_and_beside_it_a_guess(vlm, monkeypatch):
    asked = [
        Asked(str(at), TWO_HOP, None, "q", ("red", "blue", "dog", "cat"), "blue", tuple("ABCD")) for at in range(4)
    ]
    said = ["it is (B)", "A", "no idea", "(A) or (B)"]
    read = [two_hops._Read(text, False, two_hops._read(text, each)) for text, each in zip(said, asked, strict=True)]
    assert [each.only for each in read] == ["blue", "red", "", "blue"]
    monkeypatch.setattr(two_hops, "_asked_in_batches", lambda *_: (read, [True] * 4, ["blue"] * 4))
    monkeypatch.setattr(two_hops, "takes_text_alone", lambda *_: True)
    table = two_hops.answered(vlm, asked, "m", n_new=4, batch=4)
    strict, guessed = (table[table["method"] == name]["accuracy"].tolist() for name in (GENERATION, two_hops.DRAWN))
    assert strict == [1, 0, 0, 1] and guessed == [1, 0, 0.25, 1]
    assert np.allclose(table["accuracy_baseline"], 0.25)


def test_the_run_takes_both_on_the_embedded_model(tmp_path, capsys):
    export("vlmclassifier", tmp_path / "classes", n=8)
    export("imagewikiqa", tmp_path / "qa", n=4)
    given = ["--data", f"vlmclassifier:{tmp_path / 'classes'}", "--qa", f"imagewikiqa:{tmp_path / 'qa'}", "--n-qa", "4",
             "--positions", "0", "--k", "2", "--orders", "fixed", "--questions", "what is the name of the beetle?",
             "--no-probes", "--new-tokens", "4", "--batch", "8"]  # fmt: skip
    assert command(classify, *given, "--out", tmp_path / "out") == 0
    table = Result.load(tmp_path / "out").table
    asked = table[table["accuracy"].notna()]
    assert asked[asked["task"] == "classes"]["example"].nunique() == 8
    assert {TWO_HOP, NAMED} <= set(asked["task"]) and asked[asked["task"] == TWO_HOP]["example"].nunique() == 4
    assert "Two hops (generation, chance 0.250)" in capsys.readouterr().out
