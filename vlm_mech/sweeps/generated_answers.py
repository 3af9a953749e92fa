"""What is said under an edit, not only what is preferred: answers generated with it, read by the one reader."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from vlm_mech.data.reading import read_answer
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.specification import Intervention
from vlm_mech.interventions.trace import generate
from vlm_mech.results.result import Metric, Result
from vlm_mech.runs.contract import SpokenConfig
from vlm_mech.sweeps.asked import check_whole

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Says = Literal["own", "other", "neither"]
SAYS: tuple[Says, ...] = ("own", "other", "neither")
N_CELLS, N_TOKENS = 8, 16
"""Cells for which answers are generated, and tokens of each at most, unless told otherwise."""
AGREES = Metric(
    "agrees", "share", "share of answers that name one of the two, and the one that the logits of this run prefer"
)
NAMED = Metric("named", "share", "share of generated answers that name one of the two")


@dataclass(frozen=True)
class GeneratedPart:
    """For how many of the cells answers are generated, drawn with the seed, and of how many tokens at most."""

    n_cells: int = N_CELLS
    seed: int = 0
    max_new_tokens: int = N_TOKENS

    def __post_init__(self) -> None:
        check_whole(n_cells=(self.n_cells, 1), max_new_tokens=(self.max_new_tokens, 1))

    def of(self, n_cells: int) -> frozenset[int]:
        """Numbers of the cells, of so many; all where there are no more."""
        drawn = random.Random(f"generation/{self.seed}").sample(range(n_cells), min(self.n_cells, n_cells))
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


def agreement(table: pd.DataFrame) -> Result | None:
    """How often generated answers say what the logits prefer, with edits and without; None where none was generated.

    Args:
        table: rows of a sweep with `says`, `flip` and their values without edit; others are empty in `says`.
    """
    if "says" not in table:
        return None
    rows = table[table["says"].fillna("") != ""]
    rows = rows[rows["flip"].notna()]
    if rows.empty:
        return None
    parts = []
    for run, suffix in (("edited", ""), ("unedited", "_baseline")):
        said = rows[f"says{suffix}"]
        named = said != "neither"
        agrees = np.where(named, (said == "other") == (rows[f"flip{suffix}"] > 0.5), np.nan)
        part = rows[["example", "group"]].assign(run=run, named=named.astype(float), agrees=agrees)
        parts.append(part.groupby(["example", "group", "run"], sort=False, as_index=False).mean())
    each = pd.concat(parts, ignore_index=True).assign(agrees_baseline=0.0, named_baseline=0.0)
    return Result("generated answers", each, ("run",), (AGREES, NAMED))


def told(table: pd.DataFrame, axes: Sequence[str], measure: str) -> tuple[str, ...]:
    """What generated answers say beside the logits, in sentences; nothing where none was generated.

    Args:
        axes: what tells the cells apart.
        measure: what prefers an answer.
    """
    found = agreement(table)
    if found is None:
        return ()
    rows = table[(table["says"].fillna("") != "") & table["flip"].notna()]
    n_cells, n_examples = len(rows[list(axes)].drop_duplicates()), rows["example"].nunique()
    shares = ", ".join(f"{name} {100 * (rows['says'] == name).mean():.0f} %" for name in SAYS)
    clean = rows.drop_duplicates([name for name in ("example", "direction") if name in rows])
    before = ", ".join(f"{name} {100 * (clean['says_baseline'] == name).mean():.0f} %" for name in SAYS)
    sentences = [
        f"Answers generated in {n_cells} cells drawn at random, {n_examples} examples: {shares} (the answer that is "
        f"the run's own, the other one, none of them); without an edit: {before}."
    ]
    agrees = found.summary("agrees").set_index("run")
    for run in ("edited", "unedited"):
        row: Any = agrees.loc[run]
        if row["n"] > 1:
            interval = f"95 % interval {100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f} %"
            what = (
                f"{run} runs: of those that name one of the two, {100 * row['mean']:.0f} % name what {measure} prefers"
            )
            sentences.append(f"{what} ({interval}, n = {row['n']}).")
    return tuple(sentences)
