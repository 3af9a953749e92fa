"""How alike a model's states of two images are, and who tells the images apart.

After arXiv 2411.05195: its similarity is the cosine of pooled CLIP embeddings and its example of ranks is a toy of
three numbers; patch-wise cosines, ranks of real embeddings and centred kernel alignment next to it are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata, t
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import read
from vlm_mech.results.metrics import AnswerLogits
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.measures import Measure, said
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.reference import Reference

if TYPE_CHECKING:
    from PIL import Image

    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

TIE = 1e-6
"""Scores nearer than this are a tie: two rows with the same image may differ by rounding alone."""
N_SHUFFLES = 200
N_BLOCKS = 50
"""Blocks of examples that the jackknife leaves out, one at a time."""
FEWEST = 4
"""Examples that the debiased alignment needs."""
LOGPROB = Metric("logprob", "nats", "log-probability of the answer")
CLASS_TOKEN, PATCH_MEAN = "class token", "mean of patches"


# Formulas


def cosines(
    one: Float[np.ndarray, "row width"], other: Float[np.ndarray, "column width"]
) -> Float[np.ndarray, "row column"]:
    """Cosine of every row of one with every row of the other, -1 to 1.

    Raises:
        WorkError: a row is zero, so that it has no direction.
    """
    sides = [each.astype(np.float64) for each in (one, other)]
    lengths = [np.linalg.norm(each, axis=1, keepdims=True) for each in sides]
    if any((length == 0).any() for length in lengths):
        raise WorkError("a state is zero (or all its entries are equal), so it has no cosine")
    one, other = (side / length for side, length in zip(sides, lengths, strict=True))
    return one @ other.T


def rank_correlations(
    one: Float[np.ndarray, "row width"], other: Float[np.ndarray, "column width"]
) -> Float[np.ndarray, "row column"]:
    """Spearman's rho between the entries of every row of one and of the other; equal entries share their mean rank."""
    centre = (one.shape[1] + 1) / 2
    return cosines(rankdata(one, axis=1) - centre, rankdata(other, axis=1) - centre)


def patch_cosine(one: Float[Tensor, "patch width"], other: Float[Tensor, "other_patch width"]) -> float:
    """Mean over patches of the cosine of the two states at the same place; NaN where the images have unlike patches."""
    if one.shape != other.shape:
        return float("nan")
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).mean().item()


def alignment(
    one: Float[np.ndarray, "example width"], other: Float[np.ndarray, "example other_width"], *, debiased: bool = False
) -> float:
    """Linear centred kernel alignment (CKA) of two sets of states of the same examples; 1 for rotations of each other.

    `HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` of `K = X X'`, `L = Y Y'` (Kornblith et al. 2019). With fewer examples
    than dimensions this is high for anything; `debiased` takes the unbiased HSIC of Song et al. 2012, which is near 0
    for unrelated states. NaN where one set does not vary.

    Raises:
        UsageError: fewer than four examples.
    """
    if len(one) < FEWEST:
        raise UsageError(f"centred kernel alignment needs {FEWEST} examples; there are {len(one)}")
    return _aligned(_gram(one), _gram(other), debiased)


def _gram(states: Float[np.ndarray, "example width"]) -> Float[np.ndarray, "example example"]:
    """Products of centred states; centring changes neither HSIC, but keeps large means out of the rounding."""
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    return centred @ centred.T


def _aligned(
    one: Float[np.ndarray, "example example"], other: Float[np.ndarray, "example example"], debiased: bool
) -> float:
    hsic = _hsic_debiased if debiased else _hsic
    product = hsic(one, one) * hsic(other, other)
    return hsic(one, other) / product**0.5 if product > 0 else float("nan")


def _hsic(one: Float[np.ndarray, "example example"], other: Float[np.ndarray, "example example"]) -> float:
    """tr(K H L H) of Gram matrices, up to a factor that the ratio does not keep."""
    centred = one - one.mean(0) - one.mean(1)[:, None] + one.mean()
    return float((centred * other).sum())


def _hsic_debiased(one: Float[np.ndarray, "example example"], other: Float[np.ndarray, "example example"]) -> float:
    """Song et al. 2012, equation 5, up to the factor 1 / (n (n - 3))."""
    n = len(one)
    one, other = (each - np.diag(np.diag(each)) for each in (one, other))
    sums = one.sum(0), other.sum(0)
    both = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return float((one * other).sum() + both - 2 / (n - 2) * (sums[0] @ sums[1]))


@dataclass(frozen=True)
class Alignment:
    """Debiased CKA with its 95 % jackknife interval, and mean and 95 % range of it for shuffled pairings."""

    value: float
    low: float
    high: float
    floor: float
    floor_low: float
    floor_high: float


def alignment_with_floor(
    one: Float[np.ndarray, "example width"],
    other: Float[np.ndarray, "example other_width"],
    groups: Int[np.ndarray, "example"],
    *,
    seed: int = 0,
) -> Alignment:
    """Debiased CKA of paired states; blocks of whole groups are left out for the interval, rows shuffled for the floor.

    Raises:
        UsageError: fewer than four examples.
    """
    value = alignment(one, other, debiased=True)
    grams, rng = (_gram(one), _gram(other)), np.random.default_rng(seed)
    blocks = np.array_split(np.unique(groups), min(N_BLOCKS, len(np.unique(groups))))
    without = []
    for block in blocks:
        kept = np.flatnonzero(~np.isin(groups, block))
        if len(kept) >= FEWEST:
            without.append(_aligned(*(gram[np.ix_(kept, kept)] for gram in grams), True))
    n = len(without)
    # Fewer than two blocks that leave enough give no interval.
    spread = np.sqrt((n - 1) / n * np.square(np.array(without) - np.mean(without)).sum()) if n > 1 else np.nan
    reach = t.ppf(0.975, n - 1) * spread if n > 1 else np.nan
    shuffled = []
    for _ in range(N_SHUFFLES):
        order = rng.permutation(len(one))
        shuffled.append(_aligned(grams[0], grams[1][np.ix_(order, order)], True))
    low, high = np.percentile(shuffled, [2.5, 97.5])
    return Alignment(value, value - reach, value + reach, float(np.mean(shuffled)), float(low), float(high))


def picks(scores: Float[np.ndarray, "image caption"]) -> Bool[np.ndarray, "image"]:
    """Whether each image prefers its own caption, the one of the same number, to all others; a tie is wrong.

    The transpose of the scores asks whether each caption prefers its own image.
    """
    own = np.eye(len(scores), dtype=bool)
    best_other = np.where(own, -np.inf, scores).max(1)
    return np.diag(scores) > best_other + TIE


# What models make of images


@dataclass(frozen=True, eq=False)
class Seen:
    """A contrastive model's view of images and captions: embeddings, patches below the last block, states by layer."""

    images: Float[np.ndarray, "image width"]
    captions: Float[np.ndarray, "caption width"]
    patches: tuple[Float[Tensor, "patch d_model"], ...]
    states: dict[str, Float[np.ndarray, "image layer d_model"]]


def contrastive_view(encoder: "DualEncoder", images: "Sequence[Image.Image]", captions: Sequence[str]) -> Seen:
    """Everything that is compared, from one pass; `states` are the class token (if there is one) and the patch mean."""
    encoded = encoder.encode(images, captions)
    layers = [Site("vision.resid_post", layer) for layer in encoder.vision_layers]
    embeds = Site("vision.embed"), Site("text.embed")
    states = read(encoder, encoded, [*embeds, *layers])
    cells = encoded.cells("image", place="vision")
    by_layer = [states[site][cells.rows, cells.positions].split(cells.counts) for site in layers]
    means = [[patches.mean(0) for patches in each] for each in by_layer]
    pooled = {PATCH_MEAN: torch.stack([torch.stack(each) for each in means], 1)}
    if encoder.n_class_tokens:
        first = encoded.cells("class", place="vision")
        pooled[CLASS_TOKEN] = torch.stack([states[site][first.rows, first.positions] for site in layers], 1)
    seen, told = (_array(states[site][:, 0]) for site in embeds)
    return Seen(seen, told, tuple(by_layer[-2:][0]), {name: _array(each) for name, each in pooled.items()})


def tower_patches(vlm: "VLM", images: "Sequence[Image.Image]") -> tuple[Float[Tensor, "patch d_model"], ...]:
    """The patches of each image at the last layer that the VLM's projector reads."""
    site = Site("vision.resid_post", vlm.vision_depth - 1)
    encoded = vlm.encode([Prompt("what is this?", image) for image in images])
    states, cells = read(vlm, encoded, site)[site], encoded.cells("image", place="vision")
    return tuple(states[cells.rows, cells.positions].split(cells.counts))


def answer_scores(
    vlm: "VLM", prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], right: Sequence[str]
) -> tuple[Float[np.ndarray, "prompt answer"], Bool[np.ndarray, "prompt"]]:
    """Log-probability of each whole answer after each prompt, and whether greedy decoding gives the right one.

    Args:
        answers: for each prompt those it may be answered by, equally many.
        right: the right answer to each prompt; a tie with any token of the vocabulary is wrong.
    """
    columns = [list(column) for column in zip(*answers, strict=True)]
    measures = [Measure(LOGPROB, _logprob, (column,), at="whole") for column in columns]
    asked = readings_of(vlm, vlm.encode(list(prompts)), [*measures, said(list(right))])
    *found, is_right = asked.values(Reference(vlm, asked.encoded).reads)
    return _array(torch.stack(found, 1)), _array(is_right.bool())


def _logprob(answer: AnswerLogits) -> Float[Tensor, "prompt"]:
    """Log-probability of a whole answer, in double precision."""
    told = torch.log_softmax(answer.logits.double(), -1).gather(2, answer.ids.clamp(min=0)[:, :, None])[:, :, 0]
    return told.where(answer.present, 0.0).sum(-1)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if values.dtype != torch.bfloat16 else values.detach().float().cpu().numpy()
