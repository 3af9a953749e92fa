"""A group and the id of a pair without one are two things, even if they read alike."""

import dataclasses
import json

from tests.zoo.tiny import picture
from vlm_mech.data.derived_pairs import by_groups
from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import Pairs, linked, load_pairs


def made(*named):
    """Pairs of these ids and groups, each of pictures of its own."""
    return Pairs("some", tuple(
        Pair(name, picture(2 * n), picture(2 * n + 1), "what is this?", "red", "blue", group)
        for n, (name, group) in enumerate(named)
    ))  # fmt: skip


def groups(pairs):
    return [pair.group or pair.id for pair in pairs]


def test_a_group_called_like_another_pair_does_not_take_it_in():
    pairs = made(("0", None), ("1", None), ("2", "0"), ("3", "0"))
    assert groups(pairs) == ["pair 0", "1", "0", "0"]
    assert groups(pairs[:2]) == ["pair 0", "1"], "a batch has the groups of the whole"
    assert len(by_groups(pairs, (0.3, 0.3), seed=0)) == 3


def test_groups_that_cannot_be_mistaken_stay_as_they_are():
    pairs = made(("a", None), ("b", "b"), ("c", "d"), ("d", "d"))
    assert groups(pairs) == ["a", "b", "d", "d"] and [pair.group for pair in pairs] == [None, "b", "d", "d"]
    assert groups(made(("0", None), ("1", "0"), ("2", "pair 0"), ("pair pair 0", None))) == [
        "pair pair pair 0", "0", "pair 0", "pair pair 0"
    ]  # fmt: skip


def test_pairs_that_share_a_picture_stay_one_group():
    pairs = made(("a", None), ("b", None), ("c", None))
    shared = dataclasses.replace(pairs[1], image=pairs[0].image)
    found = linked(dataclasses.replace(pairs, pairs=(pairs[0], shared, pairs[2])))
    assert [pair.group for pair in found] == ["a", "a", None]
    assert groups(found[:1]) == ["a"] and groups(linked(found)) == ["a", "a", "c"]


def test_groups_numbered_like_lines_are_no_lines(tmp_path):
    lines = []
    for number, group in enumerate((None, None, 0, 0)):
        for side in "ab":
            picture(2 * number + (side == "b")).save(tmp_path / f"{number}{side}.png")
        line = {"image": f"{number}a.png", "counterfactual_image": f"{number}b.png", "question": "what is this?",
                "answer": "red", "counterfactual_answer": "blue"}  # fmt: skip
        lines.append(json.dumps(line | ({} if group is None else {"group": group})))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = load_pairs(tmp_path)
    found = groups(pairs)
    assert len(set(found)) == 3 and found[2] == found[3]
