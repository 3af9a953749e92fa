"""One planting examined by all methods that have an adapter; many of them in processes of their own."""

import dataclasses
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.methods.gates.gated import Options
from vlm_mech.organism.planted import examples, plant
from vlm_mech.organism.planted_draw import TRAPS, draw
from vlm_mech.organism.planted_recipe import ANSWERS, Answer, Recipe
from vlm_mech.validate.adapters import ARBITRATION, CONTROLS, GATED, METHODS
from vlm_mech.validate.arbiters import SETS as ARBITER_SETS
from vlm_mech.validate.arbiters import examine_arbiter
from vlm_mech.validate.grading import GRADES, NULLS, SHARP, grade
from vlm_mech.validate.true_effects import true_cells

N_ACCURACY = 64
"""Prompts from which the accuracy noted beside a planting comes."""
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30)}
"""Environment of the workers: the C library keeps freed memory for the next array, which saves a tenth of the time."""
SETS = ("plain", *NULLS, "hard", "backup", *TRAPS, *ARBITER_SETS)
KNOWN = (*METHODS, *CONTROLS, *ARBITRATION)

USUAL_SETS = ("plain", SHARP, "hard")
"""Sets that are examined where none is named."""


def sets_for(methods: Sequence[str]) -> tuple[str, ...]:
    """The sets on which methods are examined where none is named: planted arbiters for those that look for one."""
    usual = USUAL_SETS if not methods or any(each not in ARBITRATION for each in methods) else ()
    return (*usual, *(ARBITER_SETS if any(each in ARBITRATION for each in methods) else ()))


def methods_for(kind: str, methods: Sequence[str], answer: str = "word") -> tuple[str, ...]:
    """Those of some methods that go with a set, or all that do where none is named; `Job` refuses what goes with none.

    Args:
        answer: how answers are written; of two tokens there are controls too.
    """
    every = methods or (*METHODS, *(CONTROLS if answer != "word" else ()), *ARBITRATION)
    return tuple(each for each in every if (each in ARBITRATION) == (kind in ARBITER_SETS)) or tuple(every)


@dataclass(frozen=True)
class Job:
    """A planting, and how it is examined.

    `kind` is one of `SETS`. In a matched null the mean of an effect is zero up to the noise in the weights. With random
    answers, both drawn without regard to the pictures, it is exactly zero, and exchanging the two turns an effect's
    sign: the null of the sign-flip test is true. Planted arbiters are asked about by methods of their own, on twice as
    many examples. `answer` is how the model's answers are written (see `Recipe`).
    `gates` are tried on claims, with `null` random twins and as many shuffles of the answers.
    """

    kind: str
    recipe: int
    methods: tuple[str, ...] = tuple(METHODS)
    n_examples: int = 32
    n_population: int = 512
    seed: int = 0
    answer: Answer = "word"
    gates: Literal["none", "all"] = "none"
    null: int = 5

    def __post_init__(self) -> None:
        asked = [("set", (self.kind,), SETS), ("method", self.methods, KNOWN)]
        asked += [("answer", (self.answer,), ANSWERS), ("gates", (self.gates,), ("none", "all"))]
        for name, given, known in asked:
            for each in given:
                if each not in known:
                    raise UsageError(f"{name} {each!r} is not known; use one of {', '.join(known)}")
        for method in self.methods:
            if (method in ARBITRATION) != (self.kind in ARBITER_SETS):
                raise UsageError(f"method {method!r} does not go with the set {self.kind!r}")
        if self.null < 0:
            raise UsageError(f"null is {self.null}; it must be 0 or more")
        if self.n_examples < 8 or self.n_population < 2 or self.recipe < 0:
            raise UsageError(
                f"{self.n_examples} examples, {self.n_population} for the true effects, first seed {self.recipe}; "
                "they must be at least 8, 2 and 0"
            )

    @property
    def key(self) -> str:
        """Its name among the batches of a run."""
        return f"{SETS.index(self.kind)}-{self.recipe:06d}"

    @property
    def asked(self) -> Options:
        """How claims are tested."""
        return Options(self.gates, self.null, 0, self.n_examples)


def examine(job: Job) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The scores of every method on one planting, a row for each grade, and notes on the planting."""
    torch.set_num_threads(1)
    if job.kind in ARBITER_SETS:
        methods, asked = {name: ARBITRATION[name] for name in job.methods}, job.asked
        return examine_arbiter(job.kind, job.recipe, methods, asked, n=job.n_examples, seed=f"{job.seed}/{job.key}")
    began = time.perf_counter()
    # They are all of one architecture, which the check of any one of them is about.
    recipe = draw(job.recipe, "null" if job.kind in NULLS else job.kind, answer=job.answer)
    planted = plant(recipe, check=False, n=N_ACCURACY)
    pairs = shown(job, planted.recipe)
    true = None if job.kind in NULLS else true_cells(planted, job.methods, n=job.n_population)
    sizes = {"n_layers": planted.vlm.n_layers("llm"), "n_heads": planted.vlm.n_heads("llm")}
    rows, asked = [], job.asked
    for method in job.methods:
        known = None if true is None else true[true["method"] == method].drop(columns="method")
        found = (METHODS | CONTROLS)[method](planted, pairs, **({"asked": asked} if method in GATED else {}))
        scores = grade(found, planted.truth, job.kind, true=known, **sizes)
        for name, score in scores.items():
            about = {"score": score.value, "score_baseline": score.chance, "hits": score.hits, "of": score.n}
            rows.append({"example": str(job.recipe), "set": job.kind, "grade": name, "method": method} | about)
    notes = {"set": job.kind, "recipe": job.recipe, "says": planted.truth.says, "accuracy": planted.truth.accuracy}
    return pd.DataFrame(rows), notes | {"seconds": round(time.perf_counter() - began, 2)}


def shown(job: Job, recipe: Recipe) -> Pairs:
    """The examples that the methods see: other ones in every planting, so that plantings are independent."""
    seed = f"{job.seed}/{job.key}"
    pairs = examples(recipe, job.n_examples, seed=seed)
    return random_answers(pairs, seed, recipe.answers) if job.kind == SHARP else pairs


def random_answers(pairs: Pairs, seed: int | str, answers: Sequence[str]) -> Pairs:
    """The same pictures, with two of some answers drawn for each pair that have nothing to do with them."""
    rng = random.Random(f"answers/{seed}")
    drawn = []
    for pair in pairs:
        answer, other = rng.sample(answers, 2)
        drawn.append(dataclasses.replace(pair, answer=answer, counterfactual_answer=other))
    return dataclasses.replace(pairs, pairs=tuple(drawn))


def examine_all(jobs: Sequence[Job], *, workers: int) -> Iterator[tuple[Job, pd.DataFrame, dict[str, Any]]]:
    """What `examine` gives for each of some jobs, in the order in which they are done."""
    if workers < 1:
        raise UsageError(f"workers is {workers}; at least 1 is needed")
    if workers == 1 or len(jobs) < 2:
        yield from ((job, *examine(job)) for job in jobs)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn"))
    try:
        with _environment(KEPT):
            # Workers start with the first job.
            waiting = {pool.submit(examine, job): job for job in jobs}
        for done in as_completed(waiting):
            yield waiting[done], *done.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that processes started meanwhile find, unless they have them already."""
    fresh = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for name in fresh:
            del os.environ[name]


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row for every planting and cell, those that do not apply without a score.

    Cells that apply to no planting are not in it.
    """
    cells = table[["set", "grade", "method"]].drop_duplicates()
    order = {name: number for number, name in enumerate((*SETS, *GRADES, *KNOWN))}
    cells = cells.sort_values(["set", "grade", "method"], key=lambda column: column.map(order))
    examples = sorted(set(table["example"]), key=int)
    whole = [(example, *cell) for example, cell in itertools.product(examples, cells.itertuples(index=False))]
    frame = pd.DataFrame(whole, columns=["example", "set", "grade", "method"])
    found = frame.merge(table, on=["example", "set", "grade", "method"], how="left", validate="one_to_one")
    return found.assign(skipped=found["score"].isna().map({True: "does not apply", False: ""}))
