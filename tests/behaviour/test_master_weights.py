"""Tuning in half precision: what is trained moves as in float32, in every tuning, and is rounded into the model."""

import pytest
import torch
from torch import nn

from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.behaviour.classify.tuning import Tuning, tune
from vlm_mech.behaviour.contrastive_tuning import training as contrastive
from vlm_mech.behaviour.debias.adapter import trained_of, with_adapter
from vlm_mech.behaviour.debias.training import Recipe, train
from vlm_mech.behaviour.erroneous_agreement.data import load_cases
from vlm_mech.behaviour.master_weights import Descent
from vlm_mech.data.image_classes import Labelled
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.models.vlm import VLM

HALF = (torch.bfloat16, torch.float16)
COLOURS = ("red", "blue", "green")
EXAMPLES = [Labelled(f"e{number}", picture(number), COLOURS[number % 3]) for number in range(9)]


def fresh(dtype, family="llava_clip"):
    """A model whose weights all data types hold alike, small enough for bfloat16 to tell steps of 2e-5 apart."""
    model, processor = ZOO[family]("sdpa", 0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Rounded twice, so that they are exact in every data type.
            parameter.copy_(parameter.to(torch.bfloat16).to(torch.float16).float())
    return VLM(model.to(dtype), processor, name=family, check=False)


def changes(before, after, names):
    return torch.cat([(after[name].float() - before[name].float()).flatten() for name in names])


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def in_silence(steps, _):
    return iter(steps)


def alike(one, other):
    return torch.cosine_similarity(one, other, dim=0).item()


@pytest.mark.parametrize("dtype", HALF)
def test_steps_far_below_the_spacing_add_up(dtype):
    """64 steps of 2e-5 from 1.0, where bfloat16 numbers are 1/128 apart and float16 numbers 1/1024."""
    weight = nn.Parameter(torch.ones(5, dtype=dtype))
    descent = Descent([weight], dtype=dtype, rate=2e-5)
    for _ in range(64):
        descent.step(weight.float().sum())
    assert descent.moved[0].dtype == torch.float32
    torch.testing.assert_close(descent.moved[0].detach(), torch.full((5,), 1 - 64 * 2e-5), rtol=0, atol=5e-6)
    assert torch.equal(weight.detach(), descent.moved[0].detach().to(dtype))


def test_float32_is_moved_in_place_as_by_adamw_alone():
    torch.manual_seed(0)
    one, other = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    descent = Descent([one], dtype=torch.float32, rate=1e-2, weight_decay=0.1)
    adam = torch.optim.AdamW([other], lr=1e-2, weight_decay=0.1)
    assert descent.moved[0] is one
    for step in range(5):
        descent.step(one.pow(3).sum() * 9, rate=1e-2 / (step + 1))
        adam.param_groups[0]["lr"] = 1e-2 / (step + 1)
        adam.zero_grad()
        (other.pow(3).sum() * 9).backward()
        nn.utils.clip_grad_norm_([other], 1.0)
        adam.step()
    assert torch.equal(one, other) and not torch.equal(one, torch.linspace(-1, 1, 7))


def test_gradients_too_small_for_float16_count_and_too_large_ones_are_scaled_less():
    """A gradient of 2e-9 is 0 in float16; one of 1,000 is too large times 4096."""
    for size in (2e-9, 1e3):
        weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
        descent = Descent([weight], dtype=torch.float16, rate=1e-2)
        descent.step(weight.float().sum() * size)
        assert descent.moved[0].grad is not None
        expected = torch.full((3,), min(size, 3**-0.5))
        torch.testing.assert_close(descent.moved[0].grad, expected, rtol=1e-2, atol=0)
        assert (weight < 1).all()
    with pytest.raises(WorkError, match="gradients are not finite in float16"):
        descent.step(weight.float().sum() * 1e6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize(("what", "share"), [("projector", 0.8), ("lora", 0.9)])
def test_tuning_for_class_names_moves_what_it_trains(what, share, dtype):
    """Updated in place, 59 of the projector's 1,856 weights moved in bfloat16; the rest is nearer than its spacing."""
    found = {}
    for each in (torch.float32, dtype):
        vlm = fresh(each)
        before = state_of(vlm.model)
        tuning = Tuning(what, n_steps=200, rate=2e-5, batch=2, rank=4)
        told = tune(vlm, EXAMPLES[:6], EXAMPLES[6:], lambda image: Prompt("what is there?", image), tuning)
        after = vlm.model.state_dict()
        assert {value.dtype for value in after.values() if value.is_floating_point()} == {each}
        names = [name for name in before if name.startswith(vlm.family.projector)]
        assert told["n_moved"] > share * told["n_trained"]
        found[each] = told, changes(before, after, names)
    (exact, expected), (half, moved) = found[torch.float32], found[dtype]
    assert alike(moved, expected) > 0.95 and moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.1)
    gain, same = (each["validation_loss_before"] - each["validation_loss_after"] for each in (half, exact))
    assert same > 0.01 and gain == pytest.approx(same, rel=0.1)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("objective", ["supervised", "reward"])
def test_tuning_towards_looking_moves_what_it_trains(objective, dtype, tmp_path):
    pairs = Pairs("some", tuple(
        Pair(f"p{number}", picture(number), picture(50 + number), "what colour is the circle?", "red", "blue")
        for number in range(6)
    ))  # fmt: skip
    recipe = Recipe(objective, n_steps=6, rate=2e-5, rank=2, group=3, beta=0.5)
    found = {}
    for each in (torch.float32, dtype):
        vlm = fresh(each)
        adapter = with_adapter(vlm, rank=2, seed=0)
        named = trained_of(adapter)
        assert {weight.dtype for weight in named.values()} == {torch.float32}
        before = {name: weight.detach().clone() for name, weight in named.items()}
        history = train(
            vlm, adapter, pairs, recipe, folder=tmp_path / str(each), every=9, validate=dict, progress=in_silence
        )  # fmt: skip
        moved = changes(before, {name: weight.detach() for name, weight in named.items()}, list(named))
        found[each] = history, moved
    moved = found[dtype][1]
    if objective == "supervised":
        assert (moved != 0).float().mean() > 0.9 and alike(moved, found[torch.float32][1]) > 0.9
        assert found[dtype][0][-1]["loss"] == pytest.approx(found[torch.float32][0][-1]["loss"], rel=0.02)
    else:
        # What is sampled depends on the rounding; a reward that none of a group gets moves nothing.
        assert moved.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("decoder", [False, True])
def test_a_contrastive_tuning_in_half_precision_is_close_to_the_exact_one(dtype, decoder):
    cases = load_cases("scenes/left-right", n=8, seed=0, split="train", template="{answer}").cases
    variant, recipe, found = contrastive.Variant("some", decoder=decoder), contrastive.Recipe(24, 8), {}
    for each in (torch.float32, dtype):
        encoder = DualEncoder.load("clip", check=False)
        encoder.model.to(torch.bfloat16).to(torch.float16).to(each)
        seen = contrastive.material(encoder, cases)
        if decoder:
            states = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0))
            seen = contrastive.Material(seen.pixels, seen.words, states)
        known = contrastive.embedded_images(contrastive.Tuned(encoder.model), seen)
        before = state_of(encoder.model)
        tuned, losses = contrastive.tuned_by(encoder.model, seen, variant, recipe, rate=2e-5, known=known)
        part = tuned.model if tuned.head is None else tuned.head
        found[each] = losses, part, before
    assert found[dtype][0] == pytest.approx(found[torch.float32][0], rel=0.05)
    exact, half = (found[each][1].state_dict() for each in (torch.float32, dtype))
    if not decoder:
        names = [name for name in half if name.startswith("text_model.encoder") and name.endswith("weight")]
        before = [found[each][2] for each in (torch.float32, dtype)]
        one, other = changes(before[0], exact, names), changes(before[1], half, names)
        assert (other != 0).float().mean() > 0.5 and alike(one, other) > 0.8
