"""Subspaces that are trained: the pass they are trained in, what they are trained and told on, and the controls."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from tests.zoo import FEW
from tests.zoo.batches import batch, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Cells
from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import run
from vlm_mech.methods.das.das import train_das
from vlm_mech.methods.das.data import Interchange, parts_of
from vlm_mech.methods.das.figures import drawn
from vlm_mech.methods.das.study import IIA, RANDOM, SHUFFLED, TRAINED, TWIN, WHOLE, random_rows
from vlm_mech.methods.das.training import DasRecipe, Prepared, logits_under, prepared, shuffled, trained
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result

SITE = Site("llm.resid_post", 2)


@functools.cache
def organism():
    return VLM.load("organism")


@functools.cache
def training():
    """One run on the embedded model, with one number of dimensions and all controls."""
    vlm, pairs = organism(), load_pairs("scenes/colour", n=32)
    return pairs, train_das(vlm, pairs, SITE, "last", k=8, batch=8, recipe=DasRecipe(n_steps=40))


@pytest.mark.parametrize("family", FEW)
def test_the_pass_in_which_rows_are_trained_is_the_edited_run(family):
    vlm = wrapped(family)
    encoded, source = vlm.encode(batch(1)), vlm.encode(batch(7))
    each = Interchange(("a", "b"), ("a", "b"), encoded, source, torch.tensor([3, 4]), torch.tensor([5, 6]))
    places = [
        (Site("llm.resid_pre", 0), "image"),
        (Site("llm.resid_post", 0), "image"),
        (Site("llm.mlp_out", 2), ("image", "last")),
        (Site("llm.resid_post", 3), "last"),
    ]
    for site, span in places:
        made, rows = prepared(vlm, each, site, span), random_rows(vlm.width(site), 3, 0).float()
        with torch.no_grad():
            found, plain = (logits_under(vlm, made, site, some) for some in (rows, None))
        expected = run(vlm, encoded, Replace(site, span, source=source, subspace=rows)).last
        assert torch.allclose(found, expected, atol=2e-5), (site, span)
        assert torch.allclose(plain, run(vlm, encoded).last, atol=2e-5)
        assert (found - plain).abs().max() > 1e-4


def test_gradients_are_those_of_differences():
    """Of the loss, as the rows turn, in single steps of each of some of their numbers."""
    vlm = wrapped("llava_clip")
    encoded, source = vlm.encode(batch(1)), vlm.encode(batch(7))
    each = Interchange(("a", "b"), ("a", "b"), encoded, source, torch.tensor([3, 4]), torch.tensor([5, 6]))
    site = Site("llm.resid_post", 1)
    made, rows = prepared(vlm, each, site, "image"), random_rows(32, 2, 0).float().requires_grad_()

    def loss(given):
        return torch.nn.functional.cross_entropy(logits_under(vlm, made, site, given), each.wanted)

    [slope] = torch.autograd.grad(loss(rows), [rows])
    for at in ((0, 0), (1, 7), (0, 31)):
        step = torch.zeros_like(rows)
        step[at] = 1e-2
        with torch.no_grad():
            change = (loss(rows + step) - loss(rows - step)) / 2e-2
        assert change.item() == pytest.approx(slope[at].item(), rel=0.05, abs=1e-4)


def test_training_lowers_the_loss_and_leaves_the_model_alone():
    vlm = wrapped("llava_clip")
    encoded, source = vlm.encode(batch(1)), vlm.encode(batch(7))
    each = Interchange(("a", "b"), ("a", "b"), encoded, source, torch.tensor([3, 4]), torch.tensor([5, 6]))
    site, before = Site("llm.resid_post", 1), [weight.clone() for weight in vlm.model.parameters()]
    made = [prepared(vlm, each, site, "all")]
    with torch.no_grad():  # as a caller's may be
        found = trained(vlm, made, made, site, 4, recipe=DasRecipe(n_steps=20), seed=0)
        again = trained(vlm, made, made, site, 4, recipe=DasRecipe(n_steps=20), seed=0)
    assert found.losses[-1] < found.losses[0] - 0.05 and found.n_steps > 0
    assert torch.allclose(found.rows @ found.rows.T, torch.eye(4), atol=1e-5)
    assert torch.equal(found.rows, again.rows)
    assert all(torch.equal(one, other) for one, other in zip(before, vlm.model.parameters(), strict=True))
    assert all(weight.grad is None and weight.requires_grad for weight in vlm.model.parameters())


def test_no_object_and_no_pair_is_in_two_parts():
    pairs = load_pairs("scenes/colour", n=48)
    for seed in range(5):
        parts = parts_of(pairs, [pair.question for pair in pairs], seed=seed)
        every = [parts.train, parts.validation, parts.test]
        asked = [{pair.question for pair in part} for part in every]
        assert all(not asked[one] & asked[other] for one, other in ((0, 1), (0, 2), (1, 2)))
        assert sorted(pair.id for part in every for pair in part) == sorted(pair.id for pair in pairs)
        assert len(asked[0]) == 4 and len(asked[1]) == 2
    # One scene that two objects share keeps them together.
    linked = [dataclasses.replace(pair, group="one" if number < 40 else None) for number, pair in enumerate(pairs)]
    with pytest.raises(UsageError, match="too few for 3 parts"):
        parts_of(dataclasses.replace(pairs, pairs=tuple(linked)), [pair.question for pair in pairs], seed=0)


def test_shuffled_targets_are_the_same_ones_elsewhere():
    nowhere = Cells(torch.zeros(0).long(), torch.zeros(0).long(), ())
    made = [Prepared({}, None, nowhere, torch.zeros(0, 1), torch.arange(4) + 4 * number, 1) for number in range(3)]
    found = [batch.wanted for batch in shuffled(made, 0)]
    assert [len(each) for each in found] == [4, 4, 4]
    assert sorted(torch.cat(found).tolist()) == list(range(12)) and torch.cat(found).tolist() != list(range(12))


def test_on_unseen_objects_a_trained_subspace_does_what_random_ones_do_not():
    _, das = training()
    rows = das.result.summary(IIA).set_index(["subspace", "k"])
    own = rows.loc[(TRAINED, 8)]
    assert rows.loc[(WHOLE, 128), "mean"] > 0.9 and own["mean"] > 0.6 and own["baseline"] == 0.0
    draws = das.result.provenance["random_iia"]["8"]
    assert len(draws) == 20 and max(draws) < own["mean"] - 0.3
    assert rows.loc[(RANDOM, 8), "mean"] == pytest.approx(np.mean(draws))
    for control in (SHUFFLED, TWIN):
        assert rows.loc[(control, 8), "mean"] < own["mean"]
    assert set(das.result.table["subspace"]) == {TRAINED, RANDOM, SHUFFLED, TWIN, WHOLE}


def test_what_is_told_is_what_the_kept_rows_do():
    pairs, das = training()
    vlm, part = organism(), das.parts.test
    assert das.chosen == 8 and das.basis.shape == (8, 128) and torch.equal(das.basis, das.bases[8])
    table = das.result.table.query("subspace == 'trained'").set_index("example")
    encoded, source = vlm.encode(part.base), vlm.encode(part.counterfactual)
    edited, plain = run(vlm, encoded, das.replace(source)), run(vlm, encoded)
    wanted, own = (vlm.answer_ids(encoded, each) for each in (part.counterfactual_answer, part.answer))
    at = torch.arange(len(part))
    for number, pair in enumerate(part):
        row = table.loc[f"{pair.id} noising"]
        assert row[IIA] == float(edited.last[number].argmax() == wanted[number])
        assert row["logit_diff"] == pytest.approx(
            (edited.last[at, wanted] - edited.last[at, own])[number].item(), abs=1e-3
        )
        assert row["logit_diff_baseline"] == pytest.approx(
            (plain.last[at, wanted] - plain.last[at, own])[number].item(), abs=1e-3
        )
    assert {pair.id for pair in part} < {pair.id for pair in pairs}
    with pytest.raises(UsageError, match="no subspace of 3 dimensions was trained; of 8"):
        das.replace(source, k=3)


def test_findings_tell_the_numbers_and_all_is_kept(tmp_path):
    _, das = training()
    told = " ".join(das.findings)
    own = das.result.summary(IIA).set_index(["subspace", "k"]).loc[(TRAINED, 8)]
    assert f"{own['mean']:.2f} ({own['ci_low']:.2f} to {own['ci_high']:.2f}) of {own['n']} cases" in told
    assert "20 random subspaces" in told and "(p = 0.048)" in told and "shuffled answers" in told
    assert {each["subspace"] for each in das.result.provenance["training"]} == {TRAINED, SHUFFLED, TWIN}
    das.result.save(tmp_path)
    again = Result.load(tmp_path)
    assert again.findings == das.findings and json.loads((tmp_path / "config.json").read_text())["k"] == [8]
    figures = drawn(again)
    assert set(figures) == {"iia", "logit_diff"}
    assert {trace.name for trace in figures["iia"].data if trace.name} >= {TRAINED, RANDOM, SHUFFLED, TWIN}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"site": Site("vision.resid_post", 1)}, "takes sites of the decoder, not vision"),
        ({"site": (SITE, SITE)}, "one Site is needed"),
        ({"site": Site("llm.resid_post", 9)}, "layer 9 is out of range"),
        ({"k": 0}, "k is 0; a number of dimensions from 1 to 128"),
        ({"k": (1, 129)}, "k is 129"),
        ({"k": (2, 2)}, "each once"),
        ({"k": ()}, "each once"),
        ({"n_random": 5}, "n_random is 5; a whole number of at least 20"),
        ({"objects": ["circle"]}, "1 objects are given for 8 pairs"),
        ({"objects": ["circle"] * 8}, "too few for 3 parts"),
        ({"pairs": [1]}, "train_das takes Pairs"),
        ({"span": "nothing"}, "nothing"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_trained_is_refused_in_one_line(given, message):
    named = {"pairs": load_pairs("scenes/colour", n=8), "site": SITE, "span": "last"} | given
    with pytest.raises(UsageError, match=message) as refused:
        train_das(organism(), **named)
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="must be above zero"):
        DasRecipe(n_steps=0)
