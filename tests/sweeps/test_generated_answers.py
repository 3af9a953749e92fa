"""The cost of answers that are generated beside a sweep is foreseen: passes, operations and memory of a real run."""

import dataclasses
import functools
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import knockout, layer_swap
from tests.helpers import command
from tests.zoo.batches import pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.benchmark.model_shapes import QUESTION, build, geometry, noise
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import TooLargeError
from vlm_mech.methods.knockout.data import scan_of
from vlm_mech.methods.knockout.study import knock_out, plan_knockout
from vlm_mech.methods.layer_swap.study import plan_swap, swap_states
from vlm_mech.results.result import Result
from vlm_mech.sweeps.generated_answers import GeneratedPart
from vlm_mech.sweeps.memory import peak_memory

SITES = tuple(Site("llm.resid_post", layer) for layer in range(4))
PART = GeneratedPart(n_cells=5, max_new_tokens=4)


class Decoder:
    """Counts the decoder's passes by how many positions they compute, and operations, while something runs."""

    def __init__(self, vlm):
        self.module, self.passes, self.counter = vlm.model.get_submodule(vlm.family.decoder), Counter(), None

    def __enter__(self):
        self.hook = self.module.register_forward_pre_hook(self.count, with_kwargs=True)
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()
        return self

    def __exit__(self, *error):
        self.hook.remove()
        self.counter.__exit__(*error)

    def count(self, module, arguments, options):
        self.passes[options["inputs_embeds"].shape[1] if options.get("inputs_embeds") is not None else 1] += 1

    @property
    def flops(self):
        return self.counter.get_total_flops()


@functools.cache
def wide():
    """A model whose products outweigh what is counted roughly, and three pairs."""
    shape = dataclasses.replace(geometry("llava15", width=256), n_layers=4)
    made = [Pair(str(at), noise(at, *shape.picture), noise(at + 9, *shape.picture), QUESTION, "red", "blue")
            for at in range(3)]  # fmt: skip
    vlm = build(shape, attn="eager")
    # How logits are read out is found once, in a pass of its own.
    assert vlm.readout.cap is None
    # Every answer has all its tokens.
    vlm.model.generation_config.eos_token_id = None
    return vlm, Pairs("noise", tuple(made))


def swapped(vlm, pairs, part):
    with Decoder(vlm) as seen:
        swap_states(vlm, pairs, SITES, ("image", "last"), only_correct=False, part=part)
    return seen, plan_swap(vlm, pairs, SITES, ("image", "last"), part=part)


def cut(vlm, pairs, part):
    scan = scan_of(vlm, pairs, {}, ("last<-image", "question<-image"))
    with Decoder(vlm) as seen:
        knock_out(vlm, pairs, scan, only_correct=False, part=part)
    return seen, plan_knockout(vlm, pairs, scan, part=part)


@pytest.mark.parametrize(("method", "n_read"), [(swapped, 1), pytest.param(cut, 0, marks=pytest.mark.long)])
@pytest.mark.parametrize("check", [pytest.param(0, marks=pytest.mark.long), 1])
def test_passes_and_operations_of_what_is_generated_are_foreseen(method, n_read, check):
    """torch counts no fused attention, hence eager."""
    vlm, pairs = wide()
    part = dataclasses.replace(PART, check=check)
    (seen, plan), (without, plain) = method(vlm, pairs, part), method(vlm, pairs, None)
    found = seen.passes - without.passes
    n_prompt, n_steps = vlm.encode(pairs.base).n_pos, PART.max_new_tokens - 1
    # A cell of the sweep is checked: by its answers, and by a pass that holds its edit against none.
    whole = n_read * check + 2 * check + (method is cut)
    # All cells take a step together; those of each direction of a swap.
    assert found[1] == n_steps * ((2 if method is swapped else 1) + check)
    assert found[n_prompt] == whole and sum(found.values()) == found[1] + whole
    assert plan.flops - plain.flops == pytest.approx(seen.flops - without.flops, rel=0.05)
    assert plan.forwards - plain.forwards == pytest.approx(plan.generated_forwards)
    per_pass = plain.flops / plain.forwards
    assert plan.generated_forwards * per_pass == pytest.approx(plan.flops - plain.flops, rel=1e-3)
    assert (plan.n_generated, plan.n_cells) == (5, plain.n_cells)
    for text in ("5 of the cells and without an edit", "4 new tokens", f"a loop over cells: {round(plan.in_a_loop)}"):
        assert text in str(plan)
    assert plan.in_a_loop == pytest.approx(plain.in_a_loop + plan.looped_forwards)
    assert plan.looped_forwards > 1.5 * plan.generated_forwards


def test_a_plan_grows_with_the_examples():
    vlm, pairs = wrapped("llava_clip"), pairs_of(6)
    one, both = (plan_swap(vlm, some, SITES, ("last",), part=PART, batch=3) for some in (pairs[:3], pairs))
    assert both.flops == pytest.approx(2 * one.flops, rel=1e-6) and both.forwards == one.forwards
    assert both.n_generated == one.n_generated == 5


@pytest.fixture(scope="module")
def long():
    """576 image tokens and enough width for tensors to count, small enough to run; and two pairs."""
    shape = dataclasses.replace(geometry("llava15", width=256), n_layers=5)
    made = [
        Pair(str(at), noise(at, *shape.picture), noise(at + 9, *shape.picture), QUESTION, "red", "blue")
        for at in range(2)
    ]
    vlm = build(shape)
    # How logits are read out is found once, in a pass of its own.
    assert vlm.readout.cap is None
    return vlm, Pairs("noise", tuple(made))


def test_the_peak_of_what_is_generated_is_foreseen_and_kept_to_a_budget(long):
    vlm, pairs = long
    # At the last token next to nothing is computed anew, so that the peak is that of the generation.
    what = (vlm, pairs, [Site("llm.resid_post", 4)], ("last",))
    part = GeneratedPart(n_cells=1, max_new_tokens=24)
    plan = plan_swap(*what, directions=("noising",), part=part)
    with peak_memory(torch.device("cpu")) as peak:
        swap_states(*what, directions=("noising",), only_correct=False, part=part)
    assert 0.8 <= plan.peak_bytes / peak.bytes <= 1.2
    halved = plan_swap(*what, directions=("noising",), part=part, memory=int(1.4 * plan.peak_bytes))
    assert halved.batch == 1
    with pytest.raises(TooLargeError, match="with the answers that are generated; the budget is"):
        plan_swap(*what, directions=("noising",), part=part, memory=int(0.72 * plan.peak_bytes))


@pytest.mark.parametrize("experiment", [layer_swap, knockout])
def test_a_dry_run_tells_what_is_generated(experiment, capsys):
    given = ("--n", "4", "--outcome", "generation", "--generated-cells", "3", "--new-tokens", "5", "--dry-run")
    assert command(experiment, *given) == 0
    assert "answers generated in 3 of the cells" in capsys.readouterr().out
    assert command(experiment, "--n", "4", "--dry-run") == 0
    assert "generated" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("experiment", "said"), [(layer_swap, ("edited runs: ",)), (knockout, ("edited runs (edge): ", "(control of"))]
)
def test_a_report_shows_what_is_said_and_tells_how_often_logits_agree(experiment, said, tmp_path):
    given = ("--model", "organism-phrases", "--data", "scenes/phrases", "--n", "8", "--new-tokens", "6")
    assert command(experiment, *given, "--outcome", "generation", "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    shown = page.partition("<h2>Generated answers</h2>")[2].partition("</table>")[0]
    (first, *_) = Result.load(tmp_path / "out").table.dropna(subset=["says", "flip"])["text_baseline"]
    assert 9 <= shown.count("<tr") <= 21 and "whose answer" in shown and f"<td>{first}</td>" in shown
    assert [text for text in said if text not in page] == []
