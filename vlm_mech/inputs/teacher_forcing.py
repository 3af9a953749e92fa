"""Batches of prompts with answers after them (teacher forcing), as model inputs."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_mech.errors import UsageError
from vlm_mech.inputs.following import Answers, Ids
from vlm_mech.inputs.prompt import Encoded

if TYPE_CHECKING:
    import torch


def followed(encoded: Encoded, answers: Sequence[Sequence[Ids]]) -> Encoded:
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


def _inputs(encoded: Encoded, answers: Answers) -> "dict[str, torch.Tensor]":
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


def each_alone(encoded: Encoded) -> list[Encoded]:
    """The batch once for each of its answers, followed by that one alone; the batch itself where it has none or one."""
    answers = encoded.answers
    if answers is None or not answers.side_by_side:
        return [encoded]
    assert encoded.before is not None, "answers follow a batch of prompts"
    return [followed(encoded.before, [ids]) for ids, width in zip(answers.ids, answers.widths, strict=True) if width]
