"""Groups of heads ablated at the last position, beside each of their heads alone and random heads that match them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.interventions.specification import Ablate, Intervention, Together
from vlm_mech.methods.head_roles.data import FIRST, SECOND, Group, Runs, matched_draws
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.measures import logit_diff, said
from vlm_mech.sweeps.sweep import grid, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

FLIP = Metric("flip", "share", "share of examples in which the other answer newly has the higher logit")
LOST = Metric("lost", "share", "share of examples in which greedy decoding no longer gives its answer")
METRICS = (logit_diff((), ()).metric, FLIP, LOST)
AXES = ("run", "way", "heads")
RANDOM, ALONE = "random heads for ", "one of "
"""Begin the names of cells: the mean over the draws of random heads that match a group, and a head of a group alone."""


@dataclass(frozen=True, eq=False)
class Ablated:
    """What ablations did: a row an example and cell, and each draw of random heads.

    `draws` has a row for each group, run, way and draw, with the means of `flip` and `lost` over the examples that
    test; so has `groups` for the groups themselves. `redundant` has for each group, run and way the share of items
    flipped by the group that none of its heads flips alone, with its count.
    """

    result: Result
    draws: pd.DataFrame
    groups: pd.DataFrame
    redundant: pd.DataFrame


def ablate_groups(
    vlm: "VLM",
    runs: Runs,
    groups: Mapping[str, Group],
    testing: Sequence[str],
    *,
    ways: Sequence[str],
    n_random: int,
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    seed: int = 0,
) -> Ablated:
    """Each group ablated in both runs, each of its heads alone, and random groups that match it.

    Args:
        vlm: the model.
        runs: both runs of the examples that count.
        groups: heads by the name of their group; none is empty.
        testing: names of the examples that did not choose the groups, over which draws are told.
        ways: ways of ablation, as `Ablate` has them; `mean` and `resample` over all the examples of a run.
        n_random: random groups at most for each group; fewer where there are no more.
        batch: examples per forward pass.
        engine, memory: as for `sweep`.
        seed: draws random heads, and the examples of `resample`.
    """
    drawn = {name: matched_draws(group, vlm.n_heads("llm"), n_random, seed=seed) for name, group in groups.items()}
    every = [group for name in groups for group in (groups[name], *((head,) for head in groups[name]), *drawn[name])]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(tuple(sorted(each)) for each in every))}
    sets, values = list(numbers), {}
    for run in (FIRST, SECOND):
        table = _swept(vlm, runs, run, sets, ways, {"batch": batch, "engine": engine, "memory": memory}, seed)
        values[run] = dict(iter(table.groupby(["way", "number"], sort=False)))
    found = _Values(runs, numbers, values, frozenset(testing))
    rows, told = [], []
    for name, group in groups.items():
        for run in (FIRST, SECOND):
            for way in ways:
                whole = found.of(run, way, group)
                singles = [found.of(run, way, (head,)) for head in group]
                random = [found.of(run, way, each) for each in drawn[name]]
                rows.append(found.cell(whole, run, way, name))
                if random:
                    means = sum(cast(Any, each) for each in random) / len(random)
                    rows.append(found.cell(means, run, way, RANDOM + name))
                if len(group) > 1:
                    best = np.maximum.reduce([each[:, 1] for each in singles])
                    told.append(("redundant", *found.redundancy(name, run, way, whole, best)))
                told.append(("group", *found.means(name, run, way, -1, whole)))
                told += [("draw", *found.means(name, run, way, at, each)) for at, each in enumerate(random)]
    result = Result("ablated heads", pd.concat(rows, ignore_index=True), AXES, METRICS)
    names = ("group", "run", "way", "draw", "flip", "lost", "n")

    def frame(kind: str, columns: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame([each[1:] for each in told if each[0] == kind], columns=list(columns))

    redundant = frame("redundant", ("group", "run", "way", "share", "n"))
    return Ablated(result, frame("draw", names), frame("group", names), redundant)


def _swept(
    vlm: "VLM",
    runs: Runs,
    run: str,
    sets: Sequence[Group],
    ways: Sequence[str],
    how: dict[str, Any],
    seed: int,
) -> pd.DataFrame:
    pairs, prompts = runs.pairs, runs.of(run)
    measures = (logit_diff(pairs.answer, pairs.counterfactual_answer), said(runs.said(run)))
    edits = {(way, number): _ablation(group, way, seed) for way in ways for number, group in enumerate(sets)}
    return sweep(
        vlm, prompts, grid(way=ways, number=range(len(sets))), lambda at: edits[at.way, at.number], measures, **how
    ).table


def _ablation(group: Group, way: str, seed: int) -> Intervention:
    """The outputs of some heads ablated at the last position, layer by layer."""
    parts = []
    for layer in sorted({layer for layer, _ in group}):
        heads = tuple(sorted(head for at, head in group if at == layer))
        parts.append(Ablate(Site("llm.head_out", layer), "last", heads=heads, to=cast(Any, way), seed=seed))
    return parts[0] if len(parts) == 1 else Together(parts=tuple(parts))


@dataclass(frozen=True, eq=False)
class _Values:
    """What each ablation did to each example: columns are the difference of answers, `flip` and `lost`."""

    runs: Runs
    numbers: dict[Group, int]
    values: dict[str, dict[Any, pd.DataFrame]]
    testing: frozenset[str]

    def of(self, run: str, way: str, group: Group) -> np.ndarray:
        """By example the difference, whether it flips, and whether the answer is lost."""
        rows = self.values[run][way, self.numbers[tuple(sorted(group))]]
        rows = rows.assign(at=rows["example"].astype(int)).sort_values("at")
        sign = 1 if run == FIRST else -1
        after, before = sign * rows["logit_diff"].to_numpy(), sign * rows["logit_diff_baseline"].to_numpy()
        lost = (rows["said_baseline"].to_numpy() > 0) & (rows["said"].to_numpy() == 0)
        return np.stack([rows["logit_diff"].to_numpy(), (before > 0) & (after < 0), lost], 1).astype(float)

    def cell(self, values: Any, run: str, way: str, heads: str) -> pd.DataFrame:
        """Rows of the table."""
        some = next(iter(self.values[run].values()))
        clean = some.assign(at=some["example"].astype(int)).sort_values("at")["logit_diff_baseline"].to_numpy()
        pairs = list(self.runs.pairs)
        return pd.DataFrame(
            {
                "example": [pair.id for pair in pairs], "group": [pair.group or pair.id for pair in pairs],
                "run": run, "way": way, "heads": heads, "logit_diff": values[:, 0], "logit_diff_baseline": clean,
                "flip": values[:, 1], "flip_baseline": 0.0, "lost": values[:, 2], "lost_baseline": 0.0,
            }
        )  # fmt: skip

    @property
    def tests(self) -> np.ndarray:
        """Which examples did not choose the groups."""
        return np.array([pair.id in self.testing for pair in self.runs.pairs])

    def means(self, name: str, run: str, way: str, draw: int, values: np.ndarray) -> tuple[Any, ...]:
        """A row of the draws."""
        some = values[self.tests]
        return name, run, way, draw, float(some[:, 1].mean()), float(some[:, 2].mean()), len(some)

    def redundancy(self, name: str, run: str, way: str, whole: np.ndarray, best: np.ndarray) -> tuple[Any, ...]:
        """The share of items that the group flips and no single head does, of the held-out half."""
        flipped = (whole[:, 1] > 0) & self.tests
        n = int(flipped.sum())
        return name, run, way, float((best[flipped] == 0).mean()) if n else float("nan"), n


def p_of_draws(own: float, draws: Sequence[float]) -> float:
    """(1 + random groups that flip at least as many) / (B + 1); 1 without draws."""
    return (1 + sum(each >= own for each in draws)) / (len(draws) + 1)
