"""The spelling in which a model would begin its answers: measures of first tokens must look at that token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import SPELLINGS, Spelling
from vlm_mech.inputs.prompt import Prompt, render
from vlm_mech.interventions.trace import run

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

N_ASKED = 64
"""Prompts that a spelling is chosen on, at most."""


def spelling_of(vlm: "VLM", prompts: Sequence[Prompt], answers: Sequence[str]) -> tuple[Spelling, dict[str, float]]:
    """The spelling whose first tokens are most probable after the prompts, and the mean probability of each.

    Spellings that become the same tokens count once, as the plainer one; where one is left, or the model has no
    weights, nothing is run and there are no probabilities. A prompt is left out whose answer, as it is written, cannot
    follow it.

    Args:
        answers: the right answer to each prompt.
    """
    rows: list[tuple[Prompt, list[int | None]]] = []
    for prompt, answer in list(zip(prompts, answers, strict=True))[:N_ASKED]:
        text = render(vlm, prompt)[0]
        ids = [_id(vlm, text, each.of(answer)) for each in SPELLINGS]
        rows += [(prompt, ids)] if ids[0] is not None else []
    columns: dict[tuple[int | None, ...], Spelling] = {}
    for number, each in enumerate(SPELLINGS):
        columns.setdefault(tuple(ids[number] for _, ids in rows), each)
    known = [(column, each) for column, each in columns.items() if None not in column]
    if len(known) < 2 or vlm.device.type == "meta":
        return SPELLINGS[0], {}
    wanted = torch.tensor([column for column, _ in known])
    found = []
    for row, (prompt, _) in enumerate(rows):
        told = run(vlm, prompt).last[0].double().softmax(-1).cpu()
        found.append(told[wanted[:, row]])
    means = torch.stack(found).mean(0).tolist()
    best = max(range(len(known)), key=lambda number: means[number])
    return known[best][1], {str(each): mean for (_, each), mean in zip(known, means, strict=True)}


def _id(vlm: "VLM", text: str, answer: str) -> int | None:
    try:
        return vlm.first_token_id(text, answer)
    except UsageError:
        return None
