"""Files that are not as they should be: told in one line or counted, never read wrongly or left out in silence."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments import layer_swap
from tests.data.readers.made import MMVP, held, mmvp, save, shown, whatsup, write_csv, write_json, write_lines
from tests.data.readers.made import write_parquet as parquet
from tests.data.readers.test_items import pope
from tests.helpers import command
from vlm_mech.data.description import describe
from vlm_mech.data.items import Items, load_items
from vlm_mech.data.pair_folder import pair_fields
from vlm_mech.data.pairs import Pairs, load_pairs
from vlm_mech.data.readers.lettered import parted
from vlm_mech.data.readers.tables import files_in
from vlm_mech.data.user_files import with_reason
from vlm_mech.errors import UsageError
from vlm_mech.runs.provenance import left_out, remarks

ROWS = [
    (1, "Is it open?", "(a) Open (b) Closed", "(a)"), (2, "Is it open?", "(a) Open (b) Closed", "(b)"),
    (3, "Which way?", "(a) Up (b) Down", "(b)"), (4, "Which way?", "(a) Up (b) Down", "(a)"),
]  # fmt: skip
ASK = {"question": "what?", "answer": "red"}
BOTH = ASK | {"image": "1.png", "counterfactual_image": "2.png", "counterfactual_answer": "blue"}


@pytest.fixture
def folder(tmp_path):
    """With three pictures."""
    for number in (1, 2, 3):
        save(tmp_path / f"{number}.png", number)
    return tmp_path


# Options in texts

SAY = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(("asked", "options"), [
    (f"What is it?\n(A) a red\n   cup of tea\n(B) blue\n{SAY}", ["a red cup of tea", "blue"]),
    (f"What is it?\n(A) red\n(B) a blue\ncup of tea\n{SAY}", ["red", "a blue cup of tea"]),
    ("What is it?\nA.\nred\nB.\nblue\nChoose A or B.", ["red", "blue"]),
    (f"What is it? (A) red (B) dark blue (C) green {SAY}", ["red", "dark blue", "green"]),
    ("What is it? A. red B. blue C. grey. Please choose A, B, or C.", ["red", "blue", "grey."]),
    (f"What is it? A. red B. blue\nC. green D. grey\n{SAY}", ["red", "blue", "green", "grey"]),
    (f"What is it?\r\nA. red\r\nB. in B. Land\r\n{SAY}", ["red", "in B. Land"]),
])  # fmt: skip
def test_options_are_parted_as_they_stand(asked, options):
    found = parted(asked)
    assert found.question == "What is it?" and list(found.options.values()) == options and found.certain


@pytest.mark.parametrize("asked", [
    "What is it?\n(A) red\n(C) blue", "What is it?\nA. red\nB. blue C. green\nB. red", "Is plan A. or plan B. better?",
    "A. Smith asks?\nA. red\nB. blue", "What is it?\nA. red\nB. blue\n\nThe cup is old.", "Which?\n(A) red (B) red",
    "Which? (A) red (B)",
])  # fmt: skip
def test_options_that_cannot_be_told_stay_in_the_text(asked):
    found = parted(asked)
    assert (found.question, found.options, found.certain) == (asked, {}, False)


def test_options_that_stay_are_noted_and_what_has_none_is_not(folder):
    row = {"image": "1.png", "category": "c", "label": "A", "text": "Which?\n(A) red (B) red"}
    rows = [row | {"question_id": number, "text": text} for number, text in enumerate([row["text"], "Left or right?"])]
    write_lines(folder / "test_questions.jsonl", rows)
    items = load_items(folder)
    assert [item.question for item in items] == ["Which?\n(A) red (B) red", "Left or right?"]
    assert items.answer == ["A", "A"] and not items[0].options
    (note,) = items.notes
    assert note.startswith("options cannot be told from the text of test_questions.jsonl row 1; it is the question")


def test_vstar_as_parquet_with_its_ids_as_fractions(tmp_path):
    """Pictures stay in the file, the label of the first row tells V* from POPE, and 7.0 is 7."""
    row = {"image": held(1), "text": "Which?\n(A) red\n(B) blue", "category": "c", "label": "B", "question_id": 7.0}
    parquet(tmp_path / "test.parquet", [row, row | {"image": held(2), "question_id": None}])
    items = load_items(tmp_path)
    assert [(item.id, item.answer, shown(item.image), item.group) for item in items] == [
        ("7", "blue", 1, None), ("2", "blue", 2, None)
    ]  # fmt: skip
    assert describe(str(tmp_path), n=None, seed=0).startswith(f"{tmp_path}: format vstar (test.parquet)")


# Columns and headers


@pytest.mark.parametrize("suffix", ["csv", "TSV", "parquet", "frame", "lines", "list"])
def test_a_column_that_is_named_twice_is_no_answer(folder, suffix):
    """Of two answers none is taken for the right one."""
    if suffix in ("csv", "TSV"):
        cells = [("Index", "Question", "Options", "Correct Answer", "Options"), (1, "q", "(a) x (b) y", "(a)", "")]
        write_csv(folder / f"Questions.{suffix}", *cells, delimiter="," if suffix == "csv" else "\t")
        with pytest.raises(UsageError, match="Questions.* is not read: its column 'Options' is named twice"):
            load_pairs(f"mmvp:{folder}")
    elif suffix == "parquet":
        import pyarrow as pa
        from pyarrow import parquet as files

        names = ["image", "prompt", "ground_truth", "expected_bias", "topic", "topic"]
        files.write_table(pa.Table.from_arrays([pa.array(["1.png"])] * 6, names=names), folder / "main.parquet")
        with pytest.raises(UsageError, match=r"main.parquet is not read: its column 'topic' is named twice"):
            load_items(f"vlmbias:{folder}")
    elif suffix == "frame":
        frame = pd.DataFrame([["a", "q", "red", "blue"]], columns=["image", "question", "answer", "answer"])
        with pytest.raises(UsageError, match="Items.from_rows: column 'answer' is named twice"):
            Items.from_rows(frame)
    else:
        good = json.dumps(ASK | {"image": "1.png"})
        bad = good.replace("}", ', "answer": "blue"}')
        if suffix == "lines":
            (folder / "items.jsonl").write_text(f"{good}\n{bad}\n")
            items = load_items(folder)
        else:
            one = good.replace("question", "prompt").replace("}", ', "topic": "t", "expected_bias": "x"}')
            one = one.replace("answer", "ground_truth")
            again = one.replace("}", ', "topic": "u"}')
            (folder / "x.json").write_text(f"[{one},\n{again}]")
            items = load_items(f"vlmbias:{folder}")
        assert len(items) == 1 and "twice" in items.refused[0].reason


def test_a_table_with_a_bad_header_beside_a_good_one_is_told(tmp_path):
    mmvp(tmp_path, ROWS)
    write_csv(tmp_path / "More.csv", ("Index", "Question", "Choices", "Correct Answer"), *ROWS)
    write_csv(tmp_path / "Bare.csv", ROWS[0], *ROWS[1:])
    write_json(tmp_path / "config.json", [])
    (tmp_path / "notes.json").write_text('{\n"a": 1\n}')
    pairs = load_pairs(f"mmvp:{tmp_path}")
    assert len(pairs) == 2 and len(pairs.notes) == 2
    assert "More.csv is not read: it has no column 'Options', only Index, Question, Choices" in pairs.notes[1]
    assert "Bare.csv is not read: it has no column 'Index', only 1, Is it open?" in pairs.notes[0]
    assert all(f"note: {note}" in describe(str(tmp_path), n=None, seed=0) for note in pairs.notes)


def test_a_table_that_is_nearly_one_is_not_taken_for_classes(tmp_path):
    for number, kind in enumerate(("cats", "dogs") * 4):
        save(tmp_path / kind / f"{number}.png", number)
    write_csv(tmp_path / "Questions.csv", ("Index", "Question", "Choices", "Correct Answer"), *ROWS)
    told = "Questions.csv is nearly of the format mmvp, but has no column 'Options'"
    said = describe(str(tmp_path), n=None, seed=0)
    assert "images with a class" in said and f"note: {told}" in said
    with pytest.raises(UsageError, match=told):
        load_pairs(tmp_path)


def test_a_bad_first_row_is_counted_and_its_file_is_read(tmp_path):
    path = pope(tmp_path) / "coco_pope_popular.json"
    path.write_text('{"question_id": 0, "image"\n' + path.read_text())
    items = load_items(tmp_path)
    assert len(items) == 3 and "is not JSON" in items.refused[0].reason
    rows = json.loads((whatsup(tmp_path / "w") / "data" / "controlled_images_dataset.json").read_text())
    write_json(tmp_path / "w" / "data" / "controlled_images_dataset.json", ["none", *rows])
    pairs = load_pairs(f"whatsup:{tmp_path / 'w'}")
    assert len(pairs) == 4 and "it is a str; an object is needed" in pairs.refused[0].reason


# Files


def test_a_corrupt_parquet_is_one_line(tmp_path, capsys):
    row = {"prompt": "q", "ground_truth": "4", "expected_bias": "4", "topic": "t"}
    path = parquet(tmp_path / "main.parquet", [row | {"image": held(number)} for number in range(4)])
    whole = path.read_bytes()
    for cut in (whole[:40], whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :], b"PAR1"):
        path.write_bytes(cut)
        assert command(layer_swap, "--describe", "--data", f"vlmbias:{tmp_path}") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "main.parquet" in error, error
        assert "is not read: " in error or "cannot be read: " in error, error


def test_what_is_neither_file_nor_folder_is_one_line(tmp_path, capsys):
    for data in ("/dev/null", "pope:/dev/null"):
        assert command(layer_swap, "--describe", "--data", data) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ("neither a folder" in error or "no folder or file" in error)


def test_a_first_row_of_more_than_a_megabyte(tmp_path):
    row = {"image": "1.png", "prompt": "é" * 900_000, "ground_truth": "4", "expected_bias": "4", "topic": "t"}
    save(tmp_path / "1.png", 1)
    (tmp_path / "main.json").write_text(json.dumps([row], ensure_ascii=False), encoding="utf-8")
    assert len(load_items(tmp_path)) == 1


@pytest.mark.parametrize(("suffix", "write"), [(".JSONL", write_lines), (".JSON", write_json), (".Parquet", parquet)])
def test_suffixes_in_upper_case(tmp_path, suffix, write):
    save(tmp_path / "1.png", 1)
    row = {"image": "1.png", "prompt": "q", "ground_truth": "4", "expected_bias": "4", "topic": "t"}
    write(tmp_path / f"main{suffix}", [row])
    assert len(load_items(tmp_path)) == 1
    write_csv(tmp_path / "m" / "Questions.TSV", MMVP, *ROWS, delimiter="\t")
    assert len(files_in(tmp_path / "m")[0]) == 1


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_a_file_is_to_be_read(folder, coding):
    write_csv(mmvp(folder / "m", ROWS) / "Questions.csv", MMVP, *((*row[:1], f"{row[1]} é", *row[2:]) for row in ROWS))
    lines = json.dumps(ASK | {"image": "1.png", "question": "où?"}, ensure_ascii=False) + "\n"
    (folder / "items.jsonl").write_text(lines, encoding=coding)
    path = folder / "m" / "Questions.csv"
    path.write_text(path.read_text(), encoding=coding)
    assert load_items(folder).items[0].question == "où?"
    assert [pair.question for pair in load_pairs(folder / "m")] == ["Is it open? é", "Which way? é"]


def test_what_is_no_utf8_or_empty_is_one_clear_line(folder):
    path = write_csv(folder / "Questions.csv", MMVP, (1, "où?", "(a) x (b) y", "(a)"))
    text = path.read_text()
    for content, said in (
        (text.encode("latin-1"), r"it is not UTF-8 \(byte 0xf9\); save it as UTF-8"),
        (text.encode("utf-16-le"), r"not UTF-8 text \(it holds zero bytes\)"), (b"", "it is empty"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"Questions.csv is not read: .*{said}"):
            load_pairs(f"mmvp:{folder}")
    (folder / "items.jsonl").write_bytes(b"")
    with pytest.raises(UsageError, match="items.jsonl' is empty"):
        load_items(folder)
    rows = [{"image": "1.png", "prompt": prompt, "ground_truth": "4", "expected_bias": "4", "topic": "t"} for prompt in
            ("où?", "ou?")]  # fmt: skip
    (folder / "v").mkdir()
    (folder / "v" / "x.jsonl").write_bytes(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode("latin-1")
    )
    save(folder / "v" / "1.png", 1)
    assert "is not UTF-8" in load_items(folder / "v").refused[0].reason


# Which of several


def test_a_file_itself_and_a_folder_of_several(folder):
    write_lines(folder / "pairs.jsonl", [BOTH])
    assert len(load_pairs(folder / "pairs.jsonl")) == len(load_pairs(folder)) == 1
    write_lines(folder / "ITEMS.JSONL", [ASK | {"image": "1.png"}])
    for load in (load_pairs, load_items):
        with pytest.raises(UsageError, match="holds pairs.jsonl and ITEMS.JSONL; name one, as in .*/pairs.jsonl"):
            load(folder)
    assert len(load_pairs(folder / "pairs.jsonl")) == len(load_items(folder / "ITEMS.JSONL")) == 1
    with pytest.raises(UsageError, match=r"holds items \(items.jsonl\), single images"):
        load_pairs(folder / "ITEMS.JSONL")
    (folder / "ITEMS.JSONL").unlink()
    mmvp(folder, ROWS)
    with pytest.raises(UsageError, match=r"holds pairs.jsonl and Questions.csv \(mmvp\); name one, as in"):
        describe(str(folder), n=None, seed=0)
    assert len(load_pairs(f"mmvp:{folder}")) == 2
    assert describe(f"{folder}/pairs.jsonl", n=None, seed=0).startswith(f"{folder}/pairs.jsonl: pairs.jsonl\npairs: 1")


def test_equal_names_in_two_folders_are_two_pictures(tmp_path):
    """POPE in two folders: ids, and groups of items about one picture, are those of each."""
    for number, part in enumerate(("coco", "gqa")):
        pope(tmp_path / part)
        save(tmp_path / part / "val2014" / f"COCO_val2014_{2:012d}.jpg", 10 + number)
    items = load_items(tmp_path)
    assert [item.id for item in items] == [
        f"{part}/coco_pope_popular/{n}" for part in ("coco", "gqa") for n in (1, 2, 3)
    ]
    assert items[2].group == f"coco/val2014/COCO_val2014_{2:012d}.jpg" != items[5].group


# Fields and ids


def test_a_caption_alone_is_refused(folder):
    write_lines(folder / "pairs.jsonl", [
        BOTH | {"caption": "a", "counterfactual_caption": "b"}, BOTH | {"caption": "a"}, BOTH,
        BOTH | {"counterfactual_caption": "b"}, BOTH | {"caption": ["a"], "counterfactual_caption": "b"},
    ])  # fmt: skip
    pairs = load_pairs(folder)
    assert [pair.captions for pair in pairs] == [("a", "b"), None]
    assert [each.reason.partition(" has a ")[2] or each.reason for each in pairs.refused] == [
        "caption, but no counterfactual_caption; both are needed, or neither",
        "caption, but no caption; both are needed, or neither", "line 5: caption is ['a']; a text is needed, or none",
    ]  # fmt: skip


@pytest.mark.usefixtures("untyped")
def test_ids_that_are_none_are_refused_and_whole_numbers_are_whole():
    rows = [ASK | {"image": held(number)} for number in range(5)]
    for row, odd in zip(rows, (["a"], True, "", " ", np.int64(7)), strict=True):
        row["id"] = odd
    items = Items.from_rows(rows)
    assert [item.id for item in items] == ["7"]
    assert [each.reason for each in items.refused] == [
        f"row {n} has the id {odd!r}; a text or a number is needed" for n, odd in enumerate((["a"], True, "", " "), 1)
    ]
    frame = pd.DataFrame([ASK | {"image": held(n), "id": n + 1, "group": n, "prior": 4} for n in range(3)])
    frame.loc[1, ["id", "group", "prior"]] = np.nan
    items = Items.from_rows(frame.astype({"id": float, "group": float, "prior": float}))
    assert [(item.id, item.group, item.prior) for item in items] == [
        ("1", "0", "4"),
        ("2", None, None),
        ("3", "2", "4"),
    ]


def test_of_rows_with_one_id_the_later_ones_are_counted_out(folder):
    """Whichever is drawn; what methods read of a pair is of the row that is used."""
    write_lines(folder / "pairs.jsonl", [BOTH | {"id": 7, "object": 1}, BOTH, BOTH | {"id": "7", "object": 2}])
    for n, seed in ((None, 0), *((2, seed) for seed in range(6))):
        pairs = load_pairs(folder, n=n, seed=seed)
        assert [pair.id for pair in pairs] == ["7", "2"]
        told = "7: line 3: its id '7' is that of line 1; each needs one of its own, or none"
        assert [each.told for each in pairs.refused] == [told]
    assert pair_fields(folder)["7"]["object"] == 1
    row = {"image": "../1.png", "text": "q", "label": "yes", "question_id": 3}
    write_lines(folder / "a" / "coco_pope_random.json", [row, row | {"question_id": 3.0}])
    items = load_items(f"pope:{folder / 'a'}")
    said = "coco_pope_random.json row 2: its id '3' is that of coco_pope_random.json row 1"
    assert len(items) == 1 and items.refused[0].reason.startswith(said)
    write_lines(folder / "b" / "coco_pope_random.json", [row] * 3)
    with pytest.raises(UsageError, match="more than half of the rows of .* have the id of another, as .*row 2: its id"):
        load_items(f"pope:{folder / 'b'}")


def test_a_source_that_holds_fewer_than_asked_for_says_so(folder, capsys):
    rows = [ASK | {"image": f"{number}.png"} for number in (1, 2)]
    write_lines(folder / "i" / "items.jsonl", [row | {"image": f"../{row['image']}"} for row in rows])
    note = "requested 5, the source holds 2"
    assert load_items(folder / "i", n=5).notes == (note,) and load_items(folder / "i", n=2).notes == ()
    assert command(layer_swap, "--describe", "--data", folder / "i", "--n", "5") == 0
    assert f"note: {note}" in capsys.readouterr().out
    told = {"data": load_items(folder / "i", n=5).described}
    assert told["data"]["notes"] == [note] and remarks(told) == (f"{folder / 'i'}: {note}.",)
    write_lines(folder / "pairs.jsonl", [BOTH, BOTH | {"question": ""}, BOTH | {"question": "other"}])
    assert load_pairs(folder, n=3).notes == ("requested 3, the source holds 3, 2 of which can be used",)
    assert load_pairs(folder, n=2).notes == ()
    stream = ({"image": held(number)} | ASK for number in range(4))
    assert Items.from_rows(stream, n=9).notes == ("requested 9, the source holds 4",)


@pytest.mark.usefixtures("untyped")
def test_fields_that_are_misspelt_are_told():
    picture = ASK | {"image": held(1), "image_id": 3, "question_id": 4, "answers": ["red"]}
    items = Items.from_rows([picture | {"optoins": ["red", "blue"]}, picture | {"Options": ["red", "blue"]}])
    assert items.notes[:2] == (
        "field 'optoins' of 1 row is not read; options is meant, if it is misspelt",
        "field 'Options' of 1 row is not read; options is meant, if it is misspelt",
    )
    with pytest.raises(UsageError, match="answer is None.*; field 'anwser' of 1 row is not read; answer is meant"):
        Items.from_rows([{"image": held(1), "question": "q", "anwser": "a"}])
    with pytest.raises(UsageError, match="field 'imges' of 2 rows is not read; images is meant"):
        Items.from_rows([{"imges": [held(1)], "question": "q", "answer": "a"}] * 2)
    rows = [BOTH | {"image": held(1), "counterfactual_image": held(2), "counterfactual answer": "x", "catgory": "y"}]
    assert Pairs.from_rows(rows).notes == (
        "field 'catgory' of 1 row is not read; category is meant, if it is misspelt",
    )


def test_fields_of_pairs_are_told_where_items_are_read(folder):
    write_lines(folder / "items.jsonl", [{"image": "3.png"} | ASK, BOTH | {"question": "other"}, BOTH])
    assert load_items(folder).notes == (
        "field 'counterfactual_image' of 2 rows is not read; it is a field of pairs, which pairs.jsonl holds",
        "field 'counterfactual_answer' of 2 rows is not read; it is a field of pairs, which pairs.jsonl holds",
    )


def test_what_cannot_be_used_is_named_once(folder):
    """By its line or its id, whichever the reason begins with."""
    odd = [{"answer": "none"}, {"question": ""}, {"id": "a", "answer": "none"}, {"id": "b", "question": ""}]
    rows = [{"image": "1.png"} | ASK | {"options": ["red", "blue"]} | each for each in ({}, *odd)]
    write_lines(folder / "items.jsonl", rows)
    items = load_items(folder)
    told = [
        "item 2: answer 'none' is none",
        "line 3: question is ''",
        "item a: answer 'none' is none",
        "b: line 5: question is ''",
    ]
    for each, said in zip(items.refused, told, strict=True):
        assert each.told.startswith(said)
    (said,) = left_out({"refused": [vars(each) for each in items.refused]})
    assert all(f"{each}" in said for each in told[:3]) and "2: item 2" not in said
    assert f"\n  {told[0]}" in describe(str(folder), n=None, seed=0)
    assert with_reason("1", "image 'a/row 1.png' does not exist") == "1: image 'a/row 1.png' does not exist"
    assert with_reason("3", "x.jsonl row 3: label is 4") == "x.jsonl row 3: label is 4"
    assert with_reason("3", "line 33: label is 4") == "3: line 33: label is 4"


def test_what_is_there_twice_is_told_and_chance_says_what_has_no_options(folder):
    """Two of four items are the same; one of the same picture with its options exchanged is not."""
    row = ASK | {"image": "1.png", "options": ["red", "blue"]}
    write_lines(
        folder / "items.jsonl",
        [row, row | {"id": "b"}, row | {"options": ["blue", "red"]}, ASK | row | {"options": None}],
    )
    items = load_items(folder)
    assert items.notes == ("there twice, to the pixel and the word: 1 of 4 (b as 1)",)
    said = describe(str(folder), n=None, seed=0)
    assert "chance: 0.500 (1 of 4 items have no options and do not count)" in said and f"note: {items.notes[0]}" in said
    write_lines(folder / "p" / "pairs.jsonl", [
        {name: f"../{value}" if "image" in name else value for name, value in BOTH.items()} | more
        for more in ({}, {"category": "x"}, {"question": "other"})
    ])  # fmt: skip
    assert load_pairs(folder / "p").notes == ("there twice, to the pixel and the word: 1 of 3 (2 as 1)",)


def test_classes_of_a_data_set_of_the_hub_are_their_names():
    import datasets

    label, features = (
        datasets.ClassLabel(names=["cat", "dog"]),
        {name: datasets.Value("string") for name in ("question",)},
    )
    listed = datasets.Sequence(label) if hasattr(datasets, "Sequence") else datasets.List(label)
    features |= {"answer": label, "options": listed, "image": datasets.Image()}
    rows = {"question": ["q"] * 3, "answer": [1, 0, -1], "options": [[0, 1]] * 3, "image": [held(n) for n in range(3)]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    for given in (data, data.to_iterable_dataset()):
        items = Items.from_rows(given)
        assert items.answer == ["dog", "cat"] and items[0].options == ("cat", "dog")
        assert "answer is None" in items.refused[0].reason
