"""Any two scorings, prompts, orders or models compared on the same pairs; matching by either sign."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import Paired, holm, mcnemar, ratio_estimate

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
            raise UsageError(f"{metric} of {cell} is not a verdict of 0 or 1 for every pair; McNemar's test needs one")
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
            found.append(compared(result, other, one, verdict(result)))
    tests = holm([each.counts for each in found])
    return [replace(each, counts=test) for each, test in zip(found, tests, strict=True)]


def verdict(result: Result) -> str:
    """What is compared: pairs with both pictures right, or single items."""
    return "pair" if any(each.name == "pair" for each in result.metrics) else "individual"


YES_NO = ("accuracy", "precision", "recall", "f1", "yes")


def yes_no(result: Result, pairs: Pairs) -> list[dict[str, Any]]:
    """Of single items that are all answered yes or no, what POPE tells of each cell of `decided`; none of others.

    Accuracy, precision, recall and F1 of yes, and the share of answers that are yes, in which an answer that cannot be
    read is none; each with its interval over resampled groups, None where nothing is divided by. First of all items,
    then of those of each `category`, where there are several (POPE's random, popular, adversarial).
    """
    answers = {pair.id: pair.answer.strip().lower() for pair in pairs}
    if not pairs.made or set(answers.values()) - {"yes", "no"} or any(len(pair.options) != 2 for pair in pairs):
        return []
    yes_first = {pair.id: pair.options[0].strip().lower() == "yes" for pair in pairs}
    found = []
    for cell in decided(result):
        if cell["scoring"] in (SUBSTRING, STARTS, RANDOM):
            continue
        rows = result.table[(result.table[list(AXES)] == pd.Series(cell)).all(axis=1)]
        named = sorted(set(rows["category"])) if "category" in rows else []
        parts = {"": rows} | ({name: rows[rows["category"] == name] for name in named} if len(named) > 1 else {})
        found += [cell | {"category": name} | _of_yes(some, answers, yes_first) for name, some in parts.items()]
    return found


def _of_yes(rows: pd.DataFrame, answers: Mapping[str, str], yes_first: Mapping[str, bool]) -> dict[str, Any]:
    first = (rows["chose_first_answer"] == 1).to_numpy()
    other = (rows["chose_first_answer"] == 0).to_numpy()
    at_first = rows["example"].map(yes_first).to_numpy(dtype=bool)
    said, true = np.where(at_first, first, other), rows["example"].map(answers).eq("yes").to_numpy()
    hits, every = said & true, np.ones(len(rows))
    counts = {"accuracy": (rows["individual"].to_numpy(), every), "precision": (hits, said), "recall": (hits, true)}
    counts |= {"f1": (2.0 * hits, 1.0 * said + true), "yes": (said, every)}
    groups = pd.factorize(rows["group" if "group" in rows else "example"])[0]
    return {"n": len(rows)} | {name: ratio_estimate(some, of, groups) for name, (some, of) in counts.items()}


def yes_no_table(result: Result, pairs: Pairs) -> dict[str, pd.DataFrame]:
    """The table `yes_no` of what POPE tells, with the ends of the intervals; none of other data."""
    found = yes_no(result, pairs)
    for row in found:
        for name in YES_NO:
            told = row.pop(name)
            ends = (None, None, None) if told is None else (told.value, told.low, told.high)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return {"yes_no": pd.DataFrame(found)} if found else {}


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
    sides = ["right_1", "right_2"] if verdict(result) == "pair" else ["right_1"]
    table, verdicts = result.table, []
    for cell in cells:
        rows = table[(table[list(AXES)] == pd.Series(cell)).all(axis=1)]
        verdicts.append(rows.set_index("example")[sides].to_numpy().ravel())
    shares = [[float((one == other).mean()) for other in verdicts] for one in verdicts]
    return cells, np.array(shares), len(verdicts[0]) // len(sides)
