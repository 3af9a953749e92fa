"""A scoring run, batch by batch, each kept when it is done."""

from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.behaviour.answering.asked_options import others_of
from vlm_mech.behaviour.scoring import study
from vlm_mech.behaviour.scoring.data import TEST, VALIDATION, Plan
from vlm_mech.behaviour.scoring.study import finished
from vlm_mech.data.pairs import Pairs
from vlm_mech.data.whole_sets import batch_starts

if TYPE_CHECKING:
    from vlm_mech.runs.workspace import Workspace


def score_all(plan: Plan, work: "Workspace") -> None:
    """Scores every batch that is not done yet: both parts with every model, then the contrastive model's cosines."""
    others = others_of(plan.test, seed=plan.seed)
    parts = [(TEST, plan.test)] + ([(VALIDATION, plan.validation)] if plan.validation is not None else [])
    steps = {
        f"{number}-{part}-{start:08d}": (number, part, start)
        for part, pairs in parts
        for number in range(len(plan.vlms))
        for start in _starts(plan, pairs)
    }
    for key, (number, part, start) in work.batches(steps, "scoring"):
        pairs = plan.test if part == TEST or plan.validation is None else plan.validation
        rows = slice(start, min([each for each in _starts(plan, pairs) if each > start], default=len(pairs)))
        table = study.score_pairs(
            plan.vlms[number], pairs[rows], others[rows] if part == TEST else [], plan.templates, plan.forms,
            max_new_tokens=plan.max_new_tokens,
        )  # fmt: skip
        work.keep(key, table.assign(part=part), {})
    work.together()
    if plan.encoder is not None and "contrastive" not in work:
        table = study.similarity_rows(plan.encoder, plan.test, others, plan.captions, batch=plan.batch)
        work.keep("contrastive", table.assign(part=TEST), {})


def _starts(plan: Plan, pairs: Pairs) -> list[int]:
    return batch_starts(pairs, plan.batch)


def collected(work: "Workspace") -> tuple[pd.DataFrame, dict[tuple[str, str], str]]:
    """The table of all test pairs with what is taken over prompts, and the prompt chosen for each scoring."""
    table, _ = work.collect()
    parts = {part: rows.drop(columns="part") for part, rows in table.groupby("part", sort=False)}
    return finished(parts[TEST], parts.get(VALIDATION))
