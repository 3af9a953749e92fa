"""MMVP-VLM, Visual CounterFact and HallusionBench: counts, pairing, conflict, and rows that are no pair."""

import pytest

from tests.data.readers.made import held, save, shown, write_csv, write_json, write_lines, write_parquet
from vlm_mech.data.pair_folder import pair_fields
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError


def numbers(pair):
    return tuple(map(shown, pair.pictures))


# MMVP-VLM

STATEMENTS = [
    (2, "Color and Appearance", "the cup is \"red\""), (1, "Color and Appearance", "the cup is blue"),
    (3, "State", "the door is open"), (4, "State", "the door, at last,\nis closed"),
]  # fmt: skip


def mmvp_vlm(folder, rows):
    write_csv(folder / "Questions.csv", ("Question ID", "Type", "Statement"), *rows)
    for number, kind, _ in rows:
        save(folder / "MLLM_VLM Images" / kind / f"{number}.jpg", number)
    return folder


def test_statements_are_options_answers_and_captions(tmp_path):
    folder = mmvp_vlm(tmp_path, STATEMENTS)
    pairs = load_pairs(f"mmvp-vlm:{folder}")
    assert [numbers(pair) for pair in pairs] == [(1, 2), (3, 4)] and pairs.refused == ()
    assert [pair.category for pair in pairs] == ["Color and Appearance", "State"]
    assert pairs[0].captions == pairs[0].options == ("the cup is blue", 'the cup is "red"')
    assert (pairs[1].answer, pairs[1].counterfactual_answer) == ("the door is open", "the door, at last,\nis closed")
    assert load_pairs(folder).digest == pairs.digest


def test_two_rows_of_unlike_type_are_no_pair(tmp_path):
    rows = [*STATEMENTS, (5, "State", "a"), (6, "Count", "b"), (7, "State", "same"), (8, "State", "same")]
    pairs = load_pairs(mmvp_vlm(tmp_path, rows))
    assert [pair.id for pair in pairs] == ["1/2", "3/4"]
    assert "its pair is of another type, 'Count'" in pairs.refused[0].reason
    assert "they must differ" in pairs.refused[1].reason


# Visual CounterFact


def counterfact(number, right, wrong, thing):
    pictures = {"original_image": held(number), "counterfact_image": held(number + 1)}
    return {"correct_answer": right, "incorrect_answer": wrong, "object": thing} | pictures


def visual_counterfact(folder):
    """Three rows about colour in two files, one about size."""
    write_parquet(folder / "data" / "color-00000-of-00002.parquet", [
        counterfact(1, "yellow", "blue", "banana"), counterfact(3, "red", "green", "cherry")
    ], group=1)  # fmt: skip
    write_parquet(folder / "data" / "color-00001-of-00002.parquet", [counterfact(5, "green", "pink", "frog")])
    write_parquet(folder / "data" / "size-00000-of-00001.parquet", [counterfact(7, "bus", "mouse", "bus")])
    return folder


def test_the_counterfactual_picture_is_in_conflict(tmp_path):
    folder = visual_counterfact(tmp_path)
    pairs = load_pairs(folder)
    assert [numbers(pair) for pair in pairs] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [pair.category for pair in pairs] == ["colour", "colour", "colour", "size"]
    assert {pair.conflict for pair in pairs} == {"second"}
    assert [(pair.answer, pair.counterfactual_answer, pair.prior) for pair in pairs][:2] == [
        ("yellow", "blue", "yellow"), ("red", "green", "red"),
    ]  # fmt: skip
    assert pairs[0].question == "Answer with one word. What color is this banana?"
    asked = {
        f"Answer with the correct option. Which is larger here, {two}?" for two in ("bus or mouse", "mouse or bus")
    }
    found = {load_pairs(folder, seed=seed)[3].question for seed in range(8)}
    assert found == asked, "the seed draws the order"
    fields = list(pair_fields(folder).values())
    assert fields[2]["prior_question"] == "Answer with one word. What color are most frogs?"


def test_an_empty_cell_and_an_unknown_file(tmp_path):
    folder = visual_counterfact(tmp_path)
    rows = [counterfact(9, "red", "blue", "rose"), counterfact(11, "red", None, "rose"), counterfact(13, "a", "b", "c")]
    rows[0]["original_image"] = None
    write_parquet(folder / "data" / "color-00001-of-00002.parquet", rows)
    pairs = load_pairs(folder)
    assert len(pairs) == 4 and len(pairs.refused) == 2
    told = " ".join(each.reason for each in pairs.refused)
    assert "row 1: image is missing" in told and "'red', None, 'rose'" in told
    write_parquet(folder / "data" / "other.parquet", rows)
    with pytest.raises(UsageError, match="other.parquet: its name says neither color nor size"):
        load_pairs(folder)
    (folder / "data" / "other.parquet").write_bytes(b"PAR1 and nothing else")
    assert len(load_pairs(folder)) == 4, "what is no table is no table"


# HallusionBench


def hallusion(set_id, figure, answer, *, question="Is it larger?", kind="chart", number=None):
    image = None if number is None else f"./{kind}/{set_id}_{figure}.png"
    return {
        "category": "VD", "subcategory": kind, "set_id": set_id, "figure_id": figure, "question": question,
        "gt_answer": answer, "image": image, "number": number,
    }  # fmt: skip


ROWS = [
    hallusion("0", "1", "0", number=2), hallusion("0", "0", "1", number=1), hallusion("0", "2", "1", number=3),
    hallusion("0", "0", "1", question="Is it red?", number=1),
    hallusion("0", "1", "0", question="Is it red?", number=2),
    hallusion("0", "0", "1", kind="map", number=4), hallusion("0", "1", "0", kind="map", number=5),
    hallusion("1", "0", "1"), hallusion("1", "1", "0", number=6), hallusion("2", "0", "2", number=7),
]  # fmt: skip
"""Set 0 of charts has three figures and two questions, set 0 of maps two figures; set 1 has one picture."""


def hallusionbench(folder, rows=ROWS, write=write_json, name="HallusionBench.json"):
    for row in rows:
        if row["number"]:
            save(folder / row["image"], row["number"])
    write(folder / name, [{key: value for key, value in row.items() if key != "number"} for row in rows])
    return folder


@pytest.mark.parametrize("write", [write_json, write_lines])
def test_the_original_and_each_edited_figure_with_another_answer(tmp_path, write):
    pairs = load_pairs(f"hallusionbench:{hallusionbench(tmp_path, write=write)}")
    assert [numbers(pair) for pair in pairs] == [(1, 2), (1, 2), (4, 5)]
    assert {(pair.answer, pair.counterfactual_answer, tuple(pair.options)) for pair in pairs} == {
        ("yes", "no", ("yes", "no"))
    }
    assert [pair.group for pair in pairs] == ["VD/chart/0", "VD/chart/0", "VD/map/0"]
    reasons = [each.reason for each in pairs.refused]
    for said in (
        "row 8: it has no image", "gt_answer is '2'; 0 or 1 is needed",
        "the answer about its figure is yes too", "its question is asked about no other figure",
    ):  # fmt: skip
        assert any(said.removeprefix("row 8: ") in reason for reason in reasons), said
    assert len(reasons) == 4


def test_pictures_in_parquet_stay_there(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "number"} for row in ROWS]
    for row, given in zip(rows, ROWS, strict=True):
        row["image"] = given["number"] and held(given["number"])
    write_parquet(tmp_path / "image-0.parquet", rows)
    found = load_pairs(tmp_path)
    assert [numbers(pair) for pair in found] == [(1, 2), (1, 2), (4, 5)] and len(found.refused) == 4
    assert found.digest == load_pairs(f"hallusionbench:{hallusionbench(tmp_path / 'json')}").digest


def test_a_folder_of_two_formats_is_not_guessed(tmp_path):
    mmvp_vlm(tmp_path, STATEMENTS)
    hallusionbench(tmp_path)
    told = r"may be read as hallusionbench \(HallusionBench.json\), mmvp-vlm \(Questions.csv\); name one, as in hallu"
    with pytest.raises(UsageError, match=told):
        load_pairs(tmp_path)
    assert len(load_pairs(f"mmvp-vlm:{tmp_path}")) == 2


def test_a_wrong_column_is_named(tmp_path):
    write_csv(tmp_path / "Questions.csv", ("Question ID", "Kind", "Statement"), (1, "a", "b"))
    with pytest.raises(UsageError, match="Questions.csv has no column 'Type', only Question ID, Kind, Statement"):
        load_pairs(f"mmvp-vlm:{tmp_path}")
    with pytest.raises(UsageError, match=r"nor of a known format, as in mmvp:FOLDER \(.*mmvp, mmvp-vlm"):
        load_pairs(tmp_path)


def test_a_figure_is_not_paired_with_itself(tmp_path):
    """The same figure with both answers, a question that is none, and a number that is none."""
    rows = [
        hallusion("0", figure, answer, number=number)
        for number, (figure, answer) in enumerate((("0", "1"), ("0", "0"), ("1", "0"), ("\u00b2", "0")), 1)
    ]
    rows += [hallusion("9", figure, answer, question=None, number=1) for figure, answer in (("0", "1"), ("1", "0"))]
    pairs = load_pairs(f"hallusionbench:{hallusionbench(tmp_path, rows)}")
    assert len(pairs) == 1 and pairs[0].question == "Is it larger?"
    told = " ".join(each.reason for each in pairs.refused)
    assert "figure 0 is there twice" in told and "figure_id is '\u00b2'" in told and told.count("question is None") == 2
