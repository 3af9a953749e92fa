"""What a sweep measures at every point: a number per example, of the logits of the next token."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.results import metrics
from vlm_mech.results.result import Metric

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True, eq=False)
class Measure:
    """A number per example: `of(logits, *ids)` of next-token logits batch x vocab and first tokens of answers.

    Args:
        metric: what the number is called, its unit and what it is.
        of: the function; it gives a tensor of shape batch.
        answers: for each ids that the function takes, the answers' texts, one an example.
        apart: whether the answers of an example must begin with different tokens; those that do not are refused.
    """

    metric: Metric
    of: Callable[..., Tensor]
    answers: tuple[Sequence[str], ...] = ()
    apart: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric) or not callable(self.of):
            raise UsageError("a Measure is a Metric(name, unit, what it is) and a function of logits and ids")
        if any(isinstance(each, Tensor) for each in self.answers):
            raise UsageError(f"{self.metric.name} takes the texts of answers; for logits and ids use vlm_mech.metrics")
        single = [each for each in self.answers if isinstance(each, str)]
        if single:
            raise UsageError(f"{self.metric.name} is given the answer {single[0]!r}; a list is needed, one an example")

    def values(self, logits: Tensor, ids: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """The number of each example, of shape batch.

        Raises:
            UsageError: the function gives something else, or an infinite number.
        """
        found, name = self.of(logits, *ids), self.metric.name
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
            UsageError: an answer cannot be compared (see `VLM.answer_ids`), or two of an example begin alike.
        """
        texts = [list(answers[rows]) for answers in self.answers]
        ids = [vlm.answer_ids(encoded, each) for each in texts]
        for one, other in itertools.combinations(range(len(ids)), 2) if self.apart else ():
            for row in (ids[one] == ids[other]).nonzero().flatten().tolist():
                token = vlm.tokenizer.convert_ids_to_tokens(ids[one][row].item())
                raise UsageError(
                    f"{self.metric.name}: answers {texts[one][row]!r} and {texts[other][row]!r} both begin with the "
                    f"token {token!r}; answers are compared by their first tokens, which must differ"
                )
        return ids


def logit_diff(answer: Sequence[str], other: Sequence[str]) -> Measure:
    """Logit of each example's answer less that of another answer, by their first tokens.

    `metrics.logit_diff(logits, answer_ids, other_ids)` takes the same from logits at hand.
    """
    metric = Metric("logit_diff", "logits", "logit of the answer less that of the other answer", signed=True)
    return Measure(metric, metrics.logit_diff, (answer, other))


def prob(answer: Sequence[str]) -> Measure:
    """Probability of each example's answer."""
    return Measure(Metric("prob", "probability", "probability of the answer's first token"), metrics.prob, (answer,))
