"""A model spread over devices: what is computed is to the bit what the same model gives on one."""

import functools

import numpy as np
import pytest
import torch

from tests.fake_devices import FIRST, SECOND, FakeTensor, halves, scattered, spread
from tests.sweeps import test_generation, test_sweep, test_tower
from tests.sweeps.test_whole_answers import ANSWERS, read_by
from tests.zoo import ZOO
from tests.zoo.batches import batch, pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.extraction.extract import extract
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer
from vlm_mech.interventions.trace import generate, read, run
from vlm_mech.methods.attribution.study import attribute
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.lens.tuned_lens import LensTraining, train_tuned_lens
from vlm_mech.models.vlm import VLM
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.generation import answers_under
from vlm_mech.sweeps.measures import kl, logit_diff, prob
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.shares import block_devices
from vlm_mech.sweeps.sweep import grid, sweep

PLENTY = 10**12
KINDS = [("llava_clip", "eager"), ("qwen3_vl", "sdpa"), ("qwen2_5_vl", "sdpa"), ("gemma3", "sdpa"), ("blip2", "sdpa")]
"""Plain, with deepstack, with windows in the tower, with masks of two kinds and tied weights, with a Q-Former."""


@functools.cache
def far(family: str, attn: str = "sdpa", placed=scattered) -> VLM:
    model, processor = ZOO[family](attn, 0)
    return VLM(spread(model, placed(model, wrapped(family, attn).family)), processor, name=family, check=False)


def both(family: str, attn: str = "sdpa"):
    """The model on the CPU and on two devices."""
    return wrapped(family, attn), far(family, attn)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not isinstance(one, FakeTensor) and isinstance(other, FakeTensor) and torch.equal(one, other.cpu())


def test_two_devices_do_not_mix():
    one, other = (torch.ones(3, device=device) for device in (FIRST, SECOND))
    for mixed in (lambda: one + other, lambda: one + torch.ones(3), lambda: one[other.long()], lambda: one @ other):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found"):
            mixed()
    assert (one + torch.tensor(2.0))[torch.tensor([0])].tolist() == [3.0]
    assert (one + other.to(FIRST)).device == torch.device(FIRST) and one.copy_(other).device == torch.device(FIRST)


@pytest.mark.parametrize(("family", "attn"), KINDS)
def test_edited_versions_are_those_of_one_device(family, attn):
    found = []
    for vlm in both(family, attn):
        encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
        edits = test_sweep.edits_of(vlm, donors)[::4] + test_tower.edits_of(vlm, donors)[::3]
        engine = Engine(vlm, encoded, PLENTY)
        found.append((engine.baseline, *engine.answers(edits)))
    (clean, logits, receipts), (clean_far, logits_far, receipts_far) = found
    assert same(clean, clean_far) and same(logits, logits_far) and receipts == receipts_far
    assert clean_far.device == logits_far.device == far(family, attn).device


@pytest.mark.parametrize(("family", "attn"), KINDS[:2])
def test_answers_and_what_is_generated_are_those_of_one_device(family, attn):
    read, said = [], []
    for vlm in both(family, attn):
        encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
        answered = followed(encoded, [vlm.answer_tokens(encoded, answers) for answers in ANSWERS[:2]])
        edits = test_sweep.edits_of(vlm, donors)[::13]
        logits, receipts = read_by(Engine(vlm, answered, PLENTY), edits)
        read.append(([*logits, Reference(vlm, answered).logits(edits[1])], receipts))
        asked = list(test_generation.edits_of(vlm, donors).values())[::2]
        # Of many tokens that end an answer some come early, so that rows leave.
        ends = list(range(0, vlm.tokenizer.vocab_size, 3))
        with test_generation.ending(vlm, ends):
            said.append(answers_under(Engine(vlm, encoded, PLENTY), asked, max_new_tokens=4, check=[1]))
    ended = [torch.isin(each.ids[:, :2], torch.tensor(ends)).any(1) for each in said[0]]
    assert torch.stack(ended).any() and not torch.stack(ended).all()
    assert all(same(*each) for each in zip(read[0][0], read[1][0], strict=True)) and read[0][1] == read[1][1]
    for one, other in zip(*said, strict=True):
        assert same(one.ids, other.ids) and one.texts == other.texts and one.receipts == other.receipts


@pytest.mark.parametrize(("near_by", "away"), [("cpu", "disk"), (FIRST, "cpu")])
def test_weights_that_are_brought_in_for_each_block_give_the_same(near_by, away, tmp_path):
    model, processor = ZOO["qwen3_vl"]("sdpa", 0)
    plain = wrapped("qwen3_vl")
    placed = halves(model, plain.family, near_by, away) | {f"{plain.family.vision.path}.1": away}
    vlm = VLM(spread(model, placed, tmp_path), processor, name="qwen3_vl", check=False)
    assert any(weight.is_meta for weight in model.parameters())
    # All blocks compute on the device that weights are brought to.
    assert {str(each) for stream in ("llm", "vision") for each in block_devices(vlm, stream)} == {near_by}
    found, said = [], []
    for each in (plain, vlm):
        encoded, donors = each.encode(batch(1)), each.encode(batch(7))
        edits = test_sweep.edits_of(each, donors)[::5] + test_tower.edits_of(each, donors)[::5]
        found.append(Engine(each, encoded, PLENTY).answers(edits))
        spoken = list(test_generation.edits_of(each, donors).values())[::3]
        said += answers_under(Engine(each, encoded, PLENTY), spoken, max_new_tokens=3, check=[1])
    assert torch.equal(found[0][0], found[1][0].cpu()) and found[0][1] == found[1][1]
    for one, other in zip(said[: len(said) // 2], said[len(said) // 2 :], strict=True):
        assert torch.equal(one.ids, other.ids.cpu()) and one.receipts == other.receipts


def test_answers_side_by_side_need_no_mask_of_the_model():
    """Without padding the decoder gives no mask, and each device has its own of which tokens an answer sees."""
    logits = []
    for vlm in both("llava_clip"):
        encoded = vlm.encode(batch(1)[:1])
        answered = followed(encoded, [vlm.answer_tokens(encoded, answers[:1]) for answers in ANSWERS[:2]])
        logits.append(Engine(vlm, answered, PLENTY).reads)
    assert same(*logits)


@pytest.mark.parametrize("placed", [halves, scattered])
def test_rows_come_to_each_block_on_its_own_device_and_logits_to_that_of_the_inputs(placed):
    vlm, seen = far("llava_clip", placed=placed), []
    encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
    engine = Engine(vlm, encoded, PLENTY)
    blocks = list(vlm.model.get_submodule(vlm.family.llm.path).children())
    hooks = [
        block.register_forward_pre_hook(lambda _, given, layer=layer: seen.append((layer, given[0].device)))
        for layer, block in enumerate(blocks)
    ]
    edits = [Ablate(Site("projector.out"), "image"), Replace(Site("llm.resid_post", 0), "image", source=donors)]
    # States of the other prompts are read first, in a pass of their own.
    places = [engine.place(*each) for each in zip(engine.plans(edits), edits, strict=True)]
    seen.clear()
    logits, _ = engine.carry_out(places)
    for hook in hooks:
        hook.remove()
    # The pass of the tower ends where the decoder begins; it is the model's own.
    own = [each for number, each in enumerate(seen) if number or each[0]]
    assert {layer for layer, _ in own} == {0, 1, 2, 3}
    assert all(device == block_devices(vlm, "llm")[layer] for layer, device in own)
    assert logits.device == engine.reads.device == vlm.device


def test_a_sweep_and_its_reference_are_those_of_one_device():
    pairs, points = pairs_of(3), grid(layer=range(4), span=("image", "last"))

    def swap(point):
        return Replace(Site("llm.resid_post", point.layer), point.span, source=pairs.counterfactual)

    ours, theirs = (
        sweep(vlm, pairs, points, swap, [prob(pairs.answer), kl()], batch=2, check=1)
        for vlm in (wrapped("llava_clip"), far("llava_clip", placed=halves))
    )
    assert ours.table.equals(theirs.table) and ours.provenance["receipts"] == theirs.provenance["receipts"]


def test_traces_and_generation_are_those_of_one_device():
    edit = (
        Knockout("last", "image", (1, 3))
        & Ablate(Site("llm.mlp_out", 2), "image")
        & Steer(Site("llm.resid_post", 2), ("last", "generated"), vector=torch.ones(32))
    )
    settings = ({}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False})
    plain, spread_out = both("qwen3_vl")
    for options in settings:
        one, other = (generate(vlm, batch(1), edit, max_new_tokens=3, **options) for vlm in (plain, spread_out))
        assert same(one.ids, other.ids) and one.receipts == other.receipts
    sites = [Site("llm.resid_pre", 2), Site("llm.resid_post", 2), Site("vision.resid_pre", 1), Site("projector.out")]
    states = [read(vlm, batch(1), sites) for vlm in (plain, spread_out)]
    assert all(same(states[0][site], states[1][site]) for site in sites)
    # What goes into a block is read on the block's own device.
    assert [str(states[1][site].device) for site in sites[:3]] == [FIRST, FIRST, SECOND]
    edit = Replace(Site("vision.mlp_out", 1), "all", source=batch(7)) & Replace(sites[1], "last", source=batch(7))
    one, other = (run(vlm, batch(1), edit, apart=True) for vlm in (plain, spread_out))
    assert same(one.logits, other.logits) and one.receipts == other.receipts


@pytest.mark.parametrize("family", ["llava_clip", "qwen3_vl"])
def test_the_check_at_load_holds_on_two_devices(family):
    model, processor = ZOO[family]("sdpa", 0)
    vlm = VLM(spread(model, scattered(model, wrapped(family).family)), processor, name=family)
    assert vlm.checked is not None and vlm.readout.told == wrapped(family).readout.told


def test_methods_give_what_they_give_on_one_device(tmp_path):
    sites = [Site("llm.resid_post", layer) for layer in range(4)]
    tables, states, tuned, slopes = [], [], [], []
    pairs = pairs_of(2)
    for number, vlm in enumerate(both("llava_clip", "eager")):
        tables.append(lens(vlm, batch(1), sites, "image", words=["red"]).table)
        states.append(extract(vlm, batch(1), sites, spans="image", folder=tmp_path / str(number)))
        training = LensTraining(n_steps=5, check_every=5)
        translators = train_tuned_lens(vlm, batch(1), batch(3), sites[:3], "image", training=training)
        tuned.append(lens(vlm, batch(5), sites, "image", words=["red"], tuned=translators).table)
        measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
        found = attribute(vlm, pairs, [sites[1], Site("vision.mlp_out", 1)], "image", measure, top_k=1, n_random=1)
        slopes.append(found.screen.table)
    assert tables[0].equals(tables[1])
    assert tuned[0].equals(tuned[1])
    assert all(torch.equal(states[0][site], states[1][site]) for site in sites)
    # Autograd takes products apart otherwise than on a CPU.
    estimates = [table["estimate"].to_numpy() for table in slopes]
    assert estimates[1] == pytest.approx(estimates[0], rel=1e-4, abs=1e-6) and np.abs(estimates[0]).min() > 1e-5
