"""The image tokens removed, frozen or exchanged from each layer on: what becomes of the answer, example by example.

After arXiv 2512.07580 (information horizon) and 2604.09425 (exchanged states, truncation); see docs/methods.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.horizon.data import Scan, edits_of
from vlm_mech.results.result import Metric
from vlm_mech.results.statistics import share_interval
from vlm_mech.sweeps.generated_answers import GeneratedPart, generated_at, with_generated_at
from vlm_mech.sweeps.measures import Comparison, Measure, comparison, kl, logprob, prob, said
from vlm_mech.sweeps.readings import PLACES
from vlm_mech.sweeps.schedule import SweepPlan
from vlm_mech.sweeps.sweep import Point, plan_sweep, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

KL = kl().metric
SAID = Metric("said", "share", "share of examples in which the answer is the most likely text (greedy decoding)")
CHOSEN = Metric("chosen", "share", "share of examples in which the answer is preferred to the other one")
LOST = Metric("lost", "share", "share of examples whose answer is given unedited and not when edited")
PROB, LOGPROB = prob(()).metric, logprob(()).metric
WRONG = "not answered correctly"
FLIP = "flip"
"""1 where the other answer is preferred: what generated answers are held against."""


def metrics_of(name: Comparison = "logit_diff") -> tuple[Metric, ...]:
    """The metrics of a run whose answers are compared so."""
    return KL, SAID, CHOSEN, LOST, PROB, LOGPROB, comparison(name, (), ()).metric


def horizon_rows(
    vlm: "VLM",
    pairs: Pairs,
    scan: Scan,
    *,
    only_correct: bool = True,
    measure: Comparison = "logit_diff",
    part: GeneratedPart | None = None,
    seed: int = 0,
    engine: str = "fast",
    memory: int | str | None = None,
    check: int = 1,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Every cell of a scan on one batch of pairs.

    Args:
        only_correct: leave out the pairs that the model answers wrongly.
        measure: how the two answers of a pair are compared (see `measures.comparison`).
        part: cells in which answers are generated too: the columns `text` and `says` (own, other or neither) of these
            rows, and `text_baseline` and `says_baseline` without an edit.
        seed: draws the tokens of the controls.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".
        check: cells that are run by the reference too, and must agree.

    Returns:
        The table with one row per pair, arm and layer; where nothing is edited the values are those of the unedited
        run. Values left out are NaN with the reason in `skipped`. And the summary of all receipts.
    """
    points, edits = scan.points(), edits_of(vlm, pairs, scan, seed=seed)
    how = {"engine": engine, "batch": len(pairs), "memory": memory, "check": check}
    result = sweep(vlm, pairs, points, edits.of, _measures(pairs, measure), **how)
    table = result.table
    if part is not None:
        spoken = generated_at(vlm, pairs, _drawn(points, part), edits.of, part, engine=engine, memory=memory)
        table = table.merge(spoken, on=["example", *scan.axes], how="left")
    return _assembled(table, pairs, scan, measure, only_correct), result.provenance["receipts"]


def plan_horizon(
    vlm: "VLM",
    pairs: Pairs,
    scan: Scan,
    *,
    measure: Comparison = "logit_diff",
    part: GeneratedPart | None = None,
    batch: int = 32,
    seed: int = 0,
    memory: int | str | None = None,
) -> SweepPlan:
    """What `horizon_rows` over all pairs, `batch` at a time, will need; nothing is run.

    Args:
        part: cells in which answers are generated too; the plan is a `SpokenPlan` then.

    Raises:
        TooLargeError: a single edit of a single example does not fit into the memory.
    """
    first, points = pairs[:batch], scan.points()
    edits = edits_of(vlm, first, scan, seed=seed)
    plan = plan_sweep(vlm, first, points, edits.of, _measures(first, measure), batch=len(first), memory=memory)
    if part is not None:
        plan = with_generated_at(vlm, plan, first, _drawn(points, part), edits.of, part)
    return plan.over(len(pairs))


def _measures(pairs: Pairs, name: Comparison) -> tuple[Measure, ...]:
    compared = comparison(name, pairs.answer, pairs.counterfactual_answer)
    chosen = dataclasses.replace(compared, metric=CHOSEN, of=lambda *given: (compared.of(*given) > 0).float())
    is_said = dataclasses.replace(said(pairs.answer), metric=SAID)
    return kl(), is_said, chosen, prob(pairs.answer), logprob(pairs.answer), compared


def _drawn(points: Sequence[Point], part: GeneratedPart) -> list[Point]:
    """The cells in which answers are generated."""
    numbers = part.of(range(len(points)))
    return [point for number, point in enumerate(points) if number in numbers]


def _assembled(table: pd.DataFrame, pairs: Pairs, scan: Scan, measure: str, only_correct: bool) -> pd.DataFrame:
    """All cells of all examples: those that were swept, those without an edit, and those that do not count."""
    names = [KL.name, SAID.name, CHOSEN.name, PROB.name, LOGPROB.name, measure]
    of_examples = [f"{name}{ending}" for name in names for ending in ("_baseline", *PLACES)]
    of_examples = [column for column in of_examples if column in table]
    first = table.drop_duplicates("example").set_index("example")[of_examples]
    swept = table.drop(columns=[*of_examples, "group", "skipped"], errors="ignore")
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    cells, examples = pd.DataFrame(scan.cells(), columns=list(scan.axes)), pd.DataFrame({"example": list(groups)})
    found = cells.merge(examples, how="cross").merge(swept, on=["example", *scan.axes], how="left")
    found["group"] = found["example"].map(groups)
    for column in of_examples:
        found[column] = found["example"].map(first[column])
    free = [layer not in scan.layers(arm) for arm, layer in zip(found["arm"], found["layer"], strict=True)]
    for name in names:
        found[name] = found[name].where(~np.array(free), found[f"{name}_baseline"])
    found[LOST.name] = ((found["said_baseline"] == 1) & (found["said"] == 0)).astype(float)
    found[f"{LOST.name}_baseline"] = 0.0
    wrong = np.array(found["said_baseline"] != 1) & only_correct
    for name in (*names, LOST.name):
        for column in (name, f"{name}_baseline"):
            found.loc[wrong, column] = np.nan
    found["skipped"] = np.where(wrong, WRONG, "")
    if "says" in found:
        for ending in ("", "_baseline"):
            found[f"{FLIP}{ending}"] = 1 - found[f"{CHOSEN.name}{ending}"]
    return found


def same_texts(table: pd.DataFrame) -> pd.DataFrame | None:
    """How often a generated answer is, to the letter, that of the unedited run, by cell; None where none is generated.

    Returns:
        The columns `arm`, `layer`, `n` (examples that count), `same text` (their share), and `low` and `high` (Wilson's
        95 % interval).
    """
    if "text" not in table:
        return None
    rows = table[table["text"].notna() & (table["skipped"] == "")]
    same = (rows["text"] == rows["text_baseline"]).astype(float)
    found = same.groupby([rows["arm"], rows["layer"]], sort=False).agg(["size", "mean", "sum"]).reset_index()
    ends = [share_interval(int(hits), n) for hits, n in zip(found["sum"], found["size"], strict=True)]
    found = found.drop(columns="sum").set_axis(["arm", "layer", "n", "same text"], axis=1)
    return found.assign(low=[low for low, _ in ends], high=[high for _, high in ends])
