"""What a page asks: pictures in conflict with what is usual, which answer is shown and which is the prior, and edits.

One rule for all data: the picture that `conflict` names is asked about. Its own answer is the one that is *shown*; that
of the other picture, which shows what is usual, is the *prior*. A pair's `prior`, where it has one, must say the same.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_mech.data.derived_pairs import checked, conflict_first, with_conflict
from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span_kinds import Each, Span, Tokens
from vlm_mech.methods.gates.parts import chosen_parts
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL, Donors, donors_of

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

ENCODING, CROSSOVER, PATCHING, HEADS = "encoding", "crossover", "patching", "heads"
ARBITER, STEERING, HORIZON, CONTEXT = "arbiter", "steering", "horizon", "context"
PARTS = (ENCODING, CROSSOVER, PATCHING, HEADS, ARBITER, STEERING, HORIZON, CONTEXT)
"""The parts of a page."""
DEFAULT = PARTS[:-1]
"""Those asked where none is named; the last one needs a bank of text states."""

CONFLICT, USUAL, PRIOR_QUESTION = "conflict", "usual", "prior question"
"""The runs: asked about the picture in conflict, about the usual one, and what is usual of the picture in conflict."""
RUNS = (CONFLICT, USUAL)
SIDES = {CONFLICT: "noising", USUAL: "denoising"}
"""What layer swaps call putting the other picture's states into each run."""
SPANS = ("all", "image", "text", "last")
NO_HEAD = -1
"""Stands where an edit is of no head."""
QUESTION_IN = "{question}"


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts asked for, in the order of the page (`chosen_parts`)."""
    return chosen_parts(parts, PARTS, DEFAULT)


@dataclass(frozen=True, eq=False)
class Cases:
    """Pairs whose first picture is in conflict: `answer` is shown, `counterfactual_answer` is the prior.

    `prior_questions` ask each for what is usual, empty where that is not known; `why_none` says why.
    """

    pairs: Pairs
    prior_questions: tuple[str, ...] = ()
    why_none: str = ""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: slice) -> "Cases":
        return dataclasses.replace(self, pairs=self.pairs[rows], prior_questions=self.prior_questions[rows])

    def prompts(self, run: str) -> list[Prompt]:
        """The prompts of a run."""
        if run == PRIOR_QUESTION:
            asked = zip(self.pairs, self.prior_questions, strict=True)
            return [dataclasses.replace(pair, question=text).base for pair, text in asked]
        return self.pairs.base if run == CONFLICT else self.pairs.counterfactual


def conflicts_of(pairs: Pairs) -> Pairs:
    """The pairs that are in conflict, turned so that this picture is the first; the others move to `refused`.

    Raises:
        UsageError: single items, or no pair in conflict whose usual answer is the other picture's.
    """
    if pairs.made is not None:
        raise UsageError(
            f"{pairs.name} holds single items; pairs are needed: an image in conflict and one that shows what is usual"
        )
    faced = checked(conflict_first(with_conflict(pairs)), _check_prior, "has a prior that its usual image shows")
    known = tuple(dataclasses.replace(pair, prior=pair.counterfactual_answer) for pair in faced)
    return dataclasses.replace(faced, pairs=known)


def _check_prior(pair: Pair) -> None:
    if pair.prior is not None and pair.prior.strip() != pair.counterfactual_answer.strip():
        raise UsageError(
            f"its prior is {pair.prior!r:.60}, and the image that is not in conflict shows "
            f"{pair.counterfactual_answer!r:.60}; they must be the same"
        )


def cases_of(pairs: Pairs, prior_question: str | None = None) -> Cases:
    """The cases of pairs that `conflicts_of` gave, with the questions about what is usual.

    Args:
        prior_question: one text for all, in which {question} stands for a pair's own question; by default the pairs'
            `prior_question`, which all must have.

    Raises:
        UsageError: an empty text.
    """
    if prior_question is not None:
        if not prior_question.strip():
            raise UsageError("prior_question is empty; a question about what is usual is needed, or none")
        return Cases(pairs, tuple(prior_question.replace(QUESTION_IN, pair.question) for pair in pairs))
    known = [pair.prior_question for pair in pairs]
    asked = tuple(text for text in known if text is not None)
    if len(asked) == len(known):
        return Cases(pairs, asked)
    return Cases(pairs, (), f"{len(known) - len(asked)} of {len(known)} pairs of {pairs.name} name no prior_question")


@dataclass(frozen=True, eq=False)
class Scan:
    """Whose states are put into both runs: `donors` lend those of the controls, None where there are none."""

    donors: Donors | None
    why_none: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Whose states: those of the other picture of the pair, and those of the controls."""
        return (COUNTERFACTUAL, *(() if self.donors is None else self.donors.names))

    @property
    def told(self) -> dict[str, Any]:
        """How many pairs have a donor of each control, and why one is missing."""
        return {"donors": {} if self.donors is None else self.donors.told, "missing": self.why_none}


def scan_of(vlm: "VLM", pairs: Pairs, *, seed: int = 0) -> Scan:
    """The controls of patching: another pair's picture with the run's own answer, and one of another object.

    Args:
        seed: draws them.
    """
    try:
        return Scan(donors_of(vlm, pairs, ("same-answer", "other-object"), seed=seed))
    except UsageError as error:
        reason = str(error)
    try:
        return Scan(donors_of(vlm, pairs, ("same-answer",), seed=seed), reason)
    except UsageError as error:
        return Scan(None, str(error))


def spans_of(vlm: "VLM", prompts: Sequence[Prompt]) -> dict[str, Span]:
    """What is patched in these prompts, by name; `text` is every token that is no image token."""
    rows = vlm.encode(list(prompts)).rows
    texts = []
    for row in rows:
        image = {*row.image}
        texts.append(Tokens(tuple(number for number, at in enumerate(row.present) if at not in image)))
    return {"all": "all", "image": "image", "text": Each(tuple(texts)), "last": "last"}
