"""Generation with edits equals a loop of whole edited forwards on the growing text, whatever its passes hold."""

import dataclasses
import functools

import pytest
import torch

from tests.helpers import some_long
from tests.zoo import ZOO
from tests.zoo.batches import batch, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.span import Each, Positions
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer
from vlm_mech.interventions.trace import generate, run

FAMILIES = ("llava_clip", "qwen2_5_vl", "qwen3_vl", "gemma3")
N_NEW, ROUNDING = 3, 5e-5
GREEDY = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 8},
    "several sequences": {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0},
}


def edits(vlm, encoded, donors, prompt, generated):
    """Named edits, given what stands for a span of the prompt and for the generated tokens (None: not yet any)."""

    def span(name):
        return prompt(name) if generated is None else (prompt(name), generated)

    def pushed(site):
        width = vlm.width(site)
        return torch.randn(width, generator=torch.Generator().manual_seed(width))

    swap = Replace(Site("llm.resid_pre", 1), prompt("image"), source=donors, source_span="image")
    both, tower = Site("llm.resid_post", 1), Site("projector.out")
    steer = Steer(both, span("question"), vector=pushed(both)) & Steer(tower, "image", vector=pushed(tower))
    first = Steer(Site("llm.resid_post", 0), prompt("image"), vector=pushed(both))
    ablated = first if generated is None else first & Ablate(Site("llm.mlp_out", 1), generated)
    cut = Knockout(span("question"), prompt("image"), (0, 2))
    found = {"replace": swap, "steer": steer, "cut": cut, "ablate": ablated}
    return found | {"together": swap & steer & cut & ablated}


def grown(vlm, encoded, new):
    """The batch with these tokens after its prompts, as one longer prompt."""
    inputs, n_new = dict(encoded.inputs), new.shape[1]
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            tail = new if key == "input_ids" else torch.full_like(new, key == "attention_mask")
            inputs[key] = torch.cat([inputs[key], tail.to(inputs[key].dtype)], 1)
    places = tuple(range(encoded.n_pos, encoded.n_pos + n_new))
    rows = tuple(
        dataclasses.replace(
            row,
            tokens=row.tokens + ("new",) * n_new,
            present=row.present + places,
            offsets=row.offsets + ((0, 0),) * n_new,
        )
        for row in encoded.rows
    )
    return dataclasses.replace(encoded, inputs=inputs, rows=rows, known={})


def whole_logits(vlm, encoded, donors, name, ids):
    """Next-token logits at every step of these answers (one a prompt), each from one whole edited forward."""
    spans = {
        span: Each(tuple(Positions(encoded.positions(span, row)) for row in range(len(encoded))))
        for span in ("image", "question")
    }
    found = []
    for n_new in range(ids.shape[1]):
        longer = grown(vlm, encoded, ids[:, :n_new]) if n_new else encoded
        new = Positions(tuple(range(encoded.n_pos, encoded.n_pos + n_new))) if n_new else None
        edit = edits(vlm, longer, donors, spans.__getitem__, new)[name]
        found.append(run(vlm, longer, edit).last)
    return torch.stack(found, 1)


@functools.cache
def asked(family):
    vlm = wrapped(family)
    return vlm, vlm.encode(batch()), vlm.encode(batch(9))


def common(vlm):
    # Random models would say a picture's token, which has no picture.
    pictures = [vlm.config.image_token_id, *(getattr(vlm.config, f"{kind}_token_id", None) or 0 for kind in ("video",))]
    return {"max_new_tokens": N_NEW, "eos_token_id": None, "suppress_tokens": pictures, "return_dict_in_generate": True}


def edited(vlm, encoded, donors, name):
    return edits(vlm, encoded, donors, str, "generated")[name]


WAYS = [(family, way) for way in GREEDY for family in FAMILIES]
EACH_WAY = [
    *(("llava_clip", way) for way in GREEDY), ("qwen2_5_vl", "no cache"), ("qwen2_5_vl", "several sequences"),
    ("qwen3_vl", "dynamic cache"), ("qwen3_vl", "chunks"), ("gemma3", "static cache"), ("gemma3", "chunks"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "way"), some_long(WAYS, EACH_WAY))
def test_generation_equals_whole_edited_forwards(family, way):
    vlm, encoded, donors = asked(family)
    if way == "chunks" and family == "gemma3":
        with pytest.raises(UsageError, match="cannot take its prompt in chunks"):
            generate(vlm, encoded, edited(vlm, encoded, donors, "steer"), **common(vlm), **GREEDY[way])
        return
    plain = generate(vlm, encoded, **common(vlm), **GREEDY[way], output_logits=True)
    for name in ("replace", "steer", "ablate", "cut", "together"):
        torch.manual_seed(3)
        made = generate(
            vlm, encoded, edited(vlm, encoded, donors, name), **common(vlm), **GREEDY[way], output_logits=True
        )
        copies = GREEDY[way].get("num_return_sequences", 1)
        assert made.prompts == tuple(prompt for prompt in range(2) for _ in range(copies))
        logits = torch.stack(made.output.logits, 1)
        for copy in range(copies):
            whole = whole_logits(vlm, encoded, donors, name, made.ids[copy::copies])
            assert (logits[copy::copies] - whole).abs().max() <= ROUNDING * max(1.0, whole.abs().max().item()), name
        assert (logits[:, 0] - torch.stack(plain.output.logits, 1)[:, 0]).abs().max() > 1e-3
        for receipt in made.receipts:
            decoder = receipt.site.startswith("llm")
            assert receipt.rows == tuple((row, row // copies) for row in range(2 * copies)) or not decoder
    if copies > 1:
        assert len({tuple(each) for each in made.ids[:copies].tolist()}) > 1


BEAMS = [(family, way) for way in ("dynamic cache", "static cache", "no cache") for family in FAMILIES]
SOME_BEAMS = [
    ("llava_clip", "dynamic cache"), ("qwen2_5_vl", "static cache"), ("qwen3_vl", "dynamic cache"),
    ("gemma3", "no cache"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "way"), some_long(BEAMS, SOME_BEAMS))
def test_beams_are_scored_as_whole_edited_forwards_score_them(family, way):
    vlm, encoded, donors = asked(family)
    made = generate(
        vlm,
        encoded,
        edited(vlm, encoded, donors, "together"),
        **common(vlm),
        **GREEDY[way],
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        output_scores=True,
    )
    assert made.prompts == (0, 0, 1, 1) and all((5, 1) in each.rows for each in made.receipts if "llm" in each.site)
    for copy in range(2):
        ids = made.ids[copy::2]
        scores = whole_logits(vlm, encoded, donors, "together", ids).log_softmax(-1)
        total = scores.gather(2, ids[:, :, None]).sum((1, 2))
        assert (total - made.output.sequences_scores[copy::2]).abs().max() <= 1e-4
    assert (made.output.sequences_scores[0::2] > made.output.sequences_scores[1::2]).all()


def test_beams_that_the_checkpoint_ships_are_mapped_to_their_prompts():
    """Three counterfactual pairs: the answers under a swap are those of the donors, with beams and without."""
    from vlm_mech import VLM, load_pairs

    vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour-conflict", n=3)
    swap = Replace(Site("llm.resid_pre", 0), "image", source=pairs.counterfactual)
    right = generate(vlm, pairs.base, swap, max_new_tokens=3).texts
    assert generate(vlm, pairs.base, swap, max_new_tokens=3, num_beams=2).texts == right
    sequences = generate(vlm, pairs.base, swap, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert sequences.texts[::2] == right and sequences.prompts == (0, 0, 1, 1, 2, 2)
    assert generate(vlm, pairs.base, swap, max_new_tokens=3, use_cache=False).texts == right


SHIPPED = {"repetition_penalty": 1.8, "num_beams": 2, "do_sample": True, "temperature": 9.0, "suppress_tokens": [5]}


def test_nothing_but_the_meaning_of_tokens_is_taken_from_the_checkpoint():
    from tests.zoo.tiny import tiny_model, tiny_processor
    from vlm_mech.behaviour.decoding.processors import decode
    from vlm_mech.models.vlm import VLM

    vlm = VLM(tiny_model(), tiny_processor(), check=False)
    encoded, more = vlm.encode(batch()), {"max_new_tokens": 6, "eos_token_id": None}
    plain = generate(vlm, encoded, **more)
    first = plain.ids[:, 0].tolist()
    assert first == run(vlm, encoded).last.argmax(-1).tolist() and plain.settings == {"max_new_tokens": 6}
    for name, value in (SHIPPED | {"use_cache": False, "num_return_sequences": 1}).items():
        setattr(vlm.model.generation_config, name, value)
    for way in (generate, lambda *given, **named: decode(*given, **named)):
        made = way(vlm, encoded, **more)
        assert torch.equal(made.ids, plain.ids) and made.settings == {"max_new_tokens": 6}
    assert vlm.settings_set_aside == SHIPPED | {"use_cache": False}
    torch.manual_seed(1)
    own = generate(vlm, encoded, **more, settings="checkpoint")
    torch.manual_seed(1)
    with torch.no_grad():
        theirs = vlm.model.generate(**encoded.generation_inputs, **more)[:, encoded.n_pos :]
    assert torch.equal(own.ids, theirs) and not torch.equal(own.ids, plain.ids)
    assert own.settings == SHIPPED | {"use_cache": False, "top_k": 50, "max_new_tokens": 6}
    penalised = generate(vlm, encoded, **more, repetition_penalty=1.8)
    assert penalised.settings == {"max_new_tokens": 6, "repetition_penalty": 1.8}
    with pytest.raises(UsageError, match="settings='theirs' is not known; use neutral or checkpoint"):
        generate(vlm, encoded, settings="theirs")


def test_sampling_draws_from_the_whole_distribution():
    vlm, encoded, _ = asked("llava_clip")
    made = generate(vlm, encoded, max_new_tokens=1, do_sample=True, temperature=50.0, num_return_sequences=200)
    assert len(set(made.ids[:200, 0].tolist())) > 50, "no top_k of 50"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation is not supported"),
        ({"guidance_scale": 2.0}, "guidance_scale runs the model outside"),
        ({"past_key_values": object()}, "'past_key_values' is given by the prompts"),
        ({"num_beams": 1, "num_return_sequences": 2}, "generate refuses its options"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_name(options, message):
    vlm, encoded, donors = asked("llava_clip")
    with pytest.raises(UsageError, match=message):
        generate(vlm, encoded, edited(vlm, encoded, donors, "steer"), max_new_tokens=3, **options)


def test_a_pass_beside_the_generation_is_not_taken_for_one_of_its_own():
    vlm, encoded, donors = asked("llava_clip")

    def beside(ids, scores):
        with torch.no_grad():
            vlm.model(input_ids=ids[:, -1:])
        return scores

    with pytest.raises(WorkError, match="does not follow one of 2 prompts x 1 rows"):
        generate(vlm, encoded, edited(vlm, encoded, donors, "steer"), max_new_tokens=3, logits_processor=[beside])


def test_the_zoo_prepares_pictures_before_the_first_pass():
    import inspect

    assert all("mm_encoder_outputs" in inspect.signature(wrapped(name).model.forward).parameters for name in ZOO)
