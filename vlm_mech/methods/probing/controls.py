"""What a probe finds where there is nothing to find: other labels, no image, a model that has learned nothing."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.methods.probing.data import OBJECT, Examples, Features, Spot, read_states
from vlm_mech.methods.probing.training import Split
from vlm_mech.models.vlm import VLM

NONE, SHUFFLED, TASK, NO_IMAGE, RANDOM = "none", "shuffled", "control task", "no image", "random weights"
CONTROLS = (SHUFFLED, TASK, NO_IMAGE, RANDOM)
TEXT_SPANS = ("all", "system", "question", "answer_prompt", "last")
"""Spans of the decoder that a prompt without an image has too."""


DRAWS = 100
"""Orders of the labels that are tried."""


def shuffled(
    labels: Int[np.ndarray, "example"], *, seed: int, splits: Sequence[Split] = ()
) -> Int[np.ndarray, "example"]:
    """The labels dealt out anew over the examples: what overfitting and the share of the classes can give.

    Args:
        splits: the labels are dealt again where a training part of these would lack one that is rare.
    """
    rng, n_labels = np.random.default_rng(seed), len(np.unique(labels))
    for _ in range(DRAWS):
        dealt = rng.permutation(labels)
        if all(len(np.unique(dealt[split.train])) == n_labels for split in splits):
            break
    return dealt


def control_task(labels: Int[np.ndarray, "example"], types: Sequence[str], *, seed: int) -> Int[np.ndarray, "example"]:
    """A label for each type of input, drawn with the share of the real ones (after Hewitt & Liang 2019).

    Theirs are word types. A type here is a question with its answer, so a probe must learn by heart which of them goes
    with which label; types recur in the test part, so splits for this task are grouped by scene alone.
    """
    pairs = [f"{kind}/{label}" for kind, label in zip(types, labels, strict=True)]
    numbers = np.unique(pairs, return_inverse=True)[1]
    n_types, rng = int(numbers.max()) + 1, np.random.default_rng(seed)
    drawn = rng.choice(labels, size=n_types)
    # Every class must be somewhere, or there would be fewer to choose from than in the real task.
    classes = np.unique(labels)
    if n_types >= len(classes):
        drawn[rng.permutation(n_types)[: len(classes)]] = classes
    return drawn[numbers]


def with_random_weights(vlm: "VLM", *, seed: int) -> "VLM":
    """A model of the same configuration with weights as its own initialisation draws them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(vlm.model)(copy.deepcopy(vlm.config))
    model = model.to(device=vlm.device, dtype=vlm.dtype)
    # The names of the parts were checked on the model itself.
    return VLM(model, vlm.processor, name=f"{vlm.name} (random weights)", check=False)


def takes_text_alone(vlm: "VLM", prompt: Prompt) -> bool:
    """Whether the family can be asked that without an image: encoded, and run."""
    if "pixel_values" in vlm.needed_inputs:
        return False
    try:
        vlm.encode(replace(prompt, image=None))
    except UsageError:
        return False
    return True


def read_without_image(
    vlm: "VLM", examples: Examples, spots: Sequence[Spot], *, folder: Path, batch: int = 32
) -> tuple[Features, dict[str, str]]:
    """The states of every spot when the model is asked without seeing, and how each span was read.

    `text only` is the prompt without its image, where the family takes one and the span is of text; `blank` is an image
    of the mean colour of the whole data set (an image's own mean would give its colours away). Prompts that become the
    same are run once.
    """
    alone = takes_text_alone(vlm, examples.prompts[0])
    bare = [spot for spot in spots if alone and spot.site.stream == "llm" and spot.span in TEXT_SPANS]
    rest = [spot for spot in spots if spot not in bare]
    found: Features = {}
    if bare:
        prompts = [replace(prompt, image=None) for prompt in examples.prompts]
        found |= _read_once(vlm, prompts, examples, bare, folder / "text", batch)
    if rest:
        found |= _read_once(vlm, _blanked(examples.prompts), examples, rest, folder / "blank", batch)
    how = {spot.span: "text only" if spot in bare else "blank" for spot in spots}
    return {spot: found[spot] for spot in spots}, how


def _blanked(prompts: Sequence[Prompt]) -> list[Prompt]:
    images = [[load_image(image) for image in prompt.images] for prompt in prompts]
    every = [image for each in images for image in each]
    colour = np.mean([np.asarray(image).mean((0, 1)) for image in every], axis=0).round().astype(int)
    blank = {size: Image.new("RGB", size, tuple(colour.tolist())) for size in {image.size for image in every}}
    return [
        replace(prompt, image=[blank[image.size] for image in each])
        for prompt, each in zip(prompts, images, strict=True)
    ]


def _read_once(
    vlm: "VLM", prompts: Sequence[Prompt], examples: Examples, spots: Sequence[Spot], folder: Path, batch: int
) -> Features:
    """States of prompts of which many are alike: each is run once."""
    with_objects = any(spot.span == OBJECT for spot in spots)
    keys = [
        (
            prompt.said,
            tuple(load_image(image).size for image in prompt.images),
            patches if with_objects else None,
        )
        for prompt, patches in zip(prompts, examples.objects, strict=True)
    ]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    numbers = sorted(first.values())
    place = {key: numbers.index(number) for key, number in first.items()}
    objects = [examples.objects[number] for number in numbers]
    states = read_states(vlm, [prompts[number] for number in numbers], objects, spots, folder=folder, batch=batch)
    rows = torch.tensor([place[key] for key in keys])
    return {spot: state[rows] for spot, state in states.items()}
