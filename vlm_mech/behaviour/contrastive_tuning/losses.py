"""Losses of a batch of embeddings: InfoNCE with and without hard negatives, and the sigmoid loss of SigLIP."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

LARGEST_SCALE = 100.0
"""CLIP's bound of what multiplies cosines."""


def contrastive_loss(logits: Float[Tensor, "image image"]) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: mean of the cross-entropies over the captions of each image and the images of each caption.

    Radford et al. 2021, figure 3.
    """
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def negatives_loss(
    logits: Float[Tensor, "image image"], negatives: Float[Tensor, "image negative"]
) -> Float[Tensor, ""]:
    """InfoNCE in which images also have to reject the swapped captions of all images; after NegCLIP.

    Captions choose among images as before: a swapped caption has no image.

    Args:
        negatives: similarities of each image with each swapped caption.
    """
    own = torch.arange(len(logits), device=logits.device)
    by_image = functional.cross_entropy(torch.cat([logits, negatives], 1), own)
    return (by_image + functional.cross_entropy(logits.T, own)) / 2


def sigmoid_loss(logits: Float[Tensor, "image text"]) -> Float[Tensor, ""]:
    """Sum over the texts of -log sigmoid(z logit), mean over the images; z is 1 for an image's own text, else -1.

    Zhai et al. 2023 (arXiv 2303.15343), algorithm 1; logits hold scale and bias. Texts beyond the number of images are
    true of none of them.
    """
    signs = 2 * torch.eye(*logits.shape, device=logits.device) - 1
    return -functional.logsigmoid(signs * logits).sum() / len(logits)


def batch_loss(
    model: nn.Module,
    images: Float[Tensor, "image d_embed"],
    texts: Float[Tensor, "image d_embed"],
    negatives: Float[Tensor, "negative d_embed"] | None = None,
) -> Float[Tensor, ""]:
    """The loss of a batch of embeddings of length 1: sigmoid for a model with a bias (SigLIP), InfoNCE otherwise."""
    scale = model.get_parameter("logit_scale").float().exp()
    bias = dict(model.named_parameters()).get("logit_bias")
    if bias is not None:
        every = texts if negatives is None else torch.cat([texts, negatives])
        return sigmoid_loss(scale * images @ every.T + bias.float())
    scale = scale.clamp(max=LARGEST_SCALE)
    logits = scale * images @ texts.T
    return contrastive_loss(logits) if negatives is None else negatives_loss(logits, scale * images @ negatives.T)
