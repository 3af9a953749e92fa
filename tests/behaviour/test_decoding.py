"""Contrastive decoding: the formulas by hand, the second branch against whole forwards, and the experiment."""

import dataclasses
import functools
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessor, LogitsProcessorList

from experiments import decode as experiment
from tests.helpers import assert_help_tells, command, killed_at, some_long
from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.answering.asked_options import Template
from vlm_mech.behaviour.answering.without_image import without_images
from vlm_mech.behaviour.decoding import both_pictures, data, findings, first_pass, study
from vlm_mech.behaviour.decoding import processors as decoding_processors
from vlm_mech.behaviour.decoding.data import GREEDY, TEST, VALIDATION, Setting
from vlm_mech.behaviour.decoding.first_pass import FirstPass
from vlm_mech.behaviour.decoding.processors import (
    M3ID,
    VCD,
    Branch,
    Dependency,
    Drawn,
    decode,
    diffused,
    hellinger,
    kept_share,
    noised,
    seeds_of,
)
from vlm_mech.behaviour.decoding.study import OWN, STRANGER, USUAL, WHOLE
from vlm_mech.data.pairs import Pair, Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.specification import Ablate, Knockout, Replace
from vlm_mech.interventions.trace import Generation, generate
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw

SEEDS = (1, 2, 3)
N_NEW = 5
BOTH = ("llava_clip", "llava_siglip_mistral", "llava_next_mistral", "qwen2_vl", "glm4v", "gemma3", "idefics3")
NEEDS_IMAGE = ("paligemma", "instructblip", "blip2")
"""Families that cannot run without a picture."""
CASES = [(name, kind) for name in BOTH for kind in ("M3ID", "VCD")] + [(name, "VCD") for name in NEEDS_IMAGE]
EACH_KIND = ("llava_clip", "qwen2_vl", "gemma3", "blip2")
CASES = some_long(CASES, [(name, kind) for name, kind in CASES if name in EACH_KIND])


@functools.cache
def batch(name: str):
    """A model of the family, and three questions of unequal length about pictures of unequal shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = VLM(*ZOO[name]("sdpa", 0), check=False)
    questions = ("what colour is the circle?", "is the red star left of the blue circle?", "what is this?")
    shapes = ((56, 56), (80, 56), (56, 96))
    prompts = [Prompt(each, picture(n, *shapes[n])) for n, each in enumerate(questions)]
    return wrapped, wrapped.encode(prompts)


def processor(kind: str, wrapped, encoded, seeds=SEEDS, **options):
    return M3ID(wrapped, encoded, **options) if kind == "M3ID" else VCD(wrapped, encoded, seeds=seeds, **options)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# Formulas


def test_m3id_by_hand():
    rng = np.random.default_rng(0)
    seen, unseen = rng.normal(size=(4, 7)), rng.normal(size=(4, 7))
    # The best token of rows 0 and 1 is surer than alpha.
    seen[0, 2], seen[1, 5] = 9.0, 6.0
    given = [torch.tensor(each) for each in (seen, unseen)]
    ours = decoding_processors.m3id(*given, alpha=0.6, rate=0.15, t=3).numpy()
    one, other = log_softmax(seen), log_softmax(unseen)
    weight = (1 - np.exp(-0.45)) / np.exp(-0.45)
    unsure = one.max(-1) < np.log(0.6)
    assert unsure.tolist() == [False, False, True, True]
    assert np.allclose(ours, one + unsure[:, None] * weight * (one - other), atol=1e-5)
    for alpha, rate, t in ((0.6, 0.0, 5), (0.0, 2.0, 5), (0.6, 0.15, 0)):
        assert np.allclose(decoding_processors.m3id(*given, alpha=alpha, rate=rate, t=t).numpy(), one, atol=1e-6)


def test_m3id_grows_as_told_and_stays_finite():
    seen, unseen = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    plain = torch.log_softmax(seen, -1)
    gap = (plain - torch.log_softmax(unseen, -1))[0, 0].item()
    changes = [(decoding_processors.m3id(seen, unseen, alpha=1, t=t) - plain)[0, 0].item() / gap for t in range(6)]
    assert np.allclose(changes, [0, 0.162, 0.350, 0.568, 0.822, 1.117], atol=5e-4)
    assert decoding_processors.m3id(seen, unseen, alpha=1, t=10**6).isfinite().all()
    ruled_out = decoding_processors.m3id(
        torch.tensor([[1.0, 0.9, -torch.inf]]), torch.tensor([[0.0, 1.0, 1.0]]), alpha=1, t=2
    )
    assert ruled_out[0].isfinite().tolist() == [True, True, False] and ruled_out[0, 2] == -torch.inf


def test_vcd_by_hand():
    seen = torch.tensor([[2.0, 1.0, -0.4, -5.0], [0.0, 0.0, 0.0, 3.0]])
    noised_logits = torch.tensor([[3.0, -1.0, 0.0, -50.0], [1.0, 0.0, 0.0, 0.0]])
    ours = decoding_processors.vcd(seen, noised_logits, strength=1.0, cutoff=0.1)
    # log 0.1 = -2.303: in row 0 the third token is 2.4 below the best, in row 1 all others are 3 below.
    assert ours.tolist() == [[1.0, 3.0, -np.inf, -np.inf], [-np.inf, -np.inf, -np.inf, 6.0]]
    free = decoding_processors.vcd(seen, noised_logits, strength=0.5, cutoff=0.0)
    assert torch.allclose(free, 1.5 * seen - 0.5 * noised_logits)
    assert torch.equal(decoding_processors.vcd(seen, noised_logits, strength=0, cutoff=0), seen)


def test_hellinger_by_hand():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(5, 9)), rng.normal(size=(5, 9))
    first, second = np.exp(log_softmax(one)), np.exp(log_softmax(other))
    expected = [
        np.sqrt(1 - sum(np.sqrt(p * q) for p, q in zip(*row, strict=True))) for row in zip(first, second, strict=True)
    ]
    assert np.allclose(hellinger(torch.tensor(one), torch.tensor(other)).numpy(), expected, atol=1e-5)
    same = torch.randn(2, 4)
    assert hellinger(same, same + 3).abs().max() < 1e-6
    apart = torch.tensor([[0.0, -torch.inf]])
    assert hellinger(apart, apart.flip(-1)).item() == pytest.approx(1)


def test_diffusion_has_its_known_ends():
    by_hand = 1.0
    for t in range(501):
        by_hand *= 1 - (1 / (1 + np.exp(6 - 12 * t / 999)) * (5e-3 - 1e-5) + 1e-5)
    assert kept_share(500) == pytest.approx(by_hand, rel=1e-9)
    assert 1 - kept_share(0) == pytest.approx(4.99e-3 / (1 + np.exp(6)) + 1e-5) and kept_share(0) > 0.9999
    shares = [kept_share(step) for step in range(0, 1000, 111)]
    assert shares == sorted(shares, reverse=True) and 0.05 < kept_share(999) < 0.1
    pixels = torch.randn(3, 200, 200, generator=torch.Generator().manual_seed(0))
    for step in (0, 500, 999):
        now = noised(pixels, step=step, seed=1)
        assert now.var().item() == pytest.approx(1, abs=0.02)
        assert torch.corrcoef(torch.stack([now.ravel(), pixels.ravel()]))[0, 1].item() == pytest.approx(
            kept_share(step) ** 0.5, abs=0.01
        )


@pytest.mark.parametrize("name", ["llava_clip", "llava_next_mistral", "qwen2_vl", "idefics3", "mistral3"])
def test_noise_does_not_depend_on_the_batch(name):
    wrapped, encoded = batch(name)
    together = diffused(wrapped, encoded, seeds=SEEDS)
    assert not torch.equal(together, encoded.inputs["pixel_values"])
    start = 0
    for prompt, seed in zip(encoded.prompts, SEEDS, strict=True):
        alone = diffused(wrapped, wrapped.encode(prompt), seeds=[seed])
        place = (slice(start, start + len(alone)), *(slice(size) for size in alone.shape[1:]))
        assert torch.equal(together[place], alone)
        start += len(alone)
    assert start == len(together)


def test_draws_follow_the_softmax_and_not_the_batch(vlm):
    encoded = vlm.encode([Prompt("what is this?", picture(n)) for n in range(3)])
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -torch.inf]]).expand(3, 5)
    ids, counts = encoded.inputs["input_ids"], np.zeros(5)
    for seed in range(700):
        scores = Drawn(encoded, seeds=[3 * seed, 3 * seed + 1, 3 * seed + 2])(ids, logits)
        counts += np.bincount(scores.argmax(-1), minlength=5)
    expected = np.exp(log_softmax(logits[0, :4].double().numpy())) * counts.sum()
    assert counts[4] == 0 and chisquare(counts[:4], expected).pvalue > 0.01
    whole = Drawn(encoded, seeds=SEEDS)(ids, logits)
    alone = Drawn(vlm.encode(encoded.prompts[1]), seeds=[2])
    short = alone._n_pos
    assert torch.equal(alone(ids[:1, :short], logits[:1])[0], whole[1])
    later = Drawn(encoded, seeds=SEEDS)(torch.cat([ids, ids[:, :1]], 1), logits)
    assert not torch.equal(later[:, :4], whole[:, :4])


# The second branch


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_without_weight_it_is_greedy(name, kind):
    wrapped, encoded = batch(name)
    plain = decode(wrapped, encoded, max_new_tokens=N_NEW)
    for options in (
        ({"rate": 0.0, "alpha": 1.0}, {"alpha": 0.0, "rate": 2.0}) if kind == "M3ID" else ({"strength": 0.0},)
    ):
        nothing = processor(kind, wrapped, encoded, **options)
        assert torch.equal(decode(wrapped, encoded, [nothing], max_new_tokens=N_NEW).ids, plain.ids)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_branch_is_a_whole_forward_on_the_growing_text(name, kind, monkeypatch):
    wrapped, encoded = batch(name)
    contrasting = processor(
        kind, wrapped, encoded, **({"alpha": 1, "rate": 0.7} if kind == "M3ID" else {"strength": 2})
    )
    follow, logits = contrasting.branch.follow, []
    monkeypatch.setattr(contrasting.branch, "follow", lambda ids: logits.append(follow(ids)) or logits[-1])
    ids = decode(wrapped, encoded, [contrasting], max_new_tokens=N_NEW, eos_token_id=-1).ids
    assert len(logits) == N_NEW
    for row, prompt in enumerate(encoded.prompts):
        alone = wrapped.encode(prompt)
        if kind == "M3ID":
            inputs = without_images(wrapped, alone).inputs
        else:
            inputs = alone.inputs | {"pixel_values": diffused(wrapped, alone, seeds=[SEEDS[row]])}
        for step in range(N_NEW):
            with torch.no_grad():
                whole = wrapped.model(**grown(inputs, ids[row : row + 1, :step], name), use_cache=False).logits[0, -1]
            assert (whole - logits[step][row]).abs().max() <= 1e-4


def grown(inputs, new, name):
    """The inputs of one prompt with generated tokens after it, which are text."""
    more = {key: value for key, value in inputs.items() if key != "position_ids"}
    more["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            # PaliGemma marks generated tokens by 1, its prompt by 0.
            kinds = torch.full_like(new, int(name == "paligemma"))
            more[key] = torch.cat([inputs[key], kinds.to(inputs[key].dtype)], 1)
    return more


class Forced(LogitsProcessor):
    """Makes `generate` take these tokens, and keeps the scores it came with."""

    def __init__(self, ids, n_pos):
        self.ids, self.n_pos, self.scores = ids, n_pos, []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        wanted = self.ids[:, input_ids.shape[1] - self.n_pos, None]
        return torch.full_like(scores, -1e9).scatter_(1, wanted, 0.0)


EDITS = {
    "replace": Replace(
        Site("llm.resid_post", 0), "image", source=[Prompt("what is this?", picture(8 + n, 56, 56)) for n in range(2)]
    ),
    "ablate": Ablate(Site("llm.mlp_out", 1), "generated"),
    "cut": Knockout(query="last", key="image", layers=(0, 1)),
    "cut generated": Knockout(query="generated", key="image", layers=(0, 1)),
}


@pytest.mark.parametrize("name", ["llava_clip", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize("kind", ["M3ID", "VCD"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_intervention_acts_on_what_is_generated_and_not_on_what_it_is_held_against(name, kind, edit, monkeypatch):
    wrapped, _ = batch(name)
    encoded = wrapped.encode([Prompt("what is this?", picture(n, 56, 56)) for n in range(2)])
    intervention, seeds = EDITS[edit], SEEDS[:2]
    contrasting = processor(
        kind, wrapped, encoded, seeds, **({"alpha": 1, "rate": 0.7} if kind == "M3ID" else {"strength": 2})
    )
    follow, seen = contrasting.branch.follow, []
    monkeypatch.setattr(contrasting.branch, "follow", lambda ids: seen.append((ids, follow(ids))) or seen[-1][1])
    given, real = [], type(contrasting).__call__
    monkeypatch.setattr(
        type(contrasting), "__call__", lambda self, ids, scores: given.append(scores.clone()) or real(self, ids, scores)
    )
    options = {"max_new_tokens": N_NEW, "eos_token_id": -1}
    made = generate(wrapped, encoded, intervention, logits_processor=LogitsProcessorList([contrasting]), **options)
    forced = Forced(made.ids, encoded.n_pos)
    again = generate(wrapped, encoded, intervention, logits_processor=LogitsProcessorList([forced]), **options)
    assert torch.equal(again.ids, made.ids) and len(seen) > N_NEW
    # What is held against the edited run is the plain model's, in every step.
    plain = Branch(wrapped, encoded, contrasting.branch._inputs)
    for step in range(N_NEW):
        assert torch.equal(given[step], forced.scores[step])
        assert torch.equal(plain.follow(seen[step][0]), seen[step][1])


@pytest.mark.parametrize("kind", ["M3ID", "VCD"])
def test_a_batch_answers_as_its_prompts_do_alone(kind):
    wrapped, encoded = batch("qwen2_vl")
    options = {"alpha": 1, "rate": 0.5} if kind == "M3ID" else {"strength": 2.0}
    free = decode(wrapped, encoded, [processor(kind, wrapped, encoded, **options)], max_new_tokens=8).ids
    # One row ends after its third token, the others go on.
    end = int(free[0, 2])
    together = decode(
        wrapped, encoded, [processor(kind, wrapped, encoded, **options)], max_new_tokens=8, eos_token_id=end
    )
    for row, prompt in enumerate(encoded.prompts):
        alone = wrapped.encode(prompt)
        only = processor(kind, wrapped, alone, seeds=SEEDS[row : row + 1], **options)
        ids = decode(wrapped, alone, [only], max_new_tokens=8, eos_token_id=end).ids[0]
        assert torch.equal(together.ids[row, : len(ids)], ids)
        assert set(together.ids[row, len(ids) :].tolist()) <= {wrapped.tokenizer.pad_token_id, end}
    assert (together.ids[0] == end).any()


def test_a_processor_begins_anew_with_every_generate():
    wrapped, encoded = batch("qwen2_vl")
    one = M3ID(wrapped, encoded, alpha=1, rate=0.5)
    first, second = (decode(wrapped, encoded, [one], max_new_tokens=N_NEW).ids for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, decode(wrapped, encoded, max_new_tokens=N_NEW).ids)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_t_counts_tokens_from_the_start(start):
    wrapped, encoded = batch("llava_clip")
    contrasting = M3ID(wrapped, encoded, alpha=1, rate=0.4, start=start)
    ids, scores = encoded.inputs["input_ids"], torch.randn(3, len(wrapped.tokenizer))
    for step in range(3):
        unseen = Branch(wrapped, encoded, without_images(wrapped, encoded).inputs)
        for length in range(encoded.n_pos, ids.shape[1] + 1):
            last = unseen.follow(ids[:, :length])
        expected = decoding_processors.m3id(scores, last, alpha=1, rate=0.4, t=start + step)
        assert torch.equal(contrasting(ids, scores), expected)
        assert torch.equal(expected, torch.log_softmax(scores, -1)) == (start + step == 0)
        ids = torch.cat([ids, torch.full((3, 1), 7 + step)], 1)


def test_vcd_without_weight_samples_as_the_model_does():
    wrapped, encoded = batch("llava_clip")
    drawn = []
    for processors in (
        [],
        [VCD(wrapped, encoded, seeds=SEEDS, strength=0, cutoff=0)],
        [VCD(wrapped, encoded, seeds=SEEDS)],
    ):
        torch.manual_seed(5)
        drawn.append(decode(wrapped, encoded, processors, max_new_tokens=6, do_sample=True, eos_token_id=-1).ids)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    ours = [
        decode(wrapped, encoded, [*first, Drawn(encoded, seeds=SEEDS)], max_new_tokens=6).ids
        for first in ([], [VCD(wrapped, encoded, seeds=SEEDS, strength=0, cutoff=0)])
    ]
    assert torch.equal(*ours) and not torch.equal(ours[0], decode(wrapped, encoded, max_new_tokens=6).ids)


def test_dependency_is_measured_along_the_plain_answer():
    wrapped, encoded = batch("llava_clip")
    watch = Dependency(wrapped, encoded)
    ids = decode(wrapped, encoded, [watch], max_new_tokens=3, eos_token_id=-1).ids
    assert torch.equal(ids, decode(wrapped, encoded, max_new_tokens=3, eos_token_id=-1).ids)
    for row, prompt in enumerate(encoded.prompts):
        alone = wrapped.encode(prompt)
        bare = without_images(wrapped, alone)
        for step in range(3):
            with torch.no_grad():
                both = [grown(each.inputs, ids[row : row + 1, :step], "") for each in (alone, bare)]
                pair = [wrapped.model(**each, use_cache=False).logits[:, -1] for each in both]
            assert watch.steps[step][row].item() == pytest.approx(hellinger(*pair).item(), abs=1e-5)


# Wrong use


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("M3ID", {"alpha": 1.2}, "alpha is 1.2; a probability"),
        ("M3ID", {"alpha": -0.1}, "alpha is -0.1; a probability"),
        ("M3ID", {"rate": -1.0}, "lambda is -1.0; it must be 0 or more"),
        ("M3ID", {"start": -1}, "t begins at -1; it must be 0 or more"),
        ("VCD", {"strength": -1.0}, "a is -1.0; it must be 0 or more"),
        ("VCD", {"cutoff": 1.5}, "b is 1.5; a share"),
        ("VCD", {"step": 1000}, "noise step 1000 is out of range; one of 0 to 999"),
        ("VCD", {"step": -1}, "noise step -1 is out of range"),
        ("VCD", {"seeds": (1,)}, r"1 seed\(s\) for 3 prompts"),
    ],
)
def test_values_out_of_range_are_refused(kind, options, message):
    with pytest.raises(UsageError, match=message):
        processor(kind, *batch("llava_clip"), **options)


@pytest.mark.parametrize("name", NEEDS_IMAGE)
def test_models_that_need_a_picture_are_refused(name):
    for made in (M3ID, Dependency):
        with pytest.raises(UsageError, match="cannot run without an image") as caught:
            made(*batch(name))
        assert "\n" not in str(caught.value)


def test_beams_other_prompts_and_no_picture_are_refused():
    wrapped, encoded = batch("llava_clip")
    contrasting = M3ID(wrapped, encoded)
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(UsageError, match="contrastive decoding takes no beams"):
            decode(wrapped, encoded, [contrasting], max_new_tokens=2, **options)
    other = wrapped.encode([Prompt("is the red star left of the circle?", picture(n)) for n in range(3)])
    with pytest.raises(UsageError, match="give generate the same batch"):
        decode(wrapped, other, [contrasting], max_new_tokens=2)
    bare = wrapped.encode([Prompt("what is this?")])
    with pytest.raises(UsageError, match="nothing that could be left out"):
        M3ID(wrapped, bare)
    with pytest.raises(UsageError, match="nothing to diffuse"):
        VCD(wrapped, bare, seeds=[1])


def test_raw_texts_lose_their_placeholder():
    wrapped, _ = batch("llava_clip")
    prompt = Prompt("what is this?", picture(1), text="USER: <image> what is this? ASSISTANT:")
    bare = without_images(wrapped, wrapped.encode(prompt))
    assert bare.prompts[0].text == "USER:  what is this? ASSISTANT:" and not bare.prompts[0].images


# The study


def pairs_of(n: int, groups: int | None = None) -> Pairs:
    made = [
        Pair(f"p{k}", picture(k), picture(k + 100), "what colour is the circle?", "red", "blue",
             None if groups is None else f"g{k % groups}")
        for k in range(n)
    ]  # fmt: skip
    return Pairs("some", tuple(made))


def test_mcnemar_by_hand():
    greedy, other = Setting(), Setting("M3ID", 1.0)
    truth = {greedy: [0, 0, 0, 0, 1, 1, 0], other: [1, 1, 1, 1, 0, 1, 0]}
    answers = {
        (study.OWN, setting.method, setting.dose): pd.DataFrame({"truth": values}, dtype=float)
        for setting, values in truth.items()
    }
    found, same = study.against_greedy(answers, [other, greedy])
    assert (found.only_one, found.only_other) == (4, 1) and found.p == pytest.approx(2 * (1 + 5) / 2**5)
    assert found.p_corrected == pytest.approx(2 * found.p)
    assert (same.only_one, same.only_other, same.p) == (0, 0, 1.0)


def test_the_choice_looks_at_validation_alone_and_changes_little():
    settings = [Setting(), *(Setting("M3ID", rate, alpha) for alpha in (0.6, 1.0) for rate in (0.0, 0.5, 1.0))]
    truths = {(0.6, 0.0): 1.0, (0.6, 0.5): 0.5, (0.6, 1.0): 0.8, (1.0, 0.0): 1.0, (1.0, 0.5): 0.8, (1.0, 1.0): 0.8}
    rows = [
        {"split": split, "picture": OWN, "method": each.method, "dose": each.dose,
         "truth": truths.get((each.alpha, each.dose), 0.0) if split == VALIDATION else float(each.dose == 1.0)}
        for split in (VALIDATION, TEST) for each in settings
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    chosen = study.chosen(table.assign(exact=table["truth"]), settings)
    assert chosen == [Setting("M3ID", 0.5, 1.0)]
    assert study.chosen(table.assign(exact=0.0), settings) == chosen, "a model that answers in sentences"
    derailed = table["truth"].where(table["dose"] < 1, 0.1).where(table["method"] != settings[-1].method, 0.3)
    assert study.chosen(table.assign(exact=derailed), settings) == [Setting("M3ID", 0.5, 0.6)]
    tested = study.tested(chosen)
    assert tested[0] == Setting() and Setting("M3ID", 0.15, 0.6) in tested and Setting("M3ID", 0.0, 1.0) in tested
    assert len(set(tested)) == len(tested)


def test_answers_that_are_over_count_no_more(vlm):
    ids = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 2], [2, 0, 0, 0]])
    assert vlm.model.generation_config.eos_token_id == 2
    going = study.alive(vlm, Generation(("", "", ""), ids))
    assert going.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_answers_do_not_depend_on_the_batch(vlm):
    pairs, options = pairs_of(4), data.Options(max_new_tokens=3)
    settings = [Setting(), Setting("VCD", 2.0, sampled=True), Setting("M3ID", 1.0, 1.0, sampled=True)]
    given = {"split": TEST, "options": options, "dependency": True}
    whole = study.contrast(vlm, pairs, pairs.pairs[::-1], settings, **given)
    parts = [
        study.contrast(vlm, pairs[rows], pairs.pairs[::-1][rows], settings, **given)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    order = ["example", *study.AXES]
    one, other = (each.sort_values(order, ignore_index=True) for each in (whole, pd.concat(parts)))
    assert one["answer"].tolist() == other["answer"].tolist()
    assert set(one["picture"]) == {OWN, STRANGER, USUAL}
    assert np.allclose(one["dependency"], other["dependency"], atol=1e-5, equal_nan=True)
    assert int(one["dependency"].notna().sum()) > 8
    pd.testing.assert_frame_equal(one[order], other[order])


def test_the_experiment_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    given = ["--n", "6", "--batch", "3", "--alphas", "1", "--rates", "0", "0.5", "--strengths", "0", "1"]
    assert command(experiment, *given, "--out", tmp_path / "one") == 0
    assert "Control: with lambda 0, 6 of 6 answers are identical to greedy" in capsys.readouterr().out
    result = Result.load(tmp_path / "one")
    held = result.table.dropna(subset=["truth"])
    assert set(held["split"].tolist()) == {VALIDATION, TEST}
    assert len(set(held["example"].tolist())) == 12
    here = {"split": TEST, "picture": OWN, "step": WHOLE}
    greedy, corrected = here | {"method": GREEDY, "dose": 0.0}, here | {"method": "M3ID alpha 1 greedy", "dose": 0.5}
    assert result.contrast(corrected, greedy, "truth")["mean"] > 0.3, "the embedded model knows what it does not say"
    assert result.contrast(here | {"method": "M3ID alpha 1 greedy", "dose": 0.0}, greedy, "truth")["mean"] == 0
    along = result.summary("dependency").query("n > 0")
    assert set(along["picture"].tolist()) == {OWN, STRANGER, USUAL}
    assert np.all(along["mean"].to_numpy() <= 1)
    expected = {
        "methods",
        "dependency",
        *(f"dose_{kind}_{name}" for kind in ("m3id", "vcd") for name in ("truth", "prior")),
    }
    assert set(redraw(tmp_path / "one")) == expected
    # One batch of the test is done before the kill; the choice must not look at it.
    killed_at(monkeypatch, study, "contrast", 4)
    assert command(experiment, *given, "--out", tmp_path / "two") == 130
    assert command(experiment, *given, "--out", tmp_path / "two", "--resume") == 0
    for name in ("result.parquet", "summary.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_pairs_of_one_group_are_one_in_what_is_told():
    """Twelve right answers of four groups: Wilson's interval is that of 4 of 4."""
    rows = [
        {"example": f"e{n}", "group": f"g{n // 3}", "split": TEST, "picture": shown, "step": WHOLE, "method": GREEDY,
         "dose": 0.0, "truth": 1.0, "prior": 0.0, "answer": "red", "truth_baseline": 1.0, "prior_baseline": 0.0}
        for shown in (OWN, STRANGER) for n in range(12)
    ]  # fmt: skip
    result = Result("some", pd.DataFrame(rows), study.AXES, study.METRICS[:2])
    (told,) = findings.findings(result, [Setting()], [])
    assert told.count("1.000 (0.510 to 1.000, n = 12)") == 2 and "answer in 0.000 (0.000 to 0.490, n = 12)" in told


def test_settings_that_share_their_passes_say_the_same_to_the_bit(vlm):
    """Rows of all settings with the passes over a prompt kept, and made anew each time; of passes that are kept, one is
    made for each branch."""
    pairs, settings = load_pairs("scenes/colour-conflict", n=3), data.grid(("M3ID", "VCD"), (0.6,), (0.0, 2.0), (1.0,))
    made, own = [], FirstPass.of

    def rows(most_bytes):
        passes = []

        def counted(self, model, forward, *args, **inputs):
            def one(*given, **named):
                passes.append(1)
                return forward(*given, **named)

            return own(self, model, one, *args, **inputs)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(first_pass, "MOST_BYTES", most_bytes)
            patched.setattr(FirstPass, "of", counted)
            found = study.contrast(vlm, pairs, pairs.pairs[::-1], settings, split="validation", options=data.Options())
        made.append(len(passes))
        return found

    pd.testing.assert_frame_equal(rows(2**30), rows(0), check_exact=True)
    assert made[0] == 3 and made[1] > len(settings)


def test_both_pictures_are_counted_by_hand(vlm, monkeypatch):
    """Letters of four pairs; M3ID has both pictures of two pairs right, greedy of one, and one answer is unread."""
    said = {GREEDY: (("A", "A", "A", "C"), ("B", "A", "A", "B")), "M3ID": (("A", "A", "B", "C"), ("B", "B", "A", "B"))}
    views = []

    def told(asked, setting, more=()):
        views.append([name.rpartition("/")[2] for name in asked.names])
        both = said[setting.kind if setting.kind == "M3ID" else GREEDY]
        return Generation(both[int(asked.names[0][-1])], torch.zeros(4, 1, dtype=torch.long))

    monkeypatch.setattr(both_pictures, "answered", told)
    pairs = Pairs("some", tuple(dataclasses.replace(pair, category="ab"[k % 2]) for k, pair in enumerate(pairs_of(4))))
    template, settings = Template("letters", "{question} (a) {first} (b) {second}"), data.fixed(["M3ID"])
    assert [(each.dose, each.alpha, each.sampled) for each in settings] == [(0, 0, False), (0.15, 0.6, False)]
    table = both_pictures.both_pictures(vlm, pairs, pairs.pairs[::-1], template, settings, data.Options())
    own = table[table["picture"] == OWN].set_index("method")
    m3id = "M3ID greedy, alpha 0.6, lambda 0.15"
    assert own.loc[GREEDY, "individual"].tolist() == [1, 0.5, 0.5, 0.5] and own.loc[GREEDY, "pair"].tolist() == [
        1,
        0,
        0,
        0,
    ]
    assert own.loc[m3id, "individual"].tolist() == [1, 1, 0, 0.5] and own.loc[m3id, "pair"].tolist() == [1, 1, 0, 0]
    assert own.loc[GREEDY, "unread"].tolist() == [0, 0, 0, 0.5]
    assert set(table["individual_baseline"]) == {0.5} and set(table["pair_baseline"]) == {0.25} and len(views) == 8
    result = Result("r", table, both_pictures.AXES, both_pictures.METRICS)
    found = both_pictures.said_of_both(result)
    assert found[0].startswith("4 pairs, both images of each")
    assert found[1].startswith("greedy: 0.625 (") and "with greedy" not in found[1]
    assert found[2].startswith(f"{m3id}: 0.625 (") and "compared with greedy 1 pairs gained, 0 lost" in found[2]
    assert ") of images and 0.500 (" in found[2]
    assert any(each.startswith("greedy, individual by category: a 0.750") for each in found[3:])


def test_both_pictures_of_pairs_without_conflict(tmp_path, capsys):
    given = ["--data", "scenes/colour", "--both", "--n", "3", "--batch", "2", "--methods", "M3ID"]
    asked = ["--prompt", "{question} answer with one word."]
    assert command(experiment, *given, *asked, "--out", tmp_path / "one") == 0
    told = capsys.readouterr().out
    assert "3 pairs, both images of each; settings are the papers'" in told and "usual" not in told
    result = Result.load(tmp_path / "one")
    assert result.provenance["settings"][1]["dose"] == 0.15 and result.provenance["settings"][1]["alpha"] == 0.6
    assert set(redraw(tmp_path / "one")) == {"accuracies"}
    with pytest.raises(UsageError, match="holds 'zebra'"):
        data.every_pair(
            VLM.load("organism", check=False), "scenes/colour", Template("z", "{question} zebra"), n=2, seed=0
        )


def test_items_have_one_picture_and_no_usual_one(vlm):
    """The answer, or what is usual, about their own picture and about another item's."""
    items = [
        Pair(f"i{k}", picture(k), (), "what colour is the circle?", "red", "blue", conflict="first", prior="blue",
             options=("blue", "red", "green"), made="none")
        for k in range(3)
    ]  # fmt: skip
    given = {"split": TEST, "options": data.Options(max_new_tokens=2), "dependency": True}
    table = study.contrast(
        vlm, Pairs("items", tuple(items)), items[::-1], [Setting(), Setting("M3ID", 1.0, 1.0)], **given
    )
    assert set(table["picture"]) == {OWN, STRANGER} and {"truth", "prior", "dependency"} <= set(table)
    template = Template("open", "{question}")
    told = both_pictures.both_pictures(
        vlm, Pairs("items", tuple(items)), items[::-1], template, data.fixed(["M3ID"]), data.Options(max_new_tokens=2)
    )
    assert "pair" not in told and set(told["individual_baseline"]) == {1 / 3} and len(told) == 2 * 2 * 3
    own = told[(told["picture"] == OWN) & (told["method"] == GREEDY)]
    assert own["individual"].tolist() == [float(text.split() == ["red"]) for text in own["answer_1"]]


def test_a_folder_is_halved_and_vcd_needs_no_run_without_picture(tmp_path, vlm, model_folder, capsys):
    rows = []
    for n, pair in enumerate(pairs_of(8)):
        names = [f"{n}{side}.png" for side in "ab"]
        for image, name in zip((pair.image, pair.counterfactual_image), names, strict=True):
            image.save(tmp_path / name)
        answers = {"answer": pair.answer, "counterfactual_answer": pair.counterfactual_answer}
        files = dict(zip(("image", "counterfactual_image"), names, strict=True))
        rows.append(json.dumps({"id": pair.id, "question": pair.question, "conflict": "second"} | files | answers))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    given = ["--model", model_folder, "--data", tmp_path, "--methods", "VCD", "--strengths", "1", "--batch", "3"]
    assert command(experiment, *given, "--out", tmp_path / "out") == 0
    assert "4 test examples" in capsys.readouterr().out
    result = Result.load(tmp_path / "out")
    assert [each.name for each in result.metrics] == ["truth", "prior"]
    assert set(redraw(tmp_path / "out")) == {"methods", "dose_vcd_truth", "dose_vcd_prior"}


def test_wrong_use_is_one_line(tmp_path, capsys):
    for given, message in (
        (["--alphas", "2", "--n", "4"], "alpha is 2.0; a probability"),
        (["--methods", "VCD", "VCD"], "each once"),
        (["--n", "1"], "at least two are needed"),
        (["--methods", "beams"], "--methods"),
        (["--both", "--alphas", "1"], "--alphas are values to choose among; with --both"),
        (["--prompt", "{question} one word."], "is for --both"),
        (["--both", "--prompt", "what?"], "has no {question}"),
    ):
        assert command(experiment, *given, "--out", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_seeds_are_of_names():
    assert (
        seeds_of(["a", "b"], 0) == [*seeds_of(["a"], 0), *seeds_of(["b"], 0)] and len({*seeds_of(["a", "b"], 0)}) == 2
    )
    assert seeds_of(["a"], 0) != seeds_of(["a"], 1)


def test_help_tells_its_options():
    assert_help_tells(experiment, ("--alphas", "--strengths"))
