"""Attention knockout over edges and layers: how much the answer depends on who attends to whom, where.

After Geva et al. 2023 (arXiv 2304.14767) and Zhang et al. 2024 (cross-modal information flow, arXiv 2411.18620); see
docs/methods.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Tokens
from vlm_mech.interventions.receipt import add_up, summarise
from vlm_mech.interventions.specification import Knockout
from vlm_mech.interventions.trace import generate
from vlm_mech.methods.knockout.data import (
    EDGE,
    FoundBy,
    Masks,
    Scan,
    found_edges,
    kind_of,
    place_of,
    queries_of,
    sweeps,
)
from vlm_mech.methods.knockout.edges import Edge, ends_of, visible_edges
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.generated_answers import SPOKEN, GeneratedPart, generated_at, with_generated_at
from vlm_mech.sweeps.measures import Comparison, Measure, comparison, prob, said
from vlm_mech.sweeps.readings import NOTHING_BEFORE, PLACES
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.sweeps.schedule import SweepPlan
from vlm_mech.sweeps.sweep import Point, plan_sweep, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

MIN_PROB = 1e-3

RELATIVE = Metric(
    "relative_change", "%", "change of the answer's probability in percent of that of the unedited run", signed=True
)
LOGIT = Metric("logit", "logits", "logit of the answer's first token", signed=True)
FLIP = Metric("flip", "share", "share of examples in which the other answer is preferred to its own")
LOST = Metric("lost", "share", "share of examples in which greedy decoding does not give the answer")


def metrics_of(name: Comparison = "logit_diff") -> tuple[Metric, ...]:
    """The metrics of a knockout whose answers are compared so."""
    return RELATIVE, comparison(name, (), ()).metric, prob(()).metric, LOGIT, FLIP, LOST


METRICS = metrics_of()

MASS_CUT, MASS_RATIO = "mass", "mass_ratio"
"""Columns with the unedited attention on what is cut, summed over heads and layers, and its share of the edge's."""
OUT_OF_SIGHT = "attention at these layers allows none of the edges"
NO_PROB = f"the answer's probability is below {MIN_PROB} without any knockout"


def knock_out(
    vlm: "VLM",
    pairs: Pairs,
    scan: Scan,
    *,
    masks: Masks | None = None,
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
        masks: pixels of the object by pair, for the groups `object` and `rest`.
        only_correct: leave out the pairs that the model answers wrongly.
        measure: how the two answers of a pair are compared (see `measures.comparison`).
        part: cells in which answers are generated too: the columns `text` and `says` (own, other or neither) of these
            rows, and `text_baseline` and `says_baseline` without an edit.
        seed: draws the controls; they do not depend on how pairs are batched.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".
        check: cells that are run by the reference too, and must agree.

    Returns:
        The table with one row per pair, edge, `cut` (the edge or its control), layer and head; values left out are NaN
        with the reason in `skipped`; `n_layers_cut` says in how many layers of a window there was something to cut.
        Of scans with controls of equal mass or distance, `mass` is the unedited attention on what is cut, summed over
        heads and layers, and `mass_ratio` its share of the edge's. And the summary of all receipts.

    Raises:
        UsageError: an edge does not fit (see `edges.ends_of`), or a head is out of range.
    """
    points, sets = scan.points(), scan.layers.sets
    found = found_edges(vlm, pairs, scan, masks or {}, only_correct=only_correct, seed=seed)
    tables, notes = [], [summarise(())]
    drawn = _drawn(points, part)
    for chosen, some, cut in sweeps(pairs, points, found, scan):
        how = {"engine": engine, "batch": len(chosen), "memory": memory, "check": check}
        result = sweep(vlm, chosen, some, cut, _measures(chosen, measure), **how)
        table = result.table
        if part is not None:
            spoken = [point for point in some if point in drawn]
            said = generated_at(vlm, chosen, spoken, cut, part, engine=engine, memory=memory)
            said = said.reindex(columns=["example", *scan.axes, *SPOKEN])
            table = table.merge(said, on=["example", *scan.axes], how="left")
        tables.append(table)
        notes.append(result.provenance["receipts"])
    return _assembled(pairs, points, found, tables, sets, measure), add_up(notes)


def plan_knockout(
    vlm: "VLM",
    pairs: Pairs,
    scan: Scan,
    *,
    masks: Masks | None = None,
    measure: Comparison = "logit_diff",
    part: GeneratedPart | None = None,
    batch: int = 32,
    seed: int = 0,
    memory: int | str | None = None,
) -> SweepPlan:
    """What `knock_out` over all pairs, `batch` at a time, will need; all examples are taken to be answered correctly.

    One unedited pass over the first batch is run, to see which edges there are; for controls of equal mass or distance,
    and those that spare sinks, its examples are run one by one too.

    Args:
        part: cells in which answers are generated too; the plan is a `SpokenPlan` then.

    Raises:
        TooLargeError: a single knockout of a single example does not fit into the memory.
    """
    first = pairs[:batch]
    found = found_edges(vlm, first, scan, masks or {}, only_correct=False, seed=seed)
    points = scan.points()
    drawn, plans = _drawn(points, part), []
    for chosen, some, cut in sweeps(first, points, found, scan):
        plan = plan_sweep(vlm, chosen, some, cut, _measures(chosen, measure), batch=len(chosen), memory=memory)
        spoken = [point for point in some if point in drawn]
        plans.append(plan if part is None else with_generated_at(vlm, plan, chosen, spoken, cut, part))
    if not plans:
        raise UsageError("no example has any of the edges")
    added = {"forwards"} if part is None else {"forwards", "generated_forwards", "looped_forwards"}
    together = {name: sum(getattr(each, name) * each.n_examples for each in plans) / len(first) for name in added}
    largest = max(plans, key=lambda each: each.peak_bytes).with_peaks(*(each.peaks for each in plans))
    return dataclasses.replace(
        largest,
        n_cells=len(points),
        n_examples=len(first),
        flops=sum(each.flops for each in plans),
        **together | ({} if part is None else {"n_generated": len(drawn)}),
    ).over(len(pairs))


def _drawn(points: Sequence[Point], part: GeneratedPart | None) -> set[Point]:
    """The cells in which answers are generated."""
    return set() if part is None else {points[number] for number in part.of(range(len(points)))}


def _measures(pairs: Pairs, name: Comparison) -> tuple[Measure, ...]:
    own, compared = (pairs.answer,), comparison(name, pairs.answer, pairs.counterfactual_answer)
    is_said = said(pairs.answer)
    return (
        compared,
        prob(*own),
        Measure(LOGIT, lambda logits, ids: logits.float().gather(1, ids[:, None])[:, 0], own, any_token=True),
        dataclasses.replace(compared, metric=FLIP, of=lambda *given: (compared.of(*given) < 0).float()),
        dataclasses.replace(is_said, metric=LOST, of=lambda answer: 1 - is_said.of(answer)),
    )


def _assembled(
    pairs: Pairs,
    points: Sequence[Point],
    found: FoundBy,
    tables: Sequence[pd.DataFrame],
    sets: dict[int | str, tuple[int, ...]],
    measure: Comparison,
) -> pd.DataFrame:
    """All cells of all examples, those that were not measured with the reason."""
    rows = []
    for point in points:
        for number, pair in enumerate(pairs):
            here = found[kind_of(point)][number]
            place = dict(point.axes) | {"example": pair.id, "group": pair.group or pair.id}
            seen = sets[point.layer] if isinstance(here, str) else here.layers.intersection(sets[point.layer])
            why = here if isinstance(here, str) else "" if seen else OUT_OF_SIGHT
            mass = {} if isinstance(here, str) or not here.mass else {MASS_CUT: here.mass[place_of(point)]}
            rows.append(place | {"n_layers_cut": len(seen), "skipped": why} | mass)
    table = with_ratio(pd.DataFrame(rows), [axis for axis, _ in points[0].axes])
    measured = (LOGIT.name, prob(()).metric.name, measure, FLIP.name, LOST.name)
    columns = [f"{name}{ending}" for name in measured for ending in ("", "_baseline")]
    axes = [axis for axis, _ in points[0].axes]
    if tables:
        found_in = pd.concat(tables, ignore_index=True)
        places = [f"{measure}{ending}" for ending in PLACES]
        spoken = [name for name in (*SPOKEN, *places) if name in found_in]
        found_in = found_in.reindex(columns=["example", *axes, *columns, *spoken, "skipped"])
        table = table.merge(found_in, on=["example", *axes], how="left", validate="one_to_one", suffixes=("", "_in"))
    else:
        table = table.assign(**dict.fromkeys(columns, np.nan))
    table["relative_change"] = relative_change(table["prob"].to_numpy(), table["prob_baseline"].to_numpy())
    table["relative_change_baseline"] = np.where(table["relative_change"].isna(), np.nan, 0.0)
    low = (table["skipped"] == "") & table["relative_change"].isna()
    table["skipped"] = table["skipped"].where(~low, NO_PROB)
    if tables:
        # What is said whole is measured there; what is read before the answer's tokens is not.
        early = (table.pop("skipped_in") == NOTHING_BEFORE) & (table["skipped"] == "")
        table["skipped"] = table["skipped"].where(~early, NOTHING_BEFORE)
    return table


def with_ratio(table: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """The table with each cut's attention as a share of that of its edge, where attention was weighed."""
    if MASS_CUT not in table:
        return table
    where = ["example", *(axis for axis in axes if axis != "cut")]
    own = table[table["cut"] == EDGE].set_index(where)[MASS_CUT].rename("own")
    return (
        table.join(own, on=where).assign(**{MASS_RATIO: lambda each: each[MASS_CUT] / each["own"]}).drop(columns="own")
    )


def relative_change(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """`100 (after - before) / before`, in percent (Zhang et al.); NaN where `before` is below `MIN_PROB`."""
    enough = before >= MIN_PROB
    return np.where(enough, 100 * (after - before) / np.where(enough, before, 1.0), np.nan)


def texts_without(
    vlm: "VLM", pairs: Pairs, edges: Sequence[Edge], masks: Masks, *, max_new_tokens: int = 12
) -> pd.DataFrame:
    """What the model writes with and without each edge, cut at all layers; a row per pair and edge.

    Where `last` or `answer` is among the queries, generated tokens cannot attend to the keys either.
    """
    everything = tuple(vlm.llm_layers)
    found = []
    for number, pair in enumerate(pairs):
        encoded = vlm.encode(pairs[number : number + 1].base)
        clean = generate(vlm, encoded, max_new_tokens=max_new_tokens).texts[0]
        visible, row = visible_edges(record(vlm, encoded), 0), encoded.rows[0]
        for edge in edges:
            ends = ends_of(encoded, 0, edge, visible, masks.get(pair.id))
            if isinstance(ends, str):
                continue
            ends = dataclasses.replace(ends, answer=ends.answer or row.present.index(encoded.n_pos - 1) in ends.query)
            edit = Knockout(queries_of(ends), Tokens(ends.key), everything)
            cut = generate(vlm, encoded, edit, max_new_tokens=max_new_tokens)
            found.append(
                {"example": pair.id, "question": pair.question, "edge": str(edge), "clean": clean, "cut": cut.texts[0]}
            )
    return pd.DataFrame(found)
