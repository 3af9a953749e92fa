"""What a sweep measures at every point: a number per example, of the logits with which a model predicts answers."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import spellings
from vlm_mech.inputs.following import Ids, check_parting
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.results import metrics
from vlm_mech.results.metrics import AnswerLogits
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.asked import check_once

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

__all__ = [
    "Measure", "comparison", "entropy", "kl", "logit_diff", "logprob", "logprob_diff", "prob", "rank", "said",
    "total_variation",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


At = Literal["next", "parting", "whole"]
AT: tuple[At, ...] = ("next", "parting", "whole")


@dataclass(frozen=True, eq=False)
class Measure:
    """A number per example, of the logits that predict answers.

    What the function `of` takes depends on `at`:

    - "next": logits of the next token after the prompt, batch x vocab, and the first token of each of the answers;
    - "parting": the same at the first token where the two answers of an example part, after their common beginning;
    - "whole": an `AnswerLogits` for each of the answers, with logits batch x position x vocab.

    Args:
        metric: what the number is called, its unit and what it is.
        of: the function; it gives a tensor of shape batch.
        answers: for each argument that the function takes beside logits, the answers' texts, one an example.
        apart: with "next", whether the answers of an example must begin with different tokens.
        clean: whether the function takes the same logits of the unedited run too, as the keyword `clean` (a tuple of
            `AnswerLogits` with "whole").
        any_token: with "next", whether an answer's first token may be a space alone, as other answers have it too.
        parts: with "whole", whether the two answers of an example must part: neither is, or begins, the other.
    """

    metric: Metric
    of: Callable[..., Tensor]
    answers: tuple[Sequence[str], ...] = ()
    apart: bool = True
    at: At = "next"
    clean: bool = False
    parts: bool = False
    any_token: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric) or not callable(self.of):
            raise UsageError("a Measure is a Metric(name, unit, what it is) and a function of logits and ids")
        name = self.metric.name
        if any(isinstance(each, Tensor) for each in self.answers):
            raise UsageError(f"{name} takes the texts of answers; for logits and ids use vlm_mech.metrics")
        single = [each for each in self.answers if isinstance(each, str)]
        if single:
            raise UsageError(f"{name} is given the answer {single[0]!r}; a list is needed, one an example")
        if self.at not in AT:
            raise UsageError(f"{name} is measured at {self.at!r}; {', '.join(AT)} are known")
        if (self.at == "parting" and len(self.answers) != 2) or (self.at == "whole" and not self.answers):
            needed = "two answers an example" if self.at == "parting" else "answers"
            raise UsageError(f"{name} at {self.at!r} has {len(self.answers)} lists of answers; {needed} are needed")

    def checked(self, found: object, names: Sequence[str]) -> Tensor:
        """What the function gave, of shape batch.

        Raises:
            UsageError: it gave something else, or an infinite number.
        """
        name = self.metric.name
        if not isinstance(found, Tensor) or found.shape != (len(names),) or found.is_complex():
            what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"{name} gives {what}; a tensor of {len(names)} real numbers is needed, one an example")
        endless = found.double().isinf()
        if endless.any():
            example = names[int(endless.nonzero()[0])]
            raise UsageError(f"{name} of example {example!r} is infinite; a missing value is NaN")
        return found

    def ids(self, vlm: "VLM", encoded: Encoded, rows: slice = slice(None)) -> list[Tensor]:
        """First tokens of the answers of some rows, each of shape batch.

        Raises:
            UsageError: an answer cannot be compared (see `VLM.answer_ids`), or two of an example begin with the same
                tokens.
        """
        texts = [list(answers[rows]) for answers in self.answers]
        if self.any_token:
            firsts = ([tokens[0] for tokens in vlm.answer_tokens(encoded, each)] for each in texts)
            ids = [torch.tensor(each, device=vlm.device) for each in firsts]
        else:
            ids = [vlm.answer_ids(encoded, each) for each in texts]
        for one, other in itertools.combinations(range(len(ids)), 2) if self.apart else ():
            for row in (ids[one] == ids[other]).nonzero().flatten().tolist():
                token = vlm.tokenizer.convert_ids_to_tokens(ids[one][row].item())
                raise UsageError(
                    f"{self.metric.name}: answers {texts[one][row]!r} and {texts[other][row]!r} both begin with the "
                    f"token {token!r}; answers are compared by their first tokens, which must differ"
                )
        return ids

    def tokens(self, vlm: "VLM", encoded: Encoded, rows: slice = slice(None)) -> list[tuple[Ids, ...]]:
        """All tokens of the answers of some rows, by answer and example.

        Raises:
            UsageError: an answer cannot be read (see `VLM.answer_tokens`), or two of an example that must part do not.
        """
        texts = [list(answers[rows]) for answers in self.answers]
        found = [vlm.answer_tokens(encoded, each) for each in texts]
        if self.at == "parting" or self.parts:
            for *ids, one, other in zip(*found, *texts, strict=True):
                check_parting(*ids, (one, other))
        return found


def listed_measures(given: Any) -> tuple[Measure, ...]:
    """One measure or several, as a tuple.

    Raises:
        UsageError: something else, or two of one name.
    """
    found = tuple(given) if isinstance(given, list | tuple) else (given,)
    for each in found:
        if not isinstance(each, Measure):
            what = "a function" if callable(each) else repr(each)
            raise UsageError(
                f"measure is {what}; logit_diff(answers, others), prob(answers) or a Measure is needed, such as "
                "Measure(Metric('name', 'logits', 'what it is'), function, (answers,))"
            )
    remedy = "; dataclasses.replace(measure, metric=dataclasses.replace(measure.metric, name='other')) gives another"
    check_once([each.metric.name for each in found], "a measure called", remedy)
    return found


def logit_diff(answer: Sequence[str], other: Sequence[str]) -> Measure:
    """Logit of each example's answer minus that of another answer, at the first token where the two part.

    Where they begin with the same tokens, their common beginning is given to the model. Of answers in several spellings
    the first token with the highest logit counts. `metrics.logit_diff(logits, answer_ids, other_ids)` takes the same
    from logits at hand.
    """
    metric = Metric("logit_diff", "logits", "logit of the answer minus that of the other answer", signed=True)
    own, others = _by_spelling(answer), _by_spelling(other)
    if len(own) == len(others) == 1:
        return Measure(metric, metrics.logit_diff, (*own, *others), at="parting")

    def of(logits: Tensor, *ids: Tensor) -> Tensor:
        every = logits.float().gather(1, torch.stack(ids, 1))
        return every[:, : len(own)].amax(1) - every[:, len(own) :].amax(1)

    return Measure(metric, of, (*own, *others), apart=False)


def logprob_diff(answer: Sequence[str], other: Sequence[str], *, per_token: bool = False) -> Measure:
    """Log-probability of each example's whole answer minus that of another answer, in nats.

    Of answers in several spellings the likeliest counts.

    Args:
        per_token: the mean over the tokens of each answer, in nats per token, in place of the sum.
    """
    name, unit = ("logprob_diff_per_token", "nats per token") if per_token else ("logprob_diff", "nats")
    told = f"log-probability of the answer{', per token,' if per_token else ''} minus that of the other answer"
    own, others = _by_spelling(answer), _by_spelling(other)

    def of(*answers: AnswerLogits) -> Tensor:
        return _likeliest(answers[: len(own)], per_token) - _likeliest(answers[len(own) :], per_token)

    parts = len(own) == len(others) == 1
    return Measure(Metric(name, unit, told, signed=True), of, (*own, *others), at="whole", parts=parts)


def prob(answer: Sequence[str]) -> Measure:
    """Probability of each example's whole answer; of several spellings that of the likeliest."""
    metric = Metric("prob", "probability", "probability of the answer")
    return Measure(metric, lambda *answers: _likeliest(answers).exp(), _by_spelling(answer), at="whole")


def logprob(answer: Sequence[str]) -> Measure:
    """Log-probability of each example's whole answer, in nats; of several spellings that of the likeliest."""
    metric = Metric("logprob", "nats", "log-probability of the answer")
    return Measure(metric, lambda *answers: _likeliest(answers), _by_spelling(answer), at="whole")


def _by_spelling(answer: Sequence[str]) -> tuple[list[str], ...]:
    """A list of texts for each spelling; an answer that has fewer than others has its last one again."""
    if isinstance(answer, str) or any(isinstance(each, Tensor) for each in answer):
        return (answer,)  # pyright: ignore[reportReturnType] - `Measure` says what is wrong
    each = [spellings(text) for text in answer]
    most = max(map(len, each), default=1)
    return tuple([several[min(number, len(several) - 1)] for several in each] for number in range(most))


def _likeliest(answers: Sequence[AnswerLogits], per_token: bool = False) -> Tensor:
    found = [answer.logprob(per_token=per_token) for answer in answers]
    return found[0] if len(found) == 1 else torch.stack(found).amax(0)


def rank(answer: Sequence[str]) -> Measure:
    """Rank of the first token of each example's answer among all next tokens, 1 for the likeliest."""
    return Measure(Metric("rank", "rank", "rank of the answer's first token"), metrics.rank, (answer,))


def entropy() -> Measure:
    """Entropy of the distribution of the next token, in nats."""
    return Measure(Metric("entropy", "nats", "entropy of the next token"), metrics.entropy)


def kl() -> Measure:
    """Kullback-Leibler divergence of the edited run's next token from the unedited run's, D(unedited || edited)."""
    metric = Metric("kl", "nats", "Kullback-Leibler divergence of the next token from that of the unedited run")
    return Measure(metric, lambda logits, *, clean: metrics.kl(logits, clean), clean=True)


def total_variation() -> Measure:
    """Total variation distance between the distributions of the next token, edited and unedited, 0 to 1."""
    metric = Metric("total_variation", "probability", "total variation distance of the next token, edited and unedited")
    return Measure(metric, lambda logits, *, clean: metrics.total_variation(logits, clean), clean=True)


def said(answer: Sequence[str]) -> Measure:
    """1 where greedy decoding would say each example's whole answer, token by token; ties count against it."""
    metric = Metric("said", "share", "share of examples in which greedy decoding gives the answer")

    def of(*answers: AnswerLogits) -> Tensor:
        return torch.stack([metrics.said(answer) for answer in answers]).any(0).float()

    return Measure(metric, of, _by_spelling(answer), at="whole")


Comparison = Literal["logit_diff", "logprob_diff", "logprob_diff_per_token"]
"""How the two answers of a pair are compared: at the first token where they part, as a whole, or per token."""


def comparison(name: Comparison, answer: Sequence[str], other: Sequence[str]) -> Measure:
    """The measure of that name, of one answer against another.

    Raises:
        UsageError: there is none of that name.
    """
    known = {
        "logit_diff": logit_diff,
        "logprob_diff": logprob_diff,
        "logprob_diff_per_token": functools.partial(logprob_diff, per_token=True),
    }
    if name not in known:
        raise UsageError(f"measure {name!r} compares no answers; {', '.join(known)} do")
    return known[name](answer, other)
