"""Edits of claims by name, by example and in several places: against cuts and swaps that are made by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import load_pairs
from vlm_mech.interventions.specification import Knockout, Replace
from vlm_mech.interventions.trace import run
from vlm_mech.methods.gates.manifold import ClaimEdit, on_manifold
from vlm_mech.methods.gates.removals import Removed, in_other_ways
from vlm_mech.methods.knockout.claims import edit_of, pool_of, removed_of
from vlm_mech.methods.knockout.data import scan_of
from vlm_mech.methods.knockout.edges import object_masks, object_positions
from vlm_mech.methods.knockout.study import METRICS, knock_out
from vlm_mech.methods.layer_swap import claims as swaps
from vlm_mech.methods.layer_swap.data import swap_sites
from vlm_mech.methods.visual_flow import claims as flows
from vlm_mech.methods.visual_flow.data import cases_of, flow_scan
from vlm_mech.methods.visual_flow.effects import CUT, CUT_AT_RANDOM, flow_effects
from vlm_mech.methods.visual_flow.study import AXES, INPUT, depth_sites, flow, metrics_of
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import Claim
from vlm_mech.results.result import Result


@pytest.fixture(scope="module")
def organism():
    vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=10)
    masks = object_masks(pairs, seed=0, split="test")
    return vlm, fitting(vlm, pairs), masks


def leads(vlm, pairs, edit):
    encoded, rows = vlm.encode(pairs.base), torch.arange(len(pairs))
    own, rival = (vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer))
    logits = run(vlm, encoded, edit).last
    return (logits[rows, own] - logits[rows, rival]).double().numpy()


def about(**named):
    return Claim("needed", named, "", ())


# Knockout


def test_the_cut_of_an_edge_of_the_object_is_that_of_each_example(organism):
    """As the scan measured it, and as patches that show the object say."""
    vlm, pairs, masks = organism
    scan = scan_of(vlm, pairs, masks, ("after<-object", "after<-rest"))
    table = knock_out(vlm, pairs, scan, masks=masks, only_correct=False)[0]
    encoded = vlm.encode(pairs.base)
    for edge in ("after<-object", "after<-rest"):
        edit = edit_of(scan, vlm, masks)(about(edge=edge, layer=1), pairs)
        rows = table[(table["edge"] == edge) & (table["cut"] == "edge") & (table["layer"] == 1)]
        np.testing.assert_allclose(leads(vlm, pairs, edit), rows["logit_diff"], atol=1e-3)
    edit = edit_of(scan, vlm, masks)(about(edge="after<-object", layer=1), pairs)
    for number, (pair, tokens) in enumerate(zip(pairs, edit.key.spans, strict=True)):
        present = encoded.rows[number].present
        shown = object_positions(encoded, number, masks[pair.id])
        assert {present[at] for at in tokens.numbers} == shown


def test_without_the_model_or_the_object_such_an_edge_is_told_of(organism):
    vlm, pairs, masks = organism
    scan = scan_of(vlm, pairs, masks, ("after<-object",))
    claim = about(edge="after<-object", layer=1)
    assert "no name" in edit_of(scan)(claim, pairs) and "no name" in removed_of(scan)(claim)
    assert f"pair {pairs[0].id} does not have the edge" in edit_of(scan, vlm, {})(claim, pairs)
    assert removed_of(scan, vlm, {})(claim).span(pairs).startswith(f"pair {pairs[0].id} does not have")
    spoken = about(edge="last+answer<-image", layer=1)
    assert removed_of(scan, vlm, masks)(spoken) == "tokens of answers are in no prompt"
    assert edit_of(scan, vlm, masks)(spoken, pairs) == "tokens of answers are in no prompt"


def test_object_edges_meet_both_gates_and_batches_make_no_difference(organism):
    vlm, pairs, masks = organism
    scan = scan_of(vlm, pairs, masks, ("after<-object",))
    table = knock_out(vlm, pairs, scan, masks=masks, only_correct=False)[0]
    possible = pool_of(scan)(Result("knockout", table, scan.axes, METRICS))
    claim = next(each for each in possible if each.about["layer"] == 0)
    told = []
    for batch in (4, 10):
        (found,) = on_manifold([claim], vlm, pairs, edit_of(scan, vlm, masks), batch=batch)
        (found,) = in_other_ways([found], possible, vlm, pairs, removed_of(scan, vlm, masks), batch=batch)
        told.append([gate.numbers for gate in found.gates])
        assert all(gate.verdict is not None for gate in found.gates)
    assert told[0][0]["percentiles"] == told[1][0]["percentiles"]
    assert told[0][1]["mean"]["effect"] == pytest.approx(told[1][1]["mean"]["effect"], abs=1e-3)


def test_members_of_a_joint_claim_are_cut_and_removed_together(organism):
    vlm, pairs, _ = organism
    scan = scan_of(vlm, pairs, {}, ("last<-image",), heads=True)
    members = [{"layer": 1, "head": 0}, {"layer": 1, "head": 2}, {"layer": 3, "head": 1}]
    claim = about(edge="last<-image", members=members)
    by_hand = Knockout("last", "image", 1, heads=(0, 2)) & Knockout("last", "image", 3, heads=(1,))
    np.testing.assert_allclose(leads(vlm, pairs, edit_of(scan)(claim, pairs)), leads(vlm, pairs, by_hand), atol=1e-4)
    removed = removed_of(scan)(claim)
    parts = [(each.sites, each.heads) for each in (removed, *removed.more)]
    assert parts == [((Site("llm.head_out", 1),), (0, 2)), ((Site("llm.head_out", 3),), (1,))]
    whole = scan_of(vlm, pairs, {}, ("last<-image",))
    cut = edit_of(whole)(about(edge="last<-image", members=[{"layer": 2}, {"layer": 4}]), pairs)
    assert cut.each_layer == (2, 4) and cut.heads is None


# Layer swap


def test_both_directions_and_denials_of_a_swap_have_edits(organism):
    vlm, pairs, _ = organism
    sites = swap_sites(vlm, "llm", "resid_post")
    edit, removed = swaps.edit_of(sites), swaps.removed_of(sites)
    for direction, turned in (("noising", False), ("denoising", True)):
        for kind in (swaps.TURNS, swaps.NO_LONGER, swaps.NOT_YET, swaps.MOVES):
            denied = kind in (swaps.NO_LONGER, swaps.NOT_YET)
            claim = Claim(f"image {kind}", {"direction": direction, "span": "image", "layer": 2}, "", ())
            made = edit(claim, pairs)
            assert isinstance(made, ClaimEdit) and (made.turned, made.denied) == (turned, denied)
            assert (removed(claim).turned, removed(claim).denied, removed(claim).exchanged) == (turned, denied, True)
            assert made.intervention.sites == (Site("llm.resid_post", 2),)
    spoken = Claim("last+answer turns", {"direction": "noising", "span": "last+answer", "layer": 2}, "", ())
    assert edit(spoken, pairs) == removed(spoken) == "tokens of answers are in no prompt"
    tower = swaps.edit_of(swap_sites(vlm, "vision", "resid_post"))
    claim = Claim("image turns", {"direction": "noising", "span": "image", "layer": 0}, "", ())
    assert tower(claim, pairs) == "the patch is not in the decoder"


# The map


@pytest.fixture(scope="module")
def mapped(organism):
    vlm, pairs, _ = organism
    cases = cases_of(vlm, pairs)
    scan = flow_scan(vlm, cases)
    table, _ = flow(vlm, cases, scan)
    effects = flow_effects(Result("visual flow", table, AXES, metrics_of()))
    return scan, effects, flows.pool_of(scan)(effects)


def test_edits_of_the_map_do_what_its_table_says(organism, mapped):
    vlm, pairs, _ = organism
    scan, effects, possible = mapped
    edit, before = flows.edit_of(scan, depth_sites(vlm)), leads(vlm, pairs, None)
    values = dict(zip(effects.cells.itertuples(index=False, name=None), effects.matrix("effect").T, strict=True))
    kinds = set()
    for claim in possible:
        made = edit(claim, pairs)
        if not isinstance(made, Knockout | Replace) or claim.about["layer"] not in (INPUT, 1):
            continue
        kinds.add(claim.kind)
        if claim.kind == flows.TURNS:
            cell = ("swapped", claim.about["span"], claim.about["layer"])
        else:
            (cut,) = {one.cell["span"] for one in claim.conditions if one.cell["kind"] == CUT}
            cell = (CUT, cut, claim.about["layer"])
        np.testing.assert_allclose(leads(vlm, pairs, made) - before, values[cell], atol=1e-3)
    assert kinds == {flows.TURNS, flows.CARRY, flows.READ_NEEDED, flows.NEEDED, "holds back"}


def test_claims_of_the_map_that_edit_nothing_say_why(organism, mapped):
    vlm, pairs, _ = organism
    scan, _, possible = mapped
    edit, removed = flows.edit_of(scan, depth_sites(vlm)), flows.removed_of(scan, depth_sites(vlm))
    why = {claim.kind: (edit(claim, pairs), removed(claim)) for claim in possible}
    for kind in (flows.READ, flows.WRITE, flows.PUSH, flows.SUPPRESS, flows.OVERTAKEN):
        assert isinstance(why[kind][0], str) and why[kind][0] == why[kind][1], kind


def test_a_removal_of_the_map_is_asked_for_the_sign_of_its_own_cut(organism, mapped):
    """A layer reads where the lead is raised, and is needed where the cut lowers it: the latter is removed."""
    vlm, _, _ = organism
    scan, _, possible = mapped
    removed = flows.removed_of(scan, depth_sites(vlm))
    for claim in possible:
        found = removed(claim)
        if not isinstance(found, Removed):
            continue
        assert found.condition in claim.conditions and found.condition.less is None
        assert found.condition.cell["kind"] != CUT_AT_RANDOM
        if claim.kind in (flows.READ_NEEDED, flows.CARRY):
            assert found.condition.side == "below" and found.condition.cell["kind"] == CUT
        assert found.exchanged == (claim.kind == flows.TURNS)


def test_tokens_of_answers_are_in_no_prompt(organism, mapped):
    vlm, pairs, _ = organism
    scan, _, possible = mapped
    claim = next(each for each in possible if each.kind == flows.TURNS)
    spoken = dataclasses.replace(claim, about={"layer": 1, "span": "last+answer"})
    assert flows.edit_of(scan, depth_sites(vlm))(spoken, pairs) == "tokens of answers are in no prompt"
