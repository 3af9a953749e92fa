"""One pass with an edit of its own in each example equals a pass for each."""

import pytest
import torch

from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.by_example import plan_by_example
from vlm_mech.interventions.receipt import ReceiptError, verify
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer
from vlm_mech.interventions.trace import carry_out, read, run
from vlm_mech.models.vlm import VLM


@pytest.mark.parametrize("family", ["llava_clip", "llava_next_mistral", "qwen2_5_vl", "gemma3"])
def test_each_example_has_its_own_edit_and_no_other(family):
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False)
    prompts = [Prompt("what colour is the circle?", picture(seed)) for seed in range(6)]
    donors = [Prompt("what colour is the circle?", picture(seed + 10)) for seed in range(6)]
    encoded = vlm.encode(prompts)
    vector = torch.linspace(-1, 1, vlm.width(Site("llm.resid_post", 1)))
    edits = [
        None,
        Ablate(Site("vision.mlp_out", 1), "all"),
        Replace(Site("llm.resid_post", 1), "image", source=donors),
        Steer(Site("llm.resid_post", 1), "last", vector=vector) & Knockout("last", "all", 2, keep_self=True),
        Knockout("image", "image", 1, stream="vision", keep_self=True),
        Replace(Site("projector.out"), "image", source=vlm.encode(donors)),
    ]
    made = plan_by_example(vlm, encoded, edits, lambda *given: read(vlm, *given))
    last = Site("llm.resid_post", vlm.n_layers("llm") - 1)
    states, logits, receipts = carry_out(vlm, encoded, made, (last,))
    verify(receipts)
    plain = run(vlm, encoded)
    for number, edit in enumerate(edits):
        expected = run(vlm, encoded, edit) if edit else plain
        assert torch.allclose(logits[number], expected.logits[number], atol=1e-5)
        moved = (expected.logits[number] - plain.logits[number]).abs().max()
        assert (moved > 1e-3) == (edit is not None), "each is an edit that shows"
        if edit is not None:
            hidden = read(vlm, encoded, last, edit)[last]
            assert torch.allclose(states[last][number], hidden[number], atol=1e-5)


def test_a_pass_may_end_where_the_last_state_is_read(vlm, prompts):
    encoded = vlm.encode(prompts)
    made = plan_by_example(
        vlm, encoded, [Ablate(Site("projector.out"), "image"), None, None], lambda *given: read(vlm, *given)
    )
    site = Site("llm.resid_pre", 0)
    ran = []
    hook = vlm.model.get_submodule(f"{vlm.blocks('llm').path}.0").register_forward_hook(lambda *_: ran.append(1))
    states, logits, receipts = carry_out(vlm, encoded, made, (site,), to_the_end=False)
    hook.remove()
    assert logits is None and not ran and receipts[0].change > 0
    plain = read(vlm, encoded, site)[site]
    changed = (states[site] - plain).abs().amax((1, 2))
    assert changed[0] > 0 and changed[1:].tolist() == [0, 0]


def test_an_edit_that_does_not_arrive_has_a_receipt_that_says_so(vlm, prompts, monkeypatch):
    encoded, site = vlm.encode(prompts), Site("llm.mlp_out", 1)
    made = plan_by_example(vlm, encoded, [Ablate(site, "all"), None, None], lambda *given: read(vlm, *given))
    module = vlm.model.get_submodule(f"{vlm.blocks('llm').path}.1.{vlm.blocks('llm').mlp}")
    hook = module.register_forward_hook(lambda module, given, out: out + 1)
    _, _, receipts = carry_out(vlm, encoded, made)
    hook.remove()
    with pytest.raises(ReceiptError):
        verify(receipts)
