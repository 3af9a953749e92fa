"""Answers that follow their prompts (teacher forcing): which tokens the model is given, and where each token is read.

The last token of an answer is not given, since nothing that is read comes after it. Several answers of one prompt stand
side by side after it: none attends to another, and each is at the positions that it would have alone.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    import torch

    from vlm_mech.inputs.prompt import Encoded

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
        """Where each token of an answer is foretold, counted from the prompt's last position on."""
        first = self.first(answer) - self.n_prompt + 1
        return (0, *range(first, first + self.widths[answer]))

    def filled(self, example: int) -> list[int]:
        """What an example is given after its prompt, one answer after another."""
        found: list[int] = []
        for answer, width in zip(self.ids, self.widths, strict=True):
            ids = answer[example]
            found += [*ids[:-1], *[ids[-1]] * (width + 1 - len(ids))]
        return found


def followed(encoded: "Encoded", answers: Sequence[Sequence[Ids]]) -> "Encoded":
    """The batch with answers after its prompts, each given as the tokens for every example.

    Spans of the prompt mean what they mean without answers; the span `answer` are the answers' tokens.

    Raises:
        UsageError: the batch has answers already, none for an example, or more tokens than the decoder has positions.
    """
    if encoded.answers is not None:
        raise UsageError("these prompts have answers already; encode the prompts alone")
    kept = tuple(tuple(tuple(ids) for ids in answer) for answer in answers)
    for answer in kept:
        if len(answer) != len(encoded):
            raise UsageError(f"{len(answer)} answers for {len(encoded)} prompts")
        if not all(answer):
            raise UsageError(f"the answer of example {[len(ids) for ids in answer].index(0)} has no token")
    made = Answers(kept, encoded.n_pos)
    encoded.check_room(max(made.widths, default=0))
    rows = tuple(dataclasses.replace(row, answer=made.given(example)) for example, row in enumerate(encoded.rows))
    return dataclasses.replace(
        encoded, inputs=_inputs(encoded, made), rows=rows, answers=made, before=encoded, known={}
    )


def _inputs(encoded: "Encoded", answers: Answers) -> "dict[str, torch.Tensor]":
    import torch

    inputs = dict(encoded.inputs)
    if not any(answers.widths):
        return inputs
    ids = inputs["input_ids"]
    more = torch.tensor([answers.filled(example) for example in range(len(encoded))], device=ids.device)
    inputs["input_ids"] = torch.cat([ids, more], 1)
    # Where the whole prompt attends both ways, what follows it is of the other type.
    other = int(encoded.vlm.family.both_ways == "prefix")
    values = {"attention_mask": 1, "token_type_ids": other, "mm_token_type_ids": 0}
    for name, value in values.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full_like(more, value, dtype=inputs[name].dtype)], 1)
    if "position_ids" in inputs or (answers.side_by_side and encoded.vlm.family.queries_first):
        # Positions that may be looked up in a table; elsewhere they are put right in the blocks.
        counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = counted[:, list(answers.depth)]
    return inputs


def each_alone(encoded: "Encoded") -> "list[Encoded]":
    """The batch once for each of its answers, followed by that one alone; the batch itself where it has none or one."""
    answers = encoded.answers
    if answers is None or not answers.side_by_side:
        return [encoded]
    assert encoded.before is not None, "answers follow a batch of prompts"
    return [followed(encoded.before, [ids]) for ids, width in zip(answers.ids, answers.widths, strict=True) if width]


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
