"""What is said under an edit, not only what is preferred: answers generated with it, read by the one reader."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.data.reading import read_answer
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.specification import Intervention
from vlm_mech.interventions.trace import generate
from vlm_mech.results.generated_answers import SAYS
from vlm_mech.runs.contract import SpokenConfig
from vlm_mech.sweeps.asked import check_whole

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

N_CELLS, N_TOKENS = 8, 16
"""Cells for which answers are generated, and tokens of each at most, unless told otherwise."""


@dataclass(frozen=True)
class GeneratedPart:
    """For how many of the cells answers are generated, drawn with the seed, and of how many tokens at most."""

    n_cells: int = N_CELLS
    seed: int = 0
    max_new_tokens: int = N_TOKENS

    def __post_init__(self) -> None:
        check_whole(n_cells=(self.n_cells, 1), max_new_tokens=(self.max_new_tokens, 1))

    def of(self, numbers: Sequence[int]) -> frozenset[int]:
        """Some of the numbers of cells for which answers can be generated; all where there are no more.

        Raises:
            UsageError: there are none.
        """
        if not numbers:
            raise UsageError("answers can be generated in no cell: there are no states to put at what is generated")
        drawn = random.Random(f"generation/{self.seed}").sample(numbers, min(self.n_cells, len(numbers)))
        return frozenset(drawn)


def part_of(config: SpokenConfig) -> GeneratedPart | None:
    """The cells that the options of a run name; None without `--outcome generation`."""
    if config.outcome == "logits":
        return None
    return GeneratedPart(config.generated_cells, config.seed, config.new_tokens)


def generated(
    vlm: "VLM",
    prompts: Sequence[Prompt],
    intervention: Intervention | None,
    options: Sequence[tuple[str, str]],
    *,
    max_new_tokens: int = N_TOKENS,
) -> pd.DataFrame:
    """Greedy answers with an edit in force, and which of two answers each names.

    Edits of the prompt act in its pass, those of the span `answer` in the passes over what is generated.

    Args:
        options: for each prompt its own answer and the other one.

    Returns:
        A row for each prompt: `text`, and in `says` own, other or neither (none of them, or both).
    """
    texts = generate(vlm, list(prompts), intervention, max_new_tokens=max_new_tokens).texts
    said = [read_answer(text, both).only for text, both in zip(texts, options, strict=True)]
    return pd.DataFrame({"text": texts, "says": [SAYS[2 if number is None else number] for number in said]})
