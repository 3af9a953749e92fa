"""Sets of pairs: which are whole, kept together in order and in batches, drawn whole."""

import dataclasses
import random

import pytest

from tests.data.readers.made import whatsup
from tests.zoo.tiny import picture
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.whole_sets import batch_starts, load_sets, sets_in, sets_together

SIDES = ("left", "right", "above", "below")


def pair(number: int, group: str | None, first: int = 0, options=SIDES) -> Pair:
    answers = SIDES[first], SIDES[first + 1]
    return Pair(
        f"p{number}", picture(number), picture(number + 50), f"where is {group}?", *answers, group, options=options
    )


def some() -> Pairs:
    """Two whole sets (p0 with p4, p2 with p3), one that lacks a pair (p1), one pair without a group (p5)."""
    groups = ("one", "other", "two", "two", "one", None)
    firsts = (0, 0, 2, 0, 2, 0)
    return Pairs("some", tuple(pair(*each) for each in zip(range(6), groups, firsts, strict=True)))


def names(pairs):
    return [each.id for each in pairs]


def test_a_set_is_whole_where_its_answers_are_all_options():
    whole, partial = sets_in(some())
    assert [names(each) for each in whole] == [["p0", "p4"], ["p2", "p3"]] and partial == 1
    twice = [pair(0, "one"), dataclasses.replace(pair(1, "one"), id="p1")]
    assert sets_in(twice) == ((), 1), "the same relations twice"
    assert sets_in([pair(0, "one"), pair(1, "other")]) == ((), 0), "pairs with four options, and no sets"
    assert sets_in([pair(0, "one", options=SIDES[:2]), pair(1, "one", options=SIDES[:2])]) == ((), 0)


def test_batches_part_no_set():
    together = sets_together(some())
    assert names(together) == ["p0", "p4", "p1", "p2", "p3", "p5"]
    assert batch_starts(together, 2) == [0, 2, 3, 5]
    assert batch_starts(together, 3) == [0, 3]
    assert batch_starts(together, 1) == [0, 2, 3, 5], "a set is a batch by itself, were it too large"
    alone = Pairs("alone", tuple(pair(number, None) for number in range(7)))
    assert sets_together(alone) is alone
    for size in (1, 2, 3, 8):
        assert batch_starts(alone, size) == list(range(0, 7, size))


@pytest.mark.parametrize("n", [1, 3])
def test_sets_are_drawn_whole(tmp_path, n):
    things = (("beer bottle", "armchair"), ("mug", "table"))
    name = f"whatsup-four:{whatsup(tmp_path, things)}"
    pairs = load_sets(name, n=n, seed=4)
    whole, partial = sets_in(pairs)
    assert len(whole) == n and len(pairs) == 2 * n and partial == 0
    assert pairs.drawn == f"{n} of 4 whole sets, drawn with seed 4"
    every = load_sets(name, n=None, seed=4)
    assert len(every) == len(load_sets(name, n=4, seed=4)) == 8
    assert every.notes == () == load_sets(name, n=4, seed=4).notes
    assert load_sets(name, n=9, seed=4).notes == ("requested 9 whole sets, the source holds 4",)
    chosen = random.Random(4).sample(sets_in(every)[0], n)
    assert {each.id for each in pairs} == {each.id for one in chosen for each in one}
    assert len(load_sets(name.replace("-four", ""), n=n, seed=4)) == n, "pairs where there are no sets"
