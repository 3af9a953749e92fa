"""Interventions are what they say: identities, independence, both back ends, single heads, generation."""

import numpy as np
import pytest
import torch

from tests.zoo.tiny import COMBINATIONS, picture
from vlm_mech.architectures.site import Site, sites
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, Patches, Positions, Words
from vlm_mech.interventions.plan import plan
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer, window
from vlm_mech.interventions.trace import generate, read, run

LAST_LAYER = 3
LLM_POINTS = ["resid_pre", "head_out", "attn_out", "mlp_out", "resid_post"]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("decoder", "tower"), COMBINATIONS)
def test_swap_identities(tiny_vlm, prompts, donors, decoder, tower, attn):
    vlm = tiny_vlm(decoder, tower, attn)
    base, donor = run(vlm, prompts), run(vlm, donors)
    assert (base.last - donor.last).abs().max() > 0.1
    first, last = Site("llm.resid_post", 0), Site("llm.resid_post", LAST_LAYER)
    everything = run(vlm, prompts, Replace(first, "all", source=donors), baseline=base)
    real = base.encoded.inputs["attention_mask"].bool()
    assert torch.equal(everything.logits[real], donor.logits[real])
    image_at_the_end = run(vlm, prompts, Replace(last, "image", source=donors), baseline=base)
    assert torch.equal(image_at_the_end.last, base.last)
    assert image_at_the_end.receipts[0].change > 0 and not image_at_the_end.receipts[0].reaches
    last_at_the_end = run(vlm, prompts, Replace(last, "last", source=donors), baseline=base)
    assert torch.equal(last_at_the_end.last, donor.last)


@pytest.mark.parametrize("stream", ["vision", "llm"])
@pytest.mark.parametrize("point", LLM_POINTS)
def test_a_state_replaced_by_itself_changes_nothing(vlm, prompts, stream, point):
    base = run(vlm, prompts)
    for layer in (1, 2):
        same = run(vlm, prompts, Replace(Site(f"{stream}.{point}", layer), "all", source=prompts), baseline=base)
        assert torch.equal(same.logits, base.logits)
        assert same.receipts[0].change == 0.0


def test_all_image_states_carry_the_picture_through_tower_and_projector(vlm, prompts, donors):
    """Only the picture differs, so replacing every vision state, or the projector's output, gives the donor's run."""
    donor = run(vlm, donors)
    for site, span in [
        (Site("vision.resid_pre", 1), "all"),
        (Site("vision.resid_post", 2), "image"),
        (Site("projector.in"), "image"),
        (Site("projector.out"), "image"),
        (Site("llm.resid_pre", 0), "image"),
    ]:
        swapped = run(vlm, prompts, Replace(site, span, source=donors))
        assert torch.equal(swapped.last, donor.last), site


def test_before_the_image_nothing_moves_and_image_logits_become_the_donors(vlm, prompts, donors):
    base, donor = run(vlm, prompts), run(vlm, donors)
    for layer in (1, 2):
        swapped = run(vlm, prompts, Replace(Site("llm.resid_post", layer), "image", source=donors), baseline=base)
        for example in range(3):
            image = list(base.encoded.positions("image", example))
            system = list(base.encoded.positions("system", example))
            assert torch.equal(swapped.logits[example, system], base.logits[example, system])
            assert torch.allclose(swapped.logits[example, image], donor.logits[example, image], atol=1e-5)
        assert (swapped.last - base.last).abs().max() > 1e-3


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("decoder", "tower"), COMBINATIONS)
def test_without_edges_to_the_image_the_picture_cannot_matter(tiny_vlm, prompts, donors, decoder, tower, attn):
    vlm = tiny_vlm(decoder, tower, attn)
    cut = Knockout(("question", "answer_prompt"), "image", vlm.llm_layers)
    one, other = run(vlm, prompts, cut), run(vlm, donors, cut)
    assert torch.equal(one.last, other.last)
    for receipt in one.receipts:
        assert receipt.blocked_mass == 0.0 and receipt.natural_mass > 0 and receipt.n_edges > 0


def test_knockout_is_equal_under_both_back_ends_and_equals_masked_attention_by_hand(tiny_vlm, prompts):
    for decoder, tower in COMBINATIONS:
        for cut in (
            Knockout("last", "image", (1, 2)),
            Knockout("last", Patches(((0, 1), (2, 2))), 2, heads=(1, 3)),
            Knockout("image", "image", (0, 1), stream="vision", keep_self=True),
        ):
            sdpa, eager = (run(tiny_vlm(decoder, tower, attn), prompts, cut) for attn in ("sdpa", "eager"))
            assert (sdpa.last - eager.last).abs().max() <= 1e-5
            assert sdpa.receipts[0].pass_readout_change > 1e-4
            assert sdpa.receipts[0].natural_mass == pytest.approx(eager.receipts[0].natural_mass, abs=1e-6)


def test_knockout_counts_its_edges_and_spares_the_own_one_if_asked(vlm, prompts):
    spared = run(vlm, prompts, Knockout("image", "image", 1, stream="vision", keep_self=True)).receipts[0]
    assert spared.n_edges == 3 * 16 * 15
    whole = run(vlm, prompts, Knockout("image", "image", 1, stream="vision")).receipts[0]
    assert whole.n_edges == 3 * 16 * 16 and whole.natural_mass > spared.natural_mass
    causal = run(vlm, prompts, Knockout("image", "image", 1)).receipts[0]
    assert causal.n_edges == 3 * 16 * 17 // 2


def test_knockout_of_all_heads_is_the_sum_of_none_left_out(vlm, prompts):
    every_head = run(vlm, prompts, Knockout("last", "image", 2, heads=(0, 1, 2, 3)))
    whole = run(vlm, prompts, Knockout("last", "image", 2))
    one_head = run(vlm, prompts, Knockout("last", "image", 2, heads=(1,)))
    assert (every_head.last - whole.last).abs().max() <= 1e-6
    assert (one_head.last - whole.last).abs().max() > 1e-4


def test_vision_knockout_in_the_class_token_alone_cannot_matter_at_the_layer_read(vlm, prompts):
    cut = run(vlm, prompts, Knockout("class", "image", vlm.vision_depth - 1, stream="vision"))
    assert not cut.receipts[0].reaches and "class token is dropped" in cut.receipts[0].reason
    assert cut.receipts[0].pass_readout_change <= cut.receipts[0].tolerance


def test_single_heads(vlm, prompts, donors):
    """Replacing heads one by one in one pass equals replacing them all; one head differs from all."""
    site = Site("llm.head_out", 2)
    whole = run(vlm, prompts, Replace(site, "last", source=donors))
    one_by_one = Replace(site, "last", source=donors, heads=(0,))
    for head in (1, 2, 3):
        one_by_one = one_by_one & Replace(site, "last", source=donors, heads=(head,))
    assert torch.equal(run(vlm, prompts, one_by_one).logits, whole.logits)
    single = run(vlm, prompts, Replace(site, "last", source=donors, heads=(2,)))
    assert (single.last - whole.last).abs().max() > 1e-4
    assert (single.last - run(vlm, prompts).last).abs().max() > 1e-4


def test_ablation_to_zero_mean_and_resampled_states(vlm, prompts, donors):
    site = Site("llm.mlp_out", 1)
    states = read(vlm, donors, site)
    span = "image"
    cells = states.encoded.cells(span)
    mean = states[site][cells.rows, cells.positions].mean(0)
    to_mean = run(vlm, prompts, Ablate(site, span, to="mean", reference=donors))
    zero_then_mean = run(vlm, prompts, Ablate(site, span) & Steer(site, span, vector=mean))
    assert torch.allclose(to_mean.logits, zero_then_mean.logits, atol=1e-6)
    resampled = run(vlm, prompts, Ablate(site, span, to="resample", reference=donors, seed=3))
    again = run(vlm, prompts, Ablate(site, span, to="resample", reference=donors, seed=3))
    own = run(vlm, prompts, Replace(site, span, source=donors))
    assert torch.equal(resampled.logits, again.logits)
    # Every example gets another example's states, so none may equal the run with its own donor's states.
    assert (resampled.last - own.last).abs().amax(-1).min() > 1e-6


def test_steering_adds_the_vector(vlm, prompts):
    site = Site("llm.resid_pre", 2)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    steered = run(vlm, prompts, Steer(site, "question", vector=vector, scale=2.0))
    assert steered.receipts[0].change == pytest.approx(2 * vector.abs().max().item(), abs=1e-5)
    back = run(vlm, prompts, Steer(site, "question", vector=vector) & Steer(site, "question", vector=-vector))
    assert (back.last - run(vlm, prompts).last).abs().max() < 1e-4


def test_compositions_act_together_in_one_pass(vlm, prompts, donors):
    swap = Replace(Site("projector.out"), "image", source=donors)
    cut = Knockout(("question", "answer_prompt"), "image", vlm.llm_layers)
    both = run(vlm, prompts, swap & cut)
    assert torch.equal(both.last, run(vlm, prompts, cut).last)
    assert {receipt.site for receipt in both.receipts} >= {"projector.out", "llm.attention[0]", "llm.attention[3]"}
    layers = Replace(sites("llm.resid_post", [1, 2]), "last", source=donors)
    assert len(run(vlm, prompts, layers & cut).receipts) == 2 + 4


def test_spans_of_their_own_for_each_example(vlm, prompts, donors):
    spans = Each((Words("circle"), Words("star"), "last"))
    swapped = run(vlm, prompts, Ablate(Site("llm.resid_post", 1), spans))
    assert swapped.receipts[0].n_cells == 3


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
def test_generation_without_edit_equals_hugging_face(tiny_vlm, prompts, decoder, attn):
    vlm = tiny_vlm(decoder, "clip", attn)
    encoded = vlm.encode(prompts)
    with torch.no_grad():
        plain = vlm.model.generate(**encoded.inputs, do_sample=False, max_new_tokens=6)
    made = generate(vlm, encoded, max_new_tokens=6)
    assert torch.equal(made.ids, plain[:, encoded.n_pos :])
    assert len(made.texts) == 3


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
def test_generation_under_intervention_equals_a_loop_of_whole_forwards(tiny_vlm, decoder, attn):
    """Greedy decoding with a cache equals one uncached, identically edited forward per token on the growing text."""
    vlm = tiny_vlm(decoder, "clip", attn)
    question = "what colour is the circle?"
    text = f"USER: <image> {question} ASSISTANT:"
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    site = Site("llm.resid_post", 1)
    cut = Knockout(("question", "answer_prompt", "generated"), "image", (1, 2))
    steer = Steer(site, ("last", "generated"), vector=vector)
    prompt = Prompt(question, picture(1), text=text)
    allowed = [vlm.tokenizer.convert_tokens_to_ids(word) for word in ("red", "green", "blue", "circle", "star", "left")]
    options = {"max_new_tokens": 4, "prefix_allowed_tokens_fn": lambda batch, ids: allowed}
    made = generate(vlm, [prompt], cut & steer, **options)

    words: list[str] = []
    for _ in range(4):
        longer = Prompt(question, picture(1), text=" ".join([text, *words]))
        # Everything from the prompt's last token on is steered: the answer prompt without "assistant".
        encoded = vlm.encode(longer)
        tail = encoded.positions("answer_prompt")[1:]
        steered = Steer(site, Positions(tail), vector=vector)
        step = run(vlm, encoded, Knockout(("question", "answer_prompt"), "image", (1, 2)) & steered)
        best = step.last[0, allowed].argmax().item()
        words.append(vlm.tokenizer.convert_ids_to_tokens(allowed[best]))
    assert list(made.texts[0].split()) == words
    assert made.texts != generate(vlm, [prompt], **options).texts
    assert {type(receipt).__name__ for receipt in made.receipts} == {"WriteReceipt", "KnockoutReceipt"}


def test_generated_tokens_alone_can_be_edited(vlm, prompts):
    plain = generate(vlm, prompts, max_new_tokens=5, eos_token_id=-1)
    edited = generate(vlm, prompts, Ablate(Site("llm.resid_post", 2), "generated"), max_new_tokens=5, eos_token_id=-1)
    assert torch.equal(plain.ids[:, 0], edited.ids[:, 0])
    assert not torch.equal(plain.ids[:, 1:], edited.ids[:, 1:])
    assert edited.receipts[0].change > 0 and edited.receipts[0].readback_error == 0
    with pytest.raises(UsageError, match="Replace has no states to put at generated tokens"):
        generate(vlm, prompts, Replace(Site("llm.resid_post", 2), "generated", source=prompts))
    with pytest.raises(UsageError, match="do not pass through projector.out"):
        generate(vlm, prompts, Ablate(Site("projector.out"), "generated"))


def test_windows_are_clipped_and_centred():
    assert window(5, 9, n_layers=32) == tuple(range(1, 10))
    assert window(0, 9, n_layers=32) == tuple(range(0, 5))
    assert window(31, 9, n_layers=32) == tuple(range(27, 32))
    assert window(2, 1, n_layers=4) == (2,)
    assert window(5, 4, n_layers=32) == (3, 4, 5, 6)
    with pytest.raises(UsageError, match="layers are 0..3"):
        window(4, 3, n_layers=4)


def test_what_does_not_fit_is_refused_before_the_model_runs(vlm, prompts, donors):
    site = Site("llm.resid_post", 1)
    cases = [
        (Replace(site, "question", source=donors[::-1]), "span 'question' of example 0 has 6 tokens, its source has 4"),
        (Replace(site, "image", source=donors[:2]), "source has 2 examples, the batch 3"),
        (Replace(Site("llm.resid_post", 9), "image", source=donors), "layer 9 is out of range"),
        (Knockout("last", "image", 7), "layer 7 is out of range"),
        (Knockout("last", "image", 1, heads=(4,)), "head 4 is out of range at llm layer 1: heads are 0..3"),
        (Knockout("image", "last", 1), "cuts no edge"),
        (Knockout("last", "all", 1), "nothing to attend to"),
        (Steer(site, "last", vector=torch.zeros(5)), r"has shape \(32,\), or .*, not \(5,\)"),
        (Steer(site, "last", vector=torch.full((32,), torch.nan)), "holds NaN"),
        (Ablate(site, Words("circle")), "occurs 0 times in the question of example 2"),
        (Ablate(site, "image", to="resample", reference=donors[:1]), "at least two examples"),
    ]
    for intervention, message in cases:
        with pytest.raises(UsageError, match=message):
            run(vlm, prompts, intervention)
    with pytest.raises(UsageError, match="heads can be chosen at head_out sites only"):
        Ablate(site, "image", heads=(1,))
    with pytest.raises(UsageError, match="Knockout names no layer"):
        Knockout("last", "image", [])


def test_nan_activations_are_reported():
    from tests.zoo.tiny import tiny_model, tiny_processor
    from vlm_mech.models.vlm import VLM

    vlm = VLM(tiny_model(), tiny_processor())
    with torch.no_grad():
        vlm.model.model.language_model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    prompt = Prompt("what is this?", picture(1))
    with pytest.raises(WorkError, match="NaN logits"):
        run(vlm, [prompt])
    with pytest.raises(WorkError, match=r"NaN activations at llm.mlp_out\[2\]"):
        read(vlm, [prompt], Site("llm.mlp_out", 2))


def test_backends_without_masks_are_refused(vlm, prompts):
    config = vlm.config.text_config
    config._attn_implementation_internal, kept = "flash_attention_2", config._attn_implementation_internal
    try:
        with pytest.raises(UsageError, match="'flash_attention_2' takes no mask.*attn='sdpa' or attn='eager'"):
            run(vlm, prompts, Knockout("last", "image", 1))
    finally:
        config._attn_implementation_internal = kept


@pytest.mark.parametrize("spans", ["last", ("last", "generated")])
def test_generated_tokens_lose_edges_only_where_they_are_named(vlm, prompts, spans):
    encoded = vlm.encode(prompts)
    edit = Knockout(spans, "image", 0, heads=(1,))
    (cut,) = plan(vlm, encoded, edit, lambda *_: None, generating=True).cuts["llm", 0]
    new, seen = range(encoded.n_pos, encoded.n_pos + 1), range(encoded.n_pos + 1)
    blocked = cut.blocked(range(len(encoded)), new, seen, n_pos=encoded.n_pos, device=torch.device("cpu"))
    assert blocked.shape == (len(encoded), vlm.n_heads("llm"), 1, len(seen)) and not blocked[:, [0, 2, 3]].any()
    for row in range(len(encoded)):
        found = blocked[row, 1, 0].nonzero()[:, 0].tolist()
        assert found == ([] if spans == "last" else sorted(encoded.positions("image", row)))


@pytest.mark.usefixtures("untyped")
def test_what_is_no_intervention_is_refused_where_it_is_made(vlm, prompts, donors):
    """A name in place of a site, pairs or a text in place of a source, letters in place of layers."""
    site = Site("llm.resid_post", 1)
    two, together = [Ablate(site, "image"), Ablate(site, "last")], "of 2 interventions was given; a & b does both"
    cases = [
        (lambda: Replace("llm.resid_post", "image", source=donors), r"'llm.resid_post' as a site.*Site\('llm.res"),
        (lambda: Ablate((site, "mlp"), "image"), r"Ablate is given 'mlp' as a site; a Site is needed"),
        (lambda: Replace(site, "image", source="prompts"), "source of Replace is a str.*such as pairs.counterfactual"),
        (lambda: Replace(site, "image", source=donors[0]), "source of Replace is a Prompt.*a list of Prompts is"),
        (lambda: Ablate(site, "image", to="mean", reference=[1]), "reference of Ablate is a list; Activations"),
        (lambda: Steer(site, "last", vector=[0.0] * 32), "vector of Steer is a list; a torch tensor is needed"),
        (lambda: Knockout("last", "image", "all"), "layers of Knockout are 'all'; whole numbers are needed"),
        (lambda: Knockout("last", "image", [0.5]), r"layers of Knockout are \(0.5,\); whole numbers are needed"),
        (lambda: Knockout("last", "image", 1, heads=0), "heads of Knockout are 0; whole numbers are needed"),
        (lambda: Ablate(site, "image") & two, together),
        (lambda: run(vlm, prompts, two), f"a list {together}"),
        (lambda: generate(vlm, prompts, tuple(two)), f"a tuple {together}"),
        (lambda: read(vlm, prompts, site, "zero"), "'zero' is not an intervention; Replace, Ablate, Steer, Project"),
    ]  # fmt: skip
    for make, message in cases:
        with pytest.raises(UsageError, match=message):
            make()
    assert Knockout("last", "image", np.int64(2)).each_layer == (2,)
