"""One number per example from the logits of the next token, or of all tokens of an answer.

Answers are token ids (see `VLM.answer_ids`). Ties count against the model.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from vlm_mech.errors import UsageError

__all__ = [
    "AnswerLogits", "correct", "entropy", "flip", "kl", "logit_diff", "logprob_diff", "prob", "rank", "recovered",
    "said", "total_variation",
]  # fmt: skip


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
    # Never below zero, where rounding would take it.
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).clamp(min=0)


def total_variation(
    logits: Float[Tensor, "batch vocab"], reference: Float[Tensor, "batch vocab"]
) -> Float[Tensor, "batch"]:
    """Total variation distance of the two next-token distributions: half the sum of absolute differences, 0 to 1."""
    return (logits.float().softmax(-1) - reference.float().softmax(-1)).abs().sum(-1) / 2


def entropy(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch"]:
    """Entropy of the next-token distribution, in nats."""
    told = log_softmax(logits.float(), -1)
    # What is impossible adds nothing.
    return -(told.exp() * told.where(told.isfinite(), 0.0)).sum(-1)


@dataclass(frozen=True, eq=False)
class AnswerLogits:
    """Logits that predict the tokens of one answer an example, given the tokens before (teacher forcing).

    `ids` are batch x position, -100 after the last token of an answer: there `logits` and `logprobs()` are NaN, so that
    what is made of them does not depend on the longest answer of a batch; `present` says where they are not.
    """

    raw: Float[Tensor, "batch position vocab"]
    ids: Int[Tensor, "batch position"]

    @property
    def present(self) -> Bool[Tensor, "batch position"]:
        """Where the answers have a token."""
        return self.ids >= 0

    @property
    def logits(self) -> Float[Tensor, "batch position vocab"]:
        """Logits of the whole vocabulary before each token of the answers; NaN after the end."""
        return self.raw.masked_fill(~self.present[:, :, None], float("nan"))

    def logprobs(self) -> Float[Tensor, "batch position"]:
        """Log-probability of each token, in nats; NaN after the end."""
        return self._told().masked_fill(~self.present, float("nan"))

    def logprob(self, *, per_token: bool = False) -> Float[Tensor, "batch"]:
        """Log-probability of the whole answer, in nats: the sum over its tokens, or their mean."""
        total = self._told().where(self.present, 0.0).sum(-1)
        return total / self.present.sum(-1) if per_token else total

    def _told(self) -> Float[Tensor, "batch position"]:
        told = log_softmax(self.raw.float(), -1)
        return told.gather(2, self.ids.clamp(min=0)[:, :, None])[:, :, 0]


def said(answer: AnswerLogits) -> Bool[Tensor, "batch"]:
    """Whether greedy decoding would say the answer: each token has the highest logit, alone, after those before it."""
    logits = answer.raw.float()
    own = logits.gather(2, answer.ids.clamp(min=0)[:, :, None])
    first = (logits < own).sum(-1) == logits.shape[-1] - 1
    return (first | ~answer.present).all(-1)


def logprob_diff(answer: AnswerLogits, other: AnswerLogits, *, per_token: bool = False) -> Float[Tensor, "batch"]:
    """Log-probability of an answer minus that of another, in nats (per token: of their means)."""
    return answer.logprob(per_token=per_token) - other.logprob(per_token=per_token)


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
