"""Counts what joint cuts find in planted models: `python -m tests.methods.joint_counts "two backups" --n 10`.

A command, not a test: ten models take some minutes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from vlm_mech.methods.knockout.claims import pool
from vlm_mech.methods.knockout.data import scan_of
from vlm_mech.methods.knockout.joint import TOGETHER, joint_cuts
from vlm_mech.methods.knockout.study import knock_out, metrics_of
from vlm_mech.organism.planted import examples, plant
from vlm_mech.organism.planted_draw import draw
from vlm_mech.results.claiming import claimed
from vlm_mech.results.result import Result
from vlm_mech.validate.examination import random_answers

EDGE = "last<-image"


@dataclass(frozen=True)
class Counts:
    """Which planted models are cut, on last<-image, heads one at a time and together."""

    kind: Annotated[Literal["plain", "backup", "two backups", "random answers"], tyro.conf.Positional]
    """The set; random answers are asked of plain and backup models in turn."""
    n: int = 10
    """Models, of the seeds from 0 on."""
    examples: int = 32
    """Examples of each."""


def planted(kind: str, seed: int, n: int) -> tuple[set[tuple[int, int]], list[object], list[set[tuple[int, int]]]]:
    """The heads that read in a model, the single claims made of it, and the sets that are claimed together."""
    shuffled = kind == "random answers"
    recipe = draw(seed, ("plain", "backup")[seed % 2] if shuffled else kind)
    model = plant(recipe, check=False, n=16)
    pairs = examples(recipe, n, seed=seed)
    pairs = random_answers(pairs, seed, recipe.answers) if shuffled else pairs
    scan = scan_of(model.vlm, pairs, {}, (EDGE,), heads=True)
    table, _ = knock_out(model.vlm, pairs, scan, only_correct=False)
    result = Result("knockout", table, scan.axes, metrics_of())
    result = dataclasses.replace(result, claims=claimed(pool(result), result))
    made = [claim for claim in joint_cuts(model.vlm, pairs, result, scan).claims if claim.made]
    together = [
        {(each["layer"], each["head"]) for each in one.about["members"]} for one in made if one.kind == TOGETHER
    ]
    heads = [head for head in (*recipe.reads, recipe.backup, recipe.second_backup) if head]
    return {(head.layer, head.head) for head in heads}, [one for one in made if one.kind != TOGETHER], together


def main(counts: Counts) -> None:
    """Prints a line a model, and how many have the reading heads claimed together, exactly."""
    exact = n_single = n_joint = 0
    for seed in range(counts.n):
        truth, single, together = planted(counts.kind, seed, counts.examples)
        exact, n_single, n_joint = exact + (together == [truth]), n_single + bool(single), n_joint + bool(together)
        print(f"{seed}: reading heads {sorted(truth)}, {len(single)} single claims, together {together}", flush=True)
    told = f"{exact} have exactly their reading heads claimed together, {n_joint} some heads, {n_single} a single claim"
    print(f"{counts.kind}: of {counts.n} models {told}")


if __name__ == "__main__":
    main(tyro.cli(Counts))
