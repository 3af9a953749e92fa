"""Fine-tuning of a contrastive model on captions that state a relation, with and without hard negatives.

After arXiv 2411.05195, which tunes CLIP for five epochs on image-caption data of LLaVA, with a locked or unlocked
image tower, swapped left and right as hard negatives, and a language model with a two-layer MLP as text tower. Ours
tunes for a few steps on generated scenes; the learning rate is chosen on validation.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.erroneous_agreement.data import Case
from vlm_mech.behaviour.master_weights import Descent
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import read

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

Objective = Literal["captions", "negatives", "twins"]
IMAGE_SIDE = "vis"
"""How the names of all parameters of an image tower and its projection begin (CLIP, SigLIP)."""
LARGEST_SCALE = 100.0
"""CLIP's bound of what multiplies cosines."""
CHUNK = 64
HIDDEN = 4
"""Width of the MLP's hidden layer, in widths of the embedding."""


@dataclass(frozen=True)
class Variant:
    """What is tuned on what.

    Objectives: `captions` (InfoNCE over pictures of different pairs), `negatives` (the swapped caption is a further
    negative of each picture, as in NegCLIP), `twins` (both pictures and both captions of each pair in the batch).
    With `decoder` a frozen decoder's states and a trained MLP take the place of the text tower. `shuffled` moves
    captions to other pictures: all of a pair (`captions`), or at random within the pair alone (`sides`).
    """

    name: str
    objective: Objective = "twins"
    locked: bool = True
    decoder: bool = False
    shuffled: Literal["no", "captions", "sides"] = "no"


@dataclass(frozen=True)
class Recipe:
    """How all variants are tuned; `batch` is the number of pictures a step.

    Raises:
        UsageError: a number that makes no tuning.
    """

    n_steps: int
    batch: int
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise UsageError(f"steps is {self.n_steps}; at least 1 is needed")
        if self.batch < 4 or self.batch % 2:
            raise UsageError(f"batch is {self.batch}; an even number of pictures from 4 on is needed")


@dataclass(frozen=True, eq=False)
class Material:
    """Pairs of pictures with a caption each, as model inputs, the two of a pair side by side."""

    pixels: Float[Tensor, "pair two channel height width"]
    words: dict[str, Int[Tensor, "pair two token"]]
    states: Float[Tensor, "pair two d_model"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, eq=False)
class Tuned:
    """A contrastive model; `head` maps a decoder's states to its embeddings, where these replace the text tower."""

    model: nn.Module
    head: nn.Module | None = None


# Losses


def contrastive_loss(logits: Float[Tensor, "image image"]) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: mean of the cross-entropies over the captions of each image and the images of each caption.

    Radford et al. 2021, figure 3.
    """
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def negatives_loss(logits: Float[Tensor, "image image"], negatives: Float[Tensor, "image image"]) -> Float[Tensor, ""]:
    """InfoNCE in which images also have to reject the swapped captions of all images; after NegCLIP.

    Captions choose among images as before: a swapped caption has no image.

    Args:
        negatives: similarities of each image with each image's swapped caption.
    """
    own = torch.arange(len(logits), device=logits.device)
    by_image = functional.cross_entropy(torch.cat([logits, negatives], 1), own)
    return (by_image + functional.cross_entropy(logits.T, own)) / 2


def learning_rate(step: int, *, n_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then cosine to zero."""
    n_warm = max(1, round(warmup * n_steps))
    if step < n_warm:
        return peak * (step + 1) / n_warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(1, n_steps - n_warm)))


# Material


def material(encoder: "DualEncoder", cases: Sequence[Case], vlm: "VLM | None" = None) -> Material:
    """Pictures and captions of pairs as inputs of a contrastive model, and states of a VLM's decoder for the captions.

    Raises:
        UsageError: a case is no pair.
    """
    wrong = [case.id for case in cases if len(case.images) != 2]
    if wrong:
        raise UsageError(f"{wrong[0]} is no pair: {len(cases[0].images)} pictures belong together; pairs are needed")
    images = [image for case in cases for image in case.images]
    captions = [caption for case in cases for caption in case.captions]
    inputs = dict(encoder.encode(images, captions).inputs)
    pixels = inputs.pop("pixel_values").unflatten(0, (-1, 2))
    words = {name: inputs[name].unflatten(0, (-1, 2)) for name in ("input_ids", "attention_mask") if name in inputs}
    states = None if vlm is None else decoder_states(vlm, captions).to(pixels.device).unflatten(0, (-1, 2))
    return Material(pixels, words, states)


def decoder_states(vlm: "VLM", captions: Sequence[str]) -> Float[Tensor, "caption d_model"]:
    """A frozen decoder's last block at the last token of each caption, asked without a picture.

    The token reads to its left alone (LLM2Vec, in the paper, makes attention two-way).
    """
    site = Site("llm.resid_post", vlm.n_layers("llm") - 1)
    found = []
    for start in range(0, len(captions), CHUNK):
        encoded = vlm.encode([Prompt(caption) for caption in captions[start : start + CHUNK]])
        cells = encoded.cells("last")
        found.append(read(vlm, encoded, site)[site][cells.rows, cells.positions])
    return torch.cat(found).detach().float()


def shuffled(some: Material, how: str, *, seed: int) -> Material:
    """The pictures with captions of other pairs (`captions`), or swapped within half of the pairs (`sides`)."""
    rng = np.random.default_rng((seed, 7))
    n = len(some)
    rows = np.arange(n)
    if how == "captions":
        order = rng.permutation(n)
        rows[order] = np.roll(order, 1)
        sides = np.zeros(n, int)
    else:
        sides = rng.permutation(n) % 2
    columns = np.stack([sides, 1 - sides], 1)
    words = {name: each[rows[:, None], columns] for name, each in some.words.items()}
    return Material(some.pixels, words, None if some.states is None else some.states[rows[:, None], columns])


def part(some: Material, n: int) -> Material:
    """At most n pairs, evenly spread."""
    rows = np.unique(np.linspace(0, len(some) - 1, min(n, len(some))).round().astype(int))
    words = {name: each[rows] for name, each in some.words.items()}
    return Material(some.pixels[rows], words, None if some.states is None else some.states[rows])


# Embeddings


def image_embeddings(tuned: Tuned, pixels: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row d_embed"]:
    """Embeddings of pictures, of length 1, in float32."""
    return functional.normalize(tuned.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)


def text_embeddings(tuned: Tuned, words: dict[str, Tensor], states: Tensor | None) -> Float[Tensor, "row d_embed"]:
    """Embeddings of captions, of length 1, in float32, by the text tower, or by the head from a decoder's states.

    Raises:
        UsageError: the head has no states to read.
    """
    if tuned.head is None:
        return functional.normalize(tuned.model.get_text_features(**words).pooler_output.float(), dim=-1)
    if states is None:
        raise UsageError("the text tower is a decoder, but its states of the captions are missing")
    return functional.normalize(tuned.head(states), dim=-1)


@torch.no_grad()
def embedded_images(tuned: Tuned, some: Material) -> Float[Tensor, "pair two d_embed"]:
    """Embeddings of all pictures, a few at a time."""
    pixels = some.pixels.flatten(0, 1)
    found = [image_embeddings(tuned, pixels[start : start + CHUNK]) for start in range(0, len(pixels), CHUNK)]
    return torch.cat(found).unflatten(0, (-1, 2))


@torch.no_grad()
def pair_scores(
    tuned: Tuned, some: Material, known: Float[Tensor, "known two d_embed"] | None = None
) -> Float[np.ndarray, "pair image caption"]:
    """Cosine of both pictures of each pair with both captions; `known` are their embeddings, where they are known."""
    tuned.model.eval()
    images = embedded_images(tuned, some) if known is None else known
    words = {name: each.flatten(0, 1) for name, each in some.words.items()}
    states = None if some.states is None else some.states.flatten(0, 1)
    texts = text_embeddings(tuned, words, states).unflatten(0, (-1, 2))
    return torch.einsum("piw,pcw->pic", images.double(), texts.double()).cpu().numpy()


# Tuning


def tuned_by(
    model: nn.Module,
    some: Material,
    variant: Variant,
    recipe: Recipe,
    *,
    rate: float,
    known: Float[Tensor, "pair two d_embed"],
    progress: Iterable[int] | None = None,
) -> tuple[Tuned, list[float]]:
    """A tuned copy of a contrastive model, and the loss of every step; the model itself stays as it is.

    AdamW with warm-up and cosine, in float32 whatever the model's data type. What a step sees depends on seed and step
    alone.

    Args:
        rate: peak learning rate.
        known: embeddings of the pictures before tuning, which a locked tower keeps.
        progress: the steps, for a progress bar.

    Raises:
        UsageError: a rate that is not above zero, or fewer pairs than a step takes.
        WorkError: the loss is no number any more.
    """
    if rate <= 0:
        raise UsageError(f"learning rate is {rate:g}; a number above zero is needed")
    if len(some) < pairs_a_step(variant, recipe):
        n_pairs = pairs_a_step(variant, recipe)
        raise UsageError(f"{len(some)} pairs are fewer than the {n_pairs} of a step; more pairs or a smaller batch")
    some = some if variant.shuffled == "no" else shuffled(some, variant.shuffled, seed=recipe.seed)
    tuned = _fresh(model, some, variant, width=known.shape[-1], seed=recipe.seed)
    dtype = next(tuned.model.parameters()).dtype
    descent = Descent(trainable(tuned, variant), dtype=dtype, rate=rate, weight_decay=recipe.weight_decay)
    losses = []
    for step in range(recipe.n_steps) if progress is None else progress:
        with torch.enable_grad():
            loss = _loss(tuned, some, variant, recipe, step, known if variant.locked else None)
        if not torch.isfinite(loss):
            raise WorkError(f"{variant.name}: the loss of step {step} is {loss.item()} at rate {rate:g}; lower it")
        descent.step(loss, rate=learning_rate(step, n_steps=recipe.n_steps, peak=rate, warmup=recipe.warmup))
        losses.append(loss.item())
    tuned.model.eval()
    return tuned, losses


def pairs_a_step(variant: Variant, recipe: Recipe) -> int:
    """How many pairs the pictures of a step come from: both pictures of a pair, or one."""
    return recipe.batch // 2 if variant.objective == "twins" else recipe.batch


def trainable(tuned: Tuned, variant: Variant) -> list[nn.Parameter]:
    """The parameters that a variant moves: the text side, and the image side unless it is locked."""
    head = [] if tuned.head is None else list(tuned.head.parameters())
    chosen = []
    for name, parameter in tuned.model.named_parameters():
        image = name.startswith(IMAGE_SIDE)
        moved = not variant.locked if image else not (variant.decoder and name.startswith("text"))
        parameter.requires_grad_(moved)
        chosen += [parameter] if moved else []
    return chosen + head


def _fresh(model: nn.Module, some: Material, variant: Variant, *, width: int, seed: int) -> Tuned:
    """A copy to be tuned, with a new head where a decoder's states are read."""
    copied = copy.deepcopy(model).train()
    if not variant.decoder:
        return Tuned(copied)
    if some.states is None:
        raise UsageError(f"{variant.name}: the states of a decoder are needed for the captions")
    d_model, device = some.states.shape[-1], some.states.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.LayerNorm(d_model), nn.Linear(d_model, HIDDEN * width), nn.GELU(), nn.Linear(HIDDEN * width, width)
    return Tuned(copied, nn.Sequential(*layers).to(device))


def _loss(
    tuned: Tuned, some: Material, variant: Variant, recipe: Recipe, step: int, known: Tensor | None
) -> Float[Tensor, ""]:
    rng = np.random.default_rng((recipe.seed, step))
    n_pairs = pairs_a_step(variant, recipe)
    rows = rng.choice(len(some), n_pairs, replace=False)
    if variant.objective == "twins":
        rows, sides = np.repeat(rows, 2), np.tile([0, 1], n_pairs)
    else:
        sides = rng.integers(0, 2, n_pairs)
    images = image_embeddings(tuned, some.pixels[rows, sides]) if known is None else known[rows, sides]
    scale = tuned.model.get_parameter("logit_scale").float().exp().clamp(max=LARGEST_SCALE)
    logits = scale * images @ _texts(tuned, some, rows, sides).T
    if variant.objective == "negatives":
        return negatives_loss(logits, scale * images @ _texts(tuned, some, rows, 1 - sides).T)
    return contrastive_loss(logits)


def _texts(tuned: Tuned, some: Material, rows: np.ndarray, sides: np.ndarray) -> Tensor:
    words = {name: each[rows, sides] for name, each in some.words.items()}
    return text_embeddings(tuned, words, None if some.states is None else some.states[rows, sides])
