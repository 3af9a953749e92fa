"""One case: ours, the rivals and the plain forward on the same cells, and whether they agree."""

import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.benchmark import extraction
from vlm_mech.benchmark.bound import lower_bound, sizes
from vlm_mech.benchmark.cases import CASES, EXTRACTION, GENERATE, N_NEW, OF_ANSWERS, answered, cells
from vlm_mech.benchmark.operations import counted
from vlm_mech.benchmark.rivals import SOLVERS, Bridge, Ours, OursFirst, Plain, Traced
from vlm_mech.benchmark.task import Task
from vlm_mech.benchmark.timing import MIB, TOLERANCE, Entry, Timed, difference, interleaved, subset
from vlm_mech.errors import UsageError
from vlm_mech.interventions.receipt import summarise
from vlm_mech.sweeps.schedule import forecast
from vlm_mech.sweeps.shares import budget_of

if TYPE_CHECKING:
    from vlm_mech.inputs.prompt import Prompt
    from vlm_mech.models.vlm import VLM

OURS, PLAIN = Ours.name, Plain.name
RIVALS = tuple(SOLVERS)
PLAIN_PASSES = 3
"""Plain forward passes whose mean is the unit of a repeat."""
NAN = float("nan")


def check(cases: Sequence[str], rivals: Sequence[str], data: str) -> None:
    """Raises `UsageError` for a case, rival or data that are not known, or no case."""
    for kind, given, known in (("case", cases, tuple(CASES)), ("rival", rivals, RIVALS)):
        unknown = [each for each in given if each not in known]
        if unknown:
            raise UsageError(f"{kind} {unknown[0]!r} is not known; use one of {', '.join(known)}")
    if not cases:
        raise UsageError(f"no case is given; one of {', '.join(CASES)} is needed")
    if data != "noise":
        raise UsageError(f"data {data!r} is not known; the benchmark takes noise only")


def sweep_case(
    vlm: "VLM",
    case: str,
    prompts: "list[Prompt]",
    donors: "list[Prompt]",
    rivals: Sequence[str],
    *,
    rival_cells: int = 8,
    repeats: int = 3,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One sweep by all contenders.

    Args:
        prompts: the batch.
        donors: the same questions on other images, whose states are put in.
        rivals: names from `RIVALS`.
        rival_cells: how many cells, drawn with `seed`, a rival runs; its time is scaled by count.

    Returns:
        The table, one row for each repeat and contender, and notes on the case.
    """
    load = os.getloadavg()[0]
    donor = vlm.encode(donors)
    encoded, whole = vlm.encode(prompts), case.endswith(OF_ANSWERS)
    n_new = N_NEW if case == GENERATE else 0
    task = Task(vlm, answered(vlm, encoded) if whole else encoded, donor, cells(vlm, case, donor), n_new)
    n_cells = len(task.cells)
    chosen = subset(n_cells, rival_cells, seed)
    every = tuple(range(n_cells))
    entries, refused = [Entry(Plain(), (0,) * PLAIN_PASSES, 1), Entry(Ours(), every, n_cells)], {}
    entries += [Entry(OursFirst(), every, n_cells)] if whole else []
    for name in rivals:
        if (whole or n_new) and SOLVERS[name] is not Traced:
            refused[name] = "it reads the next token alone"
            continue
        rival, reason = _ready(vlm, name, task, chosen)
        if rival is None:
            refused[name] = reason
        else:
            entries.append(Entry(rival, chosen, n_cells))
    timed = interleaved(entries, task, repeats=repeats, seed=seed, device=vlm.device)
    notes = {
        "receipts": summarise(task.receipts),
        "n_cells": n_cells,
        "rival_cells": len(chosen),
        "bound": lower_bound(vlm, task.encoded, task.cells, n_new=n_new),
        "operations": counted(vlm, lambda: Ours().answers(task, Ours().begin(task), every)) / len(encoded),
        "planned_mib": None if n_new else _planned(task) / MIB,
        "n_pos": task.encoded.n_pos,
        "n_image": len(task.encoded.positions("image")),
    }
    table = _table(vlm, case, timed, chosen, refused, notes["bound"])
    over = notes["operations"] / (notes["bound"] * sizes(vlm, task.encoded).plain)
    table = table.assign(operations=table["contender"].map({OURS: over}))
    return table, notes | {"case": case, "load_before": load}


def _planned(task: Task) -> int:
    """Bytes that a sweep over these cells would be told to take beyond the model."""
    return forecast(task.vlm, task.encoded, task.cells, budget=budget_of(task.vlm, None)).peak_bytes


def extraction_case(
    vlm: "VLM",
    prompts: "list[Prompt]",
    rivals: Sequence[str],
    *,
    rival_cells: int = 8,
    repeats: int = 3,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The extraction case by all contenders; cells are batches. Arguments and returns as for `sweep_case`."""
    load = os.getloadavg()[0]
    task = extraction.Extraction(vlm, prompts)
    n_cells = len(task.encoded)
    every, chosen = tuple(range(n_cells)), subset(n_cells, rival_cells, seed)
    whole = (extraction.PlainPasses(), extraction.EncodedPasses(), extraction.OurExtraction())
    entries = [Entry(each, every, n_cells) for each in whole]
    entries += [Entry(make(), chosen, n_cells) for name, make in extraction.EXTRACTORS.items() if name in rivals]
    try:
        timed = interleaved(entries, task, repeats=repeats, seed=seed, device=vlm.device)
        answer = timed[0][OURS].answer
        timed[0][OURS] = Timed(timed[0][OURS].seconds, timed[0][OURS].memory, extraction.read_back(task, answer))
    finally:
        shutil.rmtree(task.folder, ignore_errors=True)
    notes = {
        "n_cells": n_cells,
        "rival_cells": len(chosen),
        "bound": 1.0,
        "n_pos": task.encoded[0].n_pos,
        "n_image": len(task.encoded[0].positions("image")),
    }
    return _table(vlm, EXTRACTION, timed, chosen, {}, 1.0), notes | {"case": EXTRACTION, "load_before": load}


def _ready(vlm: "VLM", name: str, task: Task, chosen: tuple[int, ...]) -> tuple[Any, str]:
    """The rival, or why it cannot even try."""
    try:
        rival = Bridge(vlm) if SOLVERS[name] is Bridge else SOLVERS[name]()
        rival.answers(task, rival.begin(task), chosen[:1])
    except UsageError as error:
        return None, str(error)
    return rival, ""


def _table(
    vlm: "VLM",
    case: str,
    timed: list[dict[str, Timed]],
    chosen: tuple[int, ...],
    refused: dict[str, str],
    bound: float,
) -> pd.DataFrame:
    """Seconds and what follows from them; missing, with the reason, for a rival that computes something else."""
    ours, differences, reasons = timed[0][OURS].answer, {}, {}
    for name, each in timed[0].items():
        if name in (OURS, OursFirst.name) or "plain forward" in name:
            continue
        differences[name] = difference(ours[list(chosen)], each.answer)
        limit = TOLERANCE[vlm.dtype]
        if not differences[name] <= limit:
            reasons[name] = f"does not do it: differs by {differences[name]:.2g} of the largest logit"
    rows = []
    for number, measured in enumerate(timed):
        base = measured[PLAIN].seconds
        for name, each in measured.items():
            seconds = NAN if name in reasons else each.seconds
            rows.append(
                {
                    "example": f"repeat {number + 1}",
                    "case": case,
                    "contender": name,
                    "seconds": seconds,
                    "seconds_baseline": base,
                    "forwards": seconds / base,
                    "ratio": seconds / measured[OURS].seconds,
                    # The bound holds a clean pass, which a rival does not make.
                    "of_bound": bound * base / seconds if name == OURS else NAN,
                    "operations": NAN,
                    "memory": NAN if name in reasons else each.memory,
                    "difference": differences.get(name, 0.0 if name == OURS else NAN),
                    "skipped": reasons.get(name, ""),
                }
            )
        for name, reason in refused.items():
            row = dict.fromkeys(("seconds", "forwards", "ratio", "of_bound", "operations", "memory", "difference"), NAN)
            label = SOLVERS[name].name
            row |= {"example": f"repeat {number + 1}", "case": case, "contender": label, "seconds_baseline": base}
            rows.append(row | {"skipped": f"does not do it: {reason}"})
    table = pd.DataFrame(rows)
    fixed = {"forwards": 1.0, "ratio": 1.0, "of_bound": 1.0, "operations": 1.0, "memory": 0.0, "difference": 0.0}
    return table.assign(**{f"{name}_baseline": value for name, value in fixed.items()})
