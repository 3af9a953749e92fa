"""Answers that follow their prompts: which tokens the model is given, and where each token is read.

The last token of an answer is not given, since nothing that is read comes after it. Several answers of one prompt stand
side by side after it: none attends to another, and each is at the positions that it would have alone.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    import torch

Ids = tuple[int, ...]
ENDED = -100
"""Stands for a token where an answer has ended already, as in the labels of Hugging Face."""


@dataclass(frozen=True)
class Answers:
    """Tokens of answers to a batch of prompts: `ids` of each answer for each example, after `n_prompt` positions.

    Answers are filled up to the longest of the batch, with tokens that are never read.
    """

    ids: tuple[tuple[Ids, ...], ...]
    n_prompt: int

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """How many tokens of each answer the model is given, in the example where they are most."""
        return tuple(max(map(len, answer)) - 1 for answer in self.ids)

    @functools.cached_property
    def depth(self) -> tuple[int, ...]:
        """For each position of a row, the one at which its token would stand if its answer stood there alone."""
        prompt = range(self.n_prompt)
        return (*prompt, *(self.n_prompt + number for width in self.widths for number in range(width)))

    @functools.cached_property
    def owner(self) -> tuple[int, ...]:
        """For each position of a row, the number of the answer that it belongs to, -1 for the prompt."""
        return (*[-1] * self.n_prompt, *(number for number, width in enumerate(self.widths) for _ in range(width)))

    @property
    def side_by_side(self) -> bool:
        """Whether a row holds tokens of several answers."""
        return sum(width > 0 for width in self.widths) > 1

    def first(self, answer: int) -> int:
        """Position of an answer's first token."""
        return self.n_prompt + sum(self.widths[:answer])

    def given(self, example: int) -> tuple[int, ...]:
        """Positions of the answers' own tokens in an example."""
        lengths = [len(answer[example]) - 1 for answer in self.ids]
        return tuple(self.first(number) + at for number, length in enumerate(lengths) for at in range(length))

    def reads(self, answer: int) -> tuple[int, ...]:
        """Where each token of an answer is predicted, counted from the prompt's last position on."""
        first = self.first(answer) - self.n_prompt + 1
        return (0, *range(first, first + self.widths[answer]))

    def filled(self, example: int) -> list[int]:
        """What an example is given after its prompt, one answer after another."""
        found: list[int] = []
        for answer, width in zip(self.ids, self.widths, strict=True):
            ids = answer[example]
            found += [*ids[:-1], *[ids[-1]] * (width + 1 - len(ids))]
        return found


def padded(column: Sequence[Ids]) -> "torch.Tensor":
    """Tokens of an answer for each example, batch x position, `ENDED` after the last one."""
    import torch

    length = max(map(len, column))
    return torch.tensor([[*ids, *[ENDED] * (length - len(ids))] for ids in column])


def parting(one: Ids, other: Ids) -> int | None:
    """How many tokens two answers have in common before they part; None where one begins the other."""
    return next((at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), None)


def check_parting(one: Ids, other: Ids, texts: Sequence[str]) -> int:
    """How many tokens two answers have in common.

    Args:
        texts: both answers, for the error.

    Raises:
        UsageError: they have the same tokens, or one begins the other.
    """
    found = parting(one, other)
    if found is None:
        how = "have the same tokens" if one == other else "do not part: one begins the other"
        raise UsageError(f"answers {texts[0]!r} and {texts[1]!r} {how}")
    return found
