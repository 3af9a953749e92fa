"""The gate for natural states: which states are looked at, and what counts as the effect that is left."""

import numpy as np
import pytest
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import load_pairs
from vlm_mech.interventions.specification import Knockout, Steer
from vlm_mech.interventions.trace import read
from vlm_mech.methods.gates import manifold
from vlm_mech.methods.gates.manifold import MANIFOLD, on_manifold, share_left
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.manifold import Strangeness


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
    site, zeros = Site("llm.resid_post", 2), np.zeros(len(pairs))
    same = Strangeness(zeros, zeros, read(vlm, pairs.base, [site])[site][:, -1].numpy()[::-1].copy())
    monkeypatch.setattr(manifold, "strangeness", lambda *given: same)
    for size in (5, 12):
        model = manifold._Model(vlm, pairs, [pairs[start : start + size] for start in range(0, 12, size)])
        assert share_left(model, lambda some: pushed(vlm, 30.0), site, same) == pytest.approx(0, abs=1e-4)


def test_states_that_stay_where_the_edit_put_them_keep_all_of_its_effect(organism, monkeypatch):
    vlm, pairs = organism
    site, edit, zeros = Site("llm.resid_post", 3), Knockout("last", "image", 1), np.zeros(len(pairs))
    clean, edited = (read(vlm, pairs.base, [site], each)[site][:, -1].numpy() for each in (None, edit))
    monkeypatch.setattr(manifold, "strangeness", lambda *given: Strangeness(zeros, zeros, clean))
    for size in (5, 12):
        model = manifold._Model(vlm, pairs, [pairs[start : start + size] for start in range(0, 12, size)])
        share = share_left(model, lambda some: edit, site, Strangeness(zeros, zeros, edited))
        assert share == pytest.approx(1, abs=1e-3)


def test_answers_that_begin_alike_leave_it_open_and_the_batch_makes_no_difference(organism, monkeypatch):
    vlm, pairs = organism
    gates = [
        on_manifold([claim()], vlm, pairs, lambda claim, pairs: pushed(vlm, 1e3), batch=batch)[0].gates[0]
        for batch in (5, 12)
    ]
    one, other = (gate.numbers["effect_left_when_projected"] for gate in gates)
    assert one == pytest.approx(other, rel=1e-3) and gates[0].numbers["percentiles"] == gates[1].numbers["percentiles"]
    first = torch.zeros(12, dtype=torch.long)
    monkeypatch.setattr(VLM, "answer_ids", lambda self, encoded, answers: first[: len(answers)])
    (alike,) = on_manifold([claim()], vlm, pairs, lambda claim, pairs: pushed(vlm, 1e3))
    assert alike.gates[0].verdict is None and "the answers begin alike" in alike.gates[0].says


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
