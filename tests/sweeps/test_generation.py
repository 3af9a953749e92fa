"""Answers generated under many edits at once are those of `generate`, one edit after another, token for token."""

import dataclasses
import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.zoo import BACKENDS
from tests.zoo.batches import batch, pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.benchmark.model_shapes import build, geometry, prompts
from vlm_mech.errors import TooLargeError, UsageError, WorkError
from vlm_mech.interventions.receipt import WriteReceipt
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer, window
from vlm_mech.interventions.trace import Generation, generate
from vlm_mech.interventions.verification import NONE_GENERATED
from vlm_mech.sweeps import generation
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.generation import answers_under
from vlm_mech.sweeps.generation_cost import generation_cost, parts_of, planned_places
from vlm_mech.sweeps.memory import peak_memory
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.schedule import MARGIN

N_NEW, PLENTY = 5, 10**12
OUT_OF_SIGHT = ("cut for the answer", "cut of heads")
"""Edits that cut nothing where a sliding window ends before the picture."""
CPU = torch.device("cpu")


def edits_of(vlm, donors):
    """Every kind of edit of the prompt, and cuts that go on among generated tokens; none of them without an edit."""

    def pushed(name, layer=None):
        site = Site(name, layer)
        width = vlm.width(site)
        return site, torch.randn(width, generator=torch.Generator().manual_seed(width))

    (stream, vector), (projector, other) = pushed("llm.resid_post", 1), pushed("projector.out")
    every = vlm.llm_layers
    return {
        "none": None,
        "swap image": Replace(Site("llm.resid_post", 0), "image", source=donors),
        "swap image later": Replace(Site("llm.resid_post", 2), "image", source=donors),
        "swap question": Replace(Site("llm.resid_pre", 1), "question", source=donors),
        "swap last": Replace(Site("llm.resid_post", 3), "last", source=donors),
        "swap of parts": Replace(Site("llm.attn_out", 1), "image", source=donors),
        "steer": Steer(stream, "image", vector=3 * vector),
        "ablate": Ablate(Site("llm.mlp_out", 1), "question", to="mean"),
        "heads": Ablate(Site("llm.head_out", 2), "last", heads=(1,)),
        "cut": Knockout("question", "image", (0, 1)),
        "cut too": Knockout("question", "image", (0, 1, 3)),
        "cut within": Knockout("image", "image", 0, keep_self=True),
        "cut for the answer": Knockout(("last", "answer"), "image", (0, 3)),
        "cut of the answer": Knockout("answer", "image", every),
        "cut of heads": Knockout(("last", "answer"), "image", every, heads=(1,))
        & Replace(Site("llm.resid_post", 1), "last", source=donors),
        "tower": Steer(projector, "image", vector=other),
        "steer the answer": Steer(stream, ("last", "answer"), vector=vector),
    }


@functools.cache
def by_reference(family, attn, ends):
    """Each edit with what `generate` says under it, those left out that it refuses."""
    vlm = wrapped(family, attn)
    encoded, donors = vlm.encode(batch()), vlm.encode(batch(9))
    found = {}
    with ending(vlm, ends):
        for name, edit in edits_of(vlm, donors).items():
            if family == "gemma3" and name in OUT_OF_SIGHT:
                for way in (
                    generate,
                    lambda vlm, *given, **more: answers_under(Engine(vlm, given[0]), [given[1]], **more),
                ):
                    with pytest.raises(UsageError, match="cuts no edge"):
                        way(vlm, encoded, edit, max_new_tokens=N_NEW)
            else:
                found[name] = edit, generate(vlm, encoded, edit, max_new_tokens=N_NEW)
    return found


@dataclasses.dataclass
class ending:  # noqa: N801 - reads as a word
    """Within the block these tokens end an answer."""

    vlm: object
    ends: object

    def __enter__(self):
        model = self.vlm.model
        configs = [each.generation_config for each in (model, getattr(model, "language_model", None)) if each]
        self.configs = [each for each in configs if each is not None]
        self.before = [each.eos_token_id for each in self.configs]
        for each in self.configs:
            each.eos_token_id = self.ends

    def __exit__(self, *error):
        for each, before in zip(self.configs, self.before, strict=True):
            each.eos_token_id = before


@pytest.mark.usefixtures("few_queries_at_once")
@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_answers_are_those_of_the_reference_token_for_token(family, attn):
    vlm = wrapped(family, attn)
    whole = by_reference(family, attn, None)
    ids = whole["none"][1].ids
    assert len({tuple(each.ids.flatten().tolist()) for _, each in whole.values()}) > 3
    # The second end is said by some versions only, so that answers end apart; rows are padded on the left.
    for ends in (None, (int(ids[0, 2]), int(ids[1, -1]))):
        expected = whole if ends is None else by_reference(family, attn, ends)
        names, engine = list(expected), Engine(vlm, vlm.encode(batch()))
        with ending(vlm, ends):
            found = answers_under(engine, [expected[name][0] for name in names], max_new_tokens=N_NEW)
        for name, said in zip(names, found, strict=True):
            assert torch.equal(said.ids, expected[name][1].ids), name
            assert said.texts == expected[name][1].texts
            assert {each.site for each in said.receipts} == {each.site for each in expected[name][1].receipts}


def test_receipts_are_those_of_the_prompt_and_of_what_is_generated():
    vlm = wrapped("llava_clip")
    encoded, donors = vlm.encode(batch()), vlm.encode(batch(9))
    edits = edits_of(vlm, donors)
    chosen = ["swap last", "cut for the answer", "cut of the answer", "none"]
    swap, cut, later, none = answers_under(Engine(vlm, encoded), [edits[name] for name in chosen], max_new_tokens=4)
    (receipt,) = swap.receipts
    assert isinstance(receipt, WriteReceipt) and receipt.change > 0 and receipt.pass_readout_change > 0
    prompt, generated = cut.receipts[:2], cut.receipts[2:]
    assert (
        [each.site for each in prompt]
        == [each.site for each in generated]
        == [
            "llm.attention[0]",
            "llm.attention[3]",
        ]
    )
    n_image = sum(len(row.image) for row in encoded.rows)
    for each in (*prompt, *generated, *later.receipts):
        assert each.blocked_mass == 0 and 0 < each.natural_mass < 1 and each.n_edges == n_image and each.reaches
    assert len(later.receipts) == 4 and not none.receipts
    # Where all answers end with the first token, nothing is generated that could lose an edge.
    with ending(vlm, [*range(len(vlm.tokenizer))]):
        (said,) = answers_under(Engine(vlm, encoded), [edits["cut of the answer"]], max_new_tokens=4)
    assert said.ids.shape == (2, 1)
    assert all(each.reason == NONE_GENERATED and not each.reaches for each in said.receipts)


def test_one_clean_pass_and_one_batch_serve_all(monkeypatch):
    vlm = wrapped("llava_clip")
    encoded, donors = vlm.encode(batch()), vlm.encode(batch(9))
    edits = list(edits_of(vlm, donors).values())[:-1]
    engine, passes = Engine(vlm, encoded), []
    decoder = vlm.model.get_submodule(vlm.family.decoder)

    def count(module, given, named):
        each = named.get("inputs_embeds")
        passes.append((named["input_ids"] if each is None else each).shape[:2])

    hook = decoder.register_forward_pre_hook(count, with_kwargs=True)
    with ending(vlm, None):
        answers_under(engine, edits, max_new_tokens=3)
    hook.remove()
    # The donor's pass, one for states that it does not record, the image edited before the decoder; then all rows.
    assert [length for _, length in passes].count(1) == 2
    assert passes[-2:] == [(2 * len(edits), 1)] * 2
    assert len(passes) <= 6


def test_rows_leave_when_their_answer_has_ended(monkeypatch):
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch())
    edits = [None, *(Knockout("question", "image", layer) for layer in range(4))]
    with ending(vlm, None):
        whole = torch.stack([each.ids for each in answers_under(Engine(vlm, encoded), edits, max_new_tokens=N_NEW)])
    end = int(whole[0, 0, 1])
    expected = [int(((whole[:, :, :step] != end).all(-1)).sum()) for step in range(1, N_NEW)]
    sizes, real = [], generation.Decoding._next
    monkeypatch.setattr(
        generation.Decoding, "_next", lambda self, tokens, *more: sizes.append(len(tokens)) or real(self, tokens, *more)
    )
    with ending(vlm, end):
        answers_under(Engine(vlm, encoded), edits, max_new_tokens=N_NEW)
    assert sizes == [each for each in expected if each] and len(set(sizes)) > 1


def test_an_engine_over_answers_generates_from_the_prompts_alone():
    vlm, pairs = wrapped("qwen2_vl"), pairs_of(3)
    prompts_alone, answers = vlm.encode(pairs.base), ["red", "blue circle", "red"]
    donors = vlm.encode(pairs.counterfactual)
    answered = vlm.encode(pairs.base, answers)
    edits = [None, Knockout("last", "image", (1, 2)), Replace(Site("llm.resid_post", 1), "image", source=donors)]
    alone = answers_under(Engine(vlm, prompts_alone), edits, max_new_tokens=4)
    engine = Engine(vlm, answered)
    engine.lend(Engine(vlm, vlm.encode(pairs.counterfactual, answers)))
    assert answered.n_pos > prompts_alone.n_pos
    for one, other in zip(alone, answers_under(engine, edits, max_new_tokens=4), strict=True):
        assert torch.equal(one.ids, other.ids)


# The check


def different(monkeypatch, vlm, logits):
    """The reference says other tokens, from these logits on."""
    real = generation.generate

    def other(*given, **options):
        made = real(*given, **{name: value for name, value in options.items() if "output" not in name})
        ids = made.ids.clone()
        ids[0, 0] = 5
        output = type("Output", (), {"logits": [logits] * 9})
        return Generation(("other", *made.texts[1:]), ids, made.receipts, output=output)

    monkeypatch.setattr(generation, "generate", other)


def test_a_difference_from_the_reference_is_an_error_and_a_tie_is_told(monkeypatch):
    vlm = wrapped("llava_clip")
    encoded, edit = vlm.encode(batch()), Knockout("last", "image", 1)
    engine = Engine(vlm, encoded)
    (said,) = answers_under(engine, [edit], max_new_tokens=2, check=[0])
    ours = int(said.ids[0, 0])
    assert ours != 5
    logits = torch.zeros(2, vlm.readout.n_words)
    logits[0, 5], logits[0, ours] = 1.0, 1.0 - 5e-6
    different(monkeypatch, vlm, logits)
    with pytest.warns(UserWarning, match="example 0 says .* the reference 'other'; token 0 is a tie"):
        answers_under(engine, [edit], max_new_tokens=2, check=[0])
    # Not asked, it is not held against the reference.
    answers_under(engine, [edit], max_new_tokens=2)
    logits[0, ours] = 0.9
    with pytest.raises(WorkError, match="token 0 differs, whose logits are 0.1 apart where at most 1e-05 is rounding"):
        answers_under(engine, [edit], max_new_tokens=2, check=[0])


def test_the_reference_engine_and_attention_that_is_no_softmax_go_one_by_one(monkeypatch):
    vlm = wrapped("llava_clip")
    encoded, asked = vlm.encode(batch()), []
    real = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *given, **more: asked.append(1) or real(*given, **more))
    edits = [None, Knockout("last", "image", 1)]
    first = answers_under(Reference(vlm, encoded), edits, max_new_tokens=2)
    engine = Engine(vlm, encoded)
    engine.clean.blocks[2].plain = False
    with pytest.warns(UserWarning, match="no plain softmax"):
        second = answers_under(engine, edits, max_new_tokens=2)
    assert len(asked) == 4 and [each.texts for each in first] == [each.texts for each in second]


# What it costs


@functools.cache
def middling(attn="sdpa"):
    shape = dataclasses.replace(geometry("llava15", width=256), n_layers=5)
    vlm = build(shape, attn=attn)
    assert vlm.readout.cap is None
    vlm.model.generation_config.eos_token_id = None
    return vlm, vlm.encode(prompts(shape, 2)), vlm.encode(prompts(shape, 2, seed=9))


def kinds(vlm, donors):
    layers = vlm.llm_layers
    return {
        "cut": [
            Knockout((query, "answer"), "image", window(layer, 3, n_layers=len(layers)))
            for layer in layers
            for query in ("last", "question")
        ],
        "swap": [
            Replace(Site("llm.resid_post", layer), span, source=donors)
            for layer in layers
            for span in ("image", "question", "last")
        ],
        "write": [Ablate(Site("llm.resid_pre", layer), "image") for layer in layers],
    }


@pytest.mark.parametrize(("attn", "kind"), [("eager", "cut"), ("eager", "swap"), ("eager", "write"), ("sdpa", "write")])
def test_peak_and_operations_are_foreseen(attn, kind):
    vlm, encoded, donors = middling(attn)
    edits, engine = kinds(vlm, donors)[kind], Engine(vlm, encoded, PLENTY)
    engine.lend(Engine(vlm, donors, PLENTY))
    cost = generation_cost(vlm, encoded, edits, 12, held=0, budget=PLENTY)
    with FlopCounterMode(display=False) as counter, peak_memory(CPU) as peak:
        answers_under(engine, [None, *edits], max_new_tokens=12)
    assert 0.8 <= cost.peak_bytes / peak.bytes <= 1.2
    # Operations of the fused kernel are not counted on a CPU.
    assert attn == "sdpa" or cost.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_budget_parts_the_versions_and_what_is_said_is_the_same():
    vlm, encoded, donors = middling()
    edits = [None, *kinds(vlm, donors)["write"]]
    free = answers_under(Engine(vlm, encoded, PLENTY), edits, max_new_tokens=4)
    engine = Engine(vlm, encoded, PLENTY)
    places = [None, *planned_places(vlm, encoded, edits[1:])]
    one = generation_cost(vlm, encoded, edits[1:2], 4, held=engine.held, budget=PLENTY).peak_bytes
    budget = int(1.3 * MARGIN["cpu"] * one)
    parts = parts_of(engine.size, places, 4, held=engine.held, budget=budget)
    assert len(parts) > 1 and sorted(number for part in parts for number in part) == list(range(len(edits)))
    with peak_memory(CPU) as peak:
        bound = answers_under(Engine(vlm, encoded, budget), edits, max_new_tokens=4)
    assert peak.bytes <= budget
    assert all(torch.equal(each.ids, other.ids) for each, other in zip(free, bound, strict=True))
    with pytest.raises(TooLargeError, match="the budget is"):
        answers_under(Engine(vlm, encoded, int(0.7 * MARGIN["cpu"] * one)), edits, max_new_tokens=4)
