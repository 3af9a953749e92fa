"""States that a claim says are needed, removed in other ways: effects against single runs, ranks and verdicts."""

import dataclasses

import pytest
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import load_pairs
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
