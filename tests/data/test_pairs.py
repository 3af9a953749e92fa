"""Pairs: turned round, asked about pictures of others, cut by groups, and what a folder may hold."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest

from tests.helpers import as_folder
from tests.zoo.tiny import picture
from vlm_mech.behaviour.erroneous_agreement.data import load_cases
from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.derived_pairs import about_others, apart, by_groups, conflict_first, partners, turned, with_conflict
from vlm_mech.data.image_classes import load_classes
from vlm_mech.data.pairs import Pair, Pairs, Refused, linked, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.methods.layer_swap.layer_swap import layer_swap

SOME_SIDES = ("first", "second", None)


def some(n, *, groups=None):
    """Pairs of n scenes, or of as many groups."""
    made = [
        Pair(f"p{number}", picture(number), picture(100 + number), "what?", f"a{number}", f"b{number}")
        for number in range(n)
    ]
    if groups:
        made = [dataclasses.replace(pair, group=f"g{number % groups}") for number, pair in enumerate(made)]
    return Pairs("some", tuple(made), (Refused("p99", "it was broken"),))


def test_turned_pairs_ask_about_the_other_picture():
    pairs = some(2)
    told = dataclasses.replace(pairs[0], captions=("one", "two"))
    assert [each.captions for each in turned(Pairs("told", (told, pairs[1])))] == [("two", "one"), None]
    other = turned(pairs)
    assert other.answer == ["b0", "b1"] and other.counterfactual_answer == ["a0", "a1"]
    assert [each.images for each in other.base] == [each.images for each in pairs.counterfactual]
    assert other.refused == pairs.refused and turned(other).digest == pairs.digest


@pytest.mark.usefixtures("untyped")
def test_a_pair_says_which_of_its_pictures_is_in_conflict(tmp_path):
    unlike = [dataclasses.replace(pair, conflict=side) for pair, side in zip(some(3), SOME_SIDES, strict=True)]
    pairs = Pairs("some", tuple(unlike))
    assert [pair.conflict for pair in turned(pairs)] == ["second", "first", None]
    faced = conflict_first(with_conflict(pairs))
    assert [(pair.conflict, pair.answer) for pair in faced] == [("first", "a0"), ("first", "b1")]
    assert [each.id for each in faced.refused] == ["p2"] and "conflict is not given" in faced.refused[0].reason
    assert conflict_first(pairs).answer == ["a0", "b1", "a2"] and conflict_first(faced) is faced
    with pytest.raises(UsageError, match='pair p0: conflict is .*both.*; "first", "second" or null is needed'):
        dataclasses.replace(unlike[0], conflict="both")
    assert [pair.conflict for pair in load_pairs(as_folder(tmp_path / "pairs", pairs))] == ["first", "second", None]
    for name, told in (
        ("colour-conflict", "second"),
        ("colour", None),
        ("left-right", None),
        ("count", None),
        ("phrases", None),
    ):
        assert {pair.conflict for pair in load_pairs(f"scenes/{name}", n=4)} == {told}


def test_every_pair_borrows_another_ones_pictures():
    for seed in range(5):
        numbers = partners(7, seed=seed)
        assert sorted(numbers) == list(range(7)) and all(one != other for one, other in enumerate(numbers))
    pairs = some(3)
    found = about_others(pairs, [pairs.pairs[number] for number in (2, 0, 1)])
    assert found.answer == pairs.answer and found.pairs[0].image is pairs.pairs[2].image
    assert found.pairs[1].counterfactual_image is pairs.pairs[0].counterfactual_image
    with pytest.raises(UsageError, match="at least two are needed"):
        partners(1, seed=0)


@pytest.mark.parametrize(
    ("n", "groups", "shares", "sizes"),
    [
        (12, 6, (0.5,), (6, 6)),
        (20, 10, (0.6, 0.2), (12, 4, 4)),
        (10, 10, (0.1, 0.2), (1, 2, 7)),
        (5, 5, (0.3,), (2, 3)),
    ],
)
def test_parts_share_no_group(n, groups, shares, sizes):
    parts = by_groups(some(n, groups=groups), shares, seed=1)
    assert tuple(len(part) for part in parts) == sizes
    held = [{pair.group for pair in part} for part in parts]
    assert sum(len(each) for each in held) == groups == len(set.union(*held))
    assert sorted(pair.id for part in parts for pair in part) == sorted(pair.id for pair in some(n))
    assert [len(part.refused) for part in parts] == [0] * len(shares) + [1], "what is broken is told once"
    again = by_groups(some(n, groups=groups), shares, seed=1)
    assert [part.digest for part in again] == [part.digest for part in parts]


def test_pairs_that_share_a_picture_stay_in_one_part(tmp_path):
    """The picture of pair n is the counterfactual of pair n + 1, in twos; ids and groups do not say so."""
    made = [
        Pair(f"p{n}", picture(n), picture(n - 1 if n % 2 else 100 + n), "what?", f"a{n}", f"b{n}", group=f"g{n}")
        for n in range(12)
    ]
    pairs = Pairs("some", tuple(made))
    assert [pair.group for pair in linked(pairs)] == [f"g{n - n % 2}" for n in range(12)]
    for seed in range(8):
        parts = by_groups(pairs, (0.5,), seed=seed)
        shown = [
            {image.tobytes() for pair in part for image in (pair.image, pair.counterfactual_image)} for part in parts
        ]
        assert not shown[0] & shown[1] and [len(part) for part in parts] == [6, 6]
        assert {pair.group for part in parts for pair in part} == {pair.group for pair in pairs}, "pairs are as given"
    folder = as_folder(tmp_path / "mine", pairs)
    assert [pair.group for pair in load_pairs(folder)] == [f"p{n - n % 2}" for n in range(12)]
    drawn = {tuple(pair.id for pair in by_groups(pairs, (0.5,), seed=seed)[0]) for seed in range(8)}
    assert len(drawn) > 1, "the seed draws the groups"
    unlike = some(6, groups=3)
    assert [pair.group for pair in linked(unlike)] == [pair.group for pair in unlike]


def test_pairs_that_show_a_picture_of_another_set_are_left_out_and_counted():
    """Probes fitted on one set are read on another: the third pair shows, as its counterfactual, a fitted picture."""
    fitted = Pairs("fitted", tuple(Pair(f"f{n}", picture(n), picture(n + 50), "what?", "a", "b") for n in range(4)))
    read = [Pair(f"r{n}", picture(n + 100), picture(50 if n == 2 else n + 150), "what?", "a", "b") for n in range(4)]
    kept = apart(Pairs("read", tuple(read)), fitted)
    assert [pair.id for pair in kept] == ["r0", "r1", "r3"]
    assert [(each.id, each.reason) for each in kept.refused] == [("r2", "it shows an image of pair f0 of fitted")]
    with pytest.raises(UsageError, match="none of the 4 pairs of fitted shows images that fitted does not"):
        apart(fitted, fitted)


@pytest.mark.parametrize(("groups", "shares"), [(1, (0.5,)), (4, (0.6, 0.2)), (6, (1.0,)), (6, (0.0,))])
def test_a_part_without_a_group_is_refused(groups, shares):
    with pytest.raises(UsageError, match=f"some has {groups} groups of pairs; too few for {len(shares) + 1} parts"):
        by_groups(some(6, groups=groups), shares, seed=0)


def test_two_pictures_of_the_same_pixels_are_no_pair(tmp_path):
    rows = []
    for name, number in (("copy", 1), ("pair", 2)):
        picture(1).save(tmp_path / f"{name}a.png")
        picture(number).save(tmp_path / f"{name}b.png")
        row = {"id": name, "image": f"{name}a.png", "counterfactual_image": f"{name}b.png"}
        rows.append(row | {"question": "what?", "answer": "red", "counterfactual_answer": "blue"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pairs = load_pairs(tmp_path)
    assert [pair.id for pair in pairs] == ["pair"]
    assert pairs.refused == (Refused("copy", "both images have the same pixels"),)


def test_pairs_made_in_python_take_pictures_in_every_form(vlm):
    buffers = [io.BytesIO() for _ in range(2)]
    for number, buffer in enumerate(buffers, 1):
        picture(number).save(buffer, "PNG")
    contents = [buffer.getvalue() for buffer in buffers]
    texts = [base64.b64encode(content).decode() for content in contents]
    other = Pair("1", picture(3), picture(4), "what is this?", "red", "blue")
    expected = Pairs("mine", (Pair("0", picture(1), picture(2), "what is this?", "red", "blue"), other))
    swapped = layer_swap(vlm, expected, only_correct=False).table
    for forms in (contents, texts, [np.asarray(picture(1)), {"bytes": contents[1], "path": None}]):
        pairs = Pairs("mine", (Pair("0", *forms, "what is this?", "red", "blue"), other))
        assert pairs.digest == expected.digest and linked(pairs).pairs == pairs.pairs
        assert layer_swap(vlm, pairs, only_correct=False).table.equals(swapped)


@pytest.mark.usefixtures("untyped")
def test_a_number_gives_a_pair_and_a_slice_gives_pairs():
    pairs = some(3)
    assert pairs[0] is pairs.pairs[0] and pairs[-1] is pairs.pairs[2]
    assert isinstance(pairs[:2], Pairs) and [pair.id for pair in pairs[:2]] == ["p0", "p1"]
    with pytest.raises(IndexError):
        pairs[3]
    with pytest.raises(UsageError, match=r"'p0' is not a row of pairs; a number gives a pair, a slice such as \[:8\]"):
        pairs["p0"]


@pytest.mark.usefixtures("untyped")
def test_what_is_no_pair_is_refused_where_it_is_given():
    made = some(2)
    assert Pairs("x", list(made)).pairs == made.pairs, "a list will do"
    for given, what in (("anything", "str"), (some(1)[0], "Pair"), ([some(1)[0], 3], "int"), (some(1), "Pairs")):
        with pytest.raises(UsageError, match=f"pairs of 'x' holds a {what}; a tuple of Pair is needed"):
            Pairs("x", given)
    with pytest.raises(UsageError, match="refused of 'x' holds a str; a tuple of Refused is needed"):
        Pairs("x", (), ("p1",))
    with pytest.raises(UsageError, match="answer of a pair is 3; a text is needed"):
        Pair("a", picture(1), picture(2), "how many?", 3, "2")


# Numbers and splits


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("split", ["val", "Test", "", None])
def test_a_split_that_no_scene_belongs_to_is_refused(split):
    """Scenes were drawn for ever."""
    told = "split .* is not known; use one of train, validation, test"
    with pytest.raises(UsageError, match=told):
        load_pairs("scenes/colour", n=2, split=split)
    with pytest.raises(UsageError, match=told):
        sample_pairs("colour", 2, seed=0, split=split)
    with pytest.raises(UsageError, match=told):
        load_cases("scenes/relations", n=2, seed=0, split=split, template="")


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("n", [1.5, True, "2"])
def test_a_number_of_examples_is_a_whole_number(n, tmp_path):
    """1.5 of a folder gave all of it, True one pair."""
    for name in ("scenes/colour", as_folder(tmp_path / "pairs", some(2))):
        with pytest.raises(UsageError, match=f"n is {n!r}; a whole number is needed"):
            load_pairs(name, n=n)
    with pytest.raises(UsageError, match=f"number of test images is {n!r}; a whole number is needed"):
        load_classes("scenes/kinds", n=n)
    assert len(load_pairs("scenes/colour", n=np.int64(2))) == 2
