"""A page put together: its steps, each kept when it is done, and the result that is made of what they left."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.errors import TooFewError
from vlm_mech.methods.facts.data import Known
from vlm_mech.methods.facts.findings import findings
from vlm_mech.methods.facts.parts import COLUMNS, How, told_by
from vlm_mech.methods.facts.study import agreed, as_table, readings, result_of
from vlm_mech.results.claim import of_dicts
from vlm_mech.results.result import Result
from vlm_mech.runs.provenance import about

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "In which layers does the last token read the answer of a known fact from its subject? Several methods run on the "
    "same {units} of texts, each about one subject and another, with the same gates. Do they agree, and do they match "
    "what the literature reports for other models?"
)


def steps_of(parts: Sequence[str]) -> dict[str, str]:
    """Every step by its key: a part each."""
    return {f"part-{number}-{part}": part for number, part in enumerate(parts)}


def done(vlm: "VLM", known: Known, part: str, how: How) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and the notes of a step."""
    return told_by(part, vlm, known.pairs, how).kept()


def told(
    vlm: "VLM", known: Known, table: pd.DataFrame, notes: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> tuple[Result, dict[str, pd.DataFrame]]:
    """What the steps left, as a result with claims and findings, and the tables next to it.

    Claims are corrected within their part, as in a run of that method alone: what is told of several methods, their
    agreement, needs claims of each, which is no easier for their number.

    Args:
        table, notes: of all steps, as `Workspace.collect` gives them.
        seed: draws resamples.

    Returns:
        The result; and `reading` (a row a method) and `answers` (a row a question).

    Raises:
        TooFewError: no part could be asked.
    """
    parts = {str(each["part"]): each for each in notes}
    missing = {part: str(each["why_not"]) for part, each in parts.items() if each["why_not"]}
    if len(missing) == len(parts):
        raise TooFewError(f"no part could be run: {next(iter(missing.values()))}")
    claims = {part: of_dicts(list(each["claims"])) for part, each in parts.items()}
    provenance = about(QUESTION, vlm, known.pairs, {}) | {"known": known.counts, "not asked": missing}
    result = result_of(table[list(COLUMNS)], provenance, tuple(each for some in claims.values() for each in some))
    found = readings(result, claims, n_layers=vlm.n_layers("llm"), seed=seed)
    rows = as_table(found)
    told_rows = [
        {str(name): None if pd.isna(value) else value for name, value in row.items()} for row in rows.to_dict("records")
    ]
    provenance |= {"reading": told_rows, "agreed": list(agreed(found)), "n_layers": vlm.n_layers("llm")}
    result = dataclasses.replace(result, provenance=provenance, known={})
    result = dataclasses.replace(result, findings=findings(result, known, found, claims))
    return result, {"reading": rows, "answers": known.answers}
