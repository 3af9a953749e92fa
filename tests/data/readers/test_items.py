"""Single items: `items.jsonl`, and POPE, V*, ImageWikiQA, HR-Bench, MMMU, VLMBias, COCO- and GQA-spatial."""

import base64
import csv
import json
import tracemalloc

import pytest

from tests.data.readers.made import (
    content,
    held,
    mmvp,
    save,
    shown,
    write_csv,
    write_json,
    write_lines,
    write_parquet,
)
from vlm_mech.data.item import Item
from vlm_mech.data.items import Items, load_items
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import Wording


def text(number):
    return base64.b64encode(content(number)).decode()


# items.jsonl

LINES = [
    {"id": "a", "image": "1.png", "question": "what is it?", "answer": "red", "options": ["blue", "red"]},
    {"image": text(2), "question": "which?", "answer": "4", "prior": 3, "category": "legs", "conflict": True},
    {"images": ["1.png", "3.png"], "question": "same?", "answer": "no", "group": 7},
    {"image": "3.png", "question": "what?", "answer": "green"},
]


def folder(path, lines=LINES):
    for number in (1, 3):
        save(path / f"{number}.png", number)
    write_lines(path / "items.jsonl", lines)
    return path


def test_lines_are_items(tmp_path):
    items = load_items(folder(tmp_path))
    assert [item.id for item in items] == ["a", "2", "3", "4"] and items.refused == ()
    assert [[shown(image) for image in item.images] for item in items] == [[1], [2], [1, 3], [3]]
    assert items.answer == ["red", "4", "no", "green"] and items[0].options == ("blue", "red")
    assert (items[1].prior, items[1].category, items[1].conflict) == ("3", "legs", True)
    # The first shares a picture with the third, which shares one with the fourth.
    assert [item.group for item in items] == ["a", None, "a", "a"]
    asked = items.worded(Wording("{question} One word."))
    assert [prompt.question for prompt in asked.prompts][:2] == ["what is it? One word.", "which? One word."]
    assert len(asked.prompts[2].images) == 2 and asked.digest != items.digest
    assert items[:2].answer == ["red", "4"] and "drawn" not in items.described


@pytest.mark.usefixtures("untyped")
def test_what_is_no_item_is_refused_with_its_reason(tmp_path):
    good = LINES[0]
    bad = [
        (good | {"id": "b", "answer": "green"}, "answer 'green' is none of the options blue, red"),
        (good | {"id": "c", "options": ["red"]}, "there are 1 options; at least two"),
        (good | {"id": "d", "options": ["red", "red"]}, "option 'red' is given twice"),
        (good | {"id": "e", "options": "red"}, "options is 'red'; a list of texts"),
        (good | {"id": "f", "image": "none.png"}, "does not exist"),
        (good | {"id": "g", "question": " "}, "line 7: question is ' '; a non-empty text"),
        (good | {"id": "h", "conflict": "second"}, "conflict is 'second'; true, false or null"),
        (good | {"id": "i", "images": ["1.png"]}, "both image and images are given"),
        ({"id": "j", "images": [], "question": "q", "answer": "a"}, "a list of at least one image"),
        ({"id": "k", "question": "q", "answer": "a"}, "image is missing"),
    ]
    items = load_items(folder(tmp_path, [good, *(row for row, _ in bad)]))
    assert [item.id for item in items] == ["a"] and [each.id for each in items.refused] == list("bcdefghijk")
    for refused, (_, said) in zip(items.refused, bad, strict=True):
        assert said in refused.reason
    write_lines(tmp_path / "items.jsonl", [row for row, _ in bad])
    with pytest.raises(UsageError, match="holds no usable item; the first was refused because item b: answer 'green'"):
        load_items(tmp_path)
    for given, what in (("x", "str"), ([3], "int")):
        with pytest.raises(UsageError, match=f"items of 'x' holds a {what}; a tuple of Item is needed"):
            Items("x", given)
    with pytest.raises(UsageError, match="item a: it shows no image"):
        Item("a", (), "q", "a")


def test_items_and_pairs_are_not_taken_for_each_other(tmp_path):
    made, pairs = folder(tmp_path / "items"), tmp_path / "pairs"
    mmvp(pairs, [(1, "Is it?", "(a) Yes (b) No", "(a)"), (2, "Is it?", "(a) Yes (b) No", "(b)")])
    with pytest.raises(UsageError, match=r"holds items \(items.jsonl\), single images; pairs are needed"):
        load_pairs(made)
    with pytest.raises(UsageError, match=r"holds pairs \(mmvp\); single items are needed"):
        load_items(pairs)
    with pytest.raises(UsageError, match=r"holds items \(pope\), single images; pairs are needed"):
        load_pairs(f"pope:{pope(tmp_path / 'pope')}")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"holds pairs \(pairs.jsonl\); single items are needed"):
        load_items(tmp_path)
    with pytest.raises(UsageError, match="neither a folder with items.jsonl nor of a known format, as in pope:FOLDER"):
        load_items(tmp_path / "nowhere")


# POPE


def pope(path, name="coco_pope_popular.json", labels=("yes", "no", "no")):
    rows = []
    for number, label in enumerate(labels, 1):
        image = f"COCO_val2014_{(number + 1) // 2:012d}.jpg"
        save(path / "val2014" / image, (number + 1) // 2)
        rows.append({"question_id": number, "image": image, "text": f"Is there a cup {number}?", "label": label})
    write_lines(path / name, rows)
    return path


def test_pope_has_yes_and_no_and_groups_of_one_picture(tmp_path):
    items = load_items(f"pope:{pope(tmp_path)}")
    assert [(item.id, item.answer, shown(item.image)) for item in items] == [
        ("1", "yes", 1),
        ("2", "no", 1),
        ("3", "no", 2),
    ]
    assert {(item.options, item.category) for item in items} == {(("yes", "no"), "popular")}
    assert [item.group for item in items] == [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (1, 1, 2)]
    pope(tmp_path, "annotations/coco_repope_random.json", labels=("no", "no"))
    both = load_items(tmp_path)
    assert len(both) == 5 and [item.category for item in both] == ["random"] * 2 + ["popular"] * 3
    assert both[0].id == "coco_repope_random/1" and both[0].answer == "no"
    assert len(load_items(f"pope:{tmp_path}/annotations/coco_repope_random.json")) == 2
    pope(tmp_path, labels=("yes", "perhaps", "no"))
    again = load_items(f"pope:{tmp_path}/coco_pope_popular.json")
    assert len(again) == 2 and "label is 'perhaps'; yes or no is needed" in again.refused[0].reason


# Lettered texts


def test_vstar_takes_options_out_of_the_text(tmp_path):
    asked = "What colour is the cup?\n(A) red\n(B) dark blue\nAnswer with the option's letter."
    rows = [
        {"image": "direct_attributes/1.jpg", "text": asked, "category": "direct_attributes", "label": "B"},
        {"image": "relative_position/2.jpg", "text": "Left or right? A or B?", "category": "relative_position",
         "label": "A"},
        {"image": "relative_position/2.jpg", "text": asked, "category": "relative_position", "label": "C"},
    ]  # fmt: skip
    for number, row in enumerate(rows[:2], 1):
        save(tmp_path / row["image"], number)
    write_lines(tmp_path / "test_questions.jsonl", [row | {"question_id": 10 + at} for at, row in enumerate(rows)])
    write_json(tmp_path / "direct_attributes" / "1.json", [{"target_object": "cup"}])
    items = load_items(tmp_path)
    assert [(item.id, item.answer, tuple(item.options)) for item in items] == [
        ("10", "dark blue", ("red", "dark blue")), ("11", "A", ()),
    ]  # fmt: skip
    assert items[0].question == "What colour is the cup?" and items[1].question == "Left or right? A or B?"
    assert [item.category for item in items] == ["direct_attributes", "relative_position"]
    assert "label is 'C', which is none of A, B" in items.refused[0].reason


def test_imagewikiqa(tmp_path):
    asked = "Where does it live?\nA. in A. Land\nB. sea\nC. air\nD. ice\nChoose A, B, C, or D."
    row = {"image": "n1/1.jpg", "text": asked, "label": "A", "wiki": "w", "classname": "wren"}
    save(tmp_path / "n1" / "1.jpg", 1)
    write_lines(tmp_path / "imagewikiqa.jsonl", [row, row | {"label": "D"}])
    items = load_items(tmp_path)
    assert items.answer == ["in A. Land", "ice"] and items[0].category == "wren"
    assert items[0].question == "Where does it live?" and len(items[0].options) == 4
    assert items[0].group == items[1].group == "1", "they show one picture"


# HR-Bench

COLUMNS = ("index", "question", "A", "B", "C", "D", "answer", "category", "cycle_category", "image")


def test_hrbench_leaves_pictures_in_the_file(tmp_path):
    """A cell longer than csv reads by default, quotes and line breaks; two rows show one picture."""
    large = text(1) + "\n" * 200_000
    rows = [
        (0, 'What says\nthe "sign"?', "a", "b", "c", "d", "C", "single", "cycle_1", large),
        (1, 'What says\nthe "sign"?', "b", "c", "d", "a", "B", "single", "cycle_2", large),
        (2, "Which?", "a", "b", "c", "d", "D", "cross", "cycle_1", text(2)),
        (3, "Which?", "a", "b", "c", "d", "E", "cross", "cycle_2", text(2)),
        (4, "Which?", "a", "b", "c", "d", "A", "cross", "cycle_3", "no*base64"),
        (5, "Which?", "a", "b", "c", "d", "A", "cross", "cycle_4", ""),
    ]
    assert len(large) > csv.field_size_limit()
    limit = csv.field_size_limit()
    write_csv(tmp_path / "hr_bench_4k.tsv", COLUMNS, *rows, delimiter="\t")
    items = load_items(f"hrbench:{tmp_path}")
    assert [(item.id, item.answer, shown(item.image)) for item in items] == [
        ("0", "c", 1),
        ("1", "c", 1),
        ("2", "d", 2),
    ]
    assert items[0].question == 'What says\nthe "sign"?' and items[0].group == items[1].group != items[2].group
    assert len(repr(vars(items[0].image))) < 400, "the item holds no image"
    told = [each.reason for each in items.refused]
    assert "answer is 'E', which is none of A, B, C, D" in told[0] and "the image is no base64" in told[1]
    assert "image is ''" in told[2] and csv.field_size_limit() == limit
    assert load_items(tmp_path).digest == items.digest


def test_a_large_tsv_takes_no_more_memory_than_a_few_of_its_rows(tmp_path):
    """60 rows of 0.7 MB each: 40 MB in the file, of which three rows at a time are held."""
    padded = base64.b64encode(content(1) + bytes(500_000)).decode()
    rows = [(number, "Which?", "a", "b", "c", "d", "D", "single", "cycle_1", padded) for number in range(60)]
    path = write_csv(tmp_path / "hr_bench_8k.tsv", COLUMNS, *rows, delimiter="\t")
    del rows, padded
    assert path.stat().st_size > 40e6
    tracemalloc.start()
    items = load_items(tmp_path, n=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(items) == 20 and peak < 8e6


# MMMU


def mmmu(question, options, answer, *numbers):
    pictures = {f"image_{at}": held(numbers[at - 1]) if at <= len(numbers) else None for at in range(1, 8)}
    return {"question": question, "options": options, "answer": answer} | pictures


def test_mmmu_shows_the_pictures_that_are_named(tmp_path):
    write_parquet(tmp_path / "Art" / "validation-0.parquet", [
        mmmu("Is <image 1> like <image 2>?", "['yes', \"no, it's not\"]", "B", 1, 2, 3),
        mmmu("Which fits?", "['<image 2>', '<image 1>']", "A", 4, 5),
        mmmu("What is it?", "['a', 'b', 'c']", "C", 6), mmmu("How many?", "[]", "12", 7),
        mmmu("How many?", "[]", "['12', '13']", 7), mmmu("Is it <image 2>?", "['a', 'b']", "A", 8),
        mmmu("What?", "['a', 'b']", "?", 9), mmmu("What?", "a, b", "A", 9),
    ], group=3)  # fmt: skip
    items = load_items(tmp_path)
    assert [[shown(image) for image in item.images] for item in items] == [[1, 2], [4, 5], [6], [7]]
    assert items.answer == ["no, it's not", "<image 2>", "c", "12"] and items[3].options == ()
    assert items[0].question == "Is <image 1> like <image 2>?" and {item.category for item in items} == {"Art"}
    told = [each.reason for each in items.refused]
    for said, reason in zip(
        ("several texts", "it has no image_2", "answer is '?'", "a list as text"), told, strict=True
    ):
        assert said in reason


# VLMBias


@pytest.mark.parametrize("lines", [True, False])
def test_vlmbias_has_its_prior_and_conflict(tmp_path, lines):
    rows = [
        {"prompt": "How many legs? In curly brackets, e.g. {9}.", "ground_truth": "5", "expected_bias": "4"},
        {"prompt": "How many legs?", "ground_truth": "4", "expected_bias": "4"},
        {"prompt": "How many legs?", "ground_truth": "", "expected_bias": "4"},
    ]
    for number, row in enumerate(rows, 1):
        row |= {"topic": "animals", "image": f"{number}.png" if lines else held(number)}
        save(tmp_path / f"{number}.png", number)
    (write_lines if lines else write_parquet)(tmp_path / f"main.{'json' if lines else 'parquet'}", rows)
    items = load_items(f"vlmbias:{tmp_path}")
    assert [(item.answer, item.prior, item.conflict, shown(item.image)) for item in items] == [
        ("5", "4", True, 1), ("4", "4", False, 2),
    ]  # fmt: skip
    assert items[0].question.endswith("{9}.") and "a text or a number is needed" in items.refused[0].reason


# COCO- and GQA-spatial

ONE = [
    [7, "A photo of a couch on the left", "A photo of a couch on the right"],
    [8, "A photo of a traffic light on the bottom", "A photo of a traffic light on the top"],
    [9, "A photo of a dog on the left", "A photo of a cat on the right"],
    [9, "A photo of a dog", "A photo of a dog on the right"], ["x", "A dog on the left", "A dog on the right"],
]  # fmt: skip
TWO = [
    [7, "A photo of a person to the right of a wine glass", "A photo of a person to the left of a wine glass"],
    [8, "A photo of a cup above an oven", "A photo of a cup below an oven"],
]


@pytest.mark.parametrize(("name", "kind", "file"), [
    ("coco-spatial", "coco", "val2017/{:012d}.jpg"), ("gqa-spatial", "vg", "vg_images/{}.jpg"),
])  # fmt: skip
def test_captions_become_questions_whose_options_are_exchanged_by_the_seed(tmp_path, name, kind, file):
    for number in (7, 8, 9):
        save(tmp_path / file.format(number), number)
    write_json(tmp_path / f"{kind}_qa_one_obj.json", ONE)
    write_json(tmp_path / f"{kind}_qa_two_obj.json", TWO)
    items = load_items(f"{name}:{tmp_path}")
    assert [(item.answer, shown(item.image)) for item in items] == [
        ("left", 7),
        ("bottom", 8),
        ("right", 7),
        ("above", 8),
    ]
    assert [item.category for item in items] == ["one object"] * 2 + ["two objects"] * 2
    assert items[0].group == items[2].group != items[1].group
    told = [each.reason for each in items.refused]
    for said, reason in zip(("in more than the side", "tells no side", "a number and two"), told, strict=True):
        assert said in reason
    asked = [[item.question for item in load_items(tmp_path, seed=seed)] for seed in range(8)]
    assert {each[0] for each in asked} == {
        "Is the couch on the left or on the right? Give a short answer.",
        "Is the couch on the right or on the left? Give a short answer.",
    }
    assert {each[2] for each in asked} == {
        "Is the person to the left of a wine glass or to the right of a wine glass? Give a short answer.",
        "Is the person to the right of a wine glass or to the left of a wine glass? Give a short answer.",
    }
    assert any("Is the cup above a oven or below a oven?" in each[3] for each in asked)


def test_about_half_of_the_questions_have_their_options_exchanged(tmp_path):
    save(tmp_path / "val2017" / f"{7:012d}.jpg", 7)
    write_json(tmp_path / "coco_qa_one_obj.json", ONE[:1] * 200)
    asked = [item.question for item in load_items(tmp_path)]
    assert 80 <= sum("left or on the right" in each for each in asked) <= 120


def test_a_file_of_another_name_is_no_table_of_the_format(tmp_path):
    write_json(tmp_path / "mine.json", ONE)
    with pytest.raises(UsageError, match="mine.json has these columns with other values; needed is `coco_qa_one_obj"):
        load_items(f"coco-spatial:{tmp_path}")
    (tmp_path / "mine.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UsageError, match="holds no file of the format coco-spatial: needed is"):
        load_items(f"coco-spatial:{tmp_path}")


def test_vlmbias_compares_numbers_as_numbers(tmp_path):
    """A column with a number missing is read as fractions; what is no answer is counted."""
    save(tmp_path / "1.png", 1)
    given = [("5", 5.0), (4.0, "4"), (float("nan"), "4"), (True, "4"), (5, "4")]
    rows = [
        {"image": "1.png", "prompt": "How many?", "ground_truth": right, "expected_bias": usual, "topic": "animals"}
        for right, usual in given
    ]
    rows += [{name: value for name, value in rows[0].items() if name != "topic"}]
    write_lines(tmp_path / "main.jsonl", rows)
    items = load_items(f"vlmbias:{tmp_path}")
    assert [(item.answer, item.prior, item.conflict) for item in items] == [
        ("5", "5", False), ("4", "4", False), ("5", "4", True)
    ]  # fmt: skip
    assert [each.reason.rpartition(": ")[2] for each in items.refused][-1] == "it has no topic" and len(
        items.refused
    ) == 3
