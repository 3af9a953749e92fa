"""What'sUp: groups of four, opposite relations as pairs, the official prompts, and the known label error."""

import json

import pytest

from tests.data.readers.made import save, shown, whatsup, write_json
from vlm_mech.data.pairs import load_pairs
from vlm_mech.data.whole_sets import sets_in
from vlm_mech.errors import UsageError

THINGS = (("beer bottle", "armchair"), ("mug", "table"))


def test_opposite_relations_of_a_group_are_pairs(tmp_path):
    """Two things in eight pictures a part: of each part two pairs of each two things."""
    pairs = load_pairs(f"whatsup:{whatsup(tmp_path, THINGS)}")
    assert len(pairs) == 8 and pairs.refused == () and pairs.notes == ()
    by_id = {pair.id: pair for pair in pairs}
    bottle, mug = (by_id[name] for name in (
        "controlled_images/beer-bottle_left_of_armchair/beer-bottle_right_of_armchair",
        "controlled_clevr/mug_in-front_of_table/mug_behind_table",
    ))  # fmt: skip
    left = [pair for pair in pairs if pair.answer == "left"]
    assert len(left) == 4
    assert bottle.question == (
        "Is the beer bottle to the left of or to the right of the armchair? Answer left or right."
    )
    assert mug.question == "Is the mug in front of or behind the table? Answer in front of or behind"
    assert (mug.answer, mug.counterfactual_answer, mug.options) == ("in front of", "behind", ("in front of", "behind"))
    assert mug.captions == ("A mug in front of a table", "A mug behind a table")
    assert by_id["controlled_images/mug_on_table/mug_under_table"].question == (
        "Is the mug on or under the table? Choose from the two options."
    )
    # The pictures of part A are numbered 1 to 8, those of B 9 to 16, in the order of the relations.
    assert (shown(mug.image), shown(mug.counterfactual_image)) == (15, 16)
    assert len({pair.group for pair in pairs}) == 4, "two parts of two things"
    assert len({pair.group for pair in pairs if pair.category == "left/right"}) == 4


def test_the_captions_of_a_group_in_any_order_are_its_name(tmp_path):
    folder = whatsup(tmp_path)
    pairs = load_pairs(f"whatsup:{folder}/data/controlled_images_dataset.json")
    assert len(pairs) == 2
    assert {pair.group for pair in pairs} == {
        "A beer bottle on a armchair | A beer bottle to the left of a armchair | "
        "A beer bottle to the right of a armchair | A beer bottle under a armchair"
    }


def test_a_bare_folder_is_known_by_its_files_wherever_it_begins(tmp_path):
    """The repository, and its folder `data` under this or another name."""
    folder = whatsup(tmp_path / "repo")
    digest = load_pairs(folder).digest
    assert load_pairs(folder / "data").digest == digest
    (folder / "data").rename(folder / "mine")
    assert load_pairs(folder / "mine").digest == digest


@pytest.mark.parametrize(("fix", "answers"), [(False, (1, 2)), (True, (2, 1))])
def test_the_exchanged_pictures_are_exchanged_back_only_when_asked(tmp_path, fix, answers):
    rows, captions = [], ["A pillow to the left of a chair", "A pillow to the right of a chair"]
    for number, name in enumerate(("left", "right"), 1):
        path = f"data/controlled_clevr/pillow_{name}_of_chair.jpeg"
        save(tmp_path / path, number)
        rows.append({"image_path": path, "caption_options": captions[:: 3 - 2 * number]})
    write_json(tmp_path / "data" / "controlled_clevr_dataset.json", rows)
    pairs = load_pairs(tmp_path, fix_labels=fix)
    assert (shown(pairs[0].image), shown(pairs[0].counterfactual_image)) == answers
    assert pairs[0].answer == "left" and pairs[0].captions == tuple(captions)
    assert len(pairs.notes) == 1 and ("--fix-labels corrects" in pairs.notes[0]) is not fix
    assert pairs.described["notes"] == list(pairs.notes)


def test_all_four_relations_are_options_and_groups_are_sets(tmp_path):
    """Two parts of two things are four whole sets; without one picture, three and one that lacks a pair."""
    folder = whatsup(tmp_path, THINGS)
    pairs, two_way = load_pairs(f"whatsup-four:{folder}"), load_pairs(f"whatsup:{folder}")
    by_id = {pair.id: pair for pair in pairs}
    mug = by_id["controlled_clevr/mug_in-front_of_table/mug_behind_table"]
    assert mug.question == "Where is the mug in relation to the table? Answer with left, right, front or behind."
    assert (mug.answer, mug.counterfactual_answer) == ("front", "behind")
    assert mug.options == ("left", "right", "front", "behind")
    bottle = by_id["controlled_images/beer-bottle_on_armchair/beer-bottle_under_armchair"]
    asked = "Where is the beer bottle in relation to the armchair? Answer with left, right, on or under."
    assert (bottle.question, bottle.options) == (asked, ("left", "right", "on", "under"))
    for four, two in zip(pairs, two_way, strict=True):
        same = ("id", "group", "category", "captions")
        assert [getattr(four, name) for name in same] == [getattr(two, name) for name in same]
        assert list(map(shown, four.pictures)) == list(map(shown, two.pictures))
    whole, partial = sets_in(pairs)
    assert [len(some) for some in whole] == [2] * 4 and partial == 0
    assert sets_in(two_way) == ((), 0)
    (folder / "data" / "controlled_clevr" / "mug_behind_table.jpeg").unlink()
    whole, partial = sets_in(load_pairs(f"whatsup-four:{folder}"))
    assert len(whole) == 3 and partial == 1


def test_what_is_no_pair_is_refused_with_its_reason(tmp_path):
    folder = whatsup(tmp_path, THINGS)
    path = folder / "data" / "controlled_images_dataset.json"
    rows = json.loads(path.read_text())
    del rows[1]  # the bottle under the armchair
    rows[3]["caption_options"] = "A mug on a table"
    rows[4]["caption_options"][0] = "A mug and a table"
    rows.append({"image_path": "data/controlled_images/none.jpeg"})
    (folder / rows[1]["image_path"]).unlink()
    path.write_text(json.dumps(rows))
    pairs = load_pairs(f"whatsup:{path}")
    assert [pair.id for pair in pairs] == ["mug_left_of_table/mug_right_of_table"]
    reasons = [each.reason for each in pairs.refused]
    for said in (
        "caption_options is 'A mug on a table'; a list of captions is needed",
        "caption 'A mug and a table' tells no relation",
        "caption_options is None",
        "its group has no image of 'under'",
        "does not exist",
    ):
        assert any(said in reason for reason in reasons), said
    assert len(reasons) == 5


def test_two_pictures_of_one_relation_in_a_group(tmp_path):
    path = whatsup(tmp_path) / "data" / "controlled_images_dataset.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[0]]))
    pairs = load_pairs(f"whatsup:{path}")
    assert len(pairs) == 2 and "its group has another image of 'on'" in pairs.refused[0].reason


def test_a_wrong_caption_without_a_relation_refuses_its_pair_of_four(tmp_path):
    path = whatsup(tmp_path) / "data" / "controlled_images_dataset.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["caption_options"] = [each.replace("under", "near") for each in row["caption_options"]]
    path.write_text(json.dumps(rows))
    with pytest.raises(UsageError, match="tells no relation"):
        load_pairs(f"whatsup-four:{path}")


def test_a_missing_column_is_named(tmp_path):
    path = write_json(tmp_path / "controlled_images_dataset.json", [{"image_path": "a.png", "captions": ["a"]}])
    told = "controlled_images_dataset.json has no column 'caption_options', only image_path, captions"
    with pytest.raises(UsageError, match=told):
        load_pairs(f"whatsup:{tmp_path}")
    path.write_text("[{")
    with pytest.raises(UsageError, match="format whatsup: controlled_images_dataset.json is not read: it is not JSON"):
        load_pairs(f"whatsup:{tmp_path}")
    with pytest.raises(UsageError, match="whatsup: there is no folder or file .*nowhere"):
        load_pairs(f"whatsup:{tmp_path / 'nowhere'}")
