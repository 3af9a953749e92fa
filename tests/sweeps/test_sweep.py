"""The fast engine equals the reference: every family, back end and kind of edit, whatever the grid and the chunking."""

import dataclasses
import functools
import operator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.zoo import ALL_AND_EAGER, FAMILIES, ZOO
from tests.zoo.batches import QUESTIONS, SHAPES, batch, pairs_of, wrapped
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, Words
from vlm_mech.interventions.receipt import KnockoutReceipt
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer
from vlm_mech.interventions.trace import run
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Metric
from vlm_mech.sweeps import suffix_attention
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.measures import Measure, logit_diff, prob
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.sweeps.sweep import grid, plan_sweep, sweep

pytestmark = pytest.mark.usefixtures("few_queries_at_once")

POINTS = ("head_out", "attn_out", "mlp_out", "resid_pre")


@functools.cache
def encodings(family: str, attn: str = "sdpa"):
    vlm = wrapped(family, attn)
    return vlm.encode(batch(1)), vlm.encode(batch(7))


def edits_of(vlm, donors):
    """Every kind of intervention at every layer, alone and composed, in decoder, projector and tower."""
    edits = [Ablate(Site("projector.out"), "image"), Replace(Site("projector.in"), "image", source=donors)]
    for layer in vlm.llm_layers:
        edits += [Replace(Site("llm.resid_post", layer), span, source=donors) for span in ("image", "question", "all")]
        edits += [Replace(Site("llm.resid_pre", layer), span, source=donors) for span in ("image", "last")]
        edits += [Ablate(Site(f"llm.{point}", layer), "question") for point in POINTS]
        edits += [Ablate(Site(f"llm.{point}", layer), "image", to="mean") for point in POINTS]
        edits.append(Ablate(Site("llm.head_out", layer), "last", heads=(1,)))
        edits.append(Steer(Site("llm.resid_post", layer), "last", vector=torch.ones(32)))
        edits.append(Knockout("last", "all", layer, keep_self=True))
        edits.append(Knockout("question", "all", range(max(0, layer - 1), layer + 1), heads=(0, 2), keep_self=True))
        edits.append(Knockout("image", "all", layer, keep_self=True))
        edits.append(
            Knockout("last", "all", layer, keep_self=True)
            & Replace(Site("llm.resid_post", 1), "image", source=donors)
            & Ablate(Site("llm.mlp_out", 2), "question")
        )
    for layer in vlm.vision_layers:
        edits.append(Replace(Site("vision.resid_post", layer), "image", source=donors))
        edits.append(Knockout("image", "image", layer, stream="vision", keep_self=True))
        edits.append(Ablate(Site("vision.mlp_out", layer), "image") & Knockout("last", "all", 1, keep_self=True))
    return edits


def close(found, expected) -> bool:
    scale = max(1.0, expected.abs().max().item())
    return bool((found - expected).abs().max() <= 1e-5 * scale)


@pytest.mark.parametrize(("family", "attn"), ALL_AND_EAGER)
def test_the_engine_equals_the_reference(family, attn):
    vlm = wrapped(family, attn)
    encoded, donors = encodings(family, attn)
    edits = edits_of(vlm, donors)
    baseline = run(vlm, encoded)
    logits, receipts = Engine(vlm, encoded).answers(edits)
    for number, edit in enumerate(edits):
        reference = run(vlm, encoded, edit, baseline=baseline)
        assert close(logits[number], reference.last), edit
        assert len(receipts[number]) == len(reference.receipts)
        for ours, theirs in zip(sorted(receipts[number], key=str), sorted(reference.receipts, key=str), strict=True):
            assert (ours.site, ours.intervention, ours.reaches) == (theirs.site, theirs.intervention, theirs.reaches)
            if isinstance(ours, KnockoutReceipt):
                assert ours.n_edges == theirs.n_edges and ours.blocked_mass == 0.0
                assert ours.natural_mass == pytest.approx(theirs.natural_mass, abs=1e-4)
            else:
                assert ours.n_cells == theirs.n_cells and ours.change == pytest.approx(theirs.change, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_pass_is_the_unedited_run(family):
    vlm = wrapped(family)
    encoded, _ = encodings(family)
    assert close(record(vlm, encoded).logits, run(vlm, encoded).last)


@pytest.mark.parametrize("n_cells", [1, 2, 5])
def test_scores_may_be_worked_on_in_pieces_of_any_size(monkeypatch, n_cells):
    vlm = wrapped("llava_next_mistral")
    encoded, donors = encodings("llava_next_mistral")
    edits = []
    for layer in vlm.llm_layers:
        # Groups of cells that do not follow one another, and groups that a piece cuts through.
        edits += [Knockout("question", "image", (layer, 3)), Knockout("question", "all", 3, keep_self=True)]
        edits.append(Replace(Site("llm.resid_post", layer), "question", source=donors))
    whole, proofs = Engine(vlm, encoded).answers(edits)
    sizes = []
    monkeypatch.setattr(suffix_attention, "cells_at_once", lambda per_cell, device: sizes.append(per_cell) or n_cells)
    pieces, again = Engine(vlm, encoded).answers(edits)
    assert sizes and close(pieces, whole)
    baseline = run(vlm, encoded)
    for number, edit in enumerate(edits):
        reference = run(vlm, encoded, edit, baseline=baseline)
        assert close(pieces[number], reference.last)
        for ours, theirs in zip(again[number], proofs[number], strict=True):
            assert (ours.site, ours.intervention) == (theirs.site, theirs.intervention)
            if isinstance(ours, KnockoutReceipt):
                assert ours.natural_mass == pytest.approx(theirs.natural_mass, abs=1e-6)
        natural = {each.site: each.natural_mass for each in reference.receipts if isinstance(each, KnockoutReceipt)}
        found = {each.site: each.natural_mass for each in again[number] if isinstance(each, KnockoutReceipt)}
        assert found == pytest.approx(natural, abs=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["llava_clip", "llava_next_mistral", "gemma3", "paligemma"])
def test_queries_may_be_worked_on_in_parts_whether_a_prefix_is_shared_or_copied(monkeypatch, family, shared):
    monkeypatch.setattr(suffix_attention, "QUERIES", 3)
    monkeypatch.setattr(suffix_attention, "shares_prefix", lambda query, n_groups: shared)
    vlm, (encoded, donors) = wrapped(family), encodings(family)
    edits = []
    for layer in vlm.llm_layers:
        edits += [Ablate(Site("llm.resid_pre", layer), "image"), Ablate(Site("llm.mlp_out", layer), "question")]
        edits.append(Replace(Site("llm.resid_pre", layer), "question", source=donors))
    logits, _ = Engine(vlm, encoded).answers(edits)
    for number, edit in enumerate(edits):
        assert close(logits[number], run(vlm, encoded, edit).last), edit


def rows_seen(vlm, encoded, edits):
    """Rows that went through each block, and the answers."""
    engine, seen = Engine(vlm, encoded), [[] for _ in vlm.llm_layers]
    stack = vlm.model.get_submodule(vlm.family.llm.path)
    hooks = [
        block.register_forward_pre_hook(lambda _, given, layer=layer: seen[layer].append(len(given[0])))
        for layer, block in enumerate(stack)
    ]
    found = engine.answers(edits)
    for hook in hooks:
        hook.remove()
    return [sum(each) // len(encoded) for each in seen], found


def test_cells_that_lose_the_same_edges_are_one_row_until_they_part():
    vlm = wrapped("llava_clip")
    encoded, _ = encodings("llava_clip")
    # Alike in block 0; the second and third part in block 1, and a write is never shared.
    cuts = [Knockout("question", "image", layers) for layers in (0, (0, 1), (0, 1, 2), (0, 1, 2), (1, 2))]
    edits = [*cuts, Ablate(Site("llm.mlp_out", 0), "question"), cuts[0] & Ablate(Site("llm.attn_out", 3), "last")]
    rows, (logits, receipts) = rows_seen(vlm, encoded, edits)
    assert rows == [3, 5, 6, 6]
    for number, edit in enumerate(edits):
        reference = run(vlm, encoded, edit)
        assert close(logits[number], reference.last), edit
        assert [each.intervention for each in receipts[number] if isinstance(each, KnockoutReceipt)] == [
            each.intervention for each in reference.receipts if isinstance(each, KnockoutReceipt)
        ]
    assert torch.equal(logits[2], logits[3])


@pytest.mark.parametrize("factor", [10.0, 1000.0])
def test_edges_that_had_all_of_the_attention_can_be_cut(factor):
    """Scores so far apart that what stays is nothing beside what goes, in single precision too."""
    model, processor = ZOO["llava_clip"]("sdpa", 0)
    vlm = VLM(model, processor, check=False)
    with torch.no_grad():
        for block in vlm.model.get_submodule(vlm.family.llm.path):
            block.self_attn.q_proj.weight.mul_(factor)
    encoded = vlm.encode(batch(1))
    edits = [Knockout("question", key, layer, keep_self=True) for key in ("image", "all") for layer in vlm.llm_layers]
    logits, receipts = Engine(vlm, encoded).answers(edits)
    masses = []
    for number, edit in enumerate(edits):
        reference = run(vlm, encoded, edit)
        assert (logits[number] - reference.last).abs().max() <= 1e-5, edit
        assert receipts[number][0].natural_mass == pytest.approx(reference.receipts[0].natural_mass, abs=1e-5)
        masses.append(receipts[number][0].natural_mass)
    assert max(masses) > 0.8, "somewhere hardly anything stays"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl", "paligemma"])
def test_batches_without_padding_equal_the_reference_too(family, attn):
    """Attention is then plainly causal, without a mask: whole rows go through the model's own kernel."""
    vlm = wrapped(family, attn)
    encoded, donors = (
        vlm.encode([Prompt(QUESTIONS[0], picture(seed + number, *SHAPES["wide"])) for number in range(2)])
        for seed in (1, 7)
    )
    assert (encoded.inputs["attention_mask"] == 1).all()
    edits = [Ablate(Site("vision.mlp_out", layer), "image") for layer in vlm.vision_layers[:3]]
    edits += [Ablate(Site("projector.out"), "image") & Knockout("last", "image", 2)]
    edits += [Ablate(Site("llm.mlp_out", layer), "all") for layer in vlm.llm_layers]
    edits += [Replace(Site("llm.resid_pre", layer), "image", source=donors) for layer in vlm.llm_layers]
    logits, _ = Engine(vlm, encoded).answers(edits)
    for found, edit in zip(logits, edits, strict=True):
        assert close(found, run(vlm, encoded, edit).last), edit


def test_a_soft_cap_on_the_logits_is_that_of_the_model():
    model, processor = ZOO["paligemma"]("sdpa", 0)
    model.config.get_text_config().final_logit_softcapping = 2.0
    vlm = VLM(model, processor, name="capped", check=False)
    encoded = vlm.encode(batch(1))
    edit = Ablate(Site("llm.mlp_out", 2), "question")
    engine = Engine(vlm, encoded)
    assert close(engine.baseline, run(vlm, encoded).last) and engine.baseline.abs().max() < 2.0
    assert close(engine.answers([edit])[0][0], run(vlm, encoded, edit).last)


SPANS = ["image", "question", "last", "all", ("question", "last")]


@st.composite
def interventions(draw, spans=SPANS):
    """An edit; those with states of another run have no source yet."""
    layer = draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["replace", "ablate", "knockout"]))
    if kind == "replace":
        return Replace(
            Site(f"llm.{draw(st.sampled_from(['resid_pre', 'resid_post']))}", layer),
            draw(st.sampled_from(spans)),
            source=(),
        )
    if kind == "ablate":
        point = draw(st.sampled_from([*POINTS, "resid_post"]))
        return Ablate(Site(f"llm.{point}", layer), draw(st.sampled_from(spans)))
    heads = draw(st.sampled_from([None, (0,), (1, 3)]))
    last = draw(st.integers(layer, 3))
    return Knockout(draw(st.sampled_from(spans)), "all", range(layer, last + 1), heads=heads, keep_self=True)


def with_source(drawn, donors):
    """Edits of one or several parts each, with the states of these runs."""
    return [
        functools.reduce(
            operator.and_,
            [dataclasses.replace(each, source=donors) if isinstance(each, Replace) else each for each in parts],
        )
        for parts in drawn
    ]


@given(
    st.sampled_from(["llava_siglip_mistral", "qwen3_vl", "gemma3", "paligemma", "blip2", "llava_next_mistral"]),
    st.lists(st.lists(interventions(), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 7),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_random_grids_equal_the_reference_whatever_the_chunking(family, drawn, max_cells):
    vlm = wrapped(family)
    encoded, donors = encodings(family)
    edits = with_source(drawn, donors)
    baseline = run(vlm, encoded)
    logits, _ = Engine(vlm, encoded).answers(edits, max_cells=max_cells)
    for found, edit in zip(logits, edits, strict=True):
        assert close(found, run(vlm, encoded, edit, baseline=baseline).last), edit


def test_a_sweep_is_the_same_by_both_engines_and_any_batch():
    vlm, pairs = wrapped("llava_clip"), pairs_of(5)
    points = grid(layer=range(4), span=("image", "question", "last"))

    def swap(point):
        return Replace(Site("llm.resid_post", point.layer), point.span, source=pairs.counterfactual)

    measures = [logit_diff(pairs.answer, pairs.counterfactual_answer), prob(pairs.answer)]
    results = [
        sweep(vlm, pairs, points, swap, measures, engine="trace", batch=2),
        sweep(vlm, pairs, points, swap, measures, batch=2),
        sweep(vlm, pairs, points, swap, measures, batch=5, max_cells=3, check=12),
    ]
    first = results[0].table
    for result in results:
        assert list(result.table.columns) == list(first.columns) and len(result.table) == 5 * 12
        ordered = result.table.set_index(["example", "layer", "span"]).sort_index()
        expected = first.set_index(["example", "layer", "span"]).sort_index()
        for column in ("logit_diff", "logit_diff_baseline", "prob", "prob_baseline"):
            assert ordered[column].to_numpy() == pytest.approx(expected[column].to_numpy(), abs=2e-5)
        assert result.provenance["receipts"]["writes"] > 0
    assert 0 <= results[2].provenance["largest_disagreement"] <= 1e-5
    assert results[0].summary("logit_diff")["n"].eq(5).all()


def test_ablation_over_the_data_does_not_depend_on_the_batch():
    vlm, pairs = wrapped("llava_clip"), pairs_of(4)
    points = grid(layer=(1, 2))

    def ablate(point):
        return Ablate(Site("llm.mlp_out", point.layer), "question", to="mean")

    measure = prob(pairs.answer)
    one, other = (sweep(vlm, pairs, points, ablate, measure, batch=size).table for size in (1, 4))
    one, other = (table.sort_values(["example", "layer"])["prob"].to_numpy() for table in (one, other))
    assert one == pytest.approx(other, abs=1e-5)


def test_spans_of_each_example_are_taken_in_step():
    vlm, pairs = wrapped("llava_clip"), pairs_of(3)
    each = Each((Words("circle"), Words("star"), Words("circle")))
    points = grid(layer=(1,))
    tables = [
        sweep(
            vlm,
            pairs,
            points,
            lambda point: Ablate(Site("llm.resid_post", point.layer), each),
            prob(pairs.answer),
            batch=size,
        )
        for size in (1, 3)
    ]
    assert tables[0].table["prob"].to_numpy() == pytest.approx(tables[1].table["prob"].to_numpy(), abs=1e-5)


def test_a_wrong_engine_is_caught_by_the_reference(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    monkeypatch.setattr("vlm_mech.sweeps.branching._entry", lambda site, n_added: min(3, site.layer + 1))
    with pytest.raises((WorkError, UsageError)):
        sweep(
            vlm, pairs, grid(layer=range(4)), lambda point: Ablate(Site("llm.mlp_out", point.layer), "question"),
            prob(pairs.answer), check=4,
        )  # fmt: skip


def test_wrong_sweeps_are_one_line():
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    points = grid(layer=(1,))

    def cut(point):
        return Knockout("last", "image", point.layer)

    with pytest.raises(UsageError, match="a grid needs values on every axis; none on: layer"):
        grid(layer=())
    with pytest.raises(UsageError, match="engine 'slow' is not known"):
        sweep(vlm, pairs, points, cut, prob(pairs.answer), engine="slow")
    with pytest.raises(UsageError, match="prob has 1 answers for 2 prompts"):
        sweep(vlm, pairs, points, cut, prob(["red"]))
    swap = Replace(Site("llm.resid_post", 1), "last", source=pairs.counterfactual[:1])
    with pytest.raises(UsageError, match="a source has 1 prompts for 2 examples"):
        sweep(vlm, pairs, points, lambda point: swap, prob(pairs.answer))
    with pytest.raises(UsageError, match="nothing to attend to; narrow its keys"):
        sweep(vlm, pairs, points, lambda point: Knockout("last", "all", 1), prob(pairs.answer))
    with pytest.raises(UsageError, match="cuts no edge"):
        sweep(vlm, pairs, points, lambda point: Knockout("image", "last", 1), prob(pairs.answer))
    with pytest.raises(AttributeError, match="the grid has no axis 'span'; it has layer"):
        sweep(vlm, pairs, points, lambda point: Knockout(point.span, "image", 1), prob(pairs.answer))
    with pytest.raises(UsageError, match="needs prompts, points of a grid and a measure"):
        sweep(vlm, [], points, cut, [])


@pytest.mark.usefixtures("untyped")
def test_arguments_that_are_none_are_refused_where_they_are_given():
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    points, edits = grid(layer=(1,)), [Knockout("last", "image", 1)]

    def cut(point):
        return Knockout("last", "image", point.layer)

    for measure in (lambda logits: logits.amax(-1), [prob(pairs.answer), torch.mean]):
        with pytest.raises(UsageError, match=r"measure is a function; logit_diff.* or a Measure is needed, such as"):
            sweep(vlm, pairs, points, cut, measure)
    with pytest.raises(UsageError, match="measure is 'prob'; logit_diff"):
        sweep(vlm, pairs, points, cut, "prob")
    for edit, what in ((edits, "list"), (edits[0], "Knockout")):
        for call, more in ((sweep, [prob(pairs.answer)]), (plan_sweep, [])):
            with pytest.raises(UsageError, match=f"of a sweep is a {what}; a function of a point is needed"):
                call(vlm, pairs, points, edit, *more)
    with pytest.raises(UsageError, match="a list of 1 interventions was given; a & b does both"):
        sweep(vlm, pairs, points, lambda point: edits, prob(pairs.answer))
    with pytest.raises(UsageError, match="is not an intervention"):
        sweep(vlm, pairs, points, lambda point: None, prob(pairs.answer))
    with pytest.raises(UsageError, match="a Measure is a Metric"):
        Measure("entropy", torch.mean)
    with pytest.raises(UsageError, match="prob is given the answer 'no'; a list is needed, one an example"):
        sweep(vlm, pairs, points, cut, prob("no"))
    for span in ("image", 3):
        with pytest.raises(UsageError, match=f"axis 'span' is {span!r}; a list of values is needed"):
            grid(layer=(1,), span=span)


def test_measures_of_ones_own():
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    entropy = Measure(
        Metric("entropy", "nats", "entropy of the next token"),
        lambda logits: torch.distributions.Categorical(logits=logits.float()).entropy(),
    )
    table = sweep(vlm, [Prompt(pair.question, pair.image) for pair in pairs], grid(layer=(0, 2)),
                  lambda point: Knockout("last", "image", point.layer), entropy).table  # fmt: skip
    assert (table["entropy"] > 0).all() and (table["entropy"] != table["entropy_baseline"]).all()


@pytest.mark.parametrize("ending", ["_baseline", "_position", "_tokens", "_other_tokens"])
def test_a_measure_is_not_called_like_a_column_beside_another(ending):
    """Its numbers would be taken for counts of tokens, and lose their fractions."""
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    mine = Measure(Metric(f"prob{ending}", "logits", "mine"), lambda logits: logits[:, 0])
    with pytest.raises(
        UsageError, match=f"a measure is called 'prob{ending}', as is a column beside 'prob'; rename it"
    ):
        sweep(
            vlm,
            pairs,
            grid(layer=(0,)),
            lambda point: Ablate(Site("llm.mlp_out", 0), "last"),
            [prob(pairs.answer), mine],
        )
    alone = sweep(vlm, pairs, grid(layer=(0,)), lambda point: Ablate(Site("llm.mlp_out", 0), "last"), mine)
    assert alone.table[f"prob{ending}"].dtype.kind == "f"
