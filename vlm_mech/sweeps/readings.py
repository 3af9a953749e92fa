"""What measures read of a batch: which answers must follow its prompts, and which logits each measure is given.

Nothing follows where nothing needs to: the first token of an answer is predicted by the prompt alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.inputs.following import Ids, padded, parting
from vlm_mech.inputs.prompt import Encoded, Prompt, written
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.answered import answer_alone
from vlm_mech.interventions.specification import Intervention
from vlm_mech.results.metrics import AnswerLogits
from vlm_mech.sweeps.measures import Measure

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

NOTHING_BEFORE = "no token of the answer comes before what is read"
"""Why an edit of an answer's tokens alone has no effect to be measured, as where answers have one token."""
LENGTHS = ("_tokens", "_other_tokens")
"""Columns with the numbers of tokens of an answer and of the one that it is compared with, by their endings."""
Column = tuple[Ids, ...]
"""The tokens of an answer, for each example."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one measure reads: first or parting tokens of its answers (`ids`), each of shape batch, or whole answers.

    These are `wanted`, batch x position, with the positions of the longest answer of each list.

    `held` are the numbers of the batch's answers in which the tokens stand; `common` how many tokens the two answers of
    each example have in common. Both are empty where the next token is read.
    """

    measure: Measure
    ids: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...]
    held: tuple[int, ...]
    common: tuple[int, ...]

    @property
    def places(self) -> dict[str, list[int]]:
        """For each example how many tokens come before the one that is compared, or how many its answers have.

        Of a measure of one answer against another these are two numbers; of several spellings that of the first.
        """
        if self.measure.at == "parting":
            return {"_position": list(self.common)}
        # Where answers need not part these are spellings of one.
        compared = self.wanted[: 1 + self.measure.parts]
        return {ending: (wanted >= 0).sum(1).tolist() for ending, wanted in zip(LENGTHS, compared, strict=False)}

    def n_before(self, n_examples: int) -> Tensor:
        """For each example how many tokens of answers come before the last one that is read."""
        if self.measure.at == "parting":
            return torch.tensor(self.common)
        lengths = [(wanted >= 0).sum(1) for wanted in self.wanted]
        return torch.stack(lengths).amax(0) - 1 if lengths else torch.zeros(n_examples, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class Readings:
    """What several measures read of a batch; `encoded` has the answers after its prompts that they need."""

    encoded: Encoded
    each: tuple[Reading, ...]

    def values(
        self, reads: Float[Tensor, "batch read vocab"], clean: Float[Tensor, "batch read vocab"] | None = None
    ) -> list[Any]:
        """What each measure's function gives for the logits of a run (`Run.reads`), unchecked.

        Args:
            clean: those of the unedited run; the same unless given.
        """
        before = reads if clean is None else clean
        return [self._value(reading, reads, before) for reading in self.each]

    def value(self, number: int, reads: Float[Tensor, "batch read vocab"]) -> Any:
        """What the function of one measure gives, by its number."""
        return self._value(self.each[number], reads, reads)

    def untouched(self, intervention: Intervention) -> Bool[Tensor, "measure example"]:
        """Where nothing that is edited comes before what is read: an answer's tokens alone, and none of them does."""
        n_examples = len(self.encoded)
        alone = torch.tensor(answer_alone(intervention, n_examples))
        return torch.stack([alone & (reading.n_before(n_examples) == 0) for reading in self.each])

    def checked(
        self, reads: Float[Tensor, "batch read vocab"], names: Sequence[str], clean: Tensor | None = None
    ) -> list[Tensor]:
        """The values, each of shape batch.

        Raises:
            UsageError: a function gave something else, or an infinite number.
        """
        found = zip(self.each, self.values(reads, clean), strict=True)
        return [reading.measure.checked(value, names) for reading, value in found]

    def _value(self, reading: Reading, reads: Tensor, clean: Tensor) -> Any:
        measure = reading.measure
        if measure.at == "whole":
            answers, before = (self._answers(reading, logits) for logits in (reads, clean))
            return measure.of(*answers, clean=before) if measure.clean else measure.of(*answers)
        logits, before = (self._at(reading, logits) for logits in (reads, clean))
        return measure.of(logits, *reading.ids, clean=before) if measure.clean else measure.of(logits, *reading.ids)

    def _answers(self, reading: Reading, reads: Tensor) -> tuple[AnswerLogits, ...]:
        found = []
        for held, wanted in zip(reading.held, reading.wanted, strict=True):
            places = [0] if self.encoded.answers is None else self.encoded.answers.reads(held)[: wanted.shape[1]]
            found.append(AnswerLogits(reads[:, list(places)], wanted.to(reads.device)))
        return tuple(found)

    def _at(self, reading: Reading, reads: Tensor) -> Float[Tensor, "batch vocab"]:
        if not any(reading.common):
            return reads[:, 0]
        assert self.encoded.answers is not None, "a common beginning follows the prompts"
        places = self.encoded.answers.reads(reading.held[0])
        at = [places[common] for common in reading.common]
        return reads[torch.arange(len(at), device=reads.device), torch.tensor(at, device=reads.device)]


PLACES = {"_position": 0} | dict.fromkeys(LENGTHS, 1)
"""Columns that tell where an answer is compared, by their endings, and what stands there where there is one token."""


def without_trivial_places(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The table without such columns of some measures where all answers part at once, or have one token.

    Batches that are one table now may have lost them, and get them back.
    """
    for name, endings in ((name, endings) for name in names for endings in (("_position",), LENGTHS)):
        values = {f"{name}{ending}": PLACES[ending] for ending in endings if f"{name}{ending}" in table}
        held = {column: table[column].fillna(value).astype(int) for column, value in values.items()}
        trivial = all(bool(np.all(held[column] == value)) for column, value in values.items())
        table = table.drop(columns=list(held)) if trivial else table.assign(**held)
    return table


def readings_of(vlm: "VLM", encoded: Encoded, measures: Sequence[Measure], rows: slice = slice(None)) -> Readings:
    """What the measures read of these prompts.

    Args:
        rows: which of the measures' answers belong to the prompts.

    Raises:
        UsageError: an answer cannot be read (see `Measure.ids` and `Measure.tokens`), or leaves no room.
    """
    asked = [_asked(vlm, encoded, measure, rows) for measure in measures]
    columns = _apart([column for each in asked for column in each.needed])
    following = followed(encoded, columns) if columns else encoded
    return Readings(following, tuple(each.reading(columns) for each in asked))


def reads_behind(vlm: "VLM", prompts: Sequence[Prompt], measure: Measure) -> bool:
    """Whether a measure reads a token of an answer that another one of it comes before, in any example.

    Then such tokens may look at the picture again, and edits of the prompt alone leave them their own look.
    """
    if measure.at == "next":
        return False
    for text, *answers in zip(written(vlm, prompts), *measure.answers, strict=True):
        ids = [vlm.tokens_after(text, answer) for answer in answers]
        if (parting(*ids) or 0) if measure.at == "parting" else max(map(len, ids)) > 1:
            return True
    return False


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a measure asks of a batch; `needed` are the answers that must follow, each up to the last token
    predicted."""

    measure: Measure
    ids: tuple[Tensor, ...]
    tokens: Sequence[Column]
    common: tuple[int, ...]
    needed: Sequence[Column]

    def reading(self, columns: Sequence[Column]) -> Reading:
        """The same, once it is known which answers follow."""
        held = tuple(_holder(columns, column) for column in self.needed)
        return Reading(self.measure, self.ids, tuple(padded(column) for column in self.tokens), held, self.common)


def _asked(vlm: "VLM", encoded: Encoded, measure: Measure, rows: slice) -> _Asked:
    if measure.at == "next":
        ids = tuple(measure.ids(vlm, encoded, rows))
        # Nothing of these is given; they are there all the same, since edits may name the span of the answer.
        firsts = [tuple((first,) for first in each.tolist()) for each in ids[:1]]
        return _Asked(measure, ids, (), (), firsts)
    tokens = measure.tokens(vlm, encoded, rows)
    if measure.at == "whole":
        return _Asked(measure, (), tokens, (), tokens)
    common = _common(tokens)
    at = [[ids[number] for ids, number in zip(column, common, strict=True)] for column in tokens]
    needed = [tuple(ids[: number + 1] for ids, number in zip(tokens[0], common, strict=True))]
    return _Asked(measure, tuple(torch.tensor(ids, device=vlm.device) for ids in at), (), common, needed)


def _common(tokens: Sequence[Column]) -> tuple[int, ...]:
    found = [parting(one, other) for one, other in zip(*tokens, strict=True)]
    return tuple(common for common in found if common is not None)


def _apart(columns: Sequence[Column]) -> list[Column]:
    """The columns without those that others begin with."""
    kept: list[Column] = []
    for column in sorted(columns, key=lambda column: -sum(map(len, column))):
        if not any(_begins(column, other) for other in kept):
            kept.append(column)
    return kept


def _holder(columns: Sequence[Column], column: Column) -> int:
    return next(number for number, other in enumerate(columns) if _begins(column, other))


def _begins(column: Column, other: Column) -> bool:
    return all(longer[: len(ids)] == ids for ids, longer in zip(column, other, strict=True))
