"""Planted arbiters examined and graded: is the kind named that lets the prior win, and none where there is none?"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.arbitration.data import HEAD, MLP, NONE, TOKEN, Part
from vlm_mech.methods.arbitration.find import UNREAD, WINS, Arbitration, find_arbiter
from vlm_mech.methods.gates.gated import Options
from vlm_mech.organism.arbiter_draw import draw_arbiter
from vlm_mech.organism.arbiter_recipe import ARBITER_KINDS, ARBITERS, ArbiterTruth
from vlm_mech.organism.arbiter_weights import SINK_WORD
from vlm_mech.organism.arbiters import PlantedArbiter, arbiter_pairs, plant_arbiter
from vlm_mech.results.claim import LEVEL
from vlm_mech.validate.commands import UNGATED
from vlm_mech.validate.grading import ARBITER, ARBITER_CLAIMED, ARBITER_PART, REASON, Score

SETS = {f"arbiter: {kind}": kind for kind in ARBITER_KINDS}
"""Sets of planted arbiters, and their kinds."""
TIMES = 2
"""So many times the examples of other plantings are shown: only those that are lost to the prior say anything."""
N_EXAM = 16
"""Pairs from which the accuracy noted beside a planting comes."""
REASONS = {"none": WINS, "blind": UNREAD}
"""What must be said of a null."""

ArbiterMethod = Callable[..., Arbitration]


def arbitration(planted: PlantedArbiter, pairs: Pairs, *, asked: Options = UNGATED) -> Arbitration:
    """What the call `find_arbiter` says.

    Args:
        asked: how claims are tested.
    """
    return find_arbiter(
        planted.vlm, pairs, batch=max(1, len(pairs)), gates=asked.gates, null=asked.null, seed=asked.seed
    )


def examine_arbiter(
    name: str, number: int, methods: Mapping[str, ArbiterMethod], asked: Options, *, n: int, seed: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The scores of methods on one planted arbiter, a row for each grade, and notes on it.

    Args:
        name: of a set.
        number: seed of the recipe.
        methods: by name.
        asked: how claims are tested.
        n: examples that other plantings are shown.
        seed: draws them.
    """
    began, kind = time.perf_counter(), SETS[name]
    planted = plant_arbiter(draw_arbiter(number, kind), check=False, n=N_EXAM)
    pairs = arbiter_pairs(planted.recipe, TIMES * n, seed=seed)
    rows, said = [], {}
    for method, call in methods.items():
        found = call(planted, pairs, asked=asked)
        said[method] = {"kind": found.kind, "part": str(found.part or ""), "why": found.why, "n": found.n}
        for grade, score in grade_arbiter(found, planted.truth).items():
            about = {"score": score.value, "score_baseline": score.chance, "hits": score.hits, "of": score.n}
            rows.append({"example": str(number), "set": name, "grade": grade, "method": method} | about)
    notes = {"set": name, "recipe": number, "says": planted.truth.kind, "lost": planted.truth.lost}
    notes |= {"accuracy": min(planted.truth.visual, planted.truth.usual), "found": said}
    return pd.DataFrame(rows), notes | {"seconds": round(time.perf_counter() - began, 2)}


def grade_arbiter(found: Arbitration, truth: ArbiterTruth) -> dict[str, Score]:
    """Whether the kind and the part are named, or in nulls any, and the right reason."""
    if truth.kind not in ARBITERS:
        claimed = Score(float(found.kind != NONE), 1, LEVEL)
        return {ARBITER_CLAIMED: claimed, REASON: Score(float(found.why == REASONS[truth.kind]), 1, math.nan)}
    named = found.kind == truth.kind
    # By chance: one of the kinds, or none.
    scores = {ARBITER: Score(float(named), 1, 1 / (len(ARBITERS) + 1))}
    return scores | {ARBITER_PART: Score(float(named and is_planted(found.part, truth)), 1, math.nan)}


def is_planted(part: Part | None, truth: ArbiterTruth) -> bool:
    """Whether a part is what the arbiter does its work with: the router, the late head, the units, the sink's token."""
    if part is None:
        return False
    if part.what == TOKEN:
        return truth.kind == "sink" and part.text == SINK_WORD
    last = truth.arbiter[-1]
    return (part.what, part.layer) == (MLP if last.head is None else HEAD, last.layer) and (
        last.head is None or part.head == last.head
    )
