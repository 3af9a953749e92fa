"""MMVP: pairs by number, letters, csv with quotes and line breaks, and rows that are no pair."""

import pytest

from tests.data.readers.made import MMVP, mmvp, save, shown, write_csv
from tests.zoo.tiny import picture
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image

DOOR = 'Is the door\nof the "old" barn open, or closed?'
ROWS = [
    (1, "Is it open?", "(a) Open (b) Closed", "(a)"), (2, "Is it open?", "(a) Open (b) Closed", "(b)"),
    (10, DOOR, "(a) Open, I think (b) Closed", "(a)"), (9, DOOR, "(a) Open, I think (b) Closed", "(b)"),
]  # fmt: skip


def test_rows_are_paired_by_their_numbers(tmp_path):
    """As texts, 10 would come before 2 and 9; the pictures are those of the numbers."""
    pairs = load_pairs(f"mmvp:{mmvp(tmp_path, ROWS)}")
    assert [pair.id for pair in pairs] == ["1/2", "9/10"] and pairs.refused == ()
    first, second = pairs
    assert (first.question, first.answer, first.counterfactual_answer) == ("Is it open?", "Open", "Closed")
    assert second.question == DOOR and second.options == ("Open, I think", "Closed")
    assert (second.answer, second.counterfactual_answer) == ("Closed", "Open, I think")
    for pair, numbers in ((first, (1, 2)), (second, (9, 10))):
        assert [load_image(each).tobytes() for each in pair.pictures] == [picture(each).tobytes() for each in numbers]
    assert load_pairs(tmp_path).digest == pairs.digest, "known by its columns"


def test_n_pairs_are_drawn_and_keep_their_order(tmp_path):
    rows = [(number, "Is it red?", "(a) Yes (b) No", "(a)" if number % 2 else "(b)") for number in range(1, 41)]
    folder = mmvp(tmp_path, rows)
    drawn = load_pairs(f"mmvp:{folder}", n=6, seed=1)
    ids = [int(pair.id.split("/")[0]) for pair in drawn]
    assert len(ids) == 6 and ids == sorted(ids) and drawn.drawn == "6 of 20 rows, drawn with seed 1"
    assert ids != [int(pair.id.split("/")[0]) for pair in load_pairs(folder, n=6, seed=2)]


def test_what_is_no_pair_is_refused(tmp_path):
    rows = [
        *ROWS[:2],
        (3, "Is it red?", "(a) Yes (b) No", "(a)"), (4, "Is it blue?", "(a) Yes (b) No", "(b)"),
        (5, "Is it red?", "(a) Yes (b) No", "(c)"), (6, "Is it red?", "(a) Yes (b) No", "(b)"),
        (7, "Is it red?", "(a) Yes (b) No", "(a)"), (8, "Is it red?", "(a) Yes (b) No", "(a)"),
        (9, "Is it red?", "(a) Yes (b) No", "(a)"), (11, "Is it red?", "(a) Yes (b) No", "(a)"),
        (12, "Is it red?", "(a) Yes (b) Never", "(b)"), ("x", "Is it red?", "(a) Yes (b) No", "(a)"),
    ]  # fmt: skip
    folder = mmvp(tmp_path, rows)
    with (folder / "Questions.csv").open("a") as file:
        file.write("13,one cell too few,(a) Yes (b) No\n")
    pairs = load_pairs(folder)
    assert [pair.id for pair in pairs] == ["1/2"]
    told = [each.reason for each in pairs.refused]
    expected = [
        "Index is 'x'; it must be a whole number", "it has 3 cells where the first line names 4 columns",
        "its pair is asked another question, 'Is it blue?'",
        "the correct answer '(c)' is none of the options '(a) Yes (b) No'", "both answers are 'Yes'; they must differ",
        "the other row of pair 9/10 is missing", "its pair has other options",
    ]  # fmt: skip
    for said in expected:
        assert any(said in reason for reason in told), said
    assert len(told) == len(expected)


def test_reported_label_errors_are_told_and_left(tmp_path):
    rows = [(number, "Is it red?", "(a) Yes (b) No", "(a)" if number % 2 else "(b)") for number in (99, 100)]
    for fix in (False, True):
        pairs = load_pairs(mmvp(tmp_path, rows), fix_labels=fix)
        assert pairs[0].answer == "Yes" and "labels of rows 99 and 100 are reported to be wrong" in pairs.notes[0]


def test_a_number_that_occurs_twice_and_a_cell_that_does_not_end_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="Index 1 occurs twice, in Questions.csv row 1 and Questions.csv row 5"):
        load_pairs(mmvp(tmp_path, [*ROWS, ROWS[0]]))
    path = write_csv(tmp_path / "Questions.csv", MMVP, *ROWS)
    path.write_text(path.read_text() + '11,"no end,(a) Yes (b) No,(a)\n')
    with pytest.raises(UsageError, match="Questions.csv' cannot be read after byte .*unexpected end of data"):
        load_pairs(tmp_path)


def test_a_missing_picture_is_counted(tmp_path):
    folder = mmvp(tmp_path, ROWS)
    (folder / "MMVP Images" / "2.jpg").unlink()
    pairs = load_pairs(folder)
    assert [pair.id for pair in pairs] == ["9/10"]
    assert pairs.refused[0].id == "1/2" and "does not exist" in pairs.refused[0].reason


def test_a_picture_elsewhere_is_not_taken_for_the_official_one(tmp_path):
    """Neither before the one in the layout's folder, nor in the place of one that is missing there."""
    folder = mmvp(tmp_path / "above" / "mmvp", ROWS)
    for stray in (folder / "1.jpg", folder / "10.jpg", folder.parent / "MMVP Images" / "10.jpg"):
        save(stray, 77)
    (folder / "MMVP Images" / "10.jpg").unlink()
    pairs = load_pairs(f"mmvp:{folder}")
    assert [pair.id for pair in pairs] == ["1/2"] and shown(pairs[0].image) == 1
    assert [each.id for each in pairs.refused] == ["9/10"] and "does not exist" in pairs.refused[0].reason


def test_rows_without_a_cell_or_with_a_letter_twice_are_counted(tmp_path):
    rows = [(number, "Is it open?", "(a) Open (b) Closed (b) Ajar", "(b)") for number in (3, 4)]
    rows += [(5, " ", "(a) Open (b) Closed", "(a)"), (6, "Is it open?", "(a) Open (b) Closed", "(b)")]
    rows += [("\u00b2", "Is it open?", "(a) Open (b) Closed", "(b)")]
    pairs = load_pairs(f"mmvp:{mmvp(tmp_path, [*ROWS[:2], *rows])}")
    assert len(pairs) == 1
    told = sorted(each.reason.partition(": ")[2] for each in pairs.refused)
    assert len(told) == 3 and "have the letter (b) twice" in told[2] + told[1] + told[0]
    assert any("Question is ' '; a non-empty text is needed" in each for each in told)
    assert any("Index is '\u00b2'; it must be a whole number of at least 1" in each for each in told)
