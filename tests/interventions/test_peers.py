"""Where TransformerLens' bridge silently does nothing on a LLaVA, ours acts: side by side on the same weights."""

import pytest
import torch

from tests.zoo.tiny import picture, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import run
from vlm_mech.models.vlm import VLM


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The bridge and our wrapper on the same tiny model, and the batch both are asked."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp("tl")
    tiny_model(attn="eager").save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    vlm = VLM.load(folder, attn="eager")
    return bridge, vlm, vlm.encode(Prompt("what colour is the circle?", picture(1)))


def bridged(bridge, encoded, hooks=()):
    inputs = {"pixel_values": encoded.inputs["pixel_values"], "attention_mask": encoded.inputs["attention_mask"]}
    with torch.no_grad(), bridge.hooks(fwd_hooks=list(hooks)):
        return bridge(encoded.inputs["input_ids"], **inputs)[:, -1]


def test_without_edits_the_three_agree(both):
    bridge, vlm, encoded = both
    assert (bridged(bridge, encoded) - run(vlm, encoded).last).abs().max() <= 1e-5


def test_zeroing_the_layer_that_the_projector_reads(both):
    bridge, vlm, encoded = both
    base = bridged(bridge, encoded)
    layer = vlm.vision_depth - 1
    theirs = bridged(
        bridge,
        encoded,
        [(f"vision_encoder.encoder_layers.{layer}.hook_out", lambda tensor, hook: torch.zeros_like(tensor))],
    )
    ours = run(vlm, encoded, Ablate(Site("vision.resid_post", layer), "all")).receipts[0]
    assert (theirs - base).abs().max() == 0.0
    assert ours.pass_readout_change > 0.01


def test_cutting_attention_in_the_vision_tower(both):
    bridge, vlm, encoded = both
    base = bridged(bridge, encoded)

    def only_self(pattern, hook):
        return torch.eye(pattern.shape[-1]).expand_as(pattern)

    with pytest.warns(UserWarning, match="edit is discarded"):
        theirs = bridged(bridge, encoded, [("vision_encoder.encoder_layers.1.attn.hook_pattern", only_self)])
    ours = run(vlm, encoded, Knockout("all", "all", 1, stream="vision", keep_self=True)).receipts[0]
    assert (theirs - base).abs().max() == 0.0
    assert ours.pass_readout_change > 0.01 and ours.blocked_mass == 0.0
