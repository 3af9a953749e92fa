"""What is said under an edit, not only what is preferred: answers generated with it, read by the one reader."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.data.reading import read_answer
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.interventions.specification import Intervention
from vlm_mech.interventions.trace import generate
from vlm_mech.results.generated_answers import SAYS
from vlm_mech.runs.configuration import SpokenConfig
from vlm_mech.sweeps.asked import check_whole
from vlm_mech.sweeps.cost import Sizes, generation_flops, generation_peak, pass_flops, sizes
from vlm_mech.sweeps.schedule import SweepPlan

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
    check_whole(**{"--generated-cells": (config.generated_cells, 1), "--new-tokens": (config.new_tokens, 1)})
    return GeneratedPart(config.generated_cells, config.seed, config.new_tokens)


@dataclass(frozen=True)
class SpokenPlan(SweepPlan):
    """What a sweep will need with the answers that are generated in `n_generated` of its cells, and without an edit.

    `flops`, `forwards` and `peak_bytes` count these too; `generated_forwards` is their part of `forwards`. Every answer
    is taken to have `new_tokens` tokens; those that end sooner cost less.
    """

    n_generated: int = 0
    new_tokens: int = 0
    generated_forwards: float = 0.0

    def __str__(self) -> str:
        return (
            f"{super().__str__()}; both counts hold {self.generated_forwards:.3g} forwards for answers generated in "
            f"{self.n_generated} of the cells and without an edit, each taken to have {self.new_tokens} new tokens "
            "(many end sooner)"
        )

    @property
    def in_a_loop(self) -> float:
        """Plain forward passes of a loop over cells, with what is generated."""
        return super().in_a_loop + self.generated_forwards


def with_generated(
    plan: SweepPlan,
    vlm: "VLM",
    prompts: Encoded,
    part: GeneratedPart,
    *,
    n_cells: int,
    n_clean: int = 1,
    read: Sequence[Site] = (),
    held: int = 0,
) -> SpokenPlan:
    """The plan of a sweep over a batch with what is generated beside it; nothing is run.

    Args:
        prompts: the batch, without answers.
        n_cells: cells in which answers are generated.
        n_clean: how often they are generated without an edit.
        read: sites whose states are read from other prompts of this size, in a pass of its own each that ends there.
        held: bytes of what is kept meanwhile.
    """
    size = sizes(vlm, prompts)
    each = generation_flops(size, part.max_new_tokens)
    # What an edit does is held against the first token of the same prompts without it.
    flops = n_clean * each + n_cells * (each + pass_flops(size)) + sum(_reading(size, site) for site in read)
    forwards = flops / (plan.flops / plan.forwards)
    changes = {
        "peak_bytes": max(plan.peak_bytes, held + generation_peak(size, part.max_new_tokens) if n_cells else 0),
        "flops": plan.flops + flops,
        "forwards": plan.forwards + forwards,
    }
    return SpokenPlan(
        **dataclasses.asdict(plan) | changes,
        n_generated=n_cells,
        new_tokens=part.max_new_tokens,
        generated_forwards=forwards,
    )


def _reading(size: Sizes, site: Site) -> int:
    """Operations of a pass that ends where the states of a site are there."""
    n_blocks = 0 if site.stream != "llm" or site.layer is None else site.layer + (site.point != "resid_pre")
    return pass_flops(dataclasses.replace(size, n_layers=n_blocks, n_vocab=0))


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
