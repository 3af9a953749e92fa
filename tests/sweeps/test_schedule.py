"""What a sweep will need is known beforehand, holds when measured, and keeps to a budget."""

import dataclasses
import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import some_long
from tests.zoo import FAMILIES
from tests.zoo.batches import batch, pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.benchmark.model_shapes import Tower, build, geometry, prompts
from vlm_mech.errors import TooLargeError, UsageError
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.attention_edits import Remove, Reweight
from vlm_mech.interventions.plan import plan
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, window
from vlm_mech.interventions.trace import read
from vlm_mech.methods.layer_swap.study import plan_swap, swap_states
from vlm_mech.runs.workspace import prepare
from vlm_mech.sweeps.branching import branch_of, outline
from vlm_mech.sweeps.cost import pass_flops, sizes
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.memory import parse_bytes, peak_memory, readable
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.sweeps.replay import Wave
from vlm_mech.sweeps.schedule import MARGIN, forecast, in_halves
from vlm_mech.sweeps.sweep import grid, plan_sweep, sweep

CPU = torch.device("cpu")
PLENTY = 10**12


@functools.cache
def middling(attn: str = "sdpa", side: int = 24):
    """576 image tokens and enough width for tensors to count, small enough to run; and two batches."""
    tile = 14 * side
    shape = dataclasses.replace(geometry("llava15", width=256), n_layers=5, tile=tile, picture=(tile, tile))
    vlm = build(shape, attn=attn)
    # How logits are read out is found once, in a pass of its own.
    assert vlm.readout.cap is None
    return vlm, vlm.encode(prompts(shape, 2)), vlm.encode(prompts(shape, 2, seed=9))


def kinds(vlm, donors):
    layers = vlm.llm_layers
    return {
        "cut": [
            Knockout(query, "image", window(layer, 3, n_layers=len(layers)))
            for layer in layers
            for query in ("last", "question")
        ],
        "cut long": [Knockout("image", "image", layer, keep_self=True) for layer in layers],
        "swap": [
            Replace(Site("llm.resid_post", layer), span, source=donors)
            for layer in layers
            for span in ("image", "question", "last")
        ],
        "write": [Ablate(Site("llm.resid_pre", layer), "image") for layer in layers],
        "read": [Ablate(Site("llm.mlp_out", layer), "question", to="mean") for layer in layers],
        "tower": [
            *(Ablate(Site("vision.mlp_out", layer), "image") for layer in (0, 2)),
            *(Replace(Site("vision.resid_pre", layer), "image", source=donors) for layer in vlm.vision_layers),
            Ablate(Site("projector.in"), "image", to="mean"),
            Ablate(Site("projector.out"), "image"),
        ],
        "removed": [Remove("image", layer) for layer in layers],
        "moved": [
            Reweight("image", "system", layer, scale=0.5, to="image")
            & Knockout("image", "image", layer, heads=(0,), keep_self=True)
            for layer in layers
        ],
        "tower alone": [Ablate(Site("vision.attn_out", 1), "image")],
        "tower cut": [
            Knockout("image", "image", range(layer, vlm.vision_depth), stream="vision", keep_self=True)
            for layer in range(vlm.vision_depth)
        ],
    }


KINDS = ("cut", "cut long", "removed", "moved", "swap", "write", "read", "tower", "tower alone", "tower cut")
PEAKS = [(attn, kind) for attn in ("sdpa", "eager") for kind in KINDS]
SOME_PEAKS = [*(("sdpa", kind) for kind in KINDS), ("eager", "cut long"), ("eager", "swap"), ("eager", "tower")]


@pytest.mark.parametrize(("attn", "kind"), some_long(PEAKS, SOME_PEAKS))
def test_the_predicted_peak_is_within_20_percent_of_the_measured_one(attn, kind):
    vlm, encoded, donors = middling(attn)
    edits = kinds(vlm, donors)[kind]
    foreseen = forecast(vlm, encoded, edits, budget=PLENTY)
    with peak_memory(CPU) as peak:
        Engine(vlm, encoded, PLENTY).answers(edits)
    assert 0.8 <= foreseen.peak_bytes / peak.bytes <= 1.2


@functools.cache
def with_answers(attn: str = "sdpa", side: int = 24):
    """The batch with two answers of four tokens after each prompt."""
    _, encoded, _ = middling(attn, side)
    return followed(encoded, [[(8, 9, 10, 11), (9, 10, 11, 12)], [(10, 9, 8, 11), (12, 13)]])


ANSWERED = [(attn, kind) for attn in ("sdpa", "eager") for kind in ("cut", "swap", "write", "tower")]


@pytest.mark.parametrize(("attn", "kind"), some_long(ANSWERED, [*ANSWERED[:4], ("eager", "write")]))
def test_the_predicted_peak_over_whole_answers_is_within_20_percent_too(attn, kind):
    vlm, _, donors = middling(attn)
    encoded, edits = with_answers(attn), kinds(vlm, donors)[kind]
    foreseen = forecast(vlm, encoded, edits, budget=PLENTY, keeps_logits=False)
    with peak_memory(CPU) as peak:
        Engine(vlm, encoded, PLENTY).answers(edits, keep=lambda _, logits: logits.amax(-1))
    assert 0.8 <= foreseen.peak_bytes / peak.bytes <= 1.2
    assert sizes(vlm, encoded).n_reads == Engine(vlm, encoded, PLENTY).reads.shape[1] == 1 + 3 + 3


@pytest.mark.parametrize("kind", ["cut long", "write"])
def test_a_sweep_stays_below_its_budget_and_its_numbers_are_the_same(kind):
    vlm, encoded, donors = middling()
    edits = kinds(vlm, donors)[kind]
    free, _ = Engine(vlm, encoded, PLENTY).answers(edits)
    least = forecast(vlm, encoded, edits[:1], budget=PLENTY, max_cells=1).peak_bytes
    most = forecast(vlm, encoded, edits, budget=PLENTY).peak_bytes
    budget = int(MARGIN["cpu"] * (least + (most - least) // 3))
    with peak_memory(CPU) as peak:
        bound, _ = Engine(vlm, encoded, budget).answers(edits)
    foreseen = forecast(vlm, encoded, edits, budget=budget)
    assert 1 <= foreseen.cells_at_once < len(edits) and foreseen.peak_bytes <= budget
    assert peak.bytes <= budget
    assert (bound - free).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_where_cells_leave_the_pass_is_known_without_running_it(family):
    vlm = wrapped(family)
    encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
    clean, before = record(vlm, encoded), outline(vlm, encoded)
    assert clean.n_added == before.n_added
    for start in range(encoded.n_pos):
        assert clean.widened(start) == before.widened(start)
    for span in ("image", "question", "last"):
        edit = Replace(Site("llm.resid_post", 2), span, source=donors)
        made = plan(vlm, encoded, edit, lambda source, sites: read(vlm, source, sites))
        found = [branch_of(each, made, edit, lambda source: source) for each in (clean, before)]
        assert (found[0].entry, found[0].start, found[0].taken) == (found[1].entry, found[1].start, found[1].taken)


# Left out: Q-Formers, and Pixtral, whose mask over a whole pack is not counted.
@pytest.mark.parametrize("family", ["llava_clip", "llava_next_mistral", "qwen2_vl", "gemma3", "idefics3", "internvl"])
def test_operations_of_a_pass_are_those_that_torch_counts(family):
    # torch counts no fused attention.
    vlm = wrapped(family, "eager")
    encoded = vlm.encode(batch(1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vlm.model(**encoded.inputs, logits_to_keep=1)
    assert pass_flops(sizes(vlm, encoded)) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.usefixtures("few_queries_at_once")
@pytest.mark.parametrize("family", ["llava_clip", "llava_next_mistral", "gemma3", "paligemma"])
def test_attention_in_parts_is_counted_as_it_is_computed(family):
    """Where earlier positions attend to later ones, no fewer pairs are foreseen than there are."""
    vlm = wrapped(family, "eager")
    encoded = vlm.encode(batch(1)[:1])
    edits = [Ablate(Site("llm.resid_pre", layer), "image") for layer in vlm.llm_layers for _ in range(3)]
    assert vlm.readout is not None, "it is found in a pass of its own"
    with FlopCounterMode(display=False) as counter:
        Engine(vlm, encoded, PLENTY).answers(edits)
    foreseen = forecast(vlm, encoded, edits, budget=PLENTY).flops
    assert 0.995 <= foreseen / counter.get_total_flops() <= 1.05


def test_operations_of_a_sweep_are_those_that_torch_counts():
    # Where operations are counted, and no memory is, fewer image tokens do.
    vlm, encoded, donors = middling("eager", 12)
    for kind in ("cut", "swap", "write", "read", "tower", "tower alone", "tower cut"):
        edits = kinds(vlm, donors)[kind]
        with FlopCounterMode(display=False) as counter:
            Engine(vlm, encoded, PLENTY).answers(edits)
        assert forecast(vlm, encoded, edits, budget=PLENTY).flops == pytest.approx(counter.get_total_flops(), rel=0.05)
        answered = with_answers("eager", 12)
        with FlopCounterMode(display=False) as counter:
            Engine(vlm, answered, PLENTY).answers(edits)
        assert forecast(vlm, answered, edits, budget=PLENTY).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_costs_of_edits_before_the_decoder_are_known_where_the_tower_is_the_larger_part():
    shape = dataclasses.replace(geometry("llava15", width=128), n_layers=2, tower=Tower(6, 256, 4, 1024))
    vlm = build(shape, attn="eager")
    assert vlm.readout.cap is None
    encoded, donors = (vlm.encode(prompts(shape, 1, seed=seed)) for seed in (0, 9))
    for kind in ("tower", "tower alone", "tower cut"):
        edits = kinds(vlm, donors)[kind]
        foreseen = forecast(vlm, encoded, edits, budget=PLENTY)
        with FlopCounterMode(display=False) as counter, peak_memory(CPU) as peak:
            Engine(vlm, encoded, PLENTY).answers(edits)
        assert foreseen.flops == pytest.approx(counter.get_total_flops(), rel=0.05), kind
        assert 0.8 <= foreseen.peak_bytes / peak.bytes <= 1.2, kind


def test_running_out_of_memory_halves_the_wave_and_goes_on(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    encoded, donors = vlm.encode(pairs.base), vlm.encode(pairs.counterfactual)
    edits = [Replace(Site("llm.resid_post", layer), "question", source=donors) for layer in range(4)]
    edits += [Knockout("question", "image", layer) for layer in range(4)]
    expected, proofs = Engine(vlm, encoded).answers(edits)
    whole, tried = Wave.run, []

    def scarce(wave):
        tried.append(len(wave.cells))
        if len(wave.cells) > 2:
            # Some of the work is done when memory runs out.
            yield next(whole(wave))
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
        yield from whole(wave)

    monkeypatch.setattr(Wave, "run", scarce)
    found, again = Engine(vlm, encoded).answers(edits)
    assert max(tried) > 2 and tried.count(2) + tried.count(1) >= 4
    assert (found - expected).abs().max() <= 1e-5
    assert [len(each) for each in again] == [len(each) for each in proofs]


def test_one_version_that_runs_out_of_memory_is_one_line(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), pairs_of(1)
    error = torch.OutOfMemoryError("CUDA out of memory")

    def none_left(wave):
        raise error

    monkeypatch.setattr(Wave, "run", none_left)
    with pytest.raises(TooLargeError, match="does not fit into memory; fewer examples at a time, a smaller budget"):
        sweep(vlm, pairs, grid(layer=(1,)), lambda point: Knockout("last", "image", 1), prob(pairs.answer))


def test_other_errors_in_a_wave_are_not_taken_for_memory(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), pairs_of(1)

    def broken(wave):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Wave, "run", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sweep(vlm, pairs, grid(layer=(1,)), lambda point: Knockout("last", "image", 1), prob(pairs.answer))


def test_a_budget_may_shrink_batches_and_is_refused_when_one_row_is_too_much():
    vlm, pairs = wrapped("llava_clip"), pairs_of(6)
    points = grid(layer=range(4), span=("image", "last"))

    def swap(point):
        return Replace(Site("llm.resid_post", point.layer), point.span, source=pairs.counterfactual)

    free = sweep(vlm, pairs, points, swap, prob(pairs.answer), batch=6)
    memory = int(MARGIN["cpu"] * plan_sweep(vlm, pairs, points, swap, batch=2).peak_bytes)
    bound = sweep(vlm, pairs, points, swap, prob(pairs.answer), batch=6, memory=memory)
    assert free.plan is not None and bound.plan is not None
    assert free.plan["batch"] == 6 and bound.plan["batch"] <= 3 and bound.plan["peak_bytes"] <= memory
    by_name = [each.table.set_index(["example", "layer", "span"]).sort_index()["prob"] for each in (free, bound)]
    assert by_name[0].to_numpy() == pytest.approx(by_name[1].to_numpy(), abs=1e-5)
    with pytest.raises(TooLargeError, match=r"1 example\(s\) of \d+ tokens need .*; the budget is 1000 B"):
        sweep(vlm, pairs, points, swap, prob(pairs.answer), memory=1000)


def test_a_plan_needs_no_weights():
    import transformers

    vlm = wrapped("llava_clip")
    with torch.device("meta"):
        empty = transformers.LlavaForConditionalGeneration(vlm.config).eval()
    skeleton = type(vlm)(empty, vlm.processor, name="skeleton", check=False)
    pairs = pairs_of(4)
    points = grid(layer=range(4), query=("last", "question"))

    def cut(point):
        return Knockout(point.query, "image", point.layer)

    ours, theirs = (plan_sweep(each, pairs, points, cut, memory="1GiB") for each in (vlm, skeleton))
    assert ours.flops == theirs.flops and ours.n_cells == 8 and 1 < ours.forwards < 3
    assert "8 cells x 4 examples" in str(ours) and "of 1 GiB" in str(ours)


def test_the_plan_of_a_swap_counts_both_directions():
    vlm, pairs = wrapped("llava_clip"), pairs_of(3)
    sites = [Site("llm.resid_post", layer) for layer in range(4)]
    one, both = (
        plan_swap(vlm, pairs, sites, ("image", "last"), directions=directions)
        for directions in (("noising",), ("noising", "denoising"))
    )
    assert both.n_cells == 2 * one.n_cells == 16
    assert one.forwards - 2 == pytest.approx((both.forwards - 2) / 2)
    tables = [
        swap_states(vlm, pairs, sites, ("image", "last"), only_correct=False, memory=memory)[0]
        for memory in (
            None,
            int(1.1 * MARGIN["cpu"] * plan_swap(vlm, pairs, sites, ("image", "last"), batch=1).peak_bytes),
        )
    ]
    first, other = (
        each.set_index(["example", "direction", "span", "layer"])["logit_diff"].sort_index() for each in tables
    )
    assert first.to_numpy() == pytest.approx(other.to_numpy(), abs=1e-5)


def test_an_interrupted_sweep_goes_on_to_the_same_numbers(tmp_path):
    vlm, pairs = wrapped("llava_clip"), pairs_of(5)
    points = grid(layer=range(4))
    calls = []

    def cut(point):
        return Knockout("last", "image", point.layer)

    def stopping(answer):
        calls.append(answer)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return prob(pairs.answer).of(answer)

    work = prepare(tmp_path / "run", {"sweep": "cut"}, resume=False, overwrite=False)
    interrupted = dataclasses.replace(prob(pairs.answer), of=stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep(vlm, pairs, points, cut, interrupted, batch=2, work=work)
    assert "00000000" in work and "00000002" not in work
    work = prepare(tmp_path / "run", {"sweep": "cut"}, resume=True, overwrite=False)
    resumed = sweep(vlm, pairs, points, cut, prob(pairs.answer), batch=2, work=work)
    whole = sweep(vlm, pairs, points, cut, prob(pairs.answer), batch=2)
    assert resumed.table.equals(whole.table)
    assert resumed.provenance["receipts"] == whole.provenance["receipts"]


def test_rows_are_halved_until_they_fit():
    def at_most_two(rows):
        if rows.stop - rows.start > 2:
            raise TooLargeError("too much")
        return (rows.start, rows.stop)

    assert in_halves(slice(3, 10), at_most_two) == [(3, 4), (4, 6), (6, 8), (8, 10)]
    assert in_halves(slice(0, 4), lambda rows: (rows.start, rows.stop), at_most=1) == [(0, 1), (1, 2), (2, 3), (3, 4)]

    def never(rows):
        raise TooLargeError("too much")

    with pytest.raises(TooLargeError, match="too much"):
        in_halves(slice(0, 5), never)


def test_peaks_count_what_lives_at_one_time():
    with peak_memory(CPU) as peak:
        first = torch.ones(1000, 250)
        second = first + 1
        del first
        third = second.view(-1) * 2
        fourth = torch.cat([third, third])
        del second, third
        assert fourth.sum() > 0
    assert peak.bytes == 4 * 1_000_000


def test_amounts_of_memory():
    assert parse_bytes("2GiB") == 2 * 1024**3 and parse_bytes("1.5 MB") == 1_500_000 and parse_bytes(77) == 77
    assert readable(3 * 1024**2) == "3 MiB" and readable(12) == "12 B"
    for wrong in ("much", "2 parsecs", "0", "-3MiB"):
        with pytest.raises(UsageError, match="is not an amount of memory"):
            parse_bytes(wrong)
