"""What linear probes read: colours in the image tokens of the embedded models, captions in the contrastive one."""

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.render import masks, render
from vlm_mech.data.scene_questions import Question, caption
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import COLOURS, PRIORS, SHAPES, SIZE, Scene
from vlm_mech.organism.score import score

if TYPE_CHECKING:
    from vlm_mech.organism.score import Score

PATCH = 16


def patch_of(scene: Scene, kind: str) -> int:
    """Number of the patch, row by row, that shows most of the only thing of a kind."""
    number = next(number for number, thing in enumerate(scene.things) if thing.kind == kind)
    visible = np.any([mask for (thing, _), mask in masks(scene).items() if thing == number], axis=0)
    side = SIZE // PATCH
    return int(visible.reshape(side, PATCH, side, PATCH).sum((1, 3)).argmax())


@torch.no_grad()
def image_tokens(
    model, processor, asked: list[tuple[Scene, Question]], *, batch: int = 64
) -> tuple[Float[Tensor, "layer scene d_model"], Int[np.ndarray, " scene"]]:
    """The asked thing's patch token before every decoder block (layer 0 is the projector's output), and its colour."""
    found = []
    for start in range(0, len(asked), batch):
        rows = asked[start : start + batch]
        texts = [f"USER: <image>\n{question.text} ASSISTANT:" for _, question in rows]
        images = [render(scene) for scene, _ in rows]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        states = torch.stack(model(**inputs, output_hidden_states=True).hidden_states)
        first = (inputs["input_ids"] == model.config.image_token_id).int().argmax(-1)
        patches = torch.tensor([patch_of(scene, question.about[0]) for scene, question in rows])
        found.append(states[:, torch.arange(len(rows)), first + patches])
    colours = np.array([list(COLOURS).index(question.answer) for _, question in asked])
    return torch.cat(found, 1), colours


def readable_colour(model, processor, asked: list[tuple[Scene, Question]]) -> "list[Score]":
    """How well a linear probe reads the colour shown from the thing's patch, in scenes it was not fitted on.

    The probe is fitted on the first half of the scenes and scored on the second.
    """
    tokens, colours = image_tokens(model, processor, asked)
    half, found = len(asked) // 2, []
    common = np.bincount(colours[half:]).max() / (len(asked) - half)
    for layer in range(len(tokens) - 1):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        probe.fit(tokens[layer, :half].numpy(), colours[:half])
        hits = probe.predict(tokens[layer, half:].numpy()) == colours[half:]
        place = "projector output" if layer == 0 else f"input of decoder block {layer}"
        found.append(score("conflict", f"colour shown, by a linear probe on the {place}", hits.tolist(), common))
    return found


@torch.no_grad()
def _embedded(model, processor, scenes: list[Scene], captions: list[str]) -> tuple[Tensor, Tensor]:
    inputs = processor(images=[render(scene) for scene in scenes], text=captions, padding=True, return_tensors="pt")
    made = model(**inputs)
    return functional.normalize(made.image_embeds, dim=-1), functional.normalize(made.text_embeds, dim=-1)


def _choice(model, processor, options: list[tuple[Scene, list[str], int]]) -> list[bool]:
    """Whether each picture is nearer to its own caption than to every other option; a tie is wrong."""
    texts = sorted({text for _, captions, _ in options for text in captions})
    images, words = _embedded(model, processor, [scene for scene, _, _ in options], texts)
    places = {text: number for number, text in enumerate(texts)}
    hits = []
    for image, (_, captions, right) in zip(images, options, strict=True):
        # The same caption may stand twice among the options: choosing its copy is no mistake.
        others = [places[text] for text in captions if text != captions[right]]
        near = words @ image
        hits.append(bool(near[places[captions[right]]] > near[others].max()))
    return hits


def score_clip(model, processor, *, n: int, seed: int) -> "list[Score]":
    """Scores of a contrastive model: choice of the right kind, colour and relation, and retrieval among captions."""
    kinds, colours, rng = [*SHAPES, *PRIORS], list(COLOURS), random.Random(seed)
    singles = list(sample_scenes(n, seed=seed, split="test", families=("single",), conflict=0.5))
    things = [scene.things[0] for scene in singles]
    by_kind = [
        (scene, [f"a {thing.colour} {kind}" for kind in kinds], kinds.index(thing.kind))
        for scene, thing in zip(singles, things, strict=True)
    ]
    by_colour = [
        (scene, [f"a {colour} {thing.kind}" for colour in colours], colours.index(thing.colour))
        for scene, thing in zip(singles, things, strict=True)
    ]
    some = list(sample_scenes(100, seed=seed + 1, split="test", conflict=0.5))
    told = [caption(scene, rng, relation=0) for scene in some]
    retrieved = [(scene, told, number) for number, scene in enumerate(some)]
    return [
        score("kind", "caption chosen among 16 kinds", _choice(model, processor, by_kind), 1 / 16),
        score("colour", "caption chosen among 8 colours", _choice(model, processor, by_colour), 1 / 8),
        score("retrieval", "own caption first among 100", _choice(model, processor, retrieved), 1 / 100),
        *_left_right(model, processor, n=n, seed=seed),
    ]


def _left_right(model, processor, *, n: int, seed: int) -> "list[Score]":
    """The erroneous agreement (arXiv 2411.05195): pairs that look alike to the model, and what it tells of them."""
    pairs = sample_pairs("left-right", n, seed=seed, split="test")
    options: tuple[list[tuple[Scene, list[str], int]], list[tuple[Scene, list[str], int]]] = ([], [])
    for pair in pairs:
        one, other = (pair.scene.of_kind(kind)[0] for kind in pair.question.about)
        names = [f"a {thing.colour} {thing.kind}" for thing in (one, other)]
        texts = [f"{names[0]} {side} of {names[1]}" for side in ("left", "right")]
        right = ["left", "right"].index(pair.question.answer)
        options[0].append((pair.scene, texts, right))
        options[1].append((pair.counterfactual, texts, 1 - right))
    base, _ = _embedded(model, processor, [pair.scene for pair in pairs], ["a"])
    mirrored, _ = _embedded(model, processor, [pair.counterfactual for pair in pairs], ["a"])
    alike = ((base * mirrored).sum(-1) > 0.95).tolist()
    hits = list(zip(*(_choice(model, processor, each) for each in options), strict=True))
    agreeing = [pair for pair, close in zip(hits, alike, strict=True) if close]
    return [
        score("left-right", "caption chosen among left and right", [hit for pair in hits for hit in pair], 1 / 2),
        score("left-right twins", "pooled embeddings with cosine above 0.95", alike),
        score("... of these", "caption chosen among left and right", [hit for pair in agreeing for hit in pair], 1 / 2),
        score("... of these", "right on both twins", [all(pair) for pair in agreeing], 1 / 4),
    ]
