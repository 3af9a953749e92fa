"""Fine-tuning of a contrastive model on captions that state a relation, with and without hard negatives.

After arXiv 2411.05195, which tunes CLIP for five epochs on image-caption data of LLaVA, with a locked or unlocked
image tower, swapped left and right as hard negatives, and a language model with a two-layer MLP as text tower. Ours
tunes on pairs for a few steps, or on such data (`captions.py`); the learning rate is chosen on validation.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.contrastive_tuning.batches import (
    Drawn,
    Recipe,
    Source,
    Texts,
    Variant,
    examples_a_step,
    learning_rate,
)
from vlm_mech.behaviour.contrastive_tuning.losses import batch_loss
from vlm_mech.behaviour.erroneous_agreement.data import Case
from vlm_mech.behaviour.master_weights import Descent
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import read

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

IMAGE_SIDE = "vis"
"""How the names of all parameters of an image tower and its projection begin (CLIP, SigLIP)."""
CHUNK = 64
HIDDEN = 4
"""Width of the MLP's hidden layer, in widths of the embedding."""


@dataclass(frozen=True, eq=False)
class Material:
    """Pairs of pictures with a caption each, as model inputs, the two of a pair side by side."""

    pixels: Float[Tensor, "pair two channel height width"]
    words: dict[str, Int[Tensor, "pair two token"]]
    states: Float[Tensor, "pair two d_model"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def drawn(self, variant: Variant, recipe: Recipe, step: int, known: Tensor | None) -> Drawn:
        """Both pictures of some pairs (`twins`), or one of each."""
        n_pairs = examples_a_step(variant, recipe)
        rng = np.random.default_rng((recipe.seed, step))
        rows = recipe.rows(len(self), n_pairs, step, rng)
        if variant.objective == "twins":
            rows, sides = np.repeat(rows, 2), np.tile([0, 1], len(rows))
        else:
            sides = rng.integers(0, 2, len(rows))
        negatives = self._texts(rows, 1 - sides) if variant.objective == "negatives" else None
        return Drawn(
            lambda part: self.pixels[rows[part], sides[part]],
            self._texts(rows, sides),
            negatives,
            None if known is None else known[rows, sides],
        )

    def _texts(self, rows: np.ndarray, sides: np.ndarray) -> Texts:
        words = {name: each[rows, sides] for name, each in self.words.items()}
        return Texts(words, None if self.states is None else self.states[rows, sides])

    def shuffled(self, how: str, *, seed: int) -> "Material":
        """The pictures with captions of other pairs, or swapped within half of them."""
        return shuffled(self, how, seed=seed)

    def decoded_width(self) -> int | None:
        """Width of a decoder's states of the captions; None without them."""
        return None if self.states is None else self.states.shape[-1]


@dataclass(frozen=True, eq=False)
class Tuned:
    """A contrastive model; `head` maps a decoder's states to its embeddings, where these replace the text tower."""

    model: nn.Module
    head: nn.Module | None = None


def material(encoder: "DualEncoder", cases: Sequence[Case], vlm: "VLM | None" = None) -> Material:
    """Pictures and captions of pairs as inputs of a contrastive model, and states of a VLM's decoder for the captions.

    Raises:
        UsageError: a case is no pair.
    """
    wrong = [case.id for case in cases if len(case.images) != 2]
    if wrong:
        raise UsageError(f"{wrong[0]} is not a pair: {len(cases[0].images)} images belong together; pairs are needed")
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
    some: Source,
    variant: Variant,
    recipe: Recipe,
    *,
    rate: float,
    known: Float[Tensor, "..."],
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
        UsageError: a rate that is not above zero, or fewer examples than a step takes.
        WorkError: the loss is no number any more.
    """
    if rate <= 0:
        raise UsageError(f"learning rate is {rate:g}; it must be above 0")
    if len(some) < (n_rows := examples_a_step(variant, recipe)):
        what = "pairs" if isinstance(some, Material) else "images with captions"
        raise UsageError(f"{len(some)} {what} are fewer than the {n_rows} of a step; more or a smaller batch is needed")
    some = some if variant.shuffled == "no" else some.shuffled(variant.shuffled, seed=recipe.seed)
    tuned = _fresh(model, some, variant, width=known.shape[-1], seed=recipe.seed)
    dtype = next(tuned.model.parameters()).dtype
    descent = Descent(trainable(tuned, variant), dtype=dtype, rate=rate, weight_decay=recipe.weight_decay)
    losses, n_steps = [], recipe.steps(len(some), variant)
    for step in range(n_steps) if progress is None else progress:
        drawn = some.drawn(variant, recipe, step, known if variant.locked else None)
        with torch.enable_grad():
            loss = loss_of(tuned, drawn, micro=recipe.micro)
        if not torch.isfinite(loss):
            raise WorkError(f"{variant.name}: the loss of step {step} is {loss.item()} at rate {rate:g}; lower it")
        descent.step(loss, rate=learning_rate(step, n_steps=n_steps, peak=rate, warmup=recipe.warmup))
        losses.append(loss.item())
    tuned.model.eval()
    return tuned, losses


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


def _fresh(model: nn.Module, some: Source, variant: Variant, *, width: int, seed: int) -> Tuned:
    """A copy to be tuned, with a new head where a decoder's states are read."""
    copied = copy.deepcopy(model).train()
    if not variant.decoder:
        return Tuned(copied)
    d_model, device = some.decoded_width(), next(copied.parameters()).device
    if d_model is None:
        raise UsageError(f"{variant.name}: the states of a decoder are needed for the captions")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.LayerNorm(d_model), nn.Linear(d_model, HIDDEN * width), nn.GELU(), nn.Linear(HIDDEN * width, width)
    return Tuned(copied, nn.Sequential(*layers).to(device))


def loss_of(tuned: Tuned, drawn: Drawn, *, micro: int = 0) -> Float[Tensor, ""]:
    """The loss of a whole batch, of which `micro` pictures or captions at a time keep what their gradients need.

    Every part is computed once for the loss, which needs the embeddings of all, and once more when its gradient is
    (as in GradCache, arXiv 2101.06983). Summing the losses of the parts would not do: each picture would have fewer
    captions to reject.
    """
    images = drawn.known
    if images is None:
        images = _in_parts(lambda part: image_embeddings(tuned, drawn.pixels(part)), len(drawn.texts), micro)
    texts = embedded_texts(tuned, drawn.texts, micro)
    negatives = None if drawn.negatives is None else embedded_texts(tuned, drawn.negatives, micro)
    return batch_loss(tuned.model, images, texts, negatives)


def embedded_texts(tuned: Tuned, texts: Texts, micro: int) -> Float[Tensor, "row d_embed"]:
    """Embeddings of captions, so many at a time (all where that is 0)."""

    def some(part: slice) -> Tensor:
        words = {name: each[part] for name, each in texts.words.items()}
        return text_embeddings(tuned, words, None if texts.states is None else texts.states[part])

    return _in_parts(some, len(texts), micro)


def _in_parts(embed: Callable[[slice], Tensor], n: int, micro: int) -> Float[Tensor, "row d_embed"]:
    if not micro or micro >= n:
        return embed(slice(0, n))
    parts = (slice(start, start + micro) for start in range(0, n, micro))
    if not torch.is_grad_enabled():
        return torch.cat([embed(part) for part in parts])
    return torch.cat([checkpoint(embed, part, use_reentrant=False) for part in parts])  # pyright: ignore
