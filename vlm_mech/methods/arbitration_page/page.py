"""A page put together: its steps, each kept when it is done, and the result that is made of what they left."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.interventions.receipt import add_up
from vlm_mech.methods.arbitration_page.claims import pool
from vlm_mech.methods.arbitration_page.crossover import Leads
from vlm_mech.methods.arbitration_page.data import Cases, Scan, scan_of
from vlm_mech.methods.arbitration_page.disagreements import disagreements
from vlm_mech.methods.arbitration_page.findings import findings
from vlm_mech.methods.arbitration_page.parts import CALLS, COLUMNS, How, told_by
from vlm_mech.methods.arbitration_page.protocols import as_table, protocols
from vlm_mech.methods.arbitration_page.study import AXES, MEASURED, asked_in, result_of, rows_of
from vlm_mech.methods.gates.gated import through_gates
from vlm_mech.results.claim import Claim, of_dicts
from vlm_mech.results.claiming import claimed, corrected_together
from vlm_mech.results.result import Result
from vlm_mech.runs.provenance import about

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "Where does an image lose to a language prior, and what would each published protocol conclude? Images that "
    "contradict what is usual and usual images get the same question. Several methods run on the same {units}; a table "
    "says what each published protocol would conclude, and why two of them can disagree."
)
Step = slice | str
"""Pairs that are measured, or a part that is a whole method."""


def steps_of(n: int, parts: Sequence[str], *, batch: int) -> dict[str, Step]:
    """Every step by its key: batches of pairs first, then the parts that are whole methods."""
    rows = {f"pairs-{start:08d}": slice(start, min(start + batch, n)) for start in range(0, n, batch)}
    return rows | {f"part-{number}-{part}": part for number, part in enumerate(parts) if part in CALLS}


def done(
    vlm: "VLM", cases: Cases, scan: Scan, step: Step, parts: Sequence[str], how: How
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and the notes of a step.

    Args:
        scan: whose states are put into the runs.
        parts: which are asked for.
    """
    if isinstance(step, str):
        return told_by(step, vlm, cases, how).kept()
    return rows_of(vlm, cases[step], scan, [part for part in MEASURED if part in parts], **how.sweeps)


def told(
    vlm: "VLM", cases: Cases, scan: Scan, table: pd.DataFrame, notes: Sequence[Mapping[str, Any]], how: How
) -> tuple[Result, dict[str, pd.DataFrame]]:
    """What the steps left, as a result with claims and findings, and the tables next to it.

    Claims of all parts are corrected together. Those of the page itself meet the gates here, the others met them in
    their part.

    Args:
        table, notes: of all steps, as `Workspace.collect` gives them.

    Returns:
        The result; and `protocols` (a row a protocol), `crossover`, `outcome` (what predicts it), and `told` (the
        sentences of every part).
    """
    parts = {str(each["part"]): each for each in notes if "part" in each}
    measured = [each for each in notes if "part" not in each]
    own = table if "part" not in table else table[table["part"].isna()]
    curves = pd.DataFrame(columns=list(COLUMNS)) if "part" not in table else table[table["part"].notna()]
    own = own.drop(columns=[name for name in COLUMNS if name in own and name not in AXES])
    own = own.astype({"layer": int, "head": int}).reset_index(drop=True)
    receipts = [each["receipts"] for each in measured]
    result = result_of(own, about(QUESTION, vlm, cases.pairs, add_up(receipts)))
    furthest = max(float(each["furthest"]) for each in measured)
    claims = _claims(vlm, cases, result, [of_dicts(each["claims"]) for each in parts.values()], how)
    facts = {name: each["facts"] for name, each in parts.items()}
    rows = protocols(result, facts, seed=how.asked.seed)
    why = disagreements(rows, result, facts, furthest)
    about_it = result.provenance | {
        "curves": _as_json(curves[list(COLUMNS)]),
        "controls": scan.told,
        "furthest": furthest,
    }
    about_it |= {"prior question": cases.why_none or "asked", "not asked": _not_asked(parts)}
    result = dataclasses.replace(result, provenance=about_it, claims=claims)
    result = dataclasses.replace(result, findings=findings(result, rows, why))
    sentences = [{"part": name, "says": text} for name, each in parts.items() for text in each["findings"]]
    held = Leads.of(result.table)
    tables = {"protocols": as_table(rows), "crossover": held.crossovers(), "outcome": held.predictors()}
    return result, tables | ({"told": pd.DataFrame(sentences)} if sentences else {})


def _claims(
    vlm: "VLM", cases: Cases, result: Result, others: Sequence[tuple[Claim, ...]], how: How
) -> tuple[Claim, ...]:
    asked = how.asked
    mine = claimed(pool(result), result, seed=asked.seed)
    every = corrected_together(mine, *others)
    own, rest = every[: len(mine)], every[len(mine) :]
    parts = [part for part in MEASURED if part in asked_in(result)]

    def measured(vlm: "VLM", pairs: Pairs) -> pd.DataFrame:
        return rows_of(vlm, Cases(pairs), scan_of(vlm, pairs, seed=asked.seed), parts, **how.sweeps)[0]

    return (*through_gates(asked, own, vlm, cases.pairs, result, pool, measured, at_once=True), *rest)


def _not_asked(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: str(each["why_not"]) for name, each in parts.items() if each["why_not"]}


def _as_json(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): None if value != value else value for name, value in row.items()}
        for row in table.to_dict("records")
    ]
