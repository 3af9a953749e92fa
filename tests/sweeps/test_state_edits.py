"""The fast engine has the states of other sites, of the pass itself and of subspaces as the reference has them."""

import functools

import pytest
import torch

from tests.sweeps.test_schedule import middling
from tests.zoo import BACKENDS, FEW_AND_EAGER
from tests.zoo.batches import QUESTIONS, batch, pairs_of, wrapped
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.specification import Knockout, Replace
from vlm_mech.interventions.state_edits import Project, frozen
from vlm_mech.interventions.trace import generate, run
from vlm_mech.sweeps.branching import branch_of
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.generation import answers_under
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.memory import peak_memory
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.schedule import forecast
from vlm_mech.sweeps.sweep import grid, plan_sweep, sweep

pytestmark = pytest.mark.usefixtures("few_queries_at_once")
PLENTY = 10**12


def rows(k, width, seed=0):
    return torch.randn(k, width, generator=torch.Generator().manual_seed(seed))


def edits_of(vlm, donors):
    """Every kind of state edit that is new here, in decoder and tower, alone and with others."""
    last, post, pre = vlm.n_layers("llm") - 1, functools.partial(Site, "llm.resid_post"), Site("llm.resid_pre", 1)
    heads, mlp, seen = Site("llm.head_out", 1), Site("llm.mlp_out", 2), Site("vision.resid_post", 1)
    # Gemma's window ends before the picture, so that a cut would cut nothing.
    cut = Knockout("last", "all" if vlm.name == "gemma3" else "image", 2, keep_self=True)
    return [
        Replace((post(0), post(1)), "image", source_site=(post(2), post(last))),
        Replace(post(0), "image", source=donors, source_site=post(2)),
        Replace(pre, "all", source=donors, source_site=post(2)),
        Replace(pre, "question", source_site=post(2)) & cut,
        Replace(Site("llm.attn_out", 2), "last", source_site=Site("llm.mlp_out", 1)),
        frozen("image", 0, n_layers=last + 1),
        frozen(("image", "question"), last - 1, n_layers=last + 1),
        Replace(post(0), "image", source=donors, subspace=rows(5, vlm.width(pre))),
        Replace(post(1), "all", source=donors, subspace=rows(5, vlm.width(pre))),
        Replace(heads, "last", source=donors, heads=(1,), subspace=rows(2, vlm.width(heads) // vlm.n_heads("llm"))),
        Project(post(1), "image", basis=rows(5, vlm.width(pre)), center=torch.ones(vlm.width(pre))),
        Project(mlp, "last", basis=rows(5, vlm.width(mlp)), onto=True) & Replace(post(0), "image", source=donors),
        Replace(seen, "image", source_site=Site("vision.resid_pre", 1)),
        Project(seen, "image", basis=rows(5, vlm.width(seen))),
    ]


def close(found, expected) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_the_engine_equals_the_reference(family, attn):
    vlm = wrapped(family, attn)
    encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
    edits, baseline = edits_of(vlm, donors), run(vlm, encoded)
    logits, receipts = Engine(vlm, encoded).answers(edits)
    for number, edit in enumerate(edits):
        reference = run(vlm, encoded, edit, baseline=baseline)
        assert close(logits[number], reference.last), edit
        assert len(receipts[number]) == len(reference.receipts)
        for ours, theirs in zip(sorted(receipts[number], key=str), sorted(reference.receipts, key=str), strict=True):
            assert (ours.site, ours.intervention, ours.reaches) == (theirs.site, theirs.intervention, theirs.reaches)
            if hasattr(ours, "change"):
                assert ours.n_cells == theirs.n_cells and ours.change == pytest.approx(theirs.change, rel=1e-3)


@pytest.mark.parametrize("more", [{"source_site": Site("llm.resid_post", 2)}, {"subspace": rows(31, 32)}])
def test_keys_and_values_of_the_other_run_are_not_taken_where_states_are_another_sites_or_a_part(more):
    """All image positions would be as in the other run if its states were put whole and at their own site."""
    vlm = wrapped("llava_clip")
    # Of one length, so that the positions are an unbroken range in both.
    asked = [[Prompt(QUESTIONS[0], picture(seed + each)) for each in range(2)] for seed in (1, 7)]
    encoded, donors = map(vlm.encode, asked)
    site = Site("llm.resid_post", 0)
    plain, moved = Replace(site, "image", source=donors), Replace(site, "image", source=donors, **more)
    named = Replace(site, "image", source=donors, source_site=site)
    engine = Engine(vlm, encoded)
    taken = [
        branch_of(engine.clean, made, edit, lambda source: source).donor
        for made, edit in zip(engine.plans([plain, named, moved]), [plain, named, moved], strict=True)
    ]
    assert taken == [donors, donors, None]
    (first, second, third), _ = engine.answers([plain, named, moved])
    assert torch.equal(first, second) and close(first, run(vlm, encoded, plain).last)
    assert close(third, run(vlm, encoded, moved).last) and not close(third, first), "the shortcut would be seen"


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_answers_are_those_of_the_reference_token_for_token(family, attn):
    vlm = wrapped(family, attn)
    encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
    edits = edits_of(vlm, donors)[::3]
    found = answers_under(Engine(vlm, encoded), edits, max_new_tokens=4)
    for edit, said in zip(edits, found, strict=True):
        assert torch.equal(said.ids, generate(vlm, encoded, edit, max_new_tokens=4).ids), edit


def test_own_states_of_an_answer_are_taken_over_each_of_several_answers():
    vlm = wrapped("llava_clip")
    encoded = followed(vlm.encode(batch(1)), [[(8, 9, 10), (9, 10)], [(10, 9), (12, 13, 8)]])
    spans = ("image", "answer", ("last", "answer"), "all")
    edits = [Replace(Site("llm.resid_post", 1), span, source_site=Site("llm.resid_post", 2)) for span in spans]
    edits += [Replace(Site("llm.attn_out", 1), span, source_site=Site("llm.mlp_out", 0)) for span in spans]
    edits += [Project(Site("llm.resid_post", 1), span, basis=rows(5, 32)) for span in spans]
    keep = lambda _, logits: logits  # noqa: E731 - all that is read
    engine, reference = Engine(vlm, encoded), Reference(vlm, encoded)
    fast, slow = (each.answers(edits, keep=keep)[0] for each in (engine, reference))
    present = torch.tensor(encoded.read_places).bool()
    for number, edit in enumerate(edits):
        assert close(fast[number][present], slow[number][present]), edit
        assert not close(fast[number][present], engine.reads[present]), edit


def of_kind(kind, donors):
    own, width, layers = functools.partial(Site, "llm.resid_post"), 256, (0, 1, 2)
    return {
        "own states": [Replace(own(layer), "image", source_site=own(4)) for layer in layers],
        "own parts": [
            Replace(Site("llm.attn_out", layer), "image", source_site=Site("llm.mlp_out", 3)) for layer in layers
        ],
        "exchanged": [Replace(own(layer), "image", source=donors, source_site=own(4)) for layer in layers],
        "subspace": [Replace(own(layer), "image", source=donors, subspace=rows(8, width)) for layer in layers],
        "project": [Project(own(layer), "image", basis=rows(8, width)) for layer in layers],
    }[kind]


@pytest.mark.parametrize("kind", ["own states", "own parts", "exchanged", "subspace", "project"])
def test_the_predicted_peak_is_within_20_percent_of_the_measured_one(kind):
    vlm, encoded, donors = middling()
    edits = of_kind(kind, donors)
    foreseen = forecast(vlm, encoded, edits, budget=PLENTY)
    with peak_memory(torch.device("cpu")) as peak:
        Engine(vlm, encoded, PLENTY).answers(edits)
    assert 0.8 <= foreseen.peak_bytes / peak.bytes <= 1.2


def test_own_residual_states_cost_no_pass_of_their_own():
    vlm, encoded, donors = middling()
    own, exchanged, parts = (
        forecast(vlm, encoded, of_kind(kind, donors), budget=PLENTY)
        for kind in ("own states", "exchanged", "own parts")
    )
    assert exchanged.forwards == pytest.approx(own.forwards + 1) and parts.forwards > own.forwards


def test_a_sweep_of_several_batches_takes_own_states_batch_by_batch():
    vlm, pairs = wrapped("llava_clip"), pairs_of(5)
    points = grid(layer=[0, 1], late=[2, 3])

    def edit(point):
        back = Replace(Site("llm.resid_post", point.layer), "image", source_site=Site("llm.resid_post", point.late))
        swap = Replace(
            Site("llm.resid_pre", point.late), "last", source=pairs.counterfactual, source_site=Site("llm.resid_pre", 1)
        )
        return back & swap & Project(Site("llm.mlp_out", point.layer), "question", basis=rows(3, 32))

    whole, fast, slow = (
        sweep(vlm, pairs, points, edit, prob(pairs.answer), batch=size, engine=engine)
        for size, engine in ((5, "trace"), (2, "fast"), (2, "trace"))
    )
    expected, *others = (each.table.sort_values(["example", "layer", "late"])["prob"] for each in (whole, fast, slow))
    for found in others:
        assert abs(found.to_numpy() - expected.to_numpy()).max() < 1e-6
    assert (whole.table["prob"] - whole.table["prob_baseline"]).abs().min() > 0
    assert plan_sweep(vlm, pairs, points, edit, batch=2).n_cells == 4
    assert fast.plan["n_cells"] == 4
