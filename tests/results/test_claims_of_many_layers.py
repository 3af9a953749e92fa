"""Sentences that rest on several claims, and nulls that reach a claim of several conditions."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from vlm_mech.results import claim as claims_module
from vlm_mech.results.claim import Claim, Condition, Gate, named_without_claim
from vlm_mech.results.claimed_layers import numbers, placed, runs
from vlm_mech.results.gates import TWIN, against_nulls
from vlm_mech.results.result import Metric, Result


def made(about, mean=1.0, p=0.01, lost=()):
    found = claims_module.Tested(8, mean, mean - 0.1, mean + 0.1, p)
    gates = tuple(Gate(name, False, "") for name in lost)
    condition = Condition("share", about, "above", bound=0.5)
    return Claim("kind", about, "it holds", (condition,), "fraction", tested=(found,), p=p, gates=gates)


def test_each_place_that_a_sentence_names_must_be_claimed():
    claims = [made({"layer": 1}), made({"layer": 3, "head": 2}), made({"layer": 5}, p=0.2)]
    held = "up to layer 1; at layer 3 head 2, and layer 3 again"
    assert named_without_claim((held, "nothing is named"), claims) == []
    for other in ("layer 1, layer 5", "layer 5, layer 1", "layer 1 head 2", "layer 3 head 1", "head 2, block 1"):
        assert named_without_claim((other,), claims) == [other]


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ([0], "at layer 0"),
        ([2, 0], "up to layer 2"),
        ([0, 2, 4, 6], "up to layer 6"),
        ([6], "from layer 6 on"),
        ([2, 4], "from layer 2 to layer 4"),
        ([0, 4, 6], "at layer 0 and from layer 4 on"),
    ],
)
def test_layers_in_words(layers, told):
    """Layers follow each other among those that were asked about, in whatever order the table has them."""
    assert placed(runs(layers, [6, 0, 2, 4]), first=0, last=6) == told


def test_the_weakest_of_several_claims_is_told_with_the_largest_p_and_what_was_lost_where():
    claims = [made({"layer": 0}, 1.0, 0.02), made({"layer": 1}, 0.7, 0.01, lost=(TWIN,))]
    text = numbers(claims, "share")
    assert text == "share +0.70 (+0.60 to +0.80, n = 8) at layer 1, p = 0.02; fails random twin: layer 1"
    assert numbers(claims[:1], "share") == "share +1.00 (+0.90 to +1.10, n = 8), p = 0.02"
    elsewhere = numbers([made({"place": "projector"}, lost=(TWIN,))], "share")
    assert elsewhere == "share +1.00 (+0.90 to +1.10, n = 8), p = 0.01; fails random twin"


def test_the_strongest_claim_is_chosen_where_it_was_declared():
    claims = [
        dataclasses.replace(made({"layer": layer}, mean), declared=made({}, declared).tested)
        for layer, mean, declared in ((0, 0.9, 0.7), (1, 0.8, 0.95))
    ]
    assert numbers(claims, "share", strongest=True).startswith("share +0.80 (+0.70 to +0.90, n = 8) at layer 1, p")


def test_a_null_reaches_a_claim_that_it_meets_in_every_condition():
    """The unit of one condition must not hide that a null falls far short of another."""
    cell = {"layer": 0}
    conditions = (Condition("share", cell, "above", bound=0.5), Condition("effect", cell, "above", 0.1))
    tested = (claims_module.Tested(8, 0.8, 0.7, 0.9, 0.01), claims_module.Tested(8, 18.0, 17.0, 19.0, 0.01))
    claim = Claim("kind", cell, "it holds", conditions, tested=tested, p=0.01)
    metrics = (Metric("share", "share", ""), Metric("effect", "logits", ""))

    def null(share, effect):
        rows = {"example": ["a", "b"], "layer": 0, "share": share, "effect": effect}
        table = pd.DataFrame(rows | {"share_baseline": 0.0, "effect_baseline": np.nan})
        return Result("null", table, ("layer",), metrics)

    def verdict(*values):
        (found,) = against_nulls([claim], lambda _: [claim], {TWIN: [null(*values)]})
        return found.gates[0].verdict, found.gates[0].numbers["p"]

    assert verdict(0.9, 2.0) == (True, 0.5)
    assert verdict(0.7, 20.0) == (True, 0.5)
    assert verdict(0.9, 20.0) == (False, 1.0)


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("Layer 9 writes.", True),
        ("layers 1, 9 and 2 read.", True),
        ("layers 1 and 2 read.", False),
        ("L9H1 matters.", True),
        ("after the last block: 1.000 of 9.", False),
        ("in block 1.000 of them", False),
        ("layer 12.", True),
    ],
)
def test_names_are_found_in_lists_and_however_they_are_written(text, left_out):
    claims = [made({"layer": 1}), made({"layer": 2})]
    assert bool(named_without_claim([text], claims)) is left_out
