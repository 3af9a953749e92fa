"""The benchmark: all contenders compute the same, the bound is right, a rival that does something else is not timed."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import benchmark
from tests.helpers import assert_help_tells, command
from vlm_mech.benchmark import cases as benchmark_cases
from vlm_mech.benchmark import model_shapes, timing
from vlm_mech.benchmark import probes as benchmark_probes
from vlm_mech.benchmark.bound import Sizes, lower_bound, sizes
from vlm_mech.benchmark.cases import GENERATE, N_NEW, cells
from vlm_mech.benchmark.compare import OURS, PLAIN, extraction_case, sweep_case
from vlm_mech.benchmark.extraction import EXTRACTORS, Extraction, OurExtraction, read_back
from vlm_mech.benchmark.model_shapes import FULL, GEOMETRIES, QUESTION, Tower, build, geometry, noise, prompts
from vlm_mech.benchmark.operations import Counts, counted, of_each, over_the_bound
from vlm_mech.benchmark.overview import METRICS, bars, findings, overview
from vlm_mech.benchmark.probes import LOOP, Size, Together, make_task, probes_case
from vlm_mech.benchmark.rivals import SOLVERS, Bridge, Ours, Plain
from vlm_mech.benchmark.task import Task
from vlm_mech.benchmark.timing import Entry, clock, difference, interleaved, subset, weigh
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import run
from vlm_mech.methods.probing.descent import LINEAR
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw
from vlm_mech.sweeps.sweep import Point, plan_sweep

KINDS = (
    "attn_out", "mlp_out", "head_out", "heads", "ablate-zero", "ablate-mean", "ablate-resample", "steer", "joint",
    GENERATE,
)  # fmt: skip
"""Cases that our reference is the only rival in."""
SMALL = {"width": 64, "n_heads": 4, "n_groups": 2, "intermediate": 96, "tile": 56, "tower": Tower(4, 32, 4, 48)}
PICTURES = {"llava15": (56, 56), "next": (112, 98), "qwen": (140, 112)}
CPU = torch.device("cpu")


def small(name):
    return dataclasses.replace(GEOMETRIES[name], n_layers=4, picture=PICTURES[name], **SMALL)


@pytest.fixture(scope="module")
def built():
    """Makes and keeps a four-layer model of each preset."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = build(small(name))
        return made[name]

    return make


def two_lengths(first):
    """Two prompts of unequal length, so that the batch is padded."""
    pictures = [noise(first + number, 56, 56) for number in range(2)]
    return [Prompt(QUESTION, pictures[0]), Prompt("is the red star left of the blue circle ?", pictures[1])]


def task_of(vlm, case, own, other):
    donor = vlm.encode(other)
    return Task(vlm, vlm.encode(own), donor, cells(vlm, case, donor))


def differences(task, rival):
    """Largest difference of each cell's logits to ours, and how far each edit moves ours."""
    numbers = range(len(task.cells))
    ours = Ours().answers(task, Ours().begin(task), numbers)
    theirs = rival.answers(task, rival.begin(task), numbers)
    clean = Plain().answers(task, None, [0])
    return (ours - theirs).abs().amax((1, 2)), (ours - clean).abs().amax((1, 2))


def solver(vlm, name):
    return Bridge(vlm) if name == "transformer_lens" else SOLVERS[name]()


# Shapes


@pytest.mark.parametrize(("name", "n_image", "n_layers"), [("llava15", 576, 32), ("next", 2830, 32), ("qwen", 990, 28)])
def test_presets_have_the_image_tokens_of_the_real_models(name, n_image, n_layers):
    assert GEOMETRIES[name].n_layers == n_layers
    vlm = build(dataclasses.replace(GEOMETRIES[name], n_layers=1))
    encoded = vlm.encode(prompts(GEOMETRIES[name], 1))
    assert len(encoded.positions("image")) == n_image
    assert 30 <= encoded.n_pos - n_image <= 40
    # 576 + 46 rows of 48 and a row end: of 48 rows two are unpadded.
    assert name != "next" or encoded.grids(0) == ((24, 24), (46, 48))


def test_full_sizes_are_those_of_seven_billion_weights():
    for name in FULL:
        full = geometry(name, full=True)
        block = 2 * full.width**2 * (1 + full.n_groups / full.n_heads) + 3 * full.width * full.intermediate
        assert 6.4e9 < full.n_layers * block < 6.7e9
    wide = geometry("qwen", width=512)
    assert (wide.n_heads, wide.n_groups, wide.intermediate) == (8, 4, 2704)


def test_pictures_differ_and_are_the_same_again():
    one, other, again = (
        prompt.images[0].tobytes() for prompt in (*prompts(small("llava15"), 2), prompts(small("llava15"), 2)[1])
    )
    assert one != other == again


# Everybody computes the same


@pytest.mark.parametrize("rival", list(SOLVERS))
@pytest.mark.parametrize("case", ["knockout", "swap"])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_rivals_compute_what_we_compute(built, name, case, rival):
    vlm, shape = built(name), small(name)
    task = task_of(vlm, case, prompts(shape, 1), prompts(shape, 1, seed=5))
    assert len(task.cells) == {"knockout": 8, "swap": 12}[case]
    apart, moved = differences(task, solver(vlm, rival))
    if (name, case, rival) == ("qwen", "knockout", "transformer_lens"):
        # Its attention edits are discarded there; what is left is the unedited run.
        assert torch.allclose(apart, moved, atol=1e-5) and apart.min() > 0.01
    else:
        assert apart.max() <= 1e-5
    # States of image or question after the last attention reach nothing; all else acts.
    assert int((moved > 0.01).sum()) == {"knockout": 8, "swap": 10}[case]


@pytest.mark.parametrize("rival", list(SOLVERS))
@pytest.mark.parametrize("case", ["knockout", "swap"])
def test_rivals_agree_on_a_padded_batch(built, case, rival):
    task = task_of(built("llava15"), case, two_lengths(0), two_lengths(20))
    assert differences(task, solver(task.vlm, rival))[0].max() <= 1e-5


@pytest.mark.parametrize("case", KINDS)
def test_the_reference_computes_what_we_compute_in_every_kind_of_edit(built, case):
    vlm = built("llava15")
    # States are drawn from other prompts of one length.
    made = (lambda seed: prompts(small("llava15"), 2, seed=seed)) if case == "ablate-resample" else two_lengths
    encoded, donor = vlm.encode(made(0)), vlm.encode(made(20))
    task = Task(vlm, encoded, donor, cells(vlm, case, donor), N_NEW if case == GENERATE else 0)
    task.cells = task.cells[:: max(1, len(task.cells) // 4)]
    numbers = range(len(task.cells))
    ours, theirs = (each.answers(task, each.begin(task), numbers) for each in (Ours(), SOLVERS["trace"]()))
    assert (ours - theirs).abs().max() <= 1e-5
    n_apart = ours.flatten(1).unique(dim=0).shape[0]
    # Cells may say the same.
    assert n_apart > 1 if case == GENERATE else n_apart == len(ours), "the cells differ"


def test_a_rival_says_for_what_it_is_written(built):
    vlm = built("llava15")
    donor = vlm.encode(two_lengths(20))
    for case, rival in (("heads", "hooks"), ("steer", "cached"), ("tower", "cached")):
        task = task_of(vlm, case, two_lengths(0), two_lengths(20))
        with pytest.raises(UsageError, match=r"written for|leaves no part"):
            SOLVERS[rival]().answers(task, SOLVERS[rival]().begin(task), [0])
    with pytest.raises(UsageError, match="give --batch 2 or more"):
        cells(vlm, "ablate-resample", vlm.encode(two_lengths(20)[:1]))
    assert len(cells(vlm, "heads", donor)) == 4 * 4 and len(cells(vlm, "steer", donor)) == 4 * 2 * 4


def test_generated_answers_are_timed(built):
    own, other = prompts(small("llava15"), 1), prompts(small("llava15"), 1, seed=5)
    table, notes = sweep_case(built("llava15"), "generate", own, other, ["hooks", "trace"], rival_cells=2, repeats=1)
    assert notes["n_cells"] == 8 and notes["receipts"]["receipts"] >= 8
    assert float(table["difference"].max()) == 0.0
    ours = table.set_index("contender").loc[OURS]
    assert ours["operations"] * notes["bound"] > 1 and "next token alone" in str(table["skipped"].tolist())


@pytest.mark.parametrize(
    ("name", "rival"),
    [*(("llava15", rival) for rival in SOLVERS if rival != "cached"), ("qwen", "hooks"), ("qwen", "nnsight")],
)
def test_tower_cells(built, name, rival):
    """A hook on the layer that LLaVA reads is lost; everything else acts, packed towers included."""
    shape = small(name)
    task = task_of(built(name), "tower", prompts(shape, 1), prompts(shape, 1, seed=5))
    apart, moved = differences(task, solver(task.vlm, rival))
    lost = name == "llava15" and rival in ("hooks", "transformer_lens")
    assert moved.min() > 0.01
    assert apart[:-1].max() <= 1e-5
    assert (apart[-1] > 0.01) if lost else (apart[-1] <= 1e-5)


def test_eager_attention_takes_the_rivals_masks_too():
    vlm = build(small("llava15"), attn="eager")
    task = task_of(vlm, "knockout", two_lengths(0), two_lengths(20))
    assert differences(task, SOLVERS["hooks"]())[0].max() <= 1e-5


@pytest.mark.parametrize("rival", list(EXTRACTORS))
def test_extractions_agree(built, rival):
    task = Extraction(built("llava15"), [*two_lengths(0), *two_lengths(3), *two_lengths(6), *two_lengths(9)])
    ours = OurExtraction()
    ours.begin(task)
    written = read_back(task, ours.answers(task, None, range(2)))
    other = EXTRACTORS[rival]()
    found = other.answers(task, other.begin(task), range(2))
    assert found.shape == written.shape == (2, 4, 4, 3, 64)
    assert (found - written).abs().max() <= 1e-5
    assert (found[0] - found[1]).abs().max() > 0.1


# The bound


def test_the_products_of_a_block_are_those_that_torch_counts(built):
    vlm = build(small("llava15"), attn="eager")
    encoded = vlm.encode(prompts(small("llava15"), 1))
    each, block = sizes(vlm, encoded), vlm.model.model.language_model.layers[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vlm.model(**encoded.inputs, logits_to_keep=1)
    n_pos, counts = encoded.n_pos, counter.get_flop_counts()
    decoder = sum(counts["LlavaForConditionalGeneration.model.language_model"].values())
    # Torch computes all pairs of positions; a block needs those at or below the diagonal.
    saved = 4 * each.n_layers * each.heads * (n_pos * (n_pos - 1) // 2)
    assert decoder - saved == each.blocks(0, 0)
    assert each.head == sum(counts["LlavaForConditionalGeneration.lm_head"].values())
    assert each.block == sum(part.weight.numel() for part in block.modules() if isinstance(part, torch.nn.Linear))


@pytest.fixture(scope="module")
def middling():
    """576 image tokens and enough width for products of weights to outweigh the rest."""
    vlm = build(dataclasses.replace(geometry("llava15", width=512), n_layers=4))
    vlm.model.generation_config.eos_token_id = None
    return vlm


@pytest.mark.parametrize("case", ["knockout", "swap", "knockout-answers", *KINDS])
def test_operations_are_near_the_bound_in_every_kind_of_edit(middling, monkeypatch, case):
    """As torch counts them, in attention over all pairs of positions, where the bound has the allowed ones."""
    # Windows part in four layers, too.
    monkeypatch.setattr(benchmark_cases, "WINDOW", 3)
    assert 1 <= over_the_bound(middling, geometry("llava15", width=512), case) <= 1.15


def test_operations_of_cases_are_told_over_the_bound():
    told = dict(of_each(Counts(width=128, layers=2, cases=("knockout", "attn_out"))))
    # At this width attention is most of the work, and torch counts the half of it that is never computed.
    assert list(told) == ["knockout", "attn_out"] and all(1 < each < 1.8 for each in told.values())
    with pytest.raises(UsageError, match="case 'swop' is not known"):
        list(of_each(Counts(width=128, layers=1, cases=("swop",))))


def test_attention_is_counted_under_both_back_ends():
    found = {}
    for attn in ("sdpa", "eager"):
        vlm = build(small("llava15"), attn=attn)
        encoded = vlm.encode(prompts(small("llava15"), 1))
        with torch.no_grad():
            found[attn] = counted(vlm, lambda vlm=vlm, encoded=encoded: vlm.model(**encoded.inputs))
    assert found["sdpa"] == found["eager"]


def test_bound_by_hand():
    """Three blocks of weight 10 with heads of 2 in all, four positions: 80 for the linear layers, 4 x 2 for an edge."""
    each = Sizes(n_layers=3, n_pos=4, block=10, heads=2, tower=100.0, head=20.0)
    assert each.blocks(0, 0) == 3 * (80 + 8 * 10)
    assert each.plain == 100 + 480 + 20
    # From block 1 on, for the last position, which sees four.
    assert each.blocks(1, 3) == 2 * (20 + 8 * 4)
    assert each.blocks(1, 1) == 2 * (60 + 8 * 9)
    assert each.blocks(3, 0) == each.blocks(7, 2) == 0


def test_bound_of_sweeps_by_hand(built):
    vlm, shape = built("llava15"), small("llava15")
    encoded, donor = (vlm.encode(prompts(shape, 1, seed=seed)) for seed in (0, 5))
    each, n_pos = sizes(vlm, encoded), encoded.n_pos
    linear, edge = 2 * each.block, 4 * each.heads
    one = linear + edge * n_pos
    # Windows of nine around any of four layers are all of them: one run, read out four times.
    assert lower_bound(vlm, encoded, cells(vlm, "knockout-last", donor)) == pytest.approx(
        1 + 4 * (each.head + one) / each.plain
    )
    # One position through 3, 2, 1 and no blocks, and the donor's pass.
    assert lower_bound(vlm, encoded, cells(vlm, "swap-last", donor)) == pytest.approx(
        2 + (4 * each.head + 6 * one) / each.plain
    )
    swaps = cells(vlm, "swap", donor)
    after = max(encoded.positions("image")) + 1
    image = [cell for cell in swaps if cell.span == "image"][1]
    positions = n_pos - after
    text = positions * linear + edge * sum(range(after + 1, n_pos + 1))
    assert lower_bound(vlm, encoded, [image]) == pytest.approx(2 + (each.head + 2 * text) / each.plain)
    # After the last attention the image's states reach no answer, and nothing is computed.
    assert lower_bound(vlm, encoded, [cell for cell in swaps if cell.span == "image"][3:]) == 2
    assert lower_bound(vlm, encoded, cells(vlm, "tower", donor)) > 1
    # What attention adds changes its own block: a head each, one position through 4, 3, 2, 1 blocks, the donor's pass.
    last = [cell for cell in cells(vlm, "attn_out", donor) if cell.span == "last"]
    assert lower_bound(vlm, encoded, last) == pytest.approx(2 + (4 * each.head + 10 * one) / each.plain)
    # Sixteen tokens of a cell and without an edit: fifteen steps over all blocks, each seeing one position more.
    cut = cells(vlm, "knockout-last", donor)[:1]
    steps = sum(4 * (linear + edge * (n_pos + step)) + each.head for step in range(1, 16))
    assert lower_bound(vlm, encoded, cut, n_new=16) == pytest.approx(
        lower_bound(vlm, encoded, cut) + 2 * steps / each.plain
    )


# Clock and memory


class Fake:
    """A contender whose clock is set by hand: `begin` takes 1 s, each cell 3 s."""

    name = "fake"

    def __init__(self, ticks, name="fake"):
        self.ticks, self.name = ticks, name

    def begin(self, task):
        self.ticks[0] += 1.0

    def answers(self, task, begun, numbers):
        self.ticks[0] += 3.0 * len(numbers)
        task.append(self.name)
        return torch.ones(len(numbers))


def test_seconds_are_scaled_by_count_but_not_what_is_done_once(monkeypatch):
    ticks = [0.0]
    for clock_of in ("perf_counter", "process_time"):
        monkeypatch.setattr(timing.time, clock_of, lambda: ticks[0])
    assert clock(Entry(Fake(ticks), (0, 4), 8), [], CPU).seconds == 1 + 3 * 8
    assert clock(Entry(Fake(ticks), (0,), 1), [], CPU).seconds == 1 + 3


def test_contenders_take_turns_in_random_order():
    log, ticks = [], [0.0]
    entries = [Entry(Fake(ticks, name), (0, 1), 2) for name in "abcd"]
    done = interleaved(entries, log, repeats=6, seed=0, device=CPU)
    rounds = [log[at : at + 4] for at in range(4, len(log), 4)]
    assert log[:4] == list("abcd") and len(rounds) == len(done) == 6
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    with pytest.raises(UsageError, match="repeat"):
        interleaved(entries, log, repeats=0, seed=0, device=CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_peak_memory_is_what_a_contender_holds_at_most():
    class Holding(Fake):
        def answers(self, task, begun, numbers):
            return float(torch.ones(64 * 2**18).sum())

    peaks = [weigh(Entry(Holding([0.0]), (0,), 1), [], CPU) for _ in range(3)]
    assert all(60 <= peak <= 80 for peak in peaks)


def test_subset_is_seeded():
    assert subset(64, 8, 0) == subset(64, 8, 0) != subset(64, 8, 1)
    assert subset(5, 8, 0) == (0, 1, 2, 3, 4)
    with pytest.raises(UsageError, match="at least one cell"):
        subset(64, 0, 0)


# A case as a whole


def result_of(table):
    return Result("benchmark", table, ("case", "contender"), METRICS)


@pytest.mark.parametrize("case", ["knockout", "knockout-question", "swap-last"])
def test_a_case_times_everybody(built, case):
    shape = small("llava15")
    own, other = prompts(shape, 1), prompts(shape, 1, seed=5)
    table, notes = sweep_case(built("llava15"), case, own, other, ["hooks", "nnsight"], rival_cells=2, repeats=2)
    assert notes["n_cells"] == {"knockout": 8}.get(case, 4) and notes["rival_cells"] == 2
    assert notes["receipts"]["receipts"] >= notes["n_cells"]
    assert float(table["forwards"].min()) > 0 and float(table["difference"].max()) <= 1e-4
    assert set(table.loc[table["contender"] == PLAIN, "forwards"]) == {1.0}
    assert set(table.loc[table["contender"] == OURS, "ratio"]) == {1.0}
    ours = table[table["contender"] == OURS]
    assert (ours["of_bound"] * ours["forwards"]).tolist() == pytest.approx([notes["bound"]] * 2)
    assert set(table.loc[table["contender"] != OURS, "of_bound"].dropna()) == set()
    text = findings(result_of(table), [notes])[0]
    assert text.startswith(f"{case} ({notes['n_cells']} cells) costs ") and "rivals scaled from 2" in text
    points = [Point((("cell", number),)) for number in range(notes["n_cells"])]
    vlm = built("llava15")
    edits = cells(vlm, case, vlm.encode(other))
    planned = plan_sweep(vlm, own, points, lambda point: edits[point.cell]).peak_bytes
    assert notes["planned_mib"] * 2**20 == pytest.approx(planned, rel=0.02)
    assert f"foreseen to take {notes['planned_mib']:.3g} MiB" in text


def test_what_is_timed_once_has_no_spread(built):
    shape = small("llava15")
    table, notes = sweep_case(
        built("llava15"), "swap-last", prompts(shape, 1), prompts(shape, 1, seed=5), [], repeats=1
    )
    text = findings(result_of(table), [notes])[0]
    assert text.endswith(" more than before (once)") and " to " not in text.replace("to take", "")
    assert "(" not in overview(result_of(table))["plain forwards"].str.cat()


def test_a_rival_that_does_something_else_is_named_and_not_timed(built):
    shape = small("qwen")
    own, other = prompts(shape, 1), prompts(shape, 1, seed=5)
    rivals = ["transformer_lens", "nnsight"]
    tables, notes = zip(
        *[sweep_case(built("qwen"), case, own, other, rivals, repeats=2) for case in ("knockout-last", "tower")],
        strict=True,
    )
    result = result_of(pd.concat(tables, ignore_index=True))
    lens = result.table[result.table["contender"] == "TransformerLens"]
    assert lens[["seconds", "forwards", "ratio", "memory"]].isna().to_numpy().all()
    cut, tower = (lens[lens["case"] == case].iloc[0] for case in ("knockout-last", "tower"))
    assert cut["difference"] > 0.01 and "does not do it: differs by" in cut["skipped"]
    assert math.isnan(tower["difference"]) and "has no hook" in tower["skipped"]
    assert int(result.table.loc[result.table["contender"] == "nnsight loop", "seconds"].count()) == 4
    assert "TransformerLens does not do it" in findings(result, list(notes))[0]
    shown = overview(result).set_index(["case", "contender"])
    assert shown.loc[("tower", "TransformerLens"), "times ours"] == "-"
    assert {trace.name for trace in bars(result, title="t").data} == {OURS, "nnsight loop", "TransformerLens"}
    # On a logarithmic axis an annotation stands at the logarithm: that of the line at 1 at 0.
    drawn = bars(result, title="t").layout
    assert [(line.y0, line.y1) for line in drawn.shapes] == [(1, 1)] and [each.y for each in drawn.annotations] == [0]


def test_the_extraction_case(built):
    shape = small("llava15")
    table, notes = extraction_case(built("llava15"), prompts(shape, 8), ["hooks", "trace"], rival_cells=1, repeats=2)
    assert notes["n_cells"] == 2 and set(table["contender"]) >= {PLAIN, OURS, "encode and plain forward"}
    assert float(table["seconds"].min()) > 0 and float(table["difference"].max()) <= 1e-4
    assert "of their throughput" in findings(result_of(table), [notes])[0]
    with pytest.raises(UsageError, match="multiple"):
        extraction_case(built("llava15"), prompts(shape, 6), [])


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (3.0, True)])
def test_a_busy_machine_is_said(built, load, busy):
    own, other = prompts(small("llava15"), 1), prompts(small("llava15"), 1, seed=5)
    table, notes = sweep_case(built("llava15"), "swap-last", own, other, [], repeats=1)
    machine = timing.machine() | {"load": load, "cores": 2}
    result = dataclasses.replace(result_of(table), provenance={"machine": machine})
    first, second = findings(result, [notes])
    assert ("others were using" in first) == busy and "1 thread(s) of torch" in first and second.startswith("swap-last")


def test_difference_is_relative_to_the_largest_of_ours():
    assert difference(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0])) == 0.25


# Probes


TINY = Size(n_layers=2, width=320, n_examples=400, n_seeds=2)


def test_the_states_of_the_probes_need_an_mlp_and_are_the_same_again():
    task, again = make_task(TINY), make_task(TINY)
    assert task.states.shape == (2, 400, 320) and torch.equal(task.states, again.states)
    assert not torch.equal(task.states[0], task.states[1])
    parts = [*task.split.train, *task.split.validation, *task.split.test]
    assert sorted(parts) == list(range(400)) and set(task.labels) == set(range(8))
    every, some = Together().answers(task, None, range(4)), Together().answers(task, None, [2])
    assert every.shape == (4,) and some[0] == pytest.approx(every[2], abs=0.02)
    linear = Together().answers(dataclasses.replace(task, recipe=LINEAR), None, range(4))
    assert every.mean() > linear.mean() + 0.2 > 0.4
    with pytest.raises(UsageError, match="so 8 it must be"):
        make_task(dataclasses.replace(TINY, n_classes=4))


def test_the_probes_case_says_how_well_both_read():
    table, notes = probes_case(TINY, rival_cells=3, repeats=2)
    assert notes["n_cells"] == 4 and notes["rival_cells"] == 3
    assert len(table) == 4 and set(table["contender"]) == {OURS, LOOP}
    ratios = table[table["contender"] == LOOP]
    assert (ratios["seconds"] / ratios["ratio"]).tolist() == pytest.approx(
        table[table["contender"] == OURS]["seconds"].tolist()
    )
    found = notes["accuracy"]
    assert found["difference"] == pytest.approx(found[LOOP] - found[OURS])
    # scikit-learn stops early with so few examples; ours must not read less.
    assert found[OURS] > found[LOOP] - 0.005 and found[OURS] > found["ours, a linear probe"] + 0.2
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert probes_case(TINY, rival_cells=1)[1]["accuracy"]["interval"] is None
    with pytest.raises(UsageError, match="at least one repeat"):
        probes_case(TINY, repeats=0)


# The experiment


def test_the_experiment_on_an_embedded_model(tmp_path, capsys):
    options = ["--model", "organism", "--cases", "swap-last", "extraction", "--rivals", "hooks", "--n", 4]
    assert command(benchmark, *options, "--repeats", 2, "--rival-cells", 2, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "PyTorch hooks takes" in said and "times ours" in said
    result = Result.load(tmp_path / "run")
    assert result.axes == ("case", "contender") and len(set(result.table["example"])) == 2
    about = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert about["machine"]["threads"] == 1 and about["machine"]["load"] >= 0
    assert [case["case"] for case in about["cases"]] == ["swap-last", "extraction"]
    assert {"bars.json", "table.json"} <= {path.name for path in (tmp_path / "run" / "figures").iterdir()}


def test_probes_need_no_model_and_no_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_probes, "FULL", TINY)
    options = ["--cases", "probes", "--full", "--rival-cells", 2, "--repeats", 2]
    assert command(benchmark, *options, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "training 4 probes (2 layers x 2 seeds, 400 x 320 states) takes" in said and "theirs minus ours" in said
    result = Result.load(tmp_path / "run")
    assert [metric.name for metric in result.metrics] == ["seconds", "ratio", "memory", "difference"]
    assert result.provenance["model"] is None
    drawn = redraw(tmp_path / "run")
    assert drawn["bars"].layout.yaxis.title.text == "times ours (log scale)"
    assert drawn["bars"].data[0].y[0] == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cases", "nothing"], "case 'nothing' is not known"),
        (["--rivals", "nobody"], "rival 'nobody' is not known"),
        (["--width", "100"], "width is 100"),
        (["--data", "scenes/colour"], "takes noise only"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, capsys, options, said):
    assert command(benchmark, *options, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("dtype", "said"), [("float32", "28.9 GiB"), ("bfloat16", "14.5 GiB")])
def test_a_model_that_does_not_fit_is_refused_before_it_is_made(tmp_path, capsys, monkeypatch, dtype, said):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**33))
    assert command(benchmark, "--full", "--dtype", dtype, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip()
    assert f"7.1 billion weights in {dtype} need {said} with their states, and 8.0 GiB are free on cpu" in error
    assert "\n" not in error and ("bfloat16 needs half" in error) == (dtype == "float32")


def test_repeated_numbers_make_a_model_like_drawn_ones(monkeypatch):
    drawn = build(small("llava15"))
    monkeypatch.setattr(model_shapes, "MANY", 0)
    monkeypatch.setattr(model_shapes, "POOL", 12_345)
    repeated = build(small("llava15"))
    for (name, one), (_, other) in zip(drawn.model.named_parameters(), repeated.model.named_parameters(), strict=True):
        assert one.shape == other.shape and other.isfinite().all(), name
        one, other = one.detach(), other.detach()
        if one.ndim == 2:
            assert other.std().item() == pytest.approx(one.std().item(), rel=0.1), name
            assert len(other.unique(dim=0)) == len(other), f"{name} has equal rows"
    made = prompts(small("llava15"), 2)
    logits = run(repeated, made).last
    assert logits.isfinite().all() and (logits[0] - logits[1]).abs().max() > 0.01, "it depends on the picture"


def test_help_tells_its_options():
    assert_help_tells(benchmark, ("--rival-cells",))


def test_a_skeleton_of_any_size_takes_no_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    vlm = build(geometry("llava15", full=True), device="meta", dtype="bfloat16")
    assert sum(each.numel() for each in vlm.model.parameters()) > 7e9
