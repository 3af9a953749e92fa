"""Gradients at every kind of site equal finite differences of the traced run, on every family."""

import random

import pytest
import torch

from tests.zoo import BACKENDS, FAMILIES, ZOO
from tests.zoo.batches import batch
from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.architectures.weights import untrained
from vlm_mech.errors import UsageError
from vlm_mech.interventions.specification import Activations, Replace
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.attribution.gradient import forward, gradient
from vlm_mech.models.vlm import VLM
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.measures import Measure, logit_diff, logprob_diff, prob
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.reference import Reference

STEPS = {"next": 3e-3, "parting": 3e-3, "whole": 1e-3}
"""Share of the way to the other run by which states are moved: sums over several tokens bend sooner."""


def wrapped(family: str) -> VLM:
    """In double precision, so that finite differences can be told from rounding."""
    model, processor = ZOO[family]("sdpa", 0)
    return VLM(model.double(), processor, name=family, check=False)


def tracked(vlm: VLM, encoded, sites, measure):
    """A pass with its gradients."""
    read = readings_of(vlm, encoded, [measure])
    with untrained(vlm.model):
        found = forward(vlm, read.encoded, sites, track=True)
        return found, gradient(found, read)


def sites_of(vlm: VLM, seed: int) -> list[Site]:
    """A site of every kind, at a random layer."""
    drawn = random.Random(seed)
    llm = [Site(f"llm.{point}", drawn.choice(vlm.llm_layers)) for point in BLOCK_POINTS]
    tower = [Site(f"vision.{point}", drawn.randrange(vlm.vision_depth)) for point in BLOCK_POINTS]
    return [*llm, *tower, Site("projector.in"), Site("projector.out")]


def measured(vlm, encoded, measure, intervention=None, *, runner=Reference):
    read = readings_of(vlm, encoded, [measure])
    kept = []
    keep = lambda _, logits: kept.append(logits) or logits[:, 0]  # noqa: E731
    runner(vlm, read.encoded).answers([intervention], keep=keep)
    if measure.at != "whole":
        return read.values(kept[0])[0].double()
    # In double precision, which the measure itself does not have.
    (asked,), told = read.each, kept[0].double().log_softmax(-1)
    total = torch.zeros(len(told), dtype=torch.double)
    for sign, held, wanted in zip((1, -1), asked.held, asked.wanted, strict=True):
        own = told[:, list(read.encoded.answers.reads(held))].gather(2, wanted.clamp(min=0)[:, :, None])[:, :, 0]
        total += sign * own.where(wanted >= 0, 0.0).sum(1)
    return total


def difference(vlm, encoded, states, toward, site, span, measure, *, held=None):
    """Central finite difference of the measure along the line to the other states, which are those of `held`."""
    found, step = [], STEPS[measure.at]
    for share in (step, -step):
        moved = Activations({site: states[site] + share * (toward[site] - states[site])}, held or encoded)
        # States of several answers are those of one pass over all of them.
        runner = Engine if held else Reference
        found.append(measured(vlm, encoded, measure, Replace(site, span, source=moved), runner=runner))
    return (found[0] - found[1]) / (2 * step)


def along(encoded, slopes, states, toward, site, span):
    """Gradient times difference over the span, by example."""
    cells = encoded.cells(span, place=site.place)
    product = (slopes[site] * (toward[site] - states[site]))[cells.rows, cells.positions].sum(-1).double()
    return torch.stack([piece.sum() for piece in product.split(cells.counts)])


MEASURES = {
    "next token": logit_diff(["red", "left"], ["blue", "right"]),
    "whole answers": logprob_diff(["left of the star", "red"], ["the blue circle", "the red star"]),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_finite_differences(family, measure):
    vlm = wrapped(family)
    encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
    sites = sites_of(vlm, len(family))
    toward = read(vlm, donors, sites).values
    found, slopes = tracked(vlm, encoded, sites, measure)
    assert (found.reads[:, 0] - run(vlm, encoded).last).abs().max() < 1e-6
    n_moved = 0
    for site in random.Random(family).sample(sites, 6):
        span = "image" if site.stream != "llm" else ("image", "question", "last")
        # Of whole answers states and slopes go on over their tokens.
        held, slope = ({site: each[site][:, : toward[site].shape[1]]} for each in (found.held, slopes))
        expected = difference(vlm, encoded, held, toward, site, span, measure)
        estimate = along(encoded, slope, held, toward, site, span)
        # Some parts of the models compute in single precision whatever is asked: rounding / step.
        limit = 3e-4 + 5e-3 * expected.abs().max().item()
        assert (estimate - expected).abs().max() <= limit, (site, estimate, expected)
        n_moved += expected.abs().max().item() > 5e-3
    assert n_moved >= 4, "a test of zeros says nothing"


@pytest.mark.parametrize("family", ["llava_clip", "gemma3", "qwen3_vl", "paligemma"])
def test_gradients_at_the_tokens_of_answers_equal_finite_differences(family):
    """Of states of an answer's own tokens, which stand in the pass of this answer alone."""
    vlm, measure = wrapped(family), MEASURES["whole answers"]
    encoded = vlm.encode(batch(1))
    asked = readings_of(vlm, encoded, [measure]).encoded
    sites = [Site(f"llm.{point}", layer) for point in ("resid_pre", "attn_out", "mlp_out") for layer in (1, 2)]
    toward, _ = tracked(vlm, vlm.encode(batch(7)), sites, measure)
    found, slopes = tracked(vlm, encoded, sites, measure)
    n_moved = 0
    for site in sites:
        for span in ("answer", ("last", "answer")):
            expected = difference(vlm, encoded, found.held, toward.held, site, span, measure, held=asked)
            estimate = along(asked, slopes, found.held, toward.held, site, span)
            limit = 3e-4 + 5e-3 * expected.abs().max().item()
            assert (estimate - expected).abs().max() <= limit, (site, span, estimate, expected)
            n_moved += expected.abs().max().item() > 5e-3
    assert n_moved >= 6, "a test of zeros says nothing"


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_single_precision_and_either_back_end_give_the_same_gradients(family, attn):
    """States are the traced run's to the last bit; padded positions give no NaN."""
    exact, vlm = wrapped(family), VLM(*ZOO[family](attn, 0), name=family, check=False)
    encoded = vlm.encode(batch(1))
    assert (encoded.inputs["attention_mask"] == 0).any()
    sites, measure = sites_of(vlm, 3), logit_diff(["red", "left"], ["blue", "right"])
    states = read(vlm, encoded, sites).values
    found, slopes = tracked(vlm, encoded, sites, measure)
    _, expected = tracked(exact, exact.encode(batch(1)), sites, measure)
    for site in sites:
        assert torch.equal(found.held[site], states[site])
        assert slopes[site].shape == states[site].shape and not slopes[site].isnan().any()
        scale = expected[site].abs().max().item()
        assert (slopes[site].double() - expected[site]).abs().max() <= 1e-3 * scale + 1e-9, site


def test_what_reads_a_block_beside_the_next_one_is_not_part_of_the_next_ones_input():
    """VipLLaVA's projector reads the output of block 1; the input of block 2 is a site of its own."""
    vlm = wrapped("vipllava")
    before, after = Site("vision.resid_post", 1), Site("vision.resid_pre", 2)
    measure = prob(["red", "left"])
    _, slopes = tracked(vlm, vlm.encode(batch(1)), [before, after], measure)
    _, alone = tracked(vlm, vlm.encode(batch(1)), [after], measure)
    assert torch.equal(slopes[after], alone[after])
    assert (slopes[before] - slopes[after]).abs().max() > 0.1 * slopes[before].abs().max()


def test_what_cannot_reach_the_answer_has_gradient_zero():
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch(1))
    last = vlm.n_layers("llm") - 1
    sites = [Site("llm.resid_post", last), Site("llm.head_out", last), Site("vision.resid_post", vlm.vision_depth)]
    _, slopes = tracked(vlm, encoded, sites, prob(["red", "left"]))
    for site in sites[:2]:
        assert (slopes[site][:, :-1] == 0).all() and (slopes[site][:, -1] != 0).any()
    assert (slopes[sites[2]] == 0).all()


def test_nothing_is_left_behind():
    vlm = wrapped("llava_clip")
    parameters = list(vlm.model.parameters())
    parameters[0].requires_grad_(False)
    encoded = vlm.encode(batch(1))
    run(vlm, encoded)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vlm.model.modules()]
    with untrained(vlm.model):
        assert not any(parameter.requires_grad for parameter in parameters)
        found = forward(vlm, encoded, [Site("llm.resid_post", 1)], track=True)
        gradient(found, readings_of(vlm, encoded, [prob(["red", "left"])]))
        untracked = forward(vlm, encoded, [Site("llm.resid_post", 1)], track=False)
    assert untracked.reads.grad_fn is None and not untracked.texts[0].start[0].requires_grad
    assert all(parameter.grad is None for parameter in parameters)
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vlm.model.modules()]


def test_nothing_is_propagated_into_a_tower_that_was_not_asked_for():
    vlm = wrapped("llava_clip")
    encoded, inside = vlm.encode(batch(1)), []
    tower = vlm.model.get_submodule(f"{vlm.family.vision.path}.0")
    hook = tower.register_forward_hook(lambda _, __, output: inside.append(output.requires_grad))
    with untrained(vlm.model):
        forward(vlm, encoded, [Site("llm.resid_post", 1)], track=True)
        forward(vlm, encoded, [Site("projector.out")], track=True)
    hook.remove()
    assert inside == [False, True]


def test_a_given_start_takes_the_place_of_the_embeddings():
    """With the donor's embeddings (and the features added later) the pass is the donor's."""
    for sites in ([Site("llm.resid_post", 1)], [Site("vision.mlp_out", 0), Site("llm.resid_post", 1)]):
        vlm = wrapped("qwen3_vl")
        encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
        other = forward(vlm, donors, sites, track=False)
        moved = forward(vlm, encoded, sites, track=False, start=[each.start for each in other.texts])
        assert (moved.reads - other.reads).abs().max() < 1e-9
        assert (forward(vlm, encoded, sites, track=False).reads - other.reads).abs().max() > 1e-3


def test_a_measure_without_gradient_is_refused():
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch(1))
    ranks = Measure(prob(["red", "left"]).metric, lambda logits, ids: logits.argmax(-1), (["red", "left"],))
    with untrained(vlm.model):
        found = forward(vlm, encoded, [Site("llm.resid_post", 1)], track=True)
        with pytest.raises(UsageError, match="prob has no gradient; logit_diff, logprob_diff and prob have one"):
            gradient(found, readings_of(vlm, encoded, [ranks]))
