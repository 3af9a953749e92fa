"""`torch.set_grad_enabled(False)` at the top of a notebook: whatever needs gradients gives the same numbers."""

import numpy as np
import pytest
import torch

from tests.behaviour.test_debias import fresh, some_pairs
from tests.zoo.batches import batch
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.architectures.weights import untrained
from vlm_mech.behaviour.classify.tuning import Tuning, tune
from vlm_mech.behaviour.contrastive_tuning import training as contrastive
from vlm_mech.behaviour.debias.adapter import trained_of, with_adapter
from vlm_mech.behaviour.debias.training import Recipe, train
from vlm_mech.behaviour.erroneous_agreement.data import load_cases
from vlm_mech.data.image_classes import Labelled
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.methods.attribution.gradient import forward, gradient
from vlm_mech.methods.lens.tuned_lens import LensTraining, train_tuned_lens
from vlm_mech.methods.probing.descent import LINEAR, ProbeRecipe
from vlm_mech.methods.probing.training import Split
from vlm_mech.methods.probing.training import train as train_probes
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.sweeps.measures import logit_diff
from vlm_mech.sweeps.readings import readings_of

SITE = Site("llm.resid_post", 1)


def of_gradient(_):
    vlm = fresh()
    encoded, measure = vlm.encode(batch()), logit_diff(["red", "red"], ["blue", "blue"])
    with untrained(vlm.model):
        made = forward(vlm, encoded, [SITE], track=True)
        return list(gradient(made, readings_of(vlm, encoded, [measure])).values())


def of_tuned_lens(_):
    prompts = [Prompt("what colour is the circle?", picture(number)) for number in range(4)]
    lens = train_tuned_lens(
        fresh(), prompts[:3], prompts[3:], [SITE], "all", training=LensTraining(n_steps=5, check_every=1)
    )
    return list(lens.weights.values())


def of_probes(_):
    states = torch.randn(1, 60, 8, generator=torch.Generator().manual_seed(0))
    labels = (states[..., 0] > 0).long()
    split = Split(np.arange(30), np.arange(30, 45), np.arange(45, 60))
    found = []
    for recipe in (LINEAR, ProbeRecipe(hidden=(4,), max_epochs=3)):
        ((_, stack),) = train_probes(states, labels, [split], recipe, n_classes=2)
        found += [*stack.weights, *stack.biases]
    return found


def of_class_names(_):
    vlm = fresh()
    examples = [Labelled(f"e{number}", picture(number), ("red", "blue")[number % 2]) for number in range(4)]
    tune(
        vlm, examples, examples, lambda image: Prompt("what is there?", image), Tuning("projector", n_steps=2, batch=2)
    )
    return [weight for name, weight in vlm.model.named_parameters() if name.startswith(vlm.family.projector)]


def of_debias(folder):
    pytest.importorskip("peft")
    vlm, found = fresh(), []
    adapter = with_adapter(vlm, rank=2, seed=0)
    recipe = Recipe("reward", n_steps=2, rate=1e-2, group=2, n_inner=2)
    train(
        vlm, adapter, some_pairs(), recipe, folder=folder, every=9, validate=dict, progress=lambda steps, _: iter(steps)
    )
    found += trained_of(adapter).values()
    return found


def of_contrastive(_):
    encoder = DualEncoder.load("clip", check=False)
    cases = load_cases("scenes/left-right", n=4, seed=0, split="train", template="{answer}").cases
    seen = contrastive.material(encoder, cases)
    known = contrastive.embedded_images(contrastive.Tuned(encoder.model), seen)
    recipe = contrastive.Recipe(2, 4)
    tuned, _ = contrastive.tuned_by(encoder.model, seen, contrastive.Variant("some"), recipe, rate=1e-3, known=known)
    return list(tuned.model.parameters())


@pytest.mark.parametrize(
    "made", [of_gradient, of_tuned_lens, of_probes, of_class_names, of_debias, of_contrastive], ids=lambda f: f.__name__
)
def test_the_numbers_are_the_same_and_the_switch_stays(made, tmp_path):
    usual = made(tmp_path / "on")
    assert torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        found = made(tmp_path / "off")
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert usual and all(torch.equal(one, other) for one, other in zip(usual, found, strict=True))
