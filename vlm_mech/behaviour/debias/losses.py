"""What a tuning towards looking descends on: cross-entropy of the true answer, or rewards of sampled ones.

Functions of log-probabilities alone. The reward objective is that of GRPO (Shao et al. 2024, DeepSeekMath,
arXiv 2402.03300, equations 3 and 4) with the advantages of their outcome supervision.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TINY = 1e-4
"""Added to the spread of rewards in a group."""


def cross_entropy(log_probs: Float[Tensor, "row new"], mask: Bool[Tensor, "row new"]) -> Float[Tensor, ""]:
    """Mean of `-log p` over all tokens of all answers, in nats.

    Args:
        mask: which positions hold a token of the answer.
    """
    return -(log_probs * mask).sum() / mask.sum()


def advantages(rewards: Float[Tensor, "prompt group"]) -> Float[Tensor, "prompt group"]:
    """`(r - mean) / (std + 1e-4)` within each group; all 0 where a group's rewards are equal.

    The spread is that of the group itself (divided by its size, not by one less), which is ours.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, correction=0, keepdim=True) + TINY)


def n_equal(rewards: Float[Tensor, "prompt group"]) -> int:
    """Number of groups whose rewards are all equal, which therefore teach nothing."""
    return int((rewards == rewards[:, :1]).all(1).sum())


def k3(log_probs: Float[Tensor, "row new"], base_log_probs: Float[Tensor, "row new"]) -> Float[Tensor, "row new"]:
    """An estimate of the divergence from the base model at each token: `exp(d) - d - 1`, `d = log base - log now`.

    Unbiased for `KL(now || base)` where the tokens were sampled from the model as it is now, and never negative.
    """
    difference = base_log_probs - log_probs
    return difference.exp() - difference - 1


def grpo_loss(
    log_probs: Float[Tensor, "row new"],
    sampled_log_probs: Float[Tensor, "row new"],
    base_log_probs: Float[Tensor, "row new"],
    advantage: Float[Tensor, "row"],
    mask: Bool[Tensor, "row new"],
    *,
    clip: float,
    beta: float,
) -> Float[Tensor, ""]:
    """`-mean over answers of the mean over their tokens of min(w A, clamp(w, 1 - clip, 1 + clip) A) - beta k3`.

    `w = exp(log now - log sampled)` is the ratio of a token's probability to that at which it was sampled.

    Args:
        log_probs: of the sampled tokens under the model as it is now, with a graph.
        sampled_log_probs: under the model that sampled them.
        base_log_probs: under the base model.
        advantage: of each answer, for all its tokens.
        mask: which positions hold a token of the answer.
    """
    ratio = (log_probs - sampled_log_probs).exp()
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
    each = (gain - beta * k3(log_probs, base_log_probs)) * mask
    return -(each.sum(1) / mask.sum(1)).mean()
