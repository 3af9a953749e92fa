"""The wrapper: parity with Hugging Face, sites that are what they say, refusal of what does not hold."""

import dataclasses

import pytest
import torch

from tests.zoo.tiny import COMBINATIONS, tiny_model, tiny_processor
from vlm_mech.architectures.families import LLAVA
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.interventions.specification import Knockout, Replace
from vlm_mech.interventions.trace import read, run
from vlm_mech.models.vlm import VLM


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("decoder", "tower"), COMBINATIONS)
def test_no_edit_equals_hugging_face_exactly(tiny_vlm, prompts, decoder, tower, attn):
    vlm = tiny_vlm(decoder, tower, attn)
    encoded = vlm.encode(prompts)
    with torch.no_grad():
        plain = vlm.model(**encoded.inputs).logits
    assert (encoded.inputs["attention_mask"] == 0).any(), "the batch must hold padding"
    assert (run(vlm, encoded).logits - plain).abs().max() == 0.0


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_and_its_receipts_hold(prompts, donors, dtype, attn):
    vlm = VLM(tiny_model("qwen2", attn=attn).to(dtype), tiny_processor())
    encoded = vlm.encode(prompts)
    with torch.no_grad():
        plain = vlm.model(**encoded.inputs).logits
    assert (run(vlm, encoded).logits - plain).abs().max() == 0.0
    swap = Replace(Site("llm.attn_out", 1), "image", source=donors) & Replace(
        Site("vision.mlp_out", 1), "all", source=donors
    )
    done = run(vlm, encoded, swap & Knockout("last", "image", 2))
    assert len(done.receipts) == 3 and done.receipts[0].pass_readout_change > 0


@pytest.mark.parametrize(("decoder", "tower"), COMBINATIONS)
def test_sites_equal_hidden_states_of_hugging_face(tiny_vlm, prompts, decoder, tower):
    vlm = tiny_vlm(decoder, tower)
    encoded = vlm.encode(prompts)
    with torch.no_grad():
        plain = vlm.model(**encoded.inputs, output_hidden_states=True)
        towers = vlm.model.model.vision_tower(encoded.inputs["pixel_values"], output_hidden_states=True)
    states = read(vlm, encoded, [Site("llm.resid_pre", 3), Site("llm.resid_post", 2), Site("vision.resid_post", 1)])
    assert torch.equal(states[Site("llm.resid_pre", 3)], plain.hidden_states[3])
    assert torch.equal(states[Site("llm.resid_post", 2)], plain.hidden_states[3])
    assert torch.equal(states[Site("vision.resid_post", 1)], towers.hidden_states[2])


def test_user_can_drop_into_the_trace(vlm, prompts):
    encoded = vlm.encode(prompts)
    expected = read(vlm, encoded, Site("llm.mlp_out", 2))[Site("llm.mlp_out", 2)]
    with torch.no_grad():
        with vlm.trace(prompts):
            found = vlm.site("llm.mlp_out", 2).output.save()
            vlm.site("llm.resid_post", 2).output = vlm.site("llm.resid_post", 2).output * 0
            logits = vlm.nn.output.logits.save()
    assert torch.equal(found, expected)
    assert (logits - run(vlm, encoded).logits).abs().max() > 0.1


def test_head_out_is_the_input_of_the_output_projection(vlm, prompts):
    site = Site("llm.head_out", 1)
    states = read(vlm, prompts, [site, Site("llm.attn_out", 1)])
    projection = vlm.model.get_submodule("model.language_model.layers.1.self_attn.o_proj")
    assert states[site].shape[-1] == vlm.width(site) == 32
    assert torch.allclose(projection(states[site]), states[Site("llm.attn_out", 1)], atol=1e-6)


def test_eager_and_sdpa_agree(tiny_vlm, prompts):
    for decoder, tower in COMBINATIONS:
        sdpa, eager = (run(tiny_vlm(decoder, tower, attn), prompts).last for attn in ("sdpa", "eager"))
        assert (sdpa - eager).abs().max() <= 1e-5


def test_check_refuses_wrong_order(monkeypatch):
    swapped = dataclasses.replace(
        LLAVA, llm=dataclasses.replace(LLAVA.llm, norm_1=LLAVA.llm.norm_2, norm_2=LLAVA.llm.norm_1)
    )
    monkeypatch.setattr("vlm_mech.architectures.families.FAMILIES", (swapped,))
    with pytest.raises(WorkError, match="does not compute its parts in the order of their names"):
        VLM(tiny_model(), tiny_processor())


def test_check_refuses_a_dead_write():
    model = tiny_model()
    layer = model.model.language_model.layers[2]
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
    with pytest.raises(WorkError, match=r"zero llm.mlp_out\[2\]: the logits moved by 0"):
        VLM(model, tiny_processor())


def test_check_refuses_a_model_that_answers_differently_inside_the_trace():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + torch.rand(1))
    with pytest.raises(WorkError, match="logits equal the plain forward: largest difference"):
        VLM(model, tiny_processor())


def test_check_refuses_a_misnamed_norm(monkeypatch):
    wrong = dataclasses.replace(
        LLAVA, llm=dataclasses.replace(LLAVA.llm, after="model.language_model.layers.0.input_layernorm")
    )
    monkeypatch.setattr("vlm_mech.architectures.families.FAMILIES", (wrong,))
    model = tiny_model()
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(2.0)
    with pytest.raises(WorkError, match="the head reads the normed last resid_post"):
        VLM(model, tiny_processor())


def test_repr_shows_the_three_towers(vlm):
    text, page = repr(vlm), vlm._repr_html_()
    for part in (
        "vision (clip)",
        "projector reads block 2; 1 later one(s) unread",
        "llm (llama)",
        "4 x 4 patches",
        "sdpa",
    ):
        assert part in text and part in page
    vlm.name, name = "<script>alert(1)</script>", vlm.name
    try:
        assert "<script>" not in vlm._repr_html_()
    finally:
        vlm.name = name


def test_answer_ids_follow_the_prompt(vlm, prompts):
    encoded = vlm.encode(prompts)
    ids = vlm.answer_ids(encoded, ["red", " blue", "yes"])
    assert vlm.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["red", "blue", "yes"]
    with pytest.raises(UsageError, match="not in the model's vocabulary"):
        vlm.answer_ids(encoded, ["red", "chartreuse", "yes"])
    with pytest.raises(UsageError, match="2 answers for 3 prompts"):
        vlm.answer_ids(encoded, ["red", "blue"])


def test_a_saved_folder_loads_and_answers_the_same(tmp_path, vlm, prompts):
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    loaded = VLM.load(tmp_path)
    assert torch.equal(run(loaded, prompts).logits, run(vlm, prompts).logits)
    assert loaded.name == str(tmp_path)


def test_wrong_models_are_refused_in_one_line(tmp_path, vlm):
    with pytest.raises(UsageError, match="neither an embedded model"):
        VLM.load("no-such-model")
    with pytest.raises(UsageError, match="neither an embedded model"):
        VLM.load(tmp_path / "missing")
    with pytest.raises(UsageError, match="holds no model: config.json is missing"):
        VLM.load(tmp_path)
    vlm.model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no processor can be loaded"):
        VLM.load(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="dtype 'int8' is not known"):
        VLM.load(tmp_path, dtype="int8")
    with pytest.raises(UsageError, match="cannot be loaded: .*[Ff]lash"):
        VLM.load(tmp_path, attn="flash_attention_2")
    with pytest.raises(UsageError, match="device 'gpu' is not usable"):
        VLM.load(tmp_path, device="gpu")


def test_text_models_are_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="architecture 'llama' has no vision encoder; .*: llava, "):
        VLM.load(tmp_path)


def test_a_foreign_processor_is_refused():
    model = tiny_model()
    model.config.image_token_id = 7
    with pytest.raises(UsageError, match="does not belong to the model"):
        VLM(model, tiny_processor())
    with pytest.raises(UsageError, match="has no tokenizer; AutoProcessor gives one that has"):
        VLM(tiny_model(), tiny_processor().tokenizer)


def test_layers_out_of_range(vlm, prompts):
    with pytest.raises(UsageError, match=r"layer 4 is out of range for llm.resid_post: layers are 0..3"):
        read(vlm, prompts, Site("llm.resid_post", 4))
    with pytest.raises(UsageError, match="needs a layer"):
        Site("llm.resid_post")
    with pytest.raises(UsageError, match="is not known; sites"):
        Site("llm.resid_mid", 0)
    with pytest.raises(UsageError, match="has no layers"):
        Site("projector.out", 1)
