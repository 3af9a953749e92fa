"""Of a model spread over devices each has its own peak and its own budget, known beforehand and kept to."""

import dataclasses
import functools
import gc

import numpy as np
import pytest
import torch

from tests.fake_devices import FIRST, SECOND, fake_peaks, halves, scattered, spread
from tests.sweeps.test_devices import far
from tests.sweeps.test_schedule import PLENTY, kinds
from tests.zoo.batches import pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.benchmark.model_shapes import build, geometry, prompts
from vlm_mech.errors import TooLargeError
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.specification import Knockout, Replace
from vlm_mech.methods.layer_swap.study import plan_swap
from vlm_mech.models.vlm import VLM
from vlm_mech.sweeps import shares
from vlm_mech.sweeps.cost import pass_bytes, sizes
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.generated_answers import GeneratedPart
from vlm_mech.sweeps.generation import answers_under
from vlm_mech.sweeps.generation_cost import generation_cost
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.memory import peak_memory
from vlm_mech.sweeps.schedule import MARGIN, forecast
from vlm_mech.sweeps.shares import devices_of, shares_of
from vlm_mech.sweeps.sweep import grid, plan_sweep, sweep


@functools.cache
def middling(placed=halves, attn: str = "sdpa"):
    """As `test_schedule.middling`, on two devices."""
    shape = dataclasses.replace(geometry("llava15", width=256), n_layers=5)
    one = build(shape, attn=attn)
    vlm = VLM(spread(one.model, placed(one.model, one.family)), one.processor, name="far", check=False)
    assert vlm.readout.cap is None
    return vlm, vlm.encode(prompts(shape, 2)), vlm.encode(prompts(shape, 2, seed=9))


def near(foreseen, measured) -> bool:
    """Whether a peak is within 20 % on each of the two devices."""
    return set(foreseen) == {FIRST, SECOND} and all(0.8 <= foreseen[each] / measured[each] <= 1.2 for each in foreseen)


def by_name(plan) -> dict[str, int]:
    return {name: peak for name, peak, _ in plan.by_device}


@pytest.mark.parametrize(
    ("placed", "attn", "kind"),
    [
        (halves, "sdpa", "cut"),
        (halves, "sdpa", "swap"),
        (halves, "eager", "write"),
        (halves, "sdpa", "read"),
        (halves, "sdpa", "tower"),
        (scattered, "sdpa", "swap"),
        (scattered, "sdpa", "tower cut"),
    ],
)
def test_the_peak_of_each_device_is_within_20_percent_of_the_measured_one(placed, attn, kind):
    vlm, encoded, donors = middling(placed, attn)
    edits = kinds(vlm, donors)[kind]
    foreseen = forecast(vlm, encoded, edits, budget=PLENTY)
    gc.collect()
    with fake_peaks() as peaks:
        Engine(vlm, encoded, PLENTY).answers(edits)
    assert near(by_name(foreseen), peaks)
    assert foreseen.peak_bytes == max(by_name(foreseen).values())


def test_so_it_is_over_whole_answers_and_where_answers_are_generated():
    vlm, encoded, donors = middling()
    answered = followed(encoded, [[(8, 9, 10, 11), (9, 10, 11, 12)], [(10, 9, 8, 11), (12, 13)]])
    edits = kinds(vlm, donors)["cut"]
    foreseen = forecast(vlm, answered, edits, budget=PLENTY, keeps_logits=False)
    gc.collect()
    with fake_peaks() as peaks:
        Engine(vlm, answered, PLENTY).answers(edits, keep=lambda _, logits: logits.amax(-1))
    assert near(by_name(foreseen), peaks)
    edits, engine = kinds(vlm, donors)["write"], Engine(vlm, encoded, PLENTY)
    cost = generation_cost(vlm, encoded, edits, 8, held=0, budget=PLENTY)
    gc.collect()
    with fake_peaks() as peaks:
        answers_under(engine, [None, *edits], max_new_tokens=8)
    assert near(dict(zip(map(str, devices_of(vlm)), cost.peaks, strict=True)), peaks)


def test_each_device_keeps_to_its_own_budget():
    vlm, encoded, donors = middling()
    edits = kinds(vlm, donors)["write"]
    least, most = (forecast(vlm, encoded, edits[:n], budget=PLENTY).peaks for n in (1, None))
    free, _ = Engine(vlm, encoded, PLENTY).answers(edits)
    for tight in ([1, 0], [0, 1]):
        # One device has room for all, the other for few.
        budget = (MARGIN["cuda"] * np.where(tight, least + (most - least) // 3, most)).astype(int)
        plan = forecast(vlm, encoded, edits, budget=budget)
        gc.collect()
        with fake_peaks() as peaks:
            bound, _ = Engine(vlm, encoded, budget).answers(edits)
        assert 1 <= plan.cells_at_once < len(edits) and (plan.peaks <= plan.budgets).all()
        assert all(peaks[name] <= room for name, room in zip((FIRST, SECOND), budget, strict=True))
        assert plan.budget == budget[(plan.peaks / budget).argmax()] and (bound.cpu() - free.cpu()).abs().max() <= 1e-5
        with pytest.raises(TooLargeError, match=f"need .* on {(FIRST, SECOND)[tight.index(1)]}; the budget is 1000 B"):
            forecast(vlm, encoded, edits, budget=np.where(tight, 1000, budget))


def test_what_is_said_of_memory_holds_for_each_device_and_else_each_has_its_default(monkeypatch):
    vlm, pairs, points = far("llava_clip", placed=halves), pairs_of(2), grid(layer=range(4))

    def cut(point):
        return Knockout("last", "image", point.layer)

    plan = plan_sweep(vlm, pairs, points, cut, memory="2GiB")
    assert [(name, budget) for name, _, budget in plan.by_device] == [(FIRST, 2**31), (SECOND, 2**31)]
    assert str(plan).endswith(" of 2 GiB on lazy:0, " + str(plan).rpartition(", ")[2])
    assert str(plan).endswith(" of 2 GiB on lazy:1")
    rooms = {FIRST: 3 * 2**30, SECOND: 2**30}
    monkeypatch.setattr(shares, "default_budget", lambda device: rooms[str(device)])
    plan = sweep(vlm, pairs, points, cut, prob(pairs.answer)).plan
    assert plan is not None and {name: budget for name, _, budget in plan["by_device"]} == rooms
    one = plan_sweep(wrapped("llava_clip"), pairs, points, cut, memory="2GiB")
    assert one.by_device == () and str(one).endswith(" of 2 GiB") and one.budget == 2**31


def test_plans_with_generated_answers_tell_each_device():
    vlm, pairs = far("llava_clip", placed=halves), pairs_of(2)
    sites = [Site("llm.mlp_out", layer) for layer in range(4)]
    plain, spoken = (
        plan_swap(vlm, pairs, sites, ("image",), part=part, memory="1GiB") for part in (None, GeneratedPart(2, 0, 24))
    )
    assert [name for name, *_ in spoken.by_device] == [FIRST, SECOND]
    assert (spoken.peaks >= plain.peaks).all() and (spoken.peaks > plain.peaks).any()
    assert spoken.peak_bytes == spoken.peaks.max() and "on lazy:1; " in str(spoken)


def apart(_, family) -> dict[str, str]:
    """The decoder's blocks on one device, all before them on another."""
    return {"": FIRST} | dict.fromkeys((family.llm.path, family.llm.after, family.head), SECOND)


@pytest.mark.parametrize(("placed", "layers"), [(halves, ((0, 1), (2, 3))), (apart, ((), (0, 1, 2, 3)))])
def test_what_a_device_holds_is_what_its_parts_leave(placed, layers):
    vlm = far("llava_clip", placed=placed)
    encoded, own = vlm.encode(pairs_of(2).base), shares_of(vlm)
    assert own.devices == (FIRST, SECOND) and own.layers == layers and own.tower == ((0, 1, 2, 3), ())
    assert (own.inputs.tolist(), own.final.tolist(), own.head.tolist()) == ([1, 0], [0, 1], [0, 1])
    engine = Engine(vlm, encoded, PLENTY)
    found = dict.fromkeys(own.devices, 0)
    for block in engine.clean.blocks:
        for tensor in (block.hidden, block.keys, block.values):
            found[str(tensor.device)] += tensor.nbytes
    masks = {id(block.mask): block.mask for block in engine.clean.blocks if block.mask is not None}
    assert masks
    for tensor in (*masks.values(), engine.clean.final, engine.clean.reads):
        found[str(tensor.device)] += tensor.nbytes
    assert pass_bytes(sizes(vlm, encoded)).tolist() == list(found.values()) == engine.held.tolist()
    engine.plans([Replace(Site("llm.mlp_out", 3), "image", source=pairs_of(2).counterfactual)])
    assert (engine.held - list(found.values())).tolist() == [0, engine.clean.final.nbytes]


def test_the_peak_of_several_gpus_is_told_by_device(monkeypatch):
    gpus = [torch.device("cuda", number) for number in range(2)]
    held, most = {gpus[0]: 100, gpus[1]: 50}, {gpus[0]: 130, gpus[1]: 250}
    asked = {"synchronize": lambda _: None, "reset_peak_memory_stats": lambda _: None}
    asked |= {"memory_allocated": held.__getitem__, "max_memory_allocated": most.__getitem__}
    for name, answer in asked.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    with peak_memory(*gpus) as peak:
        pass
    assert peak.by_device == {"cuda:0": 30, "cuda:1": 200} and peak.bytes == 200
