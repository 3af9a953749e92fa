"""The same weights in TransformerLens: nothing copied or changed, equal states; and where its edits do not act."""

import functools
import warnings

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from tests.zoo import ZOO, gemma_idefics_blip, llava_qwen_glm
from tests.zoo.tiny import COMBINATIONS, picture, tiny_config, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site, sites
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import read, run
from vlm_mech.models.transformer_lens_bridge import bridge_around, to_transformer_lens
from vlm_mech.models.vlm import VLM

POINTS = {
    "resid_pre": "hook_resid_pre",
    "head_out": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
STACKS = {"llm": "blocks", "vision": "vision_encoder.encoder_layers"}
WITH_VISION_LAYERS = ("llava", "llava_next_mistral", "llava_onevision", "gemma3", "idefics3")
WITH_THREE_AXES = ("qwen2_5_vl", "qwen3_vl", "glm4v")
QUESTION = Prompt("what colour is the circle?", picture(1))


def cached(bridge, inputs):
    """Logits and every recorded state of one forward pass."""
    rest = dict(inputs)
    with torch.no_grad():
        return bridge.run_with_cache(rest.pop("input_ids"), **rest)


def last_logits(bridge, inputs, *hooks, **options):
    """Next-token logits with the hooks in force, and the names of the hooks that fired."""
    rest, fired = dict(inputs), set()

    def watched(edit):
        def act(tensor, hook):
            fired.add(hook.name)
            return edit(tensor)

        return act

    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, watched(edit)) for name, edit in hooks]):
        return bridge(rest.pop("input_ids"), **rest, **options)[:, -1], fired


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def difference(left, right):
    return (left - right).abs().max().item()


def tolerance(expected):
    return 1e-5 * max(1.0, expected.abs().max().item())


@pytest.fixture(scope="module")
def eager():
    """A tiny LLaVA with grouped keys and a final norm that weighs, its bridge, and one encoded question."""
    model = tiny_model(attn="eager")
    with torch.no_grad():
        model.model.language_model.norm.weight.copy_(torch.linspace(0.5, 1.5, 32))
    vlm = VLM(model, tiny_processor())
    return vlm, to_transformer_lens(vlm), vlm.encode(QUESTION)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_model_stays_as_it_was(attn):
    vlm = VLM(tiny_model(attn=attn), tiny_processor())
    encoded = vlm.encode(QUESTION)
    before, kinds = run(vlm, encoded).logits, [type(module) for module in vlm.model.modules()]
    bridge = to_transformer_lens(vlm)
    assert difference(last_logits(bridge, encoded.inputs)[0], before[:, -1]) <= 1e-5
    assert torch.equal(run(vlm, encoded).logits, before)
    assert [type(module) for module in vlm.model.modules()] == kinds
    assert (vlm.backend, vlm.backend_of("vision")) == (attn, attn)
    assert bridge.tokenizer is not vlm.tokenizer and bridge.processor is vlm.processor
    done = run(vlm, encoded, Ablate(Site("vision.resid_post", 1), "all") & Knockout("last", "image", 2))
    assert all(receipt.pass_readout_change > 0.01 for receipt in done.receipts)


def test_no_weight_is_copied(eager):
    vlm, bridge, _ = eager
    ours = storages([*vlm.model.parameters(), *vlm.model.buffers()])
    theirs = {**dict(bridge.named_parameters()), **dict(bridge.named_buffers())}
    added = {name: tensor for name, tensor in theirs.items() if not storages([tensor]) <= ours}
    # TransformerLens gives every model an output bias; LLaVA has none, so it makes one of zeros.
    assert set(added) == {"unembed._original_component.bias"}
    assert not any(tensor.is_meta for tensor in theirs.values())
    whole = bridge.original_model
    assert ours <= storages([*whole.parameters(), *whole.buffers()])


def test_tied_weights_stay_tied():
    config = tiny_config()
    config.tie_word_embeddings = True
    model = LlavaForConditionalGeneration._from_config(config).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    whole = bridge_around(model, tiny_processor(), "tied").original_model
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    assert whole.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_folding_weights_in_the_bridge_leaves_the_model_alone():
    vlm = VLM(tiny_model(attn="eager"), tiny_processor())
    encoded = vlm.encode(QUESTION)
    before = run(vlm, encoded).last
    bridge = to_transformer_lens(vlm)
    bridge.enable_compatibility_mode()
    folded = last_logits(bridge, encoded.inputs)[0]
    assert difference(folded.log_softmax(-1), before.log_softmax(-1)) <= 1e-4
    assert torch.equal(run(vlm, encoded).last, before)


@pytest.mark.parametrize(("decoder", "tower"), COMBINATIONS)
def test_every_state_agrees(tiny_vlm, prompts, decoder, tower):
    vlm = tiny_vlm(decoder, tower, "eager")
    encoded = vlm.encode(prompts)
    logits, cache = cached(to_transformer_lens(vlm), encoded.inputs)
    plain = run(vlm, encoded).logits
    assert difference(logits, plain) <= tolerance(plain)
    ends = {Site("projector.in"): "vision_projector.hook_in", Site("projector.out"): "vision_projector.hook_out"}
    names = ends | {
        site: f"{stack}.{site.layer}.{hook}"
        for stream, stack in STACKS.items()
        for point, hook in POINTS.items()
        for site in sites(f"{stream}.{point}", range(vlm.n_layers(stream)))
    }
    states = read(vlm, encoded, list(names))
    for site, name in names.items():
        theirs = cache[name].flatten(2) if name.endswith("hook_z") else cache[name]
        assert difference(theirs, states[site]) <= tolerance(states[site]), f"{site} and {name}"


def test_heads_and_the_rest_sum_to_the_logit_difference(eager):
    vlm, bridge, encoded = eager
    logits, cache = cached(bridge, encoded.inputs)
    own, other = vlm.tokenizer.convert_tokens_to_ids(["red", "blue"])
    stack, labels = cache.stack_head_results(incl_remainder=True, return_labels=True, pos_slice=-1, apply_ln=True)
    direction = bridge.W_U[:, own] - bridge.W_U[:, other]
    share = (stack * bridge.ln_final.weight) @ direction
    true = (logits[:, -1, own] - logits[:, -1, other]).squeeze()
    assert labels[:2] == ["L0H0", "L0H1"] and labels[-1] == "remainder"
    assert len(labels) == vlm.n_layers("llm") * vlm.n_heads("llm") + 1
    assert abs(share.sum() - true) <= 1e-4
    # One head by hand, from our own states: its part of `head_out`, its rows of W_O, the recorded scale.
    layer, head = 2, 3
    outputs = read(vlm, encoded, Site("llm.head_out", layer))[Site("llm.head_out", layer)].unflatten(-1, (4, 8))
    by_hand = outputs[:, -1, head] @ bridge.W_O[layer, head] / cache["ln_final.hook_scale"][:, -1]
    assert difference((by_hand * bridge.ln_final.weight) @ direction, share[labels.index("L2H3")]) <= 1e-5
    # Its own shortcut divides by the scale but leaves out the gain of the final norm, unless weights are folded.
    unscaled = cache.stack_head_results(incl_remainder=True, pos_slice=-1)
    shortcut = cache.logit_attrs(unscaled, own, other, pos_slice=-1).squeeze()
    assert difference(shortcut, (stack @ direction).squeeze()) <= 1e-5
    assert difference(shortcut, share.squeeze()) > 0.01


def test_ov_and_qk_of_one_head(eager):
    _, bridge, encoded = eager
    _, cache = cached(bridge, encoded.inputs)
    layer, head, shared = 2, 3, 1  # four query heads share two key heads: heads 2 and 3 read key head 1
    normed, attn = cache[f"blocks.{layer}.ln1.hook_out"], bridge.blocks[layer].attn
    seen = cache[f"blocks.{layer}.attn.hook_pattern"][:, head] @ normed
    written = seen @ attn.W_V[shared] @ attn.W_O[head]
    assert difference(written, cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ attn.W_O[head]) <= 1e-5
    query, key = normed @ attn.W_Q[head], normed @ attn.W_K[shared]
    assert difference(query, cache[f"blocks.{layer}.attn.hook_q"][:, :, head]) <= 1e-5
    # W_Q W_K^T is the score of a position with itself: rotary embeddings turn query and key by the same angle.
    qk = attn.W_Q[head] @ attn.W_K[shared].T
    scores = torch.einsum("bpd,de,bpe->bp", normed, qk, normed) / bridge.cfg.d_head**0.5
    assert difference(scores, (query * key).sum(-1) / bridge.cfg.d_head**0.5) <= 1e-5
    recorded = cache[f"blocks.{layer}.attn.hook_attn_scores"][:, head].diagonal(dim1=-2, dim2=-1)
    assert difference(scores, recorded) <= 1e-5


def test_an_unknown_architecture_is_refused():
    unknown = type("InternVLForConditionalGeneration", (nn.Module,), {})()
    with pytest.raises(UsageError, match="no bridge for InternVL.*LlavaForConditionalGeneration") as caught:
        bridge_around(unknown, tiny_processor(), "unknown")
    assert "\n" not in str(caught.value)


def test_altered_modules_are_refused():
    model = tiny_model()
    model.model.language_model.layers[2].mlp.act_fn = nn.Identity()
    with pytest.raises(UsageError, match="layers.2.mlp.act_fn"):
        bridge_around(model, tiny_processor(), "altered")


# What the bridge is known not to do: a name in the model's own terms, and what an edit there moves.


@functools.cache
def bridged(name):
    """A tiny model of a family, its bridge, and inputs with one picture that is wider than high."""
    model, processor = ({"llava": llava} | llava_qwen_glm.FAMILIES | gemma_idefics_blip.FAMILIES)[name]("eager", 0)
    parts = [{"type": "image"}, {"type": "text", "text": "what colour is the circle ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(images=[picture(1, 80, 56)], text=[text], return_tensors="pt")
    return model, bridge_around(model, processor, name), dict(inputs)


def ours(name):
    return "llava_clip" if name == "llava" else name


def llava(attn, seed):
    return tiny_model(attn=attn, seed=seed), tiny_processor()


def moved(name, *edits):
    """How far the edits move the next-token logits, and the names of the hooks that fired; a warning is an error."""
    _, bridge, inputs = bridged(name)
    assert all(hook in bridge.hook_dict for hook, _ in edits)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        edited, fired = last_logits(bridge, inputs, *edits)
    return difference(edited, last_logits(bridge, inputs)[0]), fired


@pytest.mark.parametrize("name", [*WITH_VISION_LAYERS, *WITH_THREE_AXES, "mistral3"])
def test_without_edits_every_family_agrees(name):
    model, bridge, inputs = bridged(name)
    decoder = getattr(model.model, "text_model", None) or model.model.language_model
    entering = {}

    def keep(layer):
        return lambda module, given, named: entering.update({layer: given[0]})

    handles = [block.register_forward_pre_hook(keep(i), with_kwargs=True) for i, block in enumerate(decoder.layers)]
    with torch.no_grad():
        plain = model(**inputs).logits
    for handle in handles:
        handle.remove()
    logits, cache = cached(bridge, inputs)
    assert difference(logits, plain) <= tolerance(plain)
    for layer, states in entering.items():
        assert difference(cache[f"blocks.{layer}.hook_resid_pre"], states) <= tolerance(states)


@pytest.mark.parametrize("hook", ["vision_encoder.hook_patch_embed", "vision_encoder.hook_pos_embed"])
@pytest.mark.parametrize("name", WITH_VISION_LAYERS)
def test_hooks_of_the_vision_tower_that_never_fire(name, hook):
    assert moved(name, (hook, torch.zeros_like)) == (0.0, set())


@pytest.mark.parametrize("name", [*WITH_VISION_LAYERS, *WITH_THREE_AXES, "mistral3"])
def test_a_hook_of_the_projector_that_never_fires(name):
    assert moved(name, ("vision_projector.hook_projected", torch.zeros_like)) == (0.0, set())
    assert moved(name, ("vision_projector.hook_out", torch.zeros_like))[0] > 0.01


@pytest.mark.parametrize("name", ["llava", "llava_next_mistral", "llava_onevision", *WITH_THREE_AXES, "mistral3"])
def test_the_output_of_the_vision_tower_is_not_what_is_read(name):
    """The hook fires, but the projector reads another part of the tower's output than the one that it replaces."""
    hook = "vision_encoder.hook_out"
    assert moved(name, (hook, torch.zeros_like)) == (0.0, {hook})


@pytest.mark.parametrize("name", ["gemma3", "idefics3"])
def test_where_the_output_of_the_vision_tower_is_what_is_read(name):
    assert moved(name, ("vision_encoder.hook_out", torch.zeros_like))[0] > 0.01


@pytest.mark.parametrize(("name", "layer"), [("llava", 2), ("llava_next_mistral", 2), ("llava_onevision", 3)])
def test_the_layer_that_the_projector_reads(name, layer):
    stem = f"vision_encoder.encoder_layers.{layer}"
    assert moved(name, (f"{stem}.hook_out", torch.zeros_like)) == (0.0, {f"{stem}.hook_out"})
    assert moved(name, (f"{stem}.hook_in", torch.zeros_like))[0] > 0.01


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
@pytest.mark.parametrize(
    ("name", "stem"),
    [(name, "vision_encoder.encoder_layers.1") for name in WITH_VISION_LAYERS]
    + [(name, "blocks.2") for name in WITH_THREE_AXES],
)
def test_attention_edits_that_do_nothing(name, stem, point):
    _, bridge, inputs = bridged(name)
    base, _ = last_logits(bridge, inputs)

    def only_self(attention):
        cut = torch.eye(attention.shape[-1]).expand_as(attention)
        return cut if point == "hook_pattern" else attention + (cut - 1) * 1e9

    hook = f"{stem}.attn.{point}"
    with pytest.warns(UserWarning, match="edit is discarded"):
        edited, fired = last_logits(bridge, inputs, (hook, only_self))
    assert fired == {hook} and torch.equal(edited, base)
    # An edit that does not go through the pattern does act.
    assert moved(name, (f"{stem}.attn.hook_z", torch.zeros_like))[0] > 0.01
    # And so does the same cut here, in the same layer of the same weights.
    vlm = VLM(*ZOO[ours(name)]("eager", 0), check=False)
    stream = "vision" if stem.startswith("vision") else "llm"
    cut = Knockout("all", "all", int(stem[-1]), stream=stream, keep_self=True)
    receipt = run(vlm, Prompt("what colour is the circle?", picture(1, 80, 56)), cut).receipts[0]
    assert receipt.pass_readout_change > 0.01 and receipt.blocked_mass == 0.0


def entered_again(name, layer, **given):
    """How far the logits are off when a pass is stopped at a layer and taken up there with what is `given`."""
    _, bridge, inputs = bridged(name)
    rest = dict(inputs)
    ids = rest.pop("input_ids")
    with torch.no_grad():
        residual = bridge(ids, stop_at_layer=layer, **rest)
        again = bridge(residual, start_at_layer=layer, attention_mask=rest["attention_mask"], **given)[:, -1]
    return difference(again, last_logits(bridge, inputs)[0])


def positions_of(name):
    model, _, inputs = bridged(name)
    wanted = {key: inputs[key] for key in ("mm_token_type_ids", "image_grid_thw")}
    return {"position_ids": model.model.get_rope_index(inputs["input_ids"], **wanted)[0]}


@pytest.mark.parametrize("name", ["llava", "llava_next_mistral", "llava_onevision", "idefics3", "mistral3"])
def test_entering_again_where_positions_count_up(name):
    assert entered_again(name, 2) == 0.0


@pytest.mark.parametrize("name", WITH_THREE_AXES)
def test_entering_again_needs_the_positions(name):
    assert entered_again(name, 3) > 1e-3
    assert entered_again(name, 3, **positions_of(name)) == 0.0


def test_entering_qwen3_again_below_its_added_image_features():
    """Image features are added after the first two blocks, from what the vision tower gave: a second pass has none."""
    assert entered_again("qwen3_vl", 1, **positions_of("qwen3_vl")) > 1e-3
    assert entered_again("qwen3_vl", 2, **positions_of("qwen3_vl")) == 0.0


def test_entering_gemma_again_needs_the_token_types():
    """Image tokens attend to each other in both directions, and only the token types tell which they are."""
    assert entered_again("gemma3", 2) > 1e-3
    assert entered_again("gemma3", 2, token_type_ids=bridged("gemma3")[2]["token_type_ids"]) == 0.0
