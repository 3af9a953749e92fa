"""States that a claim says are needed, removed in other ways: effects against single runs, ranks and verdicts."""

import dataclasses

import pytest
import torch

from tests.methods.gates.single_runs import moved
from vlm_mech.architectures.site import Site
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import load_pairs
from vlm_mech.inputs.span import Each, Tokens
from vlm_mech.interventions.specification import Ablate, Replace
from vlm_mech.interventions.trace import run
from vlm_mech.methods.gates import removals
from vlm_mech.methods.gates.removals import COUNTED, OTHER_WAYS, Removed, in_other_ways
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import Claim, Condition


def claim(layer, *, edge="last<-image", side="below"):
    cell = {"edge": edge, "layer": layer}
    return Claim("needed", cell, f"cutting {edge} at layer {layer}", (Condition("logit_diff", cell, side),))


def removed(claim):
    return None if claim.about["edge"] == "nameless" else Removed((Site("llm.attn_out", claim.about["layer"]),), "last")


@pytest.fixture(scope="module")
def organism():
    vlm = VLM.load("organism")
    return vlm, fitting(vlm, load_pairs("scenes/colour", n=6))


def test_effects_are_those_of_single_runs(organism):
    vlm, pairs = organism
    pool = [claim(layer) for layer in vlm.llm_layers]
    (found,) = in_other_ways([pool[1]], pool, vlm, pairs, removed)
    (gate,) = found.gates
    own, rival = (vlm.answer_ids(vlm.encode(pairs.base), each) for each in (pairs.answer, pairs.counterfactual_answer))

    def lead(edit=None):
        logits, rows = run(vlm, pairs.base, edit).last, torch.arange(len(pairs))
        return (logits[rows, own] - logits[rows, rival]).mean().item()

    site = Site("llm.attn_out", 1)
    edits = {to: Ablate(site, "last", to=to) for to in ("mean", "resample", "zero")}
    edits["counterfactual"] = Replace(site, "last", source=pairs.counterfactual)
    for way, edit in edits.items():
        assert gate.numbers[way]["effect"] == pytest.approx(lead(edit) - lead(), abs=1e-3), way
        assert gate.numbers[way]["of"] == 6
    assert gate.name == OTHER_WAYS and gate.verdict is True
    assert gate.numbers["counterfactual"]["rank"] == 1


def test_one_counted_way_with_another_sign_loses_a_claim_and_zero_does_not(monkeypatch):
    for way in (*COUNTED, "zero"):
        effects = {(number, each): -1.0 - number for number in range(3) for each in (*COUNTED, "zero")}
        effects[1, way] = 0.5
        monkeypatch.setattr(removals, "_effects", lambda *given, effects=effects: effects)
        pool = [claim(layer) for layer in range(3)]
        (found,) = in_other_ways([pool[1]], pool, None, None, removed)
        (gate,) = found.gates
        assert gate.verdict is (way == "zero")
        assert gate.numbers[way]["rank"] == 3
        others = [each for each in (*COUNTED, "zero") if each != way]
        assert all(gate.numbers[each]["rank"] == 2 for each in others)
        raises = dataclasses.replace(pool[1], conditions=(Condition("logit_diff", {}, "above"),))
        (gate,) = in_other_ways([raises], pool, None, None, removed)[0].gates
        assert gate.verdict is False


def test_what_is_no_state_by_name_is_not_tried(organism):
    vlm, pairs = organism
    (found,) = in_other_ways([claim(1, edge="nameless")], [claim(1, edge="nameless")], vlm, pairs, removed)
    assert found.gates[0].verdict is None and not found.lost


def test_a_removal_that_does_less_than_counts_loses_a_claim_and_the_own_edit_does_not_count(monkeypatch):
    sized = Claim("needed", {"edge": "last<-image", "layer": 1}, "", (Condition("logit_diff", {}, "below", least=0.8),))

    def verdict(effects, of=removed):
        monkeypatch.setattr(removals, "_effects", lambda *given: {(0, way): each for way, each in effects.items()})
        (found,) = in_other_ways([sized], [sized], None, None, of)
        return found.gates[0].verdict

    large = dict.fromkeys((*COUNTED, "zero"), -2.0)
    assert verdict(large) is True
    assert [verdict(large | {way: -0.5}) for way in (*COUNTED, "zero")] == [False, False, False, True]
    own = lambda claim: dataclasses.replace(removed(claim), exchanged=True)  # noqa: E731
    assert [verdict(large | {way: -0.5}, own) for way in (*COUNTED, "zero")] == [True, False, False, True]


# What is said of a removal


def test_a_turned_claim_is_about_the_run_on_the_other_picture(organism):
    vlm, pairs = organism
    site = Site("llm.resid_post", 1)
    of = lambda claim: Removed((site,), "last", turned=True)  # noqa: E731
    (found,) = in_other_ways([claim(1)], [claim(1)], vlm, pairs, of)
    numbers = found.gates[0].numbers
    swap = Replace(site, "last", source=pairs.base)
    assert numbers["counterfactual"]["effect"] == pytest.approx(moved(vlm, pairs, swap, flip=True), abs=1e-3)
    zero = moved(vlm, pairs, Ablate(site, "last", to="zero"), flip=True)
    assert numbers["zero"]["effect"] == pytest.approx(zero, abs=1e-3)


def test_what_is_removed_with_it_is_removed_in_the_same_run(organism):
    vlm, pairs = organism
    one, other = (Site("llm.attn_out", layer) for layer in (1, 2))
    of = lambda claim: Removed((one,), "last", more=(Removed((other,), "question"),))  # noqa: E731
    (found,) = in_other_ways([claim(1)], [claim(1)], vlm, pairs, of)
    both = Ablate(one, "last", to="zero") & Ablate(other, "question", to="zero")
    assert found.gates[0].numbers["zero"]["effect"] == pytest.approx(moved(vlm, pairs, both), abs=1e-3)


def test_tokens_that_differ_from_example_to_example_are_those_of_each(organism):
    vlm, pairs = organism
    spans = tuple(Tokens((3 + number % 2,)) for number in range(len(pairs)))
    found = []
    for batch in (2, 6):
        of = lambda claim: Removed((Site("llm.resid_post", 0),), lambda pairs: Each(spans))  # noqa: E731
        (each,) = in_other_ways([claim(1)], [claim(1)], vlm, pairs, of, batch=batch)
        found.append(each.gates[0].numbers)
    edit = Replace(Site("llm.resid_post", 0), Each(spans), source=pairs.counterfactual)
    assert found[0]["counterfactual"]["effect"] == pytest.approx(moved(vlm, pairs, edit), abs=1e-3)
    for way in (*COUNTED, "zero"):
        assert found[0][way]["effect"] == pytest.approx(found[1][way]["effect"], abs=1e-3), way
    (none,) = in_other_ways([claim(1)], [claim(1)], vlm, pairs, lambda claim: Removed((), lambda pairs: "no object"))
    assert none.gates[0].verdict is None and none.gates[0].says == "not tried: no object"
    (why,) = in_other_ways([claim(1)], [claim(1)], vlm, pairs, lambda claim: "it reads states")
    assert why.gates[0].says == "not tried: it reads states"


def test_a_denied_effect_is_lost_where_a_removal_goes_half_of_the_way(monkeypatch):
    denied = lambda claim: dataclasses.replace(removed(claim), exchanged=True, denied=True)  # noqa: E731
    whole = {(removals.WHOLE, "False"): -10.0}

    def verdict(**effects):
        each = {(0, way): effects.get(way, -1.0) for way in (*COUNTED, "zero")}
        monkeypatch.setattr(removals, "_effects", lambda *given: each | whole)
        (found,) = in_other_ways([claim(1)], [claim(1)], None, None, denied)
        assert "the other image -10.00, of which none may do half" in found.gates[0].says
        return found.gates[0].verdict

    assert verdict() is True and verdict(mean=4.0) is True, "what raises the lead does not go that way"
    assert verdict(mean=-4.9) is True and verdict(mean=-5.1) is False and verdict(resample=-9.0) is False
    assert verdict(counterfactual=-9.0) is True and verdict(zero=-9.0) is True, "neither counts"


def test_the_whole_way_is_what_the_other_picture_changes(organism):
    vlm, pairs = organism
    of = lambda claim: dataclasses.replace(removed(claim), denied=True)  # noqa: E731
    (found,) = in_other_ways([claim(1)], [claim(1)], vlm, pairs, of)
    swap = Replace(Site("llm.resid_pre", 0), "all", source=pairs.counterfactual)
    assert found.gates[0].numbers[removals.WHOLE]["effect"] == pytest.approx(moved(vlm, pairs, swap), abs=1e-3)


def test_the_condition_that_is_named_says_which_way_and_how_much(monkeypatch):
    effects = {(0, way): -2.0 for way in (*COUNTED, "zero")}
    monkeypatch.setattr(removals, "_effects", lambda *given: effects)
    for condition, verdict in ((Condition("x", {}, "above"), False), (Condition("x", {}, "below", 2.5), False)):
        of = lambda claim, one=condition: dataclasses.replace(removed(claim), condition=one)  # noqa: E731
        (found,) = in_other_ways([claim(1)], [claim(1)], None, None, of)
        assert found.gates[0].verdict is verdict
    (found,) = in_other_ways([claim(1)], [claim(1)], None, None, removed)
    assert found.gates[0].verdict is True


def test_the_same_states_are_removed_once_for_all_claims_about_them(organism, monkeypatch):
    vlm, pairs = organism
    counts, whole_sweep = [], removals.sweep

    def counted(vlm, data, points, *given, **how):
        counts.append(len(points))
        return whole_sweep(vlm, data, points, *given, **how)

    monkeypatch.setattr(removals, "sweep", counted)
    kinds = ("needed", "holds back", "reads and is needed")
    pool = [dataclasses.replace(claim(layer), kind=kind) for kind in kinds for layer in (1, 2)]
    found = in_other_ways(pool, pool, vlm, pairs, removed)
    assert counts == [2 * len(removals.WAYS)]
    assert found[0].gates[0].numbers["mean"]["effect"] == found[2].gates[0].numbers["mean"]["effect"]
    assert found[0].gates[0].numbers["mean"]["effect"] != found[1].gates[0].numbers["mean"]["effect"]
