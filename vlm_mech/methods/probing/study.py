"""Probes of one model with all their controls, as the rows of a `Result`.

Each control is a step of its own, so that a killed run goes on where it was. Examples of two data sets meet in the
table: those on which the probes were cross-fitted (`test`), and scenes in conflict with what is usual (`conflict`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from vlm_mech.errors import UsageError
from vlm_mech.methods.probing.controls import (
    CONTROLS,
    NO_IMAGE,
    NONE,
    RANDOM,
    SHUFFLED,
    TASK,
    control_task,
    read_without_image,
    shuffled,
    with_random_weights,
)
from vlm_mech.methods.probing.crossfit import Readings, crossfit, is_first, over_seeds
from vlm_mech.methods.probing.data import Examples, Features, Spot, read_states
from vlm_mech.methods.probing.descent import ProbeRecipe
from vlm_mech.methods.probing.description_length import online_code
from vlm_mech.methods.probing.patch_map import patch_map
from vlm_mech.methods.probing.splits import check_answers, grouped, make_splits, numbered
from vlm_mech.methods.probing.training import Split
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("model", "probe", "control", "read_on", "span", "place")
TEST, CONFLICT = "test", "conflict"
ELSEWHERE = "not an example of this data set"

Notes = dict[str, Any]
"""What a step of the study tells beside its rows."""


@dataclass(frozen=True)
class Design:
    """What is probed and how: the spots, the recipes, the controls, the folds and seeds."""

    spots: tuple[Spot, ...]
    recipes: tuple[ProbeRecipe, ...]
    controls: tuple[str, ...] = CONTROLS
    grouping: str = "both"
    n_folds: int = 4
    n_seeds: int = 5
    seed: int = 0
    batch: int = 32
    mdl: bool = False
    memory: int = 2**28
    device: str = "cpu"

    def __post_init__(self) -> None:
        for control in self.controls:
            if control not in CONTROLS:
                raise UsageError(f"control {control!r} is not known; use one of {', '.join(CONTROLS)}")
        if not self.recipes:
            raise UsageError("no probe is given; linear or mlp is needed")

    @property
    def steps(self) -> tuple[str, ...]:
        """The probe itself and its controls."""
        return (NONE, *self.controls)


def study(
    vlm: "VLM", examples: Examples, conflicts: Examples | None, design: Design, step: str, *, folder: Path
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One step (the probe itself, or a control) for one model: its rows, and notes on seeds, fits and chosen spots.

    Raises:
        UsageError: a conflict scene shows or suggests an answer that no other scene has.
    """
    classes, labels = numbered(examples.labels)
    features, how = _features(vlm, examples, design, step, folder)
    grouping = "scene" if step == TASK else design.grouping
    groups = grouped(examples, grouping)
    splits = make_splits(labels, groups, n_folds=design.n_folds, n_seeds=design.n_seeds, seed=design.seed)
    check_answers(labels, classes, splits)
    wanted = _labels(step, labels, examples, splits, design.seed)
    elsewhere = None
    if step == NONE and conflicts is not None:
        _check_known(conflicts, classes)
        elsewhere = read_states(
            vlm, conflicts.prompts, conflicts.objects, design.spots, folder=folder / CONFLICT, batch=design.batch
        )
    tables, notes = [], {"step": step, "model": vlm.name, "how": how, "classes": classes, "grouping": grouping}
    for recipe in design.recipes:
        options = {"groups": groups.tolist(), "memory": design.memory, "device": design.device}
        readings = crossfit(features, wanted[None], splits, recipe, classes=classes, elsewhere=elsewhere, **options)
        where = {"model": vlm.name, "probe": recipe.name, "control": step}
        tables.append(_test_rows(readings, examples, classes, where))
        if conflicts is not None and readings.elsewhere is not None:
            tables.append(_conflict_rows(readings, readings.elsewhere, conflicts, classes, where))
        notes[recipe.name] = _notes(readings)
        if design.mdl and step in (NONE, SHUFFLED):
            code = online_code(features, wanted[None], recipe, groups=examples.groups, seed=design.seed)
            bits = {str(spot): code.bits[number, 0] for number, spot in enumerate(code.spots)}
            notes[recipe.name] |= {"bits": bits, "uniform_bits": code.uniform, "trained": code.trained}
    if step == NONE:
        notes["map"] = patch_map(vlm, examples, labels, classes, features, splits[0], design.recipes[0], folder=folder)
    return pd.concat(tables, ignore_index=True), notes


def null_rows(
    vlm: "VLM", examples: Examples, design: Design, *, folder: Path, seeds: Sequence[int] | None = None
) -> list[pd.DataFrame]:
    """The rows of the probe itself, without notes, where there is nothing to be read.

    Args:
        vlm: the model; a random twin where labels are not shuffled.
        folder: where its states are, or go.
        seeds: each shuffles the labels for a table of its own; by default one table of the real ones.
    """
    classes, labels = numbered(examples.labels)
    features, _ = _features(vlm, examples, design, NONE, folder)
    groups = grouped(examples, design.grouping)
    splits = make_splits(labels, groups, n_folds=design.n_folds, n_seeds=design.n_seeds, seed=design.seed)
    dealt = [labels] if seeds is None else [shuffled(labels, seed=seed, splits=splits) for seed in seeds]
    options = {"groups": groups.tolist(), "memory": design.memory, "device": design.device}
    tables: list[list[pd.DataFrame]] = [[] for _ in dealt]
    for recipe in design.recipes:
        found = crossfit(features, np.stack(dealt), splits, recipe, classes=classes, **options)
        where = {"model": vlm.name, "probe": recipe.name, "control": NONE}
        for number, rows in enumerate(tables):
            rows.append(_test_rows(found.of(number), examples, classes, where))
    return [pd.concat(rows, ignore_index=True) for rows in tables]


def _features(
    vlm: "VLM", examples: Examples, design: Design, step: str, folder: Path
) -> tuple[Features, dict[str, str]]:
    if step == NO_IMAGE:
        return read_without_image(vlm, examples, design.spots, folder=folder / step, batch=design.batch)
    if step == RANDOM:
        vlm, folder = with_random_weights(vlm, seed=design.seed), folder / step
    options = {"folder": folder / "states", "batch": design.batch}
    return read_states(vlm, examples.prompts, examples.objects, design.spots, **options), {}


def _labels(
    step: str, labels: Int[np.ndarray, "example"], examples: Examples, splits: Sequence[Split], seed: int
) -> np.ndarray:
    if step == SHUFFLED:
        return shuffled(labels, seed=seed, splits=splits)
    return control_task(labels, examples.templates, seed=seed) if step == TASK else labels


def _check_known(conflicts: Examples, classes: Sequence[str]) -> None:
    unknown = sorted({*conflicts.labels, *conflicts.priors} - set(classes))
    if unknown:
        raise UsageError(
            f"{conflicts.name} has the answer {unknown[0]!r}, which the probes were not trained on; they know "
            f"{', '.join(classes)}"
        )


def _notes(readings: Readings) -> dict[str, Any]:
    fits = readings.fits.groupby("spot", sort=False).agg(loss=("loss", "mean"), epoch=("epoch", "median"))
    penalties = readings.fits["l2"].map("{:.3g}".format).value_counts().to_dict()
    seeds = over_seeds(readings).drop(columns="variant").replace({np.nan: None}).to_dict("records")
    return {
        "seeds": seeds,
        "validation_loss": fits["loss"].to_dict(),
        "epochs": fits["epoch"].to_dict(),
        "l2": penalties,
    }


# Rows


def _test_rows(readings: Readings, examples: Examples, classes: Sequence[str], where: dict[str, str]) -> pd.DataFrame:
    numbers = readings.labels[0]
    scored = []
    for said in readings.tested[:, 0]:
        # Which probe to believe is not asked: each example's number is the mean over seeds.
        scored.append(_scored(said.mean(0), numbers, classes) | {"accuracy": is_first(said, numbers).mean(0)})
    majority = (readings.majority[0] == numbers).mean(0)
    return _rows(scored, readings.spots, examples, majority, where | {"read_on": TEST}, len(classes))


def _conflict_rows(
    readings: Readings, read: np.ndarray, conflicts: Examples, classes: Sequence[str], where: dict[str, str]
) -> pd.DataFrame:
    true, prior = (np.array([classes.index(each) for each in some]) for some in (conflicts.labels, conflicts.priors))
    rows, scored = np.arange(len(true)), []
    for said in read[:, 0]:
        p_true, p_prior = said[rows, true], said[rows, prior]
        found = _scored(said, true, classes) | {"p_prior": p_prior}
        if len(classes) > 2:
            found["p_other"] = (1 - p_true - p_prior) / (len(classes) - 2)
        scored.append(found)
    shares = np.bincount(readings.labels[0], minlength=len(classes))
    majority = (true == shares.argmax()).astype(float)
    return _rows(scored, readings.spots, conflicts, majority, where | {"read_on": CONFLICT}, len(classes))


def _scored(said: Float[np.ndarray, "example n_classes"], true: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    missing = np.full(len(true), np.nan)
    return {
        "accuracy": is_first(said, true).astype(float),
        "p_true": said[np.arange(len(true)), true].astype(float),
        "p_prior": missing,
        "p_other": missing,
        "label": np.array(classes)[true],
        "predicted": np.array(classes)[said.argmax(-1)],
    }


def _rows(
    scored: Sequence[dict[str, Any]],
    spots: Sequence[Spot],
    examples: Examples,
    majority: Float[np.ndarray, "example"],
    where: dict[str, str],
    n_classes: int,
) -> pd.DataFrame:
    """A row for each spot and example, from what was scored at every spot."""
    read_on, n_examples = where["read_on"], len(examples)
    columns: dict[str, Any] = {
        "example": np.tile([f"{read_on} {each}" for each in examples.ids], len(spots)),
        "group": np.tile([f"{read_on} {each}" for each in examples.groups], len(spots)),
        **where,
        "span": np.repeat([spot.span for spot in spots], n_examples),
        "place": np.repeat([str(spot.site) for spot in spots], n_examples),
    }
    columns |= {name: np.concatenate([each[name] for each in scored]) for name in scored[0]}
    columns |= {"accuracy_baseline": np.tile(majority, len(spots)), "skipped": ""}
    for metric in ("p_true", "p_prior", "p_other"):
        columns[f"{metric}_baseline"] = np.where(np.isnan(columns[metric].astype(float)), np.nan, 1 / n_classes)
        columns[metric] = columns[metric].astype(float)
    return pd.DataFrame(columns)


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row for every example in every cell: those of the other data set are missing, and say so."""
    axes = list(AXES)
    cells, people = table[axes].drop_duplicates(), table[["example", "group"]].drop_duplicates("example")
    whole = people.merge(cells, how="cross").merge(table.drop(columns="group"), on=["example", *axes], how="left")
    texts = {"label": "", "predicted": "", "skipped": ELSEWHERE}
    return whole.fillna(texts)


# What figures and findings take from it


@functools.lru_cache(maxsize=1)
def summary_of(result: Result) -> pd.DataFrame:
    """The summary of all metrics, made once for the sentences and figures of one result."""
    return result.summary()


def best_spot(notes: Notes, probe: str) -> tuple[str, str]:
    """Place and span with the lowest mean validation loss: test accuracy has no say in it."""
    losses = notes[probe]["validation_loss"]
    place, _, span = min(losses, key=losses.get).partition(" at ")
    return place, span
