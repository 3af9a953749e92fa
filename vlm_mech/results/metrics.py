"""One number per example from the logits of the next token.

Answers are token ids (see `VLM.answer_ids`). Ties count against the model.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from vlm_mech.errors import UsageError

__all__ = ["correct", "flip", "kl", "logit_diff", "prob", "rank", "recovered"]


def __dir__() -> list[str]:
    return __all__


LOGITS = "logits"


def _at(logits: Float[Tensor, "batch vocab"], ids: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    return logits.float().gather(1, ids[:, None])[:, 0]


def logit_diff(
    logits: Float[Tensor, "batch vocab"],
    answer: Int[Tensor, "batch"],
    other: Int[Tensor, "batch"],
    *,
    apart: bool = True,
) -> Float[Tensor, "batch"]:
    """`logit(answer) - logit(other)`, in logits (Zhang & Nanda 2023), of logits and token ids.

    `vlm_mech.logit_diff(answer, other)`, of texts, is the same as a measure of a sweep.

    Args:
        apart: refuse an example whose answers are the same token; without it, its difference is 0.

    Raises:
        UsageError: both answers of an example are the same token.
    """
    if apart:
        check_apart(answer, other)
    return _at(logits, answer) - _at(logits, other)


def check_apart(answer: Int[Tensor, "batch"], other: Int[Tensor, "batch"]) -> None:
    """Raises `UsageError` when both answers of an example are the same token: no logit tells them apart."""
    if (answer == other).any():
        row = int((answer == other).nonzero()[0])
        raise UsageError(
            f"both answers of example {row} begin with token {int(answer[row])}; answers are compared by their first "
            "tokens, which must differ"
        )


def prob(logits: Float[Tensor, "batch vocab"], answer: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Probability of the answer's first token, 0 to 1."""
    return _at(log_softmax(logits.float(), -1), answer).exp()


def rank(logits: Float[Tensor, "batch vocab"], answer: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
    """Rank of the answer's first token, 1 for the best; tokens with an equal logit, or NaN, count as better."""
    logits = logits.float()
    return (~(logits < _at(logits, answer)[:, None])).sum(-1)


def kl(logits: Float[Tensor, "batch vocab"], reference: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch"]:
    """Kullback-Leibler divergence `D(reference || logits)` of the two next-token distributions, in nats."""
    ours, theirs = log_softmax(logits.float(), -1), log_softmax(reference.float(), -1)
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def correct(logits: Float[Tensor, "batch vocab"], answer: Int[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
    """Whether the answer's first token has the highest logit, alone."""
    return rank(logits, answer) == 1


def flip(
    logits: Float[Tensor, "batch vocab"], answer: Int[Tensor, "batch"], other: Int[Tensor, "batch"]
) -> Bool[Tensor, "batch"]:
    """Whether the other answer is preferred to this one."""
    return logit_diff(logits, answer, other) < 0


MIN_GAP = 0.5


def recovered(
    patched: Float[Tensor, "batch"],
    base: Float[Tensor, "batch"],
    target: Float[Tensor, "batch"],
    *,
    min_gap: float = MIN_GAP,
) -> Float[Tensor, "batch"]:
    """Normalised logit difference `(patched - base) / (target - base)` (Zhang & Nanda 2023).

    0 is the run that is patched, 1 the run the patch comes from; values outside are possible. Where base and target
    differ by less than `min_gap` logits the fraction means nothing and is NaN.
    """
    gap = target - base
    return ((patched - base) / gap).where(gap.abs() >= min_gap, float("nan"))
