"""Edits that do nothing must not pass unseen: every silent failure known in this field's code, kept as a test."""

import dataclasses

import pytest
import torch

from tests.zoo.tiny import picture, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.interventions import attention
from vlm_mech.interventions.receipt import ReceiptError, receipts_table, summarise, verify
from vlm_mech.interventions.specification import Ablate, Knockout, Replace
from vlm_mech.interventions.trace import run
from vlm_mech.models.vlm import VLM


def hooked_logits(vlm, encoded, module, *, edit_mask=None, edit_output=None):
    """Logits of a forward in which a plain PyTorch hook edits a module's mask or output, as other tools do."""

    def before(module, positional, named):
        return positional, {**named, "attention_mask": edit_mask(named["attention_mask"])}

    def after(module, positional, output):
        return edit_output(output)

    if edit_mask is not None:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        with torch.no_grad():
            return vlm.model(**encoded.inputs).logits[:, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_mask_edits_that_are_silent_elsewhere_take_effect_here(tiny_vlm, attn):
    """Editing the mask 'if there is one' is inert under SDPA; writing False into it is inert under eager."""
    vlm = tiny_vlm("llama", "clip", attn)
    from vlm_mech.inputs.prompt import Prompt

    encoded = vlm.encode(Prompt("what colour is the circle?", picture(1)))
    layer = vlm.model.model.language_model.layers[2].self_attn
    image = list(encoded.positions("image"))
    base = run(vlm, encoded)

    def edit_if_there_is_one(mask):
        if mask is not None:
            mask = mask.clone()
            mask[..., -1, image] = torch.finfo(mask.dtype).min
        return mask

    def write_false(mask):
        if mask is None:
            n = encoded.n_pos
            mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
        mask = mask.clone()
        mask[..., -1, image] = False
        return mask

    moved = {
        edit.__name__: (hooked_logits(vlm, encoded, layer, edit_mask=edit) - base.last).abs().max().item()
        for edit in (edit_if_there_is_one, write_false)
    }
    silent, works = (
        ("edit_if_there_is_one", "write_false") if attn == "sdpa" else ("write_false", "edit_if_there_is_one")
    )
    assert moved[silent] == 0.0 and moved[works] > 0.01
    ours = run(vlm, encoded, Knockout("last", "image", 2), baseline=base).receipts[0]
    assert ours.pass_readout_change == pytest.approx(moved[works], abs=1e-5) and ours.blocked_mass == 0.0


@pytest.mark.parametrize(
    ("attn", "broken"),
    [
        ("sdpa", lambda mask, blocked, **options: mask),
        ("eager", lambda mask, blocked, **options: mask.masked_fill(blocked, False)),
        ("eager", lambda mask, blocked, **options: mask.masked_fill(blocked, -5.0)),
    ],
)
def test_a_knockout_that_does_nothing_or_too_little_raises(tiny_vlm, prompts, monkeypatch, attn, broken):
    vlm = tiny_vlm("llama", "clip", attn)
    monkeypatch.setattr(attention, "masked", broken)
    with pytest.raises(ReceiptError, match="blocked edges still carry attention of up to"):
        run(vlm, prompts, Knockout("last", "image", 2))


def test_an_attention_kernel_that_ignores_the_mask_raises(vlm, prompts, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    honest = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def forgetful(module, query, key, value, mask, **options):
        return honest(module, query, key, value, None, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", forgetful)
    with pytest.raises(ReceiptError, match="the attention output differs by"):
        run(vlm, prompts[:1], Knockout("last", "image", 2))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].original is forgetful


def test_the_audit_leaves_no_trace(vlm, prompts):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    run(vlm, prompts, Knockout("last", "image", 2))
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with pytest.raises(UsageError):
        run(vlm, prompts, Knockout("last", "all", 2))
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before


def test_the_vision_layer_that_the_projector_reads_is_written_even_after_a_plain_forward(prompts):
    """A PyTorch hook there is ignored once the model ran before; our write is not, and says so."""
    vlm = VLM(tiny_model(), tiny_processor(), check=False)
    encoded = vlm.encode(prompts)
    with torch.no_grad():
        base = vlm.model(**encoded.inputs).logits[:, -1]
    layer = vlm.vision_depth - 1
    module = vlm.model.model.vision_tower.encoder.layers[layer]
    assert torch.equal(hooked_logits(vlm, encoded, module, edit_output=torch.zeros_like), base)
    for _ in range(2):
        zeroed = run(vlm, encoded, Ablate(Site("vision.resid_post", layer), "all"))
        assert (zeroed.last - base).abs().max() > 0.01
        assert zeroed.receipts[0].witness == vlm.family.projector and zeroed.receipts[0].readback_error == 0.0


def test_a_write_that_never_arrives_raises(vlm, prompts, monkeypatch):
    """The handle pretends to write; the witness downstream tells."""
    from vlm_mech.architectures.traced_model import SiteHandle

    real = SiteHandle.output
    monkeypatch.setattr(SiteHandle, "output", property(real.fget, lambda self, value: None))
    for stream, point in [("llm", "resid_pre"), ("llm", "attn_out"), ("vision", "mlp_out"), ("llm", "head_out")]:
        with pytest.raises(ReceiptError, match="the edit did not take effect"):
            run(vlm, prompts, Ablate(Site(f"{stream}.{point}", 1), "all"))
    for site in (Site("vision.resid_post", 2), Site("llm.resid_post", 3), Site("projector.in"), Site("projector.out")):
        with pytest.raises(ReceiptError, match="the edit did not take effect"):
            run(vlm, prompts, Ablate(site, "image"))


def test_states_that_cannot_reach_the_answer_say_so_and_do_not(vlm, prompts, donors):
    base = run(vlm, prompts)
    above = run(vlm, prompts, Ablate(Site("vision.resid_pre", vlm.vision_depth), "all"), baseline=base)
    assert torch.equal(above.logits, base.logits)
    assert "later blocks never matter" in above.receipts[0].reason and above.receipts[0].change > 0
    class_token = run(vlm, prompts, Ablate(Site("vision.resid_post", vlm.vision_depth - 1), "class"), baseline=base)
    assert torch.equal(class_token.logits, base.logits) and "class token" in class_token.receipts[0].reason
    image = run(vlm, prompts, Replace(Site("llm.mlp_out", 3), "image", source=donors), baseline=base)
    assert torch.equal(image.last, base.last) and "last attention" in image.receipts[0].reason
    reaching = run(vlm, prompts, Replace(Site("llm.resid_pre", 3), "image", source=donors), baseline=base)
    assert reaching.receipts[0].reaches and reaching.receipts[0].pass_readout_change > 0


def test_a_change_where_none_can_be_raises(vlm, prompts, donors):
    receipt = run(vlm, prompts, Replace(Site("llm.mlp_out", 3), "image", source=donors)).receipts[0]
    verify([receipt])
    with pytest.raises(ReceiptError, match="the logits moved by 0.5 although they cannot"):
        verify([dataclasses.replace(receipt, pass_readout_change=0.5)])


def test_allowed_edges_of_every_form_of_mask():
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    for mask in (
        None,
        causal[None, None],
        torch.zeros(1, 1, 3, 3).masked_fill(~causal, torch.finfo(torch.float32).min),
    ):
        edges = attention.allowed_edges(mask, n_query=3, n_key=3, causal=True, device=torch.device("cpu"))
        assert torch.equal(edges[0, 0], causal)
    decoding = attention.allowed_edges(None, n_query=1, n_key=5, causal=True, device=torch.device("cpu"))
    assert decoding.all() and decoding.shape == (1, 1, 1, 5)
    tower = attention.allowed_edges(None, n_query=3, n_key=3, causal=False, device=torch.device("cpu"))
    assert tower.all()


def test_receipts_as_table_and_summary(vlm, prompts, donors):
    swap = Replace(Site("llm.resid_post", 1), "image", source=donors)
    receipts = run(vlm, prompts, swap & Knockout("last", "image", (1, 2))).receipts
    table = receipts_table(receipts)
    assert list(table["site"]) == ["llm.resid_post[1]", "llm.attention[1]", "llm.attention[2]"]
    summary = summarise(receipts)
    assert summary["writes"] == 1 and summary["knockouts"] == 2 and summary["largest_blocked_mass"] == 0.0


def test_the_change_of_a_pass_is_not_taken_for_that_of_its_parts(vlm, prompts, donors):
    base = run(vlm, prompts)
    parts = {
        "llm.mlp_out[3]": Replace(Site("llm.mlp_out", 3), "image", source=donors),
        "llm.resid_post[1]": Ablate(Site("llm.resid_post", 1), "question"),
        "llm.attention[2]": Knockout("last", "image", 2),
    }
    both = parts["llm.mlp_out[3]"] & parts["llm.attention[2]"] & parts["llm.resid_post[1]"]
    together, plain = run(vlm, prompts, both, baseline=base, apart=True), run(vlm, prompts, both, baseline=base)
    moved = (together.last - base.last).abs().max().item()
    assert torch.equal(together.logits, plain.logits)
    assert {receipt.pass_readout_change for receipt in together.receipts} == {moved}
    assert all(receipt.own_readout_change is None for receipt in plain.receipts)
    for receipt in together.receipts:
        alone = run(vlm, prompts, parts[receipt.site], baseline=base)
        assert receipt.own_readout_change == (alone.last - base.last).abs().max().item()
    own = {receipt.site: receipt.own_readout_change for receipt in together.receipts}
    assert own["llm.mlp_out[3]"] == 0.0 < own["llm.attention[2]"] < own["llm.resid_post[1]"] != moved
