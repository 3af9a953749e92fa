"""Steering along directions: the rows of its table, the choice of place and dose, slopes over doses.

Slopes and their sign after Tan et al. 2024 (arXiv 2407.12404); see docs/methods.md.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from vlm_mech.data.derived_pairs import turned
from vlm_mech.data.pairs import Pairs
from vlm_mech.interventions.receipt import add_up
from vlm_mech.interventions.specification import Steer
from vlm_mech.methods.steering.data import AGAINST, TOWARD
from vlm_mech.methods.steering.direction import steer
from vlm_mech.methods.steering.figures import drawn
from vlm_mech.methods.steering.states import FOUND, Differences, Place
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.statistics import percentile_interval, share_interval
from vlm_mech.sweeps.measures import Comparison, Measure, comparison, said
from vlm_mech.sweeps.schedule import SweepPlan
from vlm_mech.sweeps.sweep import Point, plan_sweep, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("direction", "picture", "span", "layer", "dose")
SAYS = Metric("says_toward", "share", "share of examples in which greedy decoding gives the direction's answer")
RIGHT = Metric("right", "share", "share of examples in which greedy decoding gives what the image shows")
SLOPES = (
    *("direction", "picture", "n", "slope", "low", "high"),
    *("anti_steerable", "anti_low", "anti_high", "spearman"),
)
"""Columns of `slopes`, before the rank among random directions."""
N_RESAMPLES = 2000
ENOUGH_RANDOM = 20
"""Random directions below which no claim is made and no rank among them is told: 1/21 is the least p that 20 give."""


def metrics_of(name: Comparison = "logit_diff") -> tuple[Metric, ...]:
    """The metrics of steering whose answers are compared so."""
    unit = comparison(name, (), ()).metric.unit
    told = f"{name} of the answer the direction is for over the other one"
    return Metric(name, unit, told, signed=True), SAYS, RIGHT


@dataclass(frozen=True, eq=False)
class Steering:
    """What is steered: the directions at all places, and at the place chosen those of controls too.

    Everywhere states are moved by the dose chosen, both ways; at the place chosen by every dose.
    """

    found: Mapping[Place, Differences]
    place: Place
    dose: float
    doses: tuple[float, ...]
    controls: Mapping[str, Float[Tensor, "width"]]

    @property
    def chosen(self) -> Differences:
        """The differences at the place chosen."""
        return self.found[self.place]

    def points(self) -> tuple[Point, ...]:
        """Every cell, but for which picture is asked about."""
        here = [_point(name, self.place, dose) for name in (FOUND, *self.controls) for dose in self.doses]
        there = [place for place in self.found if place != self.place]
        return (*here, *(_point(FOUND, place, sign * self.dose) for place in there for sign in (-1, 1)))

    def intervention(self, point: Point) -> Steer:
        """What is done in a cell."""
        place = Place(point.span, point.layer, self.place.point)
        vector = self.found[place].vector if point.direction == FOUND else self.controls[point.direction]
        return steer(vector, self.found[place].norm, place.site, place.span, point.dose)

    def alone(self, names: Sequence[str] = ()) -> "Steering":
        """The same at the place chosen alone, by the dose chosen both ways, with these controls."""
        some = {name: self.controls[name] for name in names}
        here = {self.place: self.chosen}
        return dataclasses.replace(self, found=here, doses=(-self.dose, self.dose), controls=some)


def _point(name: str, place: Place, dose: float) -> Point:
    return Point((("direction", name), ("span", place.span), ("layer", place.layer), ("dose", dose)))


def choosing(found: Mapping[Place, Differences], doses: Sequence[float]) -> Steering:
    """Every place by every dose above 0, among which place and dose are chosen."""
    first, *_ = found
    return Steering(found, first, 0.0, tuple(dose for dose in doses if dose > 0), {})


def choice_points(steering: Steering) -> tuple[Point, ...]:
    """The cells of such a choice."""
    return tuple(_point(FOUND, place, dose) for place in steering.found for dose in steering.doses)


def steered(
    vlm: "VLM",
    pairs: Pairs,
    steering: Steering,
    points: Sequence[Point],
    *,
    pictures: Sequence[str] = (AGAINST, TOWARD),
    measure: Comparison = "logit_diff",
    engine: str = "fast",
    memory: int | str | None = None,
    check: int = 1,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Every cell for one batch of pairs, about one picture of each or both.

    Args:
        pairs: turned so that the direction is for their first answers (`data.oriented`).
        points: cells of the steering.
        pictures: which are asked about.
        measure: how the two answers of a pair are compared (see `measures.comparison`).
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".
        check: cells that are run by the reference too, and must agree.

    Returns:
        The table with a row for each pair, picture and cell, and the summary of all receipts.
    """
    tables, notes = [], []
    for picture in pictures:
        faced, measures = _asked(pairs, picture, measure)
        how = {"engine": engine, "batch": len(pairs), "memory": memory, "check": check}
        result = sweep(vlm, faced, points, steering.intervention, measures, **how)
        tables.append(result.table.assign(picture=picture))
        notes.append(result.provenance["receipts"])
    table = pd.concat(tables, ignore_index=True)
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    return table.assign(group=table["example"].map(groups)), add_up(notes)


def _asked(pairs: Pairs, picture: str, name: Comparison) -> tuple[Pairs, list[Measure]]:
    """The pairs with the picture that is asked about first, and what is measured."""
    toward, over = pairs.answer, pairs.counterfactual_answer
    compared, *shares = metrics_of(name)
    each = [comparison(name, toward, over), said(toward), said(toward if picture == TOWARD else over)]
    named = [dataclasses.replace(one, metric=metric) for one, metric in zip(each, (compared, *shares), strict=True)]
    return (pairs if picture == TOWARD else turned(pairs)), named


def plan_steering(
    vlm: "VLM",
    pairs: Pairs,
    steering: Steering,
    *,
    measure: Comparison = "logit_diff",
    batch: int = 32,
    memory: int | str | None = None,
) -> SweepPlan:
    """What `steered` over both pictures of all pairs, `batch` at a time, will need; nothing is run.

    Args:
        measure, memory: as for `steered`.
        batch: pairs per forward pass.

    Raises:
        TooLargeError: a single cell of a single example does not fit into the memory.
    """
    faced, measures = _asked(pairs, AGAINST, measure)
    plan = plan_sweep(vlm, faced, steering.points(), steering.intervention, measures, batch=batch, memory=memory)
    doubled = {"n_cells": 2 * plan.n_cells, "flops": 2 * plan.flops, "forwards": 2 * plan.forwards}
    return dataclasses.replace(plan, **doubled)


def chosen(table: pd.DataFrame, measure: str, found: Mapping[Place, Differences]) -> tuple[Place, float]:
    """Place and dose with which answers are said most often that the direction is for, where the picture shows others.

    What greedy decoding gives counts, out of all words, so that a dose that drives a model to say neither is none. Of
    equal ones the smallest dose is taken, of these the one that moves the difference of the answers most.

    Args:
        table: of the validation pairs, asked about the pictures against the direction.
        measure: the column of that difference.
        found: the places.
    """
    rows = table.assign(moved=table[measure] - table[f"{measure}_baseline"])
    means = rows.groupby(["span", "layer", "dose"], sort=False)[[SAYS.name, "moved"]].mean().reset_index()
    best = means.sort_values([SAYS.name, "dose", "moved"], ascending=[False, True, False], kind="stable").iloc[0]
    place = next(each for each in found if (each.span, each.layer) == (best["span"], best["layer"]))
    return place, float(best["dose"])


def result_of(table: pd.DataFrame, measure: Comparison, provenance: dict[str, Any]) -> Result:
    """The rows of `steered` as a result."""
    return Result("steering", table, AXES, metrics_of(measure), {}, provenance | {PLOT: drawn_by(drawn)})


def slopes(result: Result, place: Mapping[str, Any], *, seed: int = 0) -> pd.DataFrame:
    """How the difference of answers follows the dose at a place, a row for each direction and picture.

    Of each example the slope of an ordinary least squares line over doses is taken, and Spearman's correlation of dose
    and difference.

    Args:
        place: span and layer.
        seed: draws the bootstrap.

    Returns:
        Columns `direction`, `picture`, `n`, `slope` (mean, in units of the difference for a dose of 1) with `low` and
        `high`, `anti_steerable` (the share of examples whose slope is below 0) with its interval (Wilson's, over
        groups), `spearman` (mean); and `beaten_by`, the share of random directions whose mean slope is at least as
        large, counted with the found one itself: (1 + those) / (1 + all); NaN with fewer than `ENOUGH_RANDOM`.
    """
    metric = result.metrics[0].name
    held = (result.table[["span", "layer"]] == pd.Series(dict(place))[["span", "layer"]]).all(axis=1)
    cells: Any = result.table[held].groupby(["direction", "picture"], sort=False)
    found = []
    for (direction, picture), some in cells:
        wide = some.pivot(index="example", columns="dose", values=metric).dropna()
        groups = pd.factorize(some.drop_duplicates("example").set_index("example")["group"].reindex(wide.index))[0]
        if len(wide.columns) < 2 or len(set(groups)) < 2:
            continue
        each = least_squares(wide.columns.to_numpy(float), wide.to_numpy(float))
        (low,), (high,) = percentile_interval(each[:, None], groups, level=0.95, n_resamples=N_RESAMPLES, seed=seed)
        below = pd.Series(each < 0).groupby(groups).mean()
        least, most = share_interval(round(float(below.sum())), len(below))
        row = {"direction": direction, "picture": picture, "n": len(wide), "slope": each.mean(), "low": low}
        row |= {"high": high, "anti_steerable": float((each < 0).mean()), "anti_low": least, "anti_high": most}
        found.append(row | {"spearman": float(np.mean(_spearman(wide.columns.to_numpy(float), wide.to_numpy(float))))})
    return _ranked(pd.DataFrame(found, columns=list(SLOPES)))


def least_squares(
    doses: Float[np.ndarray, "dose"], values: Float[np.ndarray, "example dose"]
) -> Float[np.ndarray, "example"]:
    """The slope of the least squares line of each row over the doses."""
    centred = doses - doses.mean()
    return values @ centred / (centred**2).sum()


def _spearman(doses: Float[np.ndarray, "dose"], values: Float[np.ndarray, "example dose"]) -> np.ndarray:
    """Spearman's correlation of each row with the doses; 0 where a row does not change."""
    ranks, own = rankdata(values, axis=1), rankdata(doses)
    ranks, own = ranks - ranks.mean(1, keepdims=True), own - own.mean()
    size = np.sqrt((ranks**2).sum(1) * (own**2).sum())
    return np.where(size > 0, ranks @ own / np.where(size > 0, size, 1), 0.0)


def _ranked(table: pd.DataFrame) -> pd.DataFrame:
    random = table["direction"].astype(str).str.startswith("random")
    shares = []
    for row in table.itertuples(index=False):
        others = table.loc[random & (table["picture"] == row.picture), "slope"]
        told = row.direction == FOUND and len(others) >= ENOUGH_RANDOM
        shares.append((1 + (others >= row.slope).sum()) / (1 + len(others)) if told else np.nan)
    return table.assign(beaten_by=shares)
