"""The gate for natural states: which states are looked at, and what counts as the effect that is left."""

import dataclasses

import pytest
import torch

from tests.methods.gates.single_runs import moved
from vlm_mech.architectures.site import Site
from vlm_mech.data.derived_pairs import turned
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import load_pairs
from vlm_mech.interventions.specification import Knockout, Replace, Steer
from vlm_mech.interventions.trace import read
from vlm_mech.methods.gates import manifold
from vlm_mech.methods.gates.manifold import MANIFOLD, ClaimEdit, on_manifold, share_left
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.planted import plant
from vlm_mech.organism.planted_draw import draw
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.manifold import Natural
from vlm_mech.validate.examination import Job, shown


@pytest.fixture(scope="module")
def organism():
    vlm = VLM.load("organism")
    return vlm, fitting(vlm, load_pairs("scenes/colour", n=12))


def claim():
    return Claim("needed", {"layer": 2}, "cutting", (Condition("logit_diff", {"layer": 2}, "below"),))


def pushed(vlm, scale):
    """The last token's state after block 2, pushed along one direction."""
    vector = torch.randn(vlm.width(Site("llm.resid_post", 2)), generator=torch.Generator().manual_seed(0))
    return Steer(Site("llm.resid_post", 2), "last", vector=vector / vector.norm(), scale=scale)


def test_what_an_edit_of_no_size_does_is_natural_and_a_large_push_is_not(organism):
    vlm, pairs = organism
    (small,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: pushed(vlm, 1e-3))
    (large,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: pushed(vlm, 1e3))
    assert small.gates[0].verdict is True and "effect_left_when_projected" not in small.gates[0].numbers
    told = large.gates[0].numbers
    assert sorted(told["percentiles"]) == ["2", "3", "4", "5"] and told["percentiles"]["2"] == (100.0, 100.0)
    assert "effect_left_when_projected" in told and large.gates[0].name == MANIFOLD


def test_the_damage_that_the_projection_does_by_itself_is_not_the_effect(organism, monkeypatch):
    """Edited and unedited states are put at the same place: nothing of the edit is left, whatever that place does."""
    vlm, pairs = organism
    site = Site("llm.resid_post", 2)
    same = read(vlm, pairs.base, [site])[site][:, -1].numpy()
    monkeypatch.setattr(Natural, "projected", lambda *given: same[::-1].copy())
    for size in (5, 12):
        model = manifold._Model(vlm, pairs, [pairs[start : start + size] for start in range(0, 12, size)])
        assert share_left(model, lambda some: pushed(vlm, 30.0), site, same) == pytest.approx(0, abs=1e-4)


def test_states_that_stay_where_the_edit_put_them_keep_all_of_its_effect(organism, monkeypatch):
    vlm, pairs = organism
    site, edit = Site("llm.resid_post", 3), Knockout("last", "image", 1)
    edited = read(vlm, pairs.base, [site], edit)[site][:, -1].numpy()
    monkeypatch.setattr(Natural, "projected", lambda self, states, owners: states)
    for size in (5, 12):
        model = manifold._Model(vlm, pairs, [pairs[start : start + size] for start in range(0, 12, size)])
        share = share_left(model, lambda some: edit, site, edited)
        assert share == pytest.approx(1, abs=1e-3)


def test_answers_that_begin_alike_leave_it_open_and_the_batch_makes_no_difference(organism, monkeypatch):
    vlm, pairs = organism
    gates = [
        on_manifold([claim()], vlm, pairs, lambda claim, pairs: pushed(vlm, 1e3), batch=batch)[0].gates[0]
        for batch in (5, 12)
    ]
    one, other = (gate.numbers["effect_left_when_projected"] for gate in gates)
    assert (
        "2" in one
        and one == pytest.approx(other, rel=1e-3)
        and gates[0].numbers["percentiles"] == gates[1].numbers["percentiles"]
    )
    first = torch.zeros(12, dtype=torch.long)
    monkeypatch.setattr(VLM, "answer_ids", lambda self, encoded, answers: first[: len(answers)])
    (alike,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: pushed(vlm, 1e3))
    assert alike.gates[0].verdict is None and "the answers share a token" in alike.gates[0].says


def test_states_are_looked_at_from_the_first_layer_of_a_window_on(organism):
    vlm, pairs = organism
    (found,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: Knockout("last", "image", (1, 2, 3)))
    assert sorted(found.gates[0].numbers["percentiles"]) == ["1", "2", "3", "4", "5"]


def test_too_few_pairs_or_an_edit_that_there_is_none_of_are_not_tried(organism):
    vlm, pairs = organism
    (few,) = on_manifold([claim()], vlm, pairs[:5], lambda claim, pairs: pushed(vlm, 1.0))
    assert few.gates[0].verdict is None and "10 natural states of other pairs are needed" in few.gates[0].says
    (none,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: None)
    assert none.gates[0].verdict is None and not none.lost


# What is said of an edit


def test_states_of_the_other_picture_are_natural_from_either_side(organism):
    """A swap of everything in the decoder's input is the other run itself: no state of it is strange."""
    vlm, pairs = organism
    whole = lambda pairs: Replace(Site("llm.resid_pre", 0), "all", source=pairs.counterfactual)  # noqa: E731
    for other_side in (False, True):
        (found,) = on_manifold([claim()], vlm, pairs, lambda _, some, to=other_side: ClaimEdit(whole(some), turned=to))
        (gate,) = found.gates
        assert gate.verdict is True and max(max(each) for each in gate.numbers["percentiles"].values()) < 90
        assert set(gate.numbers["beyond"]) == set(gate.numbers["percentiles"])


def test_a_turned_edit_is_one_of_the_other_pictures_run(organism, monkeypatch):
    vlm, pairs = organism
    swap = lambda _, some: ClaimEdit(  # noqa: E731
        Replace(Site("llm.resid_post", 2), "last", source=some.counterfactual), turned=True
    )
    monkeypatch.setattr(manifold, "STRANGE", -1.0)
    (found,) = on_manifold([claim()], vlm, pairs, swap, batch=5)
    model = manifold._Model(vlm, turned(pairs), [turned(pairs)])
    assert model.lead(lambda some: swap(None, some).intervention) - model.unedited == pytest.approx(
        moved(vlm, pairs, Replace(Site("llm.resid_post", 2), "last", source=pairs.base), flip=True), abs=1e-3
    )
    assert "effect_left_when_projected" in found.gates[0].numbers


@pytest.mark.parametrize(("layer", "verdict"), [(0, True), (5, False)])
def test_an_effect_that_is_denied_is_lost_where_natural_states_bring_half_of_it(organism, monkeypatch, layer, verdict):
    """All states count as strange and are left where they are: a swap at the last layer goes all the way."""
    vlm, pairs = organism
    monkeypatch.setattr(manifold, "STRANGE", -1.0)
    monkeypatch.setattr(Natural, "projected", lambda self, states, owners: states)
    swap = lambda _, some: ClaimEdit(  # noqa: E731
        Replace(Site("llm.resid_post", layer), "last", source=some.counterfactual), denied=True
    )
    (found,) = on_manifold([claim()], vlm, pairs, swap)
    (gate,) = found.gates
    whole = moved(vlm, pairs, Replace(Site("llm.resid_pre", 0), "all", source=pairs.counterfactual))
    own = moved(vlm, pairs, swap(None, pairs).intervention)
    assert gate.verdict is verdict and gate.numbers["way_gone_when_projected"]
    for share in gate.numbers["way_gone_when_projected"].values():
        assert share == pytest.approx(own / whole, abs=1e-3)


def test_states_that_just_leave_before_they_are_strangest_are_put_back_at_both_places():
    """A dormant path wakes at layer 8; after layer 5 the median lies just beyond what half of natural states have."""
    recipe = draw(30004, "dormant path")
    planted = plant(recipe, check=False, n=8)
    pairs = shown(Job("dormant path", 30004), planted.recipe)
    swap = lambda _, some: Replace(Site("llm.resid_post", 2), "image", source=some.counterfactual)  # noqa: E731
    (found,) = on_manifold([claim()], planted.vlm, pairs, swap)
    (gate,) = found.gates
    left = gate.numbers["effect_left_when_projected"]
    assert recipe.dormant.layer == 8 and list(left) == ["5", "6"]
    assert left["5"] == pytest.approx(1, abs=1e-3) and left["6"] < 0.4 and gate.verdict is False


def test_the_share_of_examples_beyond_is_told(organism):
    vlm, pairs = organism
    (large,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: pushed(vlm, 1e3))
    (none,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: pushed(vlm, 1e-3))
    assert large.gates[0].numbers["beyond"]["2"] == 1 and "100 % of examples beyond the 95th" in large.gates[0].says
    assert all(share <= 0.5 for share in none.gates[0].numbers["beyond"].values())


def test_one_edit_of_several_claims_is_carried_out_once_and_others_apart(organism, monkeypatch):
    vlm, pairs = organism
    seen, read_now = [], manifold.read

    def counted(vlm, prompts, sites, edit=None):
        seen.append(edit)
        return read_now(vlm, prompts, sites, edit)

    monkeypatch.setattr(manifold, "read", counted)
    edits = [Knockout("last", "image", 2), Knockout("last", "image", 2), Knockout("last", "question", 2)]
    edits += [
        Replace(Site("llm.resid_post", 2), span, source=pairs.counterfactual) for span in ("last", "last", "image")
    ]
    edits += [pushed(vlm, 1e-3), pushed(vlm, 1e-3)]
    claims = [dataclasses.replace(claim(), about={"number": number}) for number in range(len(edits))]
    found = on_manifold(claims, vlm, pairs, lambda claim, pairs: edits[claim.about["number"]])
    assert len([edit for edit in seen if edit is not None]) == 6, "pushes are not known to be the same"
    assert found[0].gates[0] == found[1].gates[0] and found[3].gates[0] == found[4].gates[0]
    assert found[0].gates[0] != found[2].gates[0]


def test_why_there_is_no_edit_is_told(organism):
    vlm, pairs = organism
    (found,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: "it reads states")
    assert found.gates[0].verdict is None and found.gates[0].says == "not tried: it reads states"
