"""Removed tokens and moved weights in sweeps: the engine, and answers generated with it, are the reference's."""

import pytest
import torch

from tests.zoo import BACKENDS, FEW_AND_EAGER
from tests.zoo.batches import batch, pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Each, Positions
from vlm_mech.interventions.attention_edits import Remove, Reweight
from vlm_mech.interventions.receipt import ReweightReceipt, WriteReceipt
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import generate, run
from vlm_mech.results.result import Metric
from vlm_mech.sweeps import suffix_attention
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.generation import answers_under
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.sweep import grid, plan_sweep, sweep

pytestmark = pytest.mark.usefixtures("few_queries_at_once")
LAST = ("last", "answer")


def asked(encoded):
    """The question of each example without the prompt's last token, with which it ends in some families."""
    named = [[each for each in encoded.positions("question", row) if each < encoded.n_pos - 1] for row in range(2)]
    return Each(tuple(Positions(tuple(each)) for each in named))


def edits_of(vlm, encoded):
    """Removed tokens and moved weights in every layer, alone and beside other edits."""
    edits, question = [], asked(encoded)
    for layer in vlm.llm_layers:
        edits += [Remove("image", layer), Remove(question, layer, until=layer + 1)]
        edits += [Reweight("last", question, layer, scale=scale) for scale in (0, 0.5, 1)]
        edits.append(Reweight("last", question, (0, layer), scale=0.6, to="last", heads=(0, 2)))
        edits.append(Reweight("question", question, layer, scale=0.3, how="scores"))
    edits.append(Remove(question, 1) & Ablate(Site("llm.mlp_out", 1), "image"))
    edits.append(
        Knockout("last", "all", 1, heads=(3,), keep_self=True)
        & Reweight("last", question, 1, scale=0.7, heads=(0,))
        & Reweight("last", question, 1, scale=0.5, how="scores")
        & Reweight("last", "last", 1, scale=0.9, heads=(0, 1))
    )
    vision = vlm.vision_depth - 1
    edits.append(Reweight("image", "image", vision, scale=0.5, how="scores", stream="vision"))
    edits.append(Reweight("image", "image", vision, scale=0.5, how="scores", stream="vision") & Remove("image", 2))
    return edits


def close(found, expected) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_the_engine_equals_the_reference(family, attn):
    vlm = wrapped(family, attn)
    encoded = vlm.encode(batch(1))
    edits, baseline = edits_of(vlm, encoded), run(vlm, encoded)
    logits, receipts = Engine(vlm, encoded).answers(edits)
    for number, edit in enumerate(edits):
        reference = run(vlm, encoded, edit, baseline=baseline)
        assert close(logits[number], reference.last), edit
        for ours, theirs in zip(sorted(receipts[number], key=str), sorted(reference.receipts, key=str), strict=True):
            assert (type(ours), ours.site, ours.intervention) == (type(theirs), theirs.site, theirs.intervention)
            assert ours.reaches == theirs.reaches
            if not isinstance(ours, WriteReceipt):
                assert ours.n_edges == theirs.n_edges
                assert ours.natural_mass == pytest.approx(theirs.natural_mass, abs=1e-4)
            if isinstance(ours, ReweightReceipt):
                assert ours.mass == pytest.approx(theirs.mass, abs=1e-4)


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_answers_are_those_of_the_reference_token_for_token(family, attn):
    vlm = wrapped(family, attn)
    encoded, every = vlm.encode(batch()), vlm.llm_layers
    question = asked(encoded)
    edits = [
        Remove("image", 0),
        Remove(question, 1),
        Remove(question, 0, until=2),
        Reweight(LAST, question, every, scale=0.1, heads=(1, 2)) & Knockout(LAST, "all", 1, heads=(0,), keep_self=True),
        Reweight("answer", question, every, scale=0.3, how="scores"),
        Reweight(LAST, "last", (0, 3), scale=0.2),
    ]
    said = answers_under(Engine(vlm, encoded), [None, *edits], max_new_tokens=5)[1:]
    for found, edit in zip(said, edits, strict=True):
        expected = generate(vlm, encoded, edit, max_new_tokens=5)
        assert torch.equal(found.ids, expected.ids), edit
        assert {each.site for each in found.receipts} == {each.site for each in expected.receipts}
        assert {type(each) for each in found.receipts} == {type(each) for each in expected.receipts}


@pytest.mark.parametrize("n_cells", [1, 2, 5])
def test_scores_may_be_worked_on_in_pieces_of_any_size(monkeypatch, n_cells):
    vlm = wrapped("llava_next_mistral")
    encoded = vlm.encode(batch(1))
    edits = edits_of(vlm, encoded)
    whole, _ = Engine(vlm, encoded).answers(edits)
    monkeypatch.setattr(suffix_attention, "cells_at_once", lambda per_cell, device: n_cells)
    pieces, _ = Engine(vlm, encoded).answers(edits)
    assert close(pieces, whole)


@pytest.mark.parametrize(
    "edit", [Reweight("last", "question", 1, scale=0.5, to="question"), Reweight("question", "last", 1, scale=0.5)]
)
def test_the_engine_refuses_what_the_reference_refuses_in_the_same_words(edit):
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch(1))
    told = []
    for way in (lambda: run(vlm, encoded, edit), lambda: Engine(vlm, encoded).answers([edit])):
        with pytest.raises(UsageError) as error:
            way()
        told.append(str(error.value))
    assert told[0] == told[1]


def test_tokens_removed_above_are_not_computed_for_each_cell_below():
    """Removal of the picture costs the text after it, from the block on where it is removed."""
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch(1))
    engine = Engine(vlm, encoded)
    (made,) = engine.plans([Remove("image", 2)])
    place = engine.place(made, Remove("image", 2))
    assert (place.entry, place.start) == (2, min(max(row.image) for row in encoded.rows) + 1)


def test_a_sweep_over_both_is_planned_and_run_with_answers_and_spans_of_each_example():
    vlm, pairs = wrapped("llava_clip"), pairs_of(4)
    measure = prob(pairs.answer)
    keys = Each(("image", "question", "image", "question"))
    cells = {
        "removed": lambda point: Remove(keys, point.layer),
        "moved": lambda point: Reweight("last", "image", point.layer, scale=0.5, to=Each(("question",) * 4)),
    }
    for make in cells.values():
        points = grid(layer=vlm.llm_layers)
        planned = plan_sweep(vlm, pairs, points, make, measure, batch=2)
        assert planned.n_cells == len(vlm.llm_layers) and planned.flops > 0
        result = sweep(vlm, pairs, points, make, measure, batch=2, check=len(points))
        assert len(result.table) == 4 * len(points) and isinstance(result.metrics[0], Metric)
