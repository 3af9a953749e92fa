"""Tokens that nobody reads from a block on, and attention weights that are moved: against plain Hugging Face runs."""

import sys

import pytest
import torch

from tests.zoo import BACKENDS, FEW_AND_EAGER
from tests.zoo.batches import QUESTIONS, batch, wrapped
from tests.zoo.tiny import picture
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, Positions
from vlm_mech.interventions import attention
from vlm_mech.interventions.attention_edits import Remove, Reweight
from vlm_mech.interventions.receipt import KnockoutReceipt, ReceiptError, ReweightReceipt, summarise
from vlm_mech.interventions.specification import Knockout
from vlm_mech.interventions.trace import generate, run
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.generation import answers_under
from vlm_mech.sweeps.recorded_pass import record


def close(found, expected) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()))


def positions_of(vlm, encoded):
    """The position ids of the unedited pass."""
    given = record(vlm, encoded).positions
    return (encoded.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) if given is None else given


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
@pytest.mark.parametrize("span", ["image", "question"])
def test_removal_from_the_first_block_on_is_the_plain_forward_with_these_keys_masked(family, attn, span):
    """Positions are kept; the mask of the prompt says that the tokens are none."""
    vlm = wrapped(family, attn)
    encoded = vlm.encode(batch(1))
    # In some families the question ends the prompt.
    named = [[each for each in encoded.positions(span, row) if each < encoded.n_pos - 1] for row in range(len(encoded))]
    gone = Each(tuple(Positions(tuple(each)) for each in named))
    inputs, cells = dict(encoded.inputs), encoded.cells(gone)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][cells.rows, cells.positions] = 0
    with torch.no_grad():
        expected = vlm.model(**inputs | {"position_ids": positions_of(vlm, encoded)}).logits[:, -1]
    edited = run(vlm, encoded, Remove(gone, 0))
    assert close(edited.last, expected)
    assert (edited.last - run(vlm, encoded).last).abs().max() > 1e-3
    assert all(isinstance(each, KnockoutReceipt) and each.blocked_mass == 0 for each in edited.receipts)
    assert len(edited.receipts) == len(vlm.llm_layers)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl", "llava_onevision"])
def test_a_generation_without_tokens_is_a_loop_whose_cache_has_lost_their_keys(family, layer):
    """The loop is transformers' own cache, cropped in these blocks; one token at a time, no mask is needed."""
    vlm, n_new = wrapped(family), 5
    encoded = vlm.encode([Prompt(QUESTIONS[0], picture(3, 56, 56))])
    positions, ids = positions_of(vlm, encoded), encoded.inputs["input_ids"]
    image = encoded.positions("image")
    end = max(image) + 1
    assert end < ids.shape[1] - 1
    before = {name: value for name, value in encoded.inputs.items() if name not in ("input_ids", "attention_mask")}
    before = {name: value[:, :end] if name.endswith("token_type_ids") else value for name, value in before.items()}
    with torch.no_grad():
        seen = vlm.model(input_ids=ids[:, :end], position_ids=positions[..., :end], use_cache=True, **before)
        cache, kept = seen.past_key_values, [each for each in range(end) if each not in image]
        for each in cache.layers[layer:]:
            each.keys, each.values = each.keys[:, :, kept], each.values[:, :, kept]
        said = []
        for place in range(end, ids.shape[1] + n_new - 1):
            token = ids[:, place : place + 1] if place < ids.shape[1] else torch.tensor([[said[-1]]])
            last = positions[..., -1:].amax() + 1 + place - ids.shape[1]
            at = positions[..., place : place + 1] if place < ids.shape[1] else last.expand(*positions.shape[:-1], 1)
            logits = vlm.model(input_ids=token, position_ids=at, past_key_values=cache, use_cache=True).logits
            said += [int(logits[0, -1].argmax())] if place >= ids.shape[1] - 1 else []
    assert cache.layers[-1].keys.shape[2] == ids.shape[1] + n_new - 1 - len(image)
    found = generate(vlm, encoded, Remove("image", layer), max_new_tokens=n_new).ids[0].tolist()
    # The loop does not stop where an answer ends.
    assert found == said[: len(found)] and len(found) > 2
    (fast,) = answers_under(Engine(vlm, encoded), [Remove("image", layer)], max_new_tokens=n_new)
    assert fast.ids[0].tolist() == found
    assert generate(vlm, encoded, max_new_tokens=n_new).ids[0].tolist() != found


def test_what_was_read_before_stays_and_what_is_removed_may_come_back():
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch(1))
    both = Knockout(("system", "question", "answer_prompt"), "image", (1, 2))
    assert close(run(vlm, encoded, Remove("image", 1, until=3)).last, run(vlm, encoded, both).last)
    sites = [each.site for each in run(vlm, encoded, Remove("image", 1, until=3)).receipts]
    assert sites == ["llm.attention[1]", "llm.attention[2]"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Remove("last", 0), "removes a position that the answer is read from"),
        (lambda: Remove("all", 0), "removes a position that the answer is read from"),
        (lambda: Remove("answer", 0), "no answer follows"),
        (lambda: Remove("image", 9), "llm.resid_pre"),
        (lambda: Remove("image", 1, until=9), "llm.resid_pre"),
        (lambda: Remove("image", 2, until=2), "Remove from layer 2 until 2 names no layer"),
        (lambda: Remove("all", 0, stream="vision"), "removes all positions of the vision tower"),
        (lambda: Reweight("last", "image", 0, scale=-1), "scale of Reweight is -1"),
        (lambda: Reweight("last", "image", 0, scale=float("nan")), "scale of Reweight is nan"),
        (lambda: Reweight("last", "image", (), scale=1), "Reweight names no layer"),
        (lambda: Reweight("last", "image", 0, scale=1, how="scores", to="question"), "takes no `to`"),
        (lambda: Reweight("last", "image", 0, scale=1, heads=(9,)), "head 9 is out of range"),
        (lambda: Reweight("last", "image", 0, scale=50), "too little weight for a scale of 50"),
        (lambda: Reweight("last", "image", 0, scale=0.5, to="image"), "that are to gain have no weight"),
        (lambda: Reweight("image", "last", 0, scale=0.5), "reweights no edge"),
    ],
)
def test_a_wrong_edit_of_attention_is_one_line(make, message):
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch(1))
    with pytest.raises(UsageError, match=message) as told:
        run(vlm, encoded, make())
    assert "\n" not in str(told.value)


def test_generated_tokens_cannot_be_removed():
    vlm = wrapped("llava_clip")
    with pytest.raises(UsageError, match="generated tokens cannot be removed"):
        generate(vlm, vlm.encode(batch(1)), Remove("answer", 0), max_new_tokens=2)


def by_hand(edit, chosen):
    """Eager attention as transformers has it, with the edit made on its weights in some modules."""

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        n_shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(n_shared, 1), value.repeat_interleave(n_shared, 1)
        scores = query @ key.transpose(2, 3) * scaling
        scores = edit.scores(scores) if module in chosen else scores
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[-2]]
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        weights = edit.weights(weights) if module in chosen else weights
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return attend


class Halved:
    """The weights of some heads at some keys halved, by example; others gain, or all others."""

    def __init__(self, encoded, query, key, to, heads):
        self.places = [
            (example, heads, *(list(encoded.positions(span, example)) for span in (query, key, to) if span))
            for example in range(len(encoded))
        ]

    def scores(self, scores):
        return scores

    def weights(self, weights):
        weights = weights.clone()
        for example, heads, queries, keys, *to in self.places:
            others = to[0] if to else [each for each in range(weights.shape[-1]) if each not in keys]
            for head in heads:
                for query in queries:
                    row = weights[example, head, query]
                    freed, held = row[keys].sum() / 2, row[others].sum()
                    row[keys] /= 2
                    row[others] *= (held + freed) / held
        return weights


class Gated(Halved):
    """The scores of some heads at some keys scaled down to a tenth, as by scaled keys."""

    def scores(self, scores):
        scores = scores.clone()
        for example, heads, queries, keys, *_ in self.places:
            for head in heads:
                for query in queries:
                    scores[example, head, query, keys] *= 0.1
        return scores

    def weights(self, weights):
        return weights


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("kind", "to", "heads"), [(Halved, "question", (1, 2)), (Halved, None, (0,)), (Gated, None, (3,))]
)
def test_moved_weights_are_those_of_a_function_written_by_hand(monkeypatch, family, kind, to, heads):
    vlm, layers = wrapped(family, "eager"), (0, 2)
    encoded, query = vlm.encode(batch(1)), "answer_prompt"
    blocks = vlm.model.get_submodule(vlm.family.llm.path)
    chosen = {blocks[layer].get_submodule(vlm.family.llm.attention) for layer in layers}
    module = sys.modules[type(next(iter(chosen))).__module__]
    how = {"scale": 0.1, "how": "scores"} if kind is Gated else {"scale": 0.5, "to": to}
    edited = run(vlm, encoded, Reweight(query, "image", layers, heads=heads, **how)).last
    plain = run(vlm, encoded).last
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(module, "eager_attention_forward", by_hand(kind(encoded, query, "image", to, heads), chosen))
        expected = vlm.model(**encoded.inputs).logits[:, -1]
    assert close(edited, expected) and not close(edited, plain)


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_a_scale_of_one_changes_nothing_and_one_of_zero_is_a_knockout(family, attn):
    vlm = wrapped(family, attn)
    encoded = vlm.encode(batch(1))
    plain = run(vlm, encoded)
    for how in ("weights", "scores"):
        same = run(vlm, encoded, Reweight("last", "question", (1, 2), scale=1, how=how), baseline=plain)
        assert close(same.last, plain.last)
        assert all(each.mass == pytest.approx(each.natural_mass) for each in same.receipts)
    gone = run(vlm, encoded, Reweight("last", "question", (1, 2), scale=0), baseline=plain)
    assert torch.equal(gone.last, run(vlm, encoded, Knockout("last", "question", (1, 2)), baseline=plain).last)
    # A score of 0 is no removal.
    kept = run(vlm, encoded, Reweight("last", "question", (1, 2), scale=0, how="scores"), baseline=plain)
    assert all(each.mass > 0 for each in kept.receipts) and not close(kept.last, gone.last)


def test_receipts_of_moved_weights_say_what_was_moved():
    vlm = wrapped("llava_clip")
    edit = Reweight("last", "image", (0, 2), scale=0.6, to="question") & Knockout("last", "system", 2)
    receipts = run(vlm, vlm.encode(batch(1)), edit, apart=True).receipts
    assert [type(each) for each in receipts] == [ReweightReceipt, KnockoutReceipt, ReweightReceipt]
    for each in (receipts[0], receipts[2]):
        assert each.mass == pytest.approx(0.6 * each.natural_mass, rel=1e-5) and each.natural_mass > 0.05
        assert each.weight_error <= each.tolerance and each.own_readout_change > 1e-4 and each.reaches
        assert each.rows == ((0, 0), (1, 1))
    counts = summarise(receipts)
    assert (counts["knockouts"], counts["reweightings"], counts["writes"]) == (1, 2, 0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("lost", [lambda added: 0 * added, lambda added: 0.9 * added])
def test_weights_that_are_not_those_asked_for_are_found_out(monkeypatch, attn, lost):
    real = attention.added_to_scores
    monkeypatch.setattr(attention, "added_to_scores", lambda *given: lost(real(*given)))
    vlm = wrapped("llava_clip", attn)
    with pytest.raises(ReceiptError, match="from those asked for"):
        run(vlm, vlm.encode(batch(1)), Reweight("last", "image", 1, scale=0.5))


def test_towers_of_contrastive_models_can_be_edited_too():
    vlm = DualEncoder.load("clip")
    encoded = vlm.encode([picture(1, 96, 96), picture(2, 96, 96)], ["a red circle", "a blue star"])
    plain = run(vlm, encoded).logits
    for edit in (
        Reweight("class", "image", 1, scale=0.5, stream="vision"),
        Remove("image", vlm.n_layers("vision") - 1, stream="vision"),
        Reweight("last", "all", 1, scale=0.3, how="scores", stream="text"),
    ):
        edited = run(vlm, encoded, edit)
        assert (edited.logits - plain).abs().max() > 1e-4 and edited.receipts[0].reaches
    with pytest.raises(UsageError, match="the embedding is read from"):
        run(vlm, encoded, Remove("class", 0, stream="vision"))
