"""States of an answer's tokens taken from another run: the source's prompts are followed by the same answers.

A source given as prompts has no answers. Where an edit takes states at the span `answer`, both runs are given the same
tokens (teacher forcing), so that they differ in their prompts alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.following import Answers
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Each, Span
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.passes import Batch
from vlm_mech.interventions.specification import Activations, Intervention, Replace, Source, Together

Given = dict[int, tuple[Source, Encoded]]
"""For each source by its identity, itself and its prompts with the answers after them."""


def with_answers(vlm: Any, encoded: Batch, intervention: Intervention, given: Given | None = None) -> Intervention:
    """The intervention whose sources have the batch's answers after their prompts wherever states of these are taken.

    Args:
        given: what was made of sources so far; what is made now is added.

    Raises:
        UsageError: a source of another number of prompts than there are answers.
    """
    if not isinstance(encoded, Encoded) or encoded.answers is None:
        return intervention
    answers, known = encoded.answers, {} if given is None else given
    parts = tuple(_part(part, lambda source: _after(vlm, source, answers, known)) for part in intervention.flat())
    return parts[0] if len(parts) == 1 else Together(parts=parts)


def _part(part: Intervention, after: Callable[[Source], Source]) -> Intervention:
    if not isinstance(part, Replace) or not _names_answer(part.span if part.source_span is None else part.source_span):
        return part
    source = after(part.source)
    return part if source is part.source else dataclasses.replace(part, source=source)


def _names_answer(span: Span) -> bool:
    if isinstance(span, Each):
        return any(_names_answer(part) for part in span.spans)
    return any(_names_answer(part) for part in span) if isinstance(span, tuple) else span == "answer"


def _after(vlm: Any, source: Source, answers: Answers, known: Given) -> Source:
    if isinstance(source, Activations | DualEncoded) or (isinstance(source, Encoded) and source.answers is not None):
        return source
    if id(source) not in known:
        prompts = source if isinstance(source, Encoded) else vlm.encode(list(source))
        known[id(source)] = (source, followed(prompts, answers.ids))
    return known[id(source)][1]
