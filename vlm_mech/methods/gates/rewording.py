"""The questions of a run put in other words: in which words, and what the same analysis says then."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.wording import BARE, QUESTION, Wording, check_words
from vlm_mech.results.claim import Claim
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result
from vlm_mech.results.rewording import FEWEST_WORDINGS, Reworded, over_other_wordings
from vlm_mech.sweeps.measures import said
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.recorded_pass import record

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

NEUTRAL = (
    f"Look at the picture. {QUESTION}",
    f"{QUESTION} Answer with one word.",
    f"In this picture, {QUESTION}",
    f"Answer with one word: {QUESTION}",
    f"You see a picture. {QUESTION}",
    f"Picture: {QUESTION}",
    f"{QUESTION} Answer:",
)
"""Wordings that ask nothing else. What stands in the place of the question is the question in its own words."""
NEUTRAL_TEXTS = (
    f"It is a fact. {QUESTION}",
    f"Everyone knows this. {QUESTION}",
    f"Remember this well. {QUESTION}",
    f"Here is something to know. {QUESTION}",
    f"As we read in a book: {QUESTION}",
)
"""The same for texts that the answer goes on with."""
LEAST_RIGHT = 0.5
"""Share of what is answered correctly in the own wording below which another one does not count: it says little."""


def other_wordings(vlm: "VLM", pairs: "Pairs", given: Sequence[str] = ()) -> tuple[list[Wording], dict[str, str]]:
    """Wordings to ask pairs in beside their own, in the order in which they are tried, and why others cannot be used.

    First those that are given, then, around the own wording, the neutral ones. All keep the system message and the
    prefix of the own.

    Args:
        given: templates with `{question}`.

    Raises:
        UsageError: a template that is none.
    """
    own = pairs[0].wording if len(pairs) else BARE
    neutral = NEUTRAL_TEXTS if len(pairs) and pairs[0].completion else NEUTRAL
    templates = [*given, *(each.replace(QUESTION, own.template) for each in neutral)]
    found, left_out = [], {}
    for template in dict.fromkeys(templates):
        if template == own.template:
            continue
        wording = dataclasses.replace(own, template=template)
        try:
            check_words(vlm, wording)
        except UsageError as error:
            left_out[template] = str(error)
        else:
            found.append(wording)
    return found, left_out


def share_right(vlm: "VLM", pairs: "Pairs", *, batch: int = 32) -> float:
    """The share of pairs whose first question the model answers right, as greedy decoding would say it.

    Args:
        batch: pairs per forward pass.
    """
    right: list[bool] = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        asked = readings_of(vlm, vlm.encode(some.base), [said(some.answer)])
        right += asked.value(0, record(vlm, asked.encoded).reads).bool().tolist()
    return sum(right) / len(right) if right else float("nan")


def in_other_wordings(
    claims: tuple[Claim, ...],
    possible: Sequence[Claim],
    vlm: "VLM",
    pairs: "Pairs",
    result: Result,
    pool: Pool,
    measured: "Callable[[VLM, Pairs], pd.DataFrame]",
    *,
    given: Sequence[str] = (),
    batch: int = 32,
) -> tuple[Claim, ...]:
    """The claims with a gate: are they made again in other wordings (see `results.rewording`)?

    A wording counts in which the model answers at least `LEAST_RIGHT` of what it answers right in the own one. All that
    are given are tried, and of the neutral ones as many as make three that count.

    Args:
        possible: all that could be said of the result.
        pairs: some of those that the result is about.
        measured: does the analysis again, of other pairs.
        given: templates of the user's own.
        batch: pairs per forward pass.

    Raises:
        UsageError: a template that is none, or pairs that cannot be asked.
    """
    wordings, left_out = other_wordings(vlm, pairs, given)
    usual = share_right(vlm, pairs, batch=batch)
    others: dict[str, Reworded] = {}
    for wording in wordings:
        if wording.template not in given and len(others) >= FEWEST_WORDINGS:
            break
        asked = pairs.worded(wording)
        try:
            right = share_right(vlm, asked, batch=batch)
            if right < LEAST_RIGHT * usual:
                left_out[wording.template] = f"{100 * right:.0f} % are correct, {100 * usual:.0f} % in the own wording"
                continue
            tables = [measured(vlm, asked[start : start + batch]) for start in range(0, len(asked), batch)]
        except (UsageError, WorkError) as error:
            left_out[wording.template] = " ".join(str(error).split())
            continue
        table = pd.concat(tables, ignore_index=True)
        again = dataclasses.replace(result, table=table, findings=(), claims=(), known={})
        others[wording.template] = Reworded(again, right)
    names = {pair.id for pair in pairs}
    kept = result.table[result.table["example"].isin(names)].reset_index(drop=True)
    own = dataclasses.replace(result, table=kept, known={})
    return over_other_wordings(claims, possible, pool, own, others, left_out, right=usual)
