"""Models as people hold them: copied, pickled, with a PEFT wrapper around, within an open trace, without gradients."""

import copy
import pickle

import pytest
import torch

from tests.models.test_dual_encoder import piece_tokenizer, tiny_dual
from tests.zoo import ZOO
from tests.zoo.batches import batch, pairs_of
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.classify.baselines import contrastive_scores
from vlm_mech.data.image_classes import Labelled
from vlm_mech.errors import UsageError
from vlm_mech.inputs.special_tokens import check_known
from vlm_mech.interventions.specification import Knockout
from vlm_mech.interventions.trace import generate, read, run
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.models.vlm import VLM
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.sweep import grid, sweep

SITE = Site("llm.resid_post", 1)


def fresh():
    return VLM(*ZOO["llava_clip"]("sdpa", 0), name="small", check=False)


def tiny_encoder():
    return DualEncoder(*tiny_dual("clip"), name="small")


def logits_of(model):
    if isinstance(model, DualEncoder):
        return run(model, model.encode([picture(1)], ["a red circle"])).logits
    return run(model, batch()).logits


@pytest.mark.parametrize("make", [fresh, tiny_encoder])
def test_a_deep_copy_is_a_model_of_its_own(make):
    model = make()
    before = logits_of(model)
    copied = copy.deepcopy(model)
    assert type(copied) is type(model) and copied.name == model.name and copied.model is not model.model
    assert torch.equal(logits_of(copied), before)
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.mul_(1.5)
    assert (logits_of(copied) - before).abs().max() > 0.01
    assert torch.equal(logits_of(model), before)
    del model
    assert logits_of(copied).isfinite().all()
    assert copy.copy(copied).model is copied.model and torch.equal(logits_of(copy.copy(copied)), logits_of(copied))


def test_pickling_is_refused_in_one_line():
    with pytest.raises(UsageError, match=r"small cannot be pickled; give its name or folder and call VLM\.load"):
        pickle.dumps(fresh())


def test_a_peft_model_is_unwrapped_with_its_adapter_active():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapper = peft.get_peft_model(ZOO["llava_clip"]("sdpa", 0)[0], config).eval()
    vlm = VLM(wrapper, ZOO["llava_clip"]("sdpa", 0)[1], name="adapted")
    inputs = vlm.encode(batch()).inputs
    with torch.no_grad():
        adapted = wrapper(**inputs).logits
        with wrapper.disable_adapter():
            bare = wrapper(**inputs).logits
    assert torch.equal(run(vlm, batch()).logits, adapted) and (adapted - bare).abs().max() > 0.01
    assert run(vlm, batch(), Knockout("last", "image", 1)).receipts[0].pass_readout_change > 0
    vlm.config._commit_hash = "main"
    assert "weights" in vlm.identity() and fresh().identity()["weights"] != vlm.identity()["weights"]


def test_an_adapter_of_tokens_is_refused():
    peft = pytest.importorskip("peft")
    model, processor = ZOO["llava_clip"]("sdpa", 0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=2, token_dim=32,
                                     num_attention_heads=4, num_transformer_submodules=1)  # fmt: skip
    model.prepare_inputs_for_generation = lambda *_, **__: {}
    with pytest.raises(UsageError, match="a PROMPT_TUNING adapter adds tokens that no processor made"):
        VLM(peft.get_peft_model(model, config), processor)


def test_within_an_open_trace_what_opens_one_is_refused():
    vlm, pairs = fresh(), pairs_of(2)
    encoded = vlm.encode(batch())
    before = run(vlm, encoded).logits
    calls = (
        lambda: run(vlm, encoded),
        lambda: read(vlm, encoded, SITE),
        lambda: generate(vlm, encoded),
        lambda: sweep(
            vlm, pairs, grid(layer=(1,)), lambda _: Knockout("last", "image", 1), prob(pairs.answer)
        ),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match="a trace of small is open; run, read, generate and sweep open one"):
            with vlm.trace(encoded):
                call()
        assert torch.equal(run(vlm, encoded).logits, before)
    with vlm.trace(encoded):
        states = vlm.site(SITE.name, SITE.layer).output.save()
    assert torch.equal(states, read(vlm, encoded, SITE)[SITE])


def test_words_that_a_contrastive_model_does_not_know_are_refused():
    """All of them are one token: two texts that differ in such words had the same similarity."""
    dual = DualEncoder(*tiny_dual("siglip"), check=False)
    texts, images = ["a red apple", "a red pear"], [pairs_of(1)[0].image]
    with pytest.raises(UsageError, match="text 0, 'a red apple', holds 'apple', which .* has no token for"):
        dual.encode(images, texts)
    found = dual.encode(images, texts, unknown_words=True).inputs["input_ids"]
    assert torch.equal(found[0], found[1])


def test_a_slow_tokenizer_says_which_word_it_does_not_know(tmp_path):
    dual = DualEncoder(*tiny_dual("siglip", tokenizer=piece_tokenizer(tmp_path)), check=False)
    assert not dual.tokenizer.is_fast
    examples = [Labelled(pair.id, pair.image, "star") for pair in pairs_of(2)]
    scores = contrastive_scores(dual, examples, ("blue star", "square"), "the {class}")
    assert scores.shape == (2, 2) and abs(scores).max() <= 1 and len(set(scores.flatten())) > 1
    check_known(dual, ["the blue star", "left of the square."], "caption")
    with pytest.raises(UsageError, match="caption 'the 猫 star' holds '猫', which .* has no token for"):
        contrastive_scores(dual, examples, ("猫 star",), "the {class}")
