"""The table of a classification run: what each method says of each picture, among all classes or among k of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from vlm_mech.behaviour.answering.prompts import candidates
from vlm_mech.data.image_classes import Labelled
from vlm_mech.errors import UsageError
from vlm_mech.results.result import Metric

AXES = ("task", "model", "question", "world", "order", "method", "k")
CLASSES, OPEN, CLOSED, LOADED, NO_ORDER = "classes", "open", "closed", "as loaded", "-"
GENERATION, SUM, MEAN, CONTRASTIVE = "generation", "sum", "mean", "contrastive"
AVERAGE = "average"
ELSEWHERE = "asked of other pictures"
METRICS = (
    Metric(
        "accuracy",
        "share",
        "the right class: generated answers must name it as whole words and no other class; scores must be higher than "
        "every other candidate's, a tie is wrong; the baseline is 1 / candidates",
    ),
    Metric(
        "substring",
        "share",
        "the lower-cased class name occurs in the lower-cased answer (after Zhang et al. 2024); generated answers only",
    ),
)


@dataclass(frozen=True)
class Cell:
    """Where a set of numbers stands in the table."""

    task: str
    model: str
    question: str
    world: str
    order: str
    method: str
    k: int

    @property
    def axes(self) -> dict[str, Any]:
        """The values of the axes."""
        return {axis: getattr(self, axis) for axis in AXES}


def rows(
    cell: Cell,
    examples: Sequence[Labelled],
    accuracy: Sequence[float] | np.ndarray,
    *,
    substring: Sequence[float] | None = None,
    predicted: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    chance: Sequence[float] | None = None,
) -> pd.DataFrame:
    """A row an example for one cell; `substring` is missing where nothing was generated."""
    n, empty = len(examples), [""] * len(examples)
    found = pd.DataFrame({"example": [each.id for each in examples], "group": [each.id for each in examples]})
    found = found.assign(**cell.axes, label=[each.label for each in examples])
    found["accuracy"] = np.asarray(accuracy, float)
    found["accuracy_baseline"] = np.full(n, 1 / cell.k) if chance is None else np.asarray(chance, float)
    found["substring"] = np.full(n, np.nan) if substring is None else np.asarray(substring, float)
    found["substring_baseline"] = np.where(found["substring"].isna(), np.nan, found["accuracy_baseline"])
    found["predicted"] = empty if predicted is None else list(predicted)
    return found.assign(answer=empty if answers is None else list(answers), skipped="")


def among(
    examples: Sequence[Labelled], names: Sequence[str], k: int, *, seed: int
) -> Bool[np.ndarray, "example n_classes"]:
    """Which classes are candidates of which example; the same ones that the closed world offers."""
    found = np.zeros((len(examples), len(names)), bool)
    for number, example in enumerate(examples):
        found[number, list(candidates(example, names, k, seed=seed, order="fixed"))] = True
    return found


def best(
    scores: Float[np.ndarray, "example n_classes"],
    own: Sequence[int],
    offered: Bool[np.ndarray, "example n_classes"] | None = None,
) -> tuple[Bool[np.ndarray, "example"], np.ndarray]:
    """Whether each example's own class scores above every other candidate (a tie is a miss), and the best class.

    Raises:
        UsageError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise UsageError(f"the score of class number {int(np.argwhere(~np.isfinite(scores))[0, 1])} is not finite")
    held = scores if offered is None else np.where(offered, scores, -np.inf)
    numbers = np.arange(len(held))
    others = held.copy()
    others[numbers, list(own)] = -np.inf
    return held[numbers, list(own)] > others.max(1), held.argmax(1)


def score_rows(
    cell: Cell,
    examples: Sequence[Labelled],
    names: Sequence[str],
    scores: Float[np.ndarray, "example n_classes"],
    *,
    seed: int,
) -> pd.DataFrame:
    """The rows of a method that gives every class a score, among the cell's number of candidates."""
    own = [list(names).index(each.label) for each in examples]
    offered = None if cell.k == len(names) else among(examples, names, cell.k, seed=seed)
    hits, first = best(scores, own, offered)
    return rows(cell, examples, hits, predicted=[names[number] for number in first])


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row for every example in every cell: what was asked of other pictures is missing there."""
    axes = list(AXES)
    cells, people = table[axes].drop_duplicates(), table[["example", "group"]].drop_duplicates("example")
    # Classes first, by rising numbers of candidates; the rest in the order in which it was asked.
    about, other = cells[cells["task"] == CLASSES], cells[cells["task"] != CLASSES]
    cells = pd.concat([about.sort_values("k", kind="stable"), other])
    whole = people.merge(cells, how="cross").merge(table.drop(columns="group"), on=["example", *axes], how="left")
    return whole.fillna({"label": "", "predicted": "", "answer": "", "skipped": ELSEWHERE})
