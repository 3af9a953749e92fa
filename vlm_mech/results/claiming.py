"""How claims come about: declared on one half of the examples of a result, tested on the other."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm_mech.results.claim import LEVEL, SHARE, SMALLEST, Claim, Condition, Tested, p_of
from vlm_mech.results.result import N_RESAMPLES, N_SIGN_FLIPS, Result
from vlm_mech.results.statistics import corrected, percentile_interval, sign_flip_p

FEWEST = 4
"""Groups of examples without which there are no two halves of two."""


def halves(result: Result, *, seed: int = 0) -> tuple[Result, Result] | None:
    """The result on one half of the groups of examples, which may choose, and on the other.

    Groups in which nothing was measured go to the second. None where fewer than `FEWEST` have a value.
    """
    column = result.table["group" if "group" in result.table else "example"]
    held = result.table[[metric.name for metric in result.metrics]].notna().any(axis=1)
    distinct = column[held].drop_duplicates().tolist()
    if len(distinct) < FEWEST:
        return None
    order = np.random.default_rng(seed).permutation(len(distinct))
    chosen = {distinct[number] for number in order[: len(distinct) // 2]}
    of = column.isin(chosen)
    one, other = (
        dataclasses.replace(result, table=result.table[some].reset_index(drop=True), known={}) for some in (of, ~of)
    )
    return one, other


def claimed(
    pool: Sequence[Claim], result: Result, *, seed: int = 0, parts: tuple[Result, Result] | None = None
) -> tuple[Claim, ...]:
    """The claims of a pool that one half of the examples declares, tested on the other half.

    Declared are those all of whose conditions are significant (uncorrected) and of the least size on the first half. p
    is corrected (Holm) over the declared ones, whether they are `made` or not.

    Args:
        pool: all that could be said; it may not depend on the examples but by thresholds and names of cells.
        seed: parts the examples.
        parts: the result on the selection half and on the held-out half, where these were chosen before.
    """
    parts = parts or halves(result, seed=seed)
    if parts is None or not pool:
        return ()
    found = [
        dataclasses.replace(claim, declared=told)
        for claim, told in zip(pool, checked_on(pool, parts[0], seed=seed), strict=True)
        if p_of(told) < LEVEL and claim.met(told)
    ]
    if not found:
        return ()
    told = checked_on(found, parts[1], seed=seed)
    p = corrected(np.array([p_of(each) for each in told]), "holm")
    return tuple(
        dataclasses.replace(claim, tested=each, p=float(value))
        for claim, each, value in zip(found, told, p, strict=True)
    )


def parted_like(result: Result, parts: tuple[Result, Result]) -> tuple[Result, Result]:
    """Another result, of the same examples, in the same two halves.

    Args:
        parts: as `halves` gave them; examples that neither has are in neither half.
    """
    names = [set(part.table["example"]) for part in parts]
    one, other = (
        dataclasses.replace(
            result, table=result.table[result.table["example"].isin(each)].reset_index(drop=True), known={}
        )
        for each in names
    )
    return one, other


def corrected_together(*families: Sequence[Claim]) -> tuple[Claim, ...]:
    """Claims that were tested apart, with p corrected (Holm) over all of them; a single family is as it was."""
    found = [claim for family in families for claim in family]
    if sum(map(bool, families)) < 2:
        return tuple(found)
    p = corrected(np.array([p_of(claim.tested) for claim in found]), "holm")
    return tuple(dataclasses.replace(claim, p=float(value)) for claim, value in zip(found, p, strict=True))


def checked_on(claims: Sequence[Claim], result: Result, *, seed: int = 0) -> list[tuple[Tested, ...]]:
    """Each condition of each claim on the examples of a result."""
    every = [condition for claim in claims for condition in claim.conditions]
    known = {_same(condition): number for number, condition in reversed(list(enumerate(every)))}
    # Both sides of a bound are one test.
    distinct = [every[number] for number in sorted(known.values())]
    values, groups = matrix(distinct, result), result.groups()
    bounds = np.array([condition.bound for condition in distinct])
    low, high = percentile_interval(values, groups, level=0.95, n_resamples=N_RESAMPLES, seed=seed)
    p = sign_flip_p(values - bounds, groups, n_resamples=N_SIGN_FLIPS, seed=seed)
    counts = (~np.isnan(values)).sum(0)
    means = np.where(counts > 0, np.nansum(values, 0) / np.maximum(1, counts), np.nan)
    found = {
        _same(condition): Tested(int(counts[at]), *(float(column[at]) for column in (means, low, high, p)))
        for at, condition in enumerate(distinct)
    }
    return [tuple(found[_same(condition)] for condition in claim.conditions) for claim in claims]


def means_on(claims: Sequence[Claim], result: Result) -> list[list[float]]:
    """The mean of each condition of each claim over the examples of a result; NaN where none has a value."""
    every = [condition for claim in claims for condition in claim.conditions]
    if not every:
        return [[] for _ in claims]
    values = matrix(every, result)
    counts = (~np.isnan(values)).sum(0)
    means = np.where(counts > 0, np.nansum(values, 0) / np.maximum(1, counts), np.nan).tolist()
    ends = np.cumsum([0, *(len(claim.conditions) for claim in claims)]).tolist()
    return [means[start:end] for start, end in itertools.pairwise(ends)]


def _same(condition: Condition) -> str:
    """Tells conditions that are about the same mean and bound."""
    about = (condition.metric, condition.cell, condition.less, condition.bound)
    return repr(about)


def matrix(conditions: Sequence[Condition], result: Result) -> Float[np.ndarray, "example condition"]:
    """What each condition is a mean of, by example; NaN throughout where the result has no such cell."""
    cells = result.cells
    known: dict[str, Float[np.ndarray, "example cell"]] = {}
    places: dict[tuple[Any, ...], int] = {
        tuple(row): number for number, row in enumerate(cells.itertuples(index=False, name=None))
    }

    def column(name: str, cell: dict[str, Any]) -> Float[np.ndarray, "example"]:
        if name not in known:
            known[name] = result.matrix(name)
        at = places.get(tuple(cell[axis] for axis in result.axes))
        return np.full(len(known[name]), np.nan) if at is None else known[name][:, at]

    columns = []
    for each in conditions:
        values = column(each.metric, each.cell)
        if each.less is not None:
            other = (f"{each.metric}_baseline", each.cell) if each.less == "baseline" else (each.metric, each.less)
            values = values - column(*other)
        columns.append(values)
    return np.stack(columns, 1)


def least(result: Result, metric: str) -> float:
    """What a change of a difference of answers must be to count: `enough_of` the unedited mean."""
    first = result.table.drop_duplicates("example")[f"{metric}_baseline"]
    return enough_of(float(first.mean()))


def enough_of(whole: float, smallest: float = SMALLEST) -> float:
    """What a change must be to count beside a whole: `smallest` logits (or nats), or `SHARE` of it where that is more.

    Args:
        whole: such as the unedited difference; where it is NaN, `smallest` alone counts.
        smallest: in the unit of the whole.
    """
    return smallest if np.isnan(whole) else max(smallest, SHARE * abs(whole))
