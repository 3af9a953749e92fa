"""The spelling in which a model would write its answers: what is measured must look at those tokens."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import SPELLINGS, Spelling
from vlm_mech.inputs.following import Ids
from vlm_mech.inputs.prompt import Prompt, render
from vlm_mech.interventions.trace import run

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

N_ASKED = 64
"""Prompts that a spelling is chosen on, at most; where answers have several tokens, passes over them."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """Prompts with the tokens of their correct answers in each of several spellings, which differ in some answer."""

    prompts: tuple[Prompt, ...]
    answers: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    tokens: tuple[tuple[Ids, ...], ...]
    """By prompt and spelling."""


def spellings_of(
    vlm: "VLM", prompts: Sequence[Prompt], answers: Sequence[str], among: Sequence[Spelling] = SPELLINGS
) -> Asked:
    """The spellings that become other tokens than those before them; nothing is run.

    A prompt is left out whose answer, as it is written, cannot follow it.

    Args:
        answers: the right answer to each prompt.
        among: the spellings to try, the plainest first.
    """
    rows: list[tuple[Prompt, str, list[Ids | None]]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = render(vlm, prompt)[0]
        ids = [_tokens(vlm, text, each.of(answer)) for each in among]
        rows += [(prompt, answer, ids)] if ids[0] is not None else []
    columns: dict[tuple[Ids | None, ...], Spelling] = {}
    for number, each in enumerate(among):
        columns.setdefault(tuple(ids[number] for *_, ids in rows), each)
    known = [(column, each) for column, each in columns.items() if None not in column]
    spellings = tuple(each for _, each in known) or tuple(among[:1])
    tokens = tuple(tuple(column[row] or () for column, _ in known) for row in range(len(rows)))
    return Asked(tuple(prompt for prompt, *_ in rows), tuple(answer for _, answer, _ in rows), spellings, tokens)


def likeliest(vlm: "VLM", asked: Asked) -> tuple[Spelling, dict[str, float]]:
    """The spelling whose answers are most probable after the prompts, and the mean probability of each.

    Where one is left, or the model has no weights, nothing is run and there are no probabilities.
    """
    found = _each(vlm, asked)
    if found is None:
        return asked.spellings[0], {}
    means = found.mean(0).tolist()
    best = max(range(len(means)), key=lambda number: means[number])
    told = {str(each): mean for each, mean in zip(asked.spellings, means, strict=True)}
    return asked.spellings[best], told


def wins(vlm: "VLM", asked: Asked) -> tuple[dict[str, float], int]:
    """The share of answers of which each spelling is the likeliest, and of how many: of as many as `likeliest` asks.

    Where one spelling is left, or the model has no weights, nothing is run and there are no shares. Of equally likely
    ones the plainer counts.
    """
    found = _each(vlm, asked)
    if found is None:
        return {}, 0
    # Of several largest values argmax names any.
    first = [row.index(max(row)) for row in found.tolist()]
    shares = {str(each): first.count(number) / len(first) for number, each in enumerate(asked.spellings)}
    return shares, len(first)


def _each(vlm: "VLM", asked: Asked) -> Float[Tensor, "prompt spelling"] | None:
    """Probabilities of the first answers in each spelling; None where there is nothing to choose, or no weights."""
    if len(asked.spellings) < 2 or not asked.prompts or vlm.device.type == "meta":
        return None
    single = all(len(ids) == 1 for row in asked.tokens for ids in row)
    n_asked = N_ASKED if single else max(1, N_ASKED // len(asked.spellings))
    rows = list(zip(asked.prompts, asked.answers, asked.tokens, strict=True))[:n_asked]
    return torch.stack([_probabilities(vlm, *row, asked.spellings) for row in rows])


def _probabilities(
    vlm: "VLM", prompt: Prompt, answer: str, ids: Sequence[Ids], spellings: Sequence[Spelling]
) -> torch.Tensor:
    """Probability of the whole answer in each spelling."""
    if all(len(each) == 1 for each in ids):
        return run(vlm, prompt).last[0].double().softmax(-1).cpu()[torch.tensor([first for first, *_ in ids])]
    written = [spelling.of(answer) for spelling in spellings]
    reads = [run(vlm, vlm.encode([prompt], [each])).reads.double().cpu() for each in written]
    each = zip(reads, ids, strict=True)
    return torch.stack([told[0].log_softmax(-1)[torch.arange(len(of)), list(of)].sum().exp() for told, of in each])


def _tokens(vlm: "VLM", text: str, answer: str) -> Ids | None:
    try:
        return vlm.tokens_after(text, answer)
    except UsageError:
        return None
