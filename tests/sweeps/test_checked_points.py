"""Points of a sweep that are run by the reference too: what that costs, and what it finds."""

import pytest
import torch

from tests.zoo.batches import pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import WorkError
from vlm_mech.interventions.receipt import ReceiptError
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.models.vlm import VLM
from vlm_mech.sweeps import sweep as sweep_module
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.replay import Wave
from vlm_mech.sweeps.sweep import grid, rounding, sweep


def passes_of(vlm, work):
    """Whole passes of the decoder that some work makes, as calls of its last norm; the fast engine calls its own."""
    seen = []
    hook = vlm.model.get_submodule(vlm.family.llm.after).register_forward_hook(lambda *_: seen.append(1))
    try:
        return work(), len(seen)
    finally:
        hook.remove()


def cut(point):
    return Knockout("last", "image", point.layer)


@pytest.mark.parametrize(("check", "passes"), [(0, 0), (1, 1), (3, 3)])
def test_a_checked_point_costs_one_pass(check, passes):
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    assert vlm.readout.cap is None, "found once, in a pass of its own"
    points = grid(layer=range(3))
    # The engine reads logits out through the same norm: once for the unedited pass and once for the wave.
    _, found = passes_of(vlm, lambda: sweep(vlm, pairs, points, cut, prob(pairs.answer), check=check))
    assert found == 2 + passes


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl"])
def test_the_reference_gives_the_same_logits_with_and_without_the_unedited_run(family):
    vlm, pairs = wrapped(family), pairs_of(2)
    reference = Reference(vlm, vlm.encode(pairs.base))
    last, depth = vlm.n_layers("llm") - 1, vlm.vision_depth
    reaching = [Knockout("last", "image", 1), Ablate(Site("vision.mlp_out", 1), "image")]
    for edit in [*reaching, Ablate(Site("llm.resid_post", last), "image")]:
        expected, _ = reference.answers([edit], keep=lambda _, logits: logits)
        assert torch.equal(reference.logits(edit), expected[0])
    assert depth > 1
    _, found = passes_of(vlm, lambda: Reference(vlm, vlm.encode(pairs.base)).logits(reaching[0]))
    assert found == 1


def test_an_edit_that_cannot_reach_is_held_against_the_unedited_run(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    edit = Ablate(Site("llm.resid_post", vlm.n_layers("llm") - 1), "image")
    points = grid(layer=(1,))
    sweep(vlm, pairs, points, lambda point: edit, prob(pairs.answer))
    # The reference finds it where the logits move all the same.
    plain = Reference(vlm, vlm.encode(pairs.base)).unedited
    moved = [type(each)(each.logits + 1e-7, each.encoded) for each in plain]
    monkeypatch.setattr(Reference, "unedited", moved)
    with pytest.raises(ReceiptError, match="the logits moved by .* although they cannot"):
        sweep(vlm, pairs, points, lambda point: edit, prob(pairs.answer))


@pytest.mark.parametrize("wrong", ["a cell", "the unedited pass"])
def test_wrong_numbers_of_the_engine_are_found(monkeypatch, wrong):
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    points = grid(layer=range(3))
    if wrong == "a cell":
        whole = Wave.run
        monkeypatch.setattr(Wave, "run", lambda wave: ((number, logits + 1e-3) for number, logits in whole(wave)))
    else:
        start = Engine.__post_init__

        def with_wrong_states(engine):
            start(engine)
            for block in engine.clean.blocks:
                block.hidden += 1e-2

        monkeypatch.setattr(Engine, "__post_init__", with_wrong_states)
    with pytest.raises(WorkError, match="the fast engine differs from the reference by"):
        sweep(vlm, pairs, points, cut, prob(pairs.answer))


def test_small_logits_may_differ_by_what_their_products_are_rounded_by(monkeypatch):
    vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=2)
    largest = vlm.readout.head.weight.double().norm(dim=1).max() * vlm.readout.norm.weight.double().norm()
    assert vlm.readout.size == pytest.approx(largest.item(), rel=1e-6)
    small, eps = torch.full((2, 3), 0.5), torch.finfo(torch.float32).eps
    assert rounding(vlm, small, 0.9e-5) == pytest.approx(1e-5) == rounding(vlm, 10 * small, 0.9e-5) / 5
    assert 1.1e-5 < rounding(vlm, small, 1.1e-5) == pytest.approx(4 * eps * largest.item())
    assert rounding(vlm, small, 1e-3) < 1e-3
    whole, far = Wave.run, [1.1e-5]
    monkeypatch.setattr(Wave, "run", lambda wave: ((number, logits + far[0]) for number, logits in whole(wave)))
    monkeypatch.setattr(sweep_module, "ROUNDING", 0.0)
    sweep(vlm, pairs, grid(layer=(1,)), cut, prob(pairs.answer))
    far[0] = 1e-4
    with pytest.raises(WorkError, match="the fast engine differs from the reference by") as error:
        sweep(vlm, pairs, grid(layer=(1,)), cut, prob(pairs.answer))
    assert len(str(error.value)) < 400
