"""Any two scorings, prompts, orders or models compared on the same pairs; matching by either sign."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.behaviour.scoring.measures import (
    GENERATION,
    RANDOM,
    SIMILARITY,
    STARTS,
    SUBSTRING,
    TO_IMAGE,
    relaxed,
)
from vlm_mech.behaviour.scoring.study import AS_GIVEN, AXES, BEST, MEAN, OWN, SCORES
from vlm_mech.errors import UsageError
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import Paired, holm, mcnemar

Cell = dict[str, str]
UNDECIDED = (RANDOM,)
"""Scorings whose verdicts are expected values, which McNemar's test does not take."""


@dataclass(frozen=True)
class Compared:
    """Two cells on the same pairs: McNemar's exact test of a verdict, and the paired difference of its share."""

    one: Cell
    other: Cell
    metric: str
    counts: Paired
    difference: Mapping[str, float]


def compared(result: Result, one: Cell, other: Cell, metric: str = "pair") -> Compared:
    """Any two scorings, prompts, orders or models compared on the same pairs.

    Returns:
        How many pairs only one of them has right with McNemar's exact two-sided p, and `one - other` with its paired
        bootstrap interval.

    Raises:
        UsageError: a cell that does not exist, or holds shares instead of verdicts.
    """
    difference = result.contrast(one, other, metric)
    values, cells = result.matrix(metric), result.cells
    verdicts = []
    for cell in (one, other):
        held = values[:, (cells[list(cell)] == pd.Series(cell)).all(axis=1).to_numpy()][:, 0]
        if not np.isin(held, (0, 1)).all():
            raise UsageError(f"{metric} of {cell} is no verdict of 0 or 1 for every pair; McNemar's test needs one")
        verdicts.append(held.astype(bool))
    return Compared(one, other, metric, mcnemar(*verdicts), difference)


def comparisons(result: Result) -> list[Compared]:
    """Each scoring against the model's word-boundary reading, and each model against the first; Holm over all.

    Both pictures of a pair have to be right. Each scoring is taken with its first prompt, options as given: what was
    fixed before looking.
    """
    held = [cell for cell in decided(result) if cell["scoring"] not in UNDECIDED]
    found = []
    for one, other in itertools.combinations(held, 2):
        models, scorings = one["model"] == other["model"], one["scoring"] == other["scoring"]
        contrastive = bool({SIMILARITY, TO_IMAGE} & {one["scoring"], other["scoring"]})
        loose = one["scoring"] in (SUBSTRING, STARTS)
        if (one["scoring"] == GENERATION and (models or contrastive)) or (scorings and not models and not loose):
            found.append(compared(result, other, one))
    tests = holm([each.counts for each in found])
    return [replace(each, counts=test) for each, test in zip(found, tests, strict=True)]


def decided(result: Result) -> list[Cell]:
    """For each model and scoring the cell of its first prompt, options as given where they are listed."""
    cells = result.cells
    cells = cells[(cells["view"] == OWN) & ~cells["prompt"].isin([MEAN, BEST])]
    found = []
    for _, rows in cells.groupby(["model", "scoring"], sort=False):
        rows = rows[rows["prompt"] == rows["prompt"].iloc[0]]
        given = rows[rows["order"] == AS_GIVEN]
        found.append({str(name): str(value) for name, value in (given if len(given) else rows).iloc[0].items()})
    return found


def matched(result: Result, cell: Cell) -> tuple[float, float]:
    """Share of pairs matched in one decision by perplexity: by the sign that matches, and as the paper prints it."""
    rows = result.table[(result.table[list(AXES)] == pd.Series(cell)).all(axis=1)]
    scores = rows[list(SCORES)].to_numpy().reshape(-1, 2, 2)
    ours, printed = (relaxed(scores, kind="perplexity", as_printed=sign).mean() for sign in (False, True))
    return ours, printed


def same_verdicts(result: Result) -> tuple[list[Cell], Float[np.ndarray, "cell cell"], int]:
    """Share of pictures on which two scorings give the same verdict, each with its first prompt, options as given.

    Returns:
        The cells of `decided` whose verdicts are decided, the share of any two, and the number of pairs.
    """
    cells = [cell for cell in decided(result) if cell["scoring"] not in UNDECIDED]
    table, verdicts = result.table, []
    for cell in cells:
        rows = table[(table[list(AXES)] == pd.Series(cell)).all(axis=1)]
        verdicts.append(rows.set_index("example")[["right_1", "right_2"]].to_numpy().ravel())
    shares = [[float((one == other).mean()) for other in verdicts] for one in verdicts]
    return cells, np.array(shares), len(verdicts[0]) // 2
