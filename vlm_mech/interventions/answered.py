"""What edits of an answer's tokens mean: states for them come from a source that is followed by the same answers.

A source given as prompts has no answers. Where an edit takes states at the span `answer`, both runs are given the same
tokens (teacher forcing), so that they differ in their prompts alone. Where answers are generated, these are the answer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.following import Answers
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Each, Span
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.passes import Batch
from vlm_mech.interventions.specification import Activations, Intervention, Replace, Source, Together

GENERATED = "generated"
"""The span of generated tokens."""
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
    if not isinstance(part, Replace) or part.source is None:
        return part
    if not _names_answer(part.span if part.source_span is None else part.source_span):
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


def answer_alone(intervention: Intervention, n_examples: int) -> tuple[bool, ...]:
    """For each example whether nothing but tokens of its answer is edited: in a knockout as queries, or as keys."""
    parts = intervention.flat()
    return tuple(all(_is_of_answer(part, example) for part in parts) for example in range(n_examples))


def _is_of_answer(part: Intervention, example: int) -> bool:
    spans = [getattr(part, name) for name in ("span", "query", "key") if hasattr(part, name)]
    own = [span.spans[example] if isinstance(span, Each) else span for span in spans]
    return any(set(span) == {"answer"} if isinstance(span, tuple) else span == "answer" for span in own)


def of_generated(part: Intervention) -> Intervention:
    """The part with `answer` taken for what is generated, which is the answer there."""
    names = [name for name in ("span", "query", "key") if hasattr(part, name)]
    return dataclasses.replace(part, **{name: _generated_in(getattr(part, name)) for name in names})


def _generated_in(span: Span) -> Span:
    if isinstance(span, Each):
        return Each(tuple(_generated_in(part) for part in span.spans))
    if isinstance(span, tuple):
        return tuple(_generated_in(part) for part in span)
    return GENERATED if span == "answer" else span


def split_generated(span: Span) -> tuple[Span | None, bool]:
    """What a span names of the prompt (None: nothing), and whether it names generated tokens.

    Raises:
        UsageError: an `Each` names generated tokens for some examples alone.
    """
    if span == GENERATED:
        return None, True
    if isinstance(span, tuple) and GENERATED in span:
        left = tuple(part for part in span if part != GENERATED)
        return left or None, True
    if isinstance(span, Each):
        parts = [split_generated(part) for part in span.spans]
        of_prompt = [part for part, _ in parts if part is not None]
        generated = {generated for _, generated in parts}
        if len(generated) > 1 or len(of_prompt) not in (0, len(parts)):
            raise UsageError("generated tokens are edited for every example of an Each, or for none")
        return Each(tuple(of_prompt)) if of_prompt else None, generated == {True}
    return span, False
