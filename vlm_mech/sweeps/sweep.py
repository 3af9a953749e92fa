"""One intervention over a grid of layers, spans, heads or anything else, on every example of a data set.

By default the sweep computes only what can change (`engine.py`); `engine="trace"` runs every cell through `trace.run`,
which is the reference. A sample of every fast sweep is run both ways and must agree.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError, WorkError, shortened
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.batches import progressing
from vlm_mech.interventions.receipt import add_up, summarise
from vlm_mech.interventions.rows import Rows
from vlm_mech.interventions.specification import Intervention, as_intervention
from vlm_mech.interventions.trace import refuse_open_trace
from vlm_mech.results.result import Result
from vlm_mech.runs.workspace import Workspace
from vlm_mech.sweeps.asked import check_listed, check_once, check_whole, digest
from vlm_mech.sweeps.axis_labels import axis_table, check_axes
from vlm_mech.sweeps.engine import engine_of
from vlm_mech.sweeps.measures import Measure, listed_measures
from vlm_mech.sweeps.readings import NOTHING_BEFORE, PLACES, Readings, readings_of, without_trivial_places
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.schedule import MAX_CELLS, SweepPlan, forecast, in_halves
from vlm_mech.sweeps.shares import Bytes, budget_of

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True)
class Point:
    """One cell of a grid; its axes are attributes, as in `point.layer`."""

    axes: tuple[tuple[str, Any], ...]

    def __getattr__(self, name: str) -> Any:
        for axis, value in object.__getattribute__(self, "axes"):
            if axis == name:
                return value
        raise AttributeError(f"the grid has no axis {name!r}; it has {', '.join(axis for axis, _ in self.axes)}")


def grid(**axes: Iterable[Any]) -> tuple[Point, ...]:
    """Every combination of the values, the last axis changing fastest.

    Raises:
        UsageError: no axis, one without values, one that is a single value, or one called like a column of results.
    """
    check_axes(tuple(axes))
    single = [name for name, each in axes.items() if isinstance(each, str) or not isinstance(each, Iterable)]
    if single:
        raise UsageError(f"axis {single[0]!r} is {axes[single[0]]!r}; a list of values is needed, of one it may be")
    values = {name: tuple(each) for name, each in axes.items()}
    empty = [name for name, each in values.items() if not each]
    if not values or empty:
        raise UsageError(f"a grid needs values on every axis; none on: {', '.join(empty) or 'any'}")
    return tuple(Point(tuple(zip(values, each, strict=True))) for each in itertools.product(*values.values()))


def sweep(
    vlm: "VLM",
    data: Pairs | Prompt | Sequence[Prompt],
    points: Sequence[Point],
    intervention: Callable[[Point], Intervention],
    measure: Measure | Sequence[Measure],
    *,
    engine: str = "fast",
    batch_size: int = 8,
    memory: int | str | None = None,
    max_cells: int = MAX_CELLS,
    check: int = 1,
    seed: int = 0,
    work: Workspace | None = None,
    progress: bool | None = None,
    batch: int | None = None,
) -> Result:
    """Every point of a grid on every example, as one row each, with the value of the unedited run next to it.

    Args:
        data: prompts, or pairs (their base prompts are used; sources are given in the interventions).
        intervention: what to do at a point. Sources given as one prompt for each example are taken in step with them;
            `Ablate` without a reference averages or draws over all the data.
        measure: one or several of `logit_diff`, `prob`, or a `Measure` of your own.
        engine: `fast`, or `trace` for one whole forward pass a point.
        batch_size: examples that run together at most; `batch` is another name for it.
        memory: bytes that the sweep may take beyond the model (on each of its devices), as a number or such as "2GiB";
            half of what there is by default. Fewer points and examples run together to stay below it; results do not
            depend on it.
        max_cells: points that run together at most in the fast engine.
        check: points of the first batch that are run through `trace` too.
        seed: draws these points.
        work: where finished batches are kept, so that an interrupted sweep goes on; commands give the folder of their
            run. Nothing is kept by default.
        progress: whether a bar tells how many batches are done; by default in notebooks and terminals.

    Returns:
        A `Result` with the grid's axes (labels where values are no numbers or text). Where answers share a beginning
        or have several tokens, columns tell how many tokens come before the one that is compared (`..._position`), and
        how many an answer has (`..._tokens`, and `..._other_tokens` the one that it is compared with). Where the tokens
        of an answer are edited alone and none comes before what a measure reads, its value is NaN, with the reason in
        `skipped`. The provenance
        holds the plan (`result.plan`), the summary of all receipts and the largest difference that the check found.

    Raises:
        UsageError: an intervention does not fit, answers are missing, the points make no table, a trace is open, or
            `work` keeps batches of another sweep.
        TooLargeError: a single point of a single example does not fit into the memory.
        ReceiptError: an intervention did not take effect.
        WorkError: the two engines disagree.
    """
    check_decoder(vlm, "sweep")
    name, batch = ("batch_size", batch_size) if batch is None else ("batch", batch)
    check_whole(**{name: (batch, 1)}, max_cells=(max_cells, 1), check=(check, 0))
    measures = listed_measures(measure)
    job = _Job(vlm, data, points, intervention, measures, engine, max_cells, budget_of(vlm, memory))
    refuse_open_trace(vlm)
    _check(job, points, measures)
    job.places  # noqa: B018 - points that make no table are refused before any work
    if work is not None:
        work.made_of(job.asked(batch))
    planned = job.plan(batch) if engine == "fast" else None
    checked = random.Random(seed).sample(range(len(points)), min(check, len(points)))
    parts: list[tuple[pd.DataFrame, dict[str, Any]]] = []
    for first in progressing(range(0, len(job.prompts), batch), "sweep", progress):
        rows, key = slice(first, min(first + batch, len(job.prompts))), f"{first:08d}"
        if work is None or key not in work:
            chosen = checked if first == 0 else []
            done = in_halves(rows, lambda rows, chosen=chosen: job.run(rows, chosen), at_most=planned and planned.batch)
            parts.append((pd.concat([table for table, _ in done], ignore_index=True), _together(done)))
            if work is not None:
                work.keep(key, *parts[-1])
    table, notes = work.collect() if work is not None else _collected(parts)
    table = without_trivial_places(table, [each.metric.name for each in measures])
    if "skipped" in table:
        table["skipped"] = table["skipped"].fillna("")  # batches in which nothing was
    axes = tuple(axis for axis, _ in points[0].axes)
    provenance = {"model": vlm.identity(), "engine": engine, "receipts": add_up([each["receipts"] for each in notes])}
    if planned is not None:
        provenance["largest_disagreement"] = max(each["disagreement"] for each in notes)
        provenance["plan"] = dataclasses.asdict(planned)
    return Result("sweep", table, axes, tuple(each.metric for each in measures), provenance=provenance)


def plan_sweep(
    vlm: "VLM",
    data: Pairs | Prompt | Sequence[Prompt],
    points: Sequence[Point],
    intervention: Callable[[Point], Intervention],
    measure: Measure | Sequence[Measure] = (),
    *,
    batch_size: int = 8,
    memory: int | str | None = None,
    max_cells: int = MAX_CELLS,
    batch: int | None = None,
) -> SweepPlan:
    """What `sweep` with these arguments will need, found without running anything.

    Args:
        data, points, intervention, measure: as for `sweep`; without a measure the next token is read.
        batch_size: examples that run together at most; `batch` is another name for it.
        memory: bytes that the sweep may take beyond the model (on each of its devices), as a number or such as "2GiB";
            half of what there is by default.
        max_cells: points that run together at most.

    Raises:
        UsageError: an intervention does not fit.
        TooLargeError: a single point of a single example does not fit into the memory.
    """
    check_decoder(vlm, "plan_sweep")
    name, batch = ("batch_size", batch_size) if batch is None else ("batch", batch)
    check_whole(**{name: (batch, 1)}, max_cells=(max_cells, 1))
    measures = listed_measures(measure)
    job = _Job(vlm, data, points, intervention, measures, "fast", max_cells, budget_of(vlm, memory))
    if not job.prompts or not points:
        raise UsageError("a sweep needs prompts and points of a grid")
    return job.plan(batch)


def _together(done: list[tuple[pd.DataFrame, dict[str, Any]]]) -> dict[str, Any]:
    notes = [each for _, each in done]
    worst = max(each["disagreement"] for each in notes)
    return {"receipts": add_up([each["receipts"] for each in notes]), "disagreement": worst}


def _collected(parts: list[tuple[pd.DataFrame, dict[str, Any]]]) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    return pd.concat([table for table, _ in parts], ignore_index=True), [notes for _, notes in parts]


@dataclass(eq=False)
class _Job:
    """A sweep's arguments, and what is done for some rows of its data."""

    vlm: "VLM"
    data: Pairs | Prompt | Sequence[Prompt]
    points: Sequence[Point]
    intervention: Callable[[Point], Intervention]
    measures: tuple[Measure, ...]
    engine: str
    max_cells: int
    budget: Bytes
    last: tuple[slice, Readings] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.intervention, Intervention) or not callable(self.intervention):
            raise UsageError(
                f"the intervention of a sweep is a {type(self.intervention).__name__}; a function of a point is "
                "needed, such as lambda point: Ablate(Site('llm.resid_post', point.layer), 'image')"
            )
        check_listed(self.points, Point, "points of a grid")
        if not isinstance(self.data, Pairs):
            check_listed(self.prompts, Prompt, "the data of a sweep")

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts that are run."""
        given = self.data.base if isinstance(self.data, Pairs) else self.data
        return [given] if isinstance(given, Prompt) else list(given)

    @functools.cached_property
    def names(self) -> list[str]:
        """Name of each example."""
        if isinstance(self.data, Pairs):
            return [pair.id for pair in self.data]
        return [str(number) for number in range(len(self.prompts))]

    @functools.cached_property
    def places(self) -> pd.DataFrame:
        """The axes of the table, a row for each point."""
        endings = ("", "_baseline", *PLACES)
        columns = [f"{each.metric.name}{ending}" for each in self.measures for ending in endings]
        return axis_table([point.axes for point in self.points], columns)

    @functools.cached_property
    def planned(self) -> list[Intervention]:
        """The intervention at each point, over all the data."""
        return [as_intervention(self.intervention(point)) for point in self.points]

    def asked(self, batch: int) -> dict[str, str]:
        """What batches that are kept are made of, beside the rows."""
        # A function is known by its metric: its own name says nothing.
        measured = [(each.metric, each.answers, each.at) for each in self.measures]
        return {
            "model of the sweep": digest(self.vlm.identity()),
            "grid": digest(self.places.to_dict("list")),
            "intervention": digest(self.planned),
            "data of the sweep": digest([self.names, self.prompts]),
            "measure": digest(measured),
            "engine or batch": digest([self.engine, batch]),
        }

    def edits(self, rows: slice) -> list[Intervention]:
        """The interventions as they concern some rows."""
        own = Rows(self.vlm, rows, self.prompts)
        return [own.of(each) for each in self.planned]

    def reading(self, rows: slice) -> Readings:
        """The prompts of some rows, with what the measures read of them.

        The last ones are kept, since a plan and the run after it ask for the same.
        """
        if self.last is None or self.last[0] != rows:
            self.last = rows, readings_of(self.vlm, self.vlm.encode(self.prompts[rows]), self.measures, rows)
        return self.last[1]

    def plan(self, batch: int) -> SweepPlan:
        """The forecast for the first batch, as many examples as fit, carried over to all the data."""

        def of(rows: slice) -> SweepPlan:
            encoded, edits = self.reading(rows).encoded, self.edits(rows)
            how = {"budget": self.budget, "max_cells": self.max_cells, "keeps_logits": False}
            return forecast(self.vlm, encoded, edits, **how)

        return in_halves(slice(0, min(batch, len(self.prompts))), of)[0].over(len(self.prompts))

    def run(self, rows: slice, checked: Sequence[int]) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The table of some rows, the summary of its receipts, and how far the engines differ at the points checked."""
        edits = self.edits(rows)
        names, read = self.names[rows], self.reading(rows)
        runner = engine_of(self.vlm, read.encoded, self.engine, budget=self.budget)
        whole: dict[int, Tensor] = {}

        def keep(number: int, logits: Tensor) -> Tensor:
            if number in checked and self.engine == "fast":
                whole[number] = logits.clone()
            return _stacked(read.checked(logits, names, runner.reads))

        values, receipts = runner.answers(edits, max_cells=self.max_cells, keep=keep)
        worst = _agree(self.vlm, read, edits, whole)
        untouched = torch.stack([read.untouched(each) for each in edits])
        values = values.masked_fill(untouched.to(values.device), float("nan"))
        table = _table(self.places, read, names, _stacked(read.checked(runner.reads, names)), values)
        if untouched.any():
            table["skipped"] = np.where(untouched.any(1).flatten().numpy(), NOTHING_BEFORE, "")
        if isinstance(self.data, Pairs):
            groups = {pair.id: pair.group or pair.id for pair in self.data}
            table = table.assign(group=table["example"].map(groups))
        summaries = [summarise(each) for each in receipts if each]
        return table, {"receipts": add_up(summaries), "disagreement": worst}


def _check(job: _Job, points: Sequence[Point], measures: tuple[Measure, ...]) -> None:
    prompts = job.prompts
    if not prompts or not points or not measures:
        raise UsageError("a sweep needs prompts, points of a grid and a measure")
    check_once(job.names, "a pair with the id")
    _check_columns([each.metric.name for each in measures])
    for each in measures:
        for answers in each.answers:
            if len(answers) != len(prompts):
                raise UsageError(f"{each.metric.name} has {len(answers)} answers for {len(prompts)} prompts")


def _check_columns(names: Sequence[str]) -> None:
    """Raises `UsageError` where a measure is called like a column that is given next to another one."""
    beside = {f"{name}{ending}": name for name in names for ending in ("_baseline", *PLACES)}
    taken = [name for name in names if name in beside]
    if taken:
        raise UsageError(f"a measure is called {taken[0]!r}, as is a column beside {beside[taken[0]]!r}; rename it")


ROUNDING = 1e-5 / torch.finfo(torch.float32).eps
"""Multiples of the data type's precision by which the two ways may differ, relative to the largest logit above 1: in
single precision 1e-5, as the tests ask."""
OF_PRODUCTS = 4
"""The same relative to `Readout.size`, for logits much smaller than the products that they are sums of."""


def _stacked(values: Sequence[Tensor]) -> Float[Tensor, "measure example"]:
    return torch.stack([each.double().cpu() for each in values])


def rounding(vlm: "VLM", logits: Tensor, difference: float) -> float:
    """By how much two ways to the same logits may differ: relative to the largest of them, or to what they are made of.

    Args:
        difference: how far they are apart; what logits are made of is asked where it needs explaining.
    """
    eps = torch.finfo(logits.dtype).eps
    limit = ROUNDING * eps * max(1.0, logits.abs().max().item())
    return limit if difference <= limit else max(limit, OF_PRODUCTS * eps * vlm.readout.size)


def _agree(vlm: "VLM", read: Readings, edits: list[Intervention], found: dict[int, Tensor]) -> float:
    """Largest difference between the fast engine's logits at some points and the reference's, where they are read."""
    if not found:
        return 0.0
    reference, worst = Reference(vlm, read.encoded), 0.0
    present = torch.tensor(read.encoded.read_places).bool() if read.encoded.answers else slice(None)
    for number, logits in found.items():
        expected = reference.logits(edits[number]).float()[present]
        difference = (expected - logits.float()[present]).abs().max().item()
        limit = rounding(vlm, expected.to(logits.dtype), difference)
        if not difference <= limit:
            raise WorkError(
                f"the fast engine differs from the reference by {difference:.3g} at {shortened(str(edits[number]))}; "
                f"at most {limit:.3g} is rounding; engine='trace' gives the reference"
            )
        worst = max(worst, difference)
    return worst


def _table(
    places: pd.DataFrame,
    read: Readings,
    names: list[str],
    clean: Float[Tensor, "measure example"],
    values: Float[Tensor, "cell measure example"],
) -> pd.DataFrame:
    columns = places.loc[places.index.repeat(len(names))].reset_index(drop=True)
    columns.insert(0, "example", names * len(places))
    for number, each in enumerate(read.each):
        name = each.measure.metric.name
        columns[name] = values[:, number].flatten().numpy()
        columns[f"{name}_baseline"] = np.tile(clean[number].numpy(), len(places))
        for ending, told in each.places.items():
            columns[f"{name}{ending}"] = np.tile(told, len(places))
    return columns
