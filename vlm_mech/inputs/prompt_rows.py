"""From what the processor made of a batch to its rows: tokens, images and where the question stands.

Ids are matched against the tokenizer's own offsets, and anything that does not match raises.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image_layout import ImageLayout
from vlm_mech.inputs.processing import Processed
from vlm_mech.inputs.span import Picture, Row
from vlm_mech.inputs.special_tokens import tokenized


def rows_of(
    vlm: Any,
    processed: Processed,
    rendered: Sequence[tuple[str, tuple[int, int]]],
    sizes: Sequence[Sequence[tuple[int, int]]],
) -> tuple[Row, ...]:
    """The rows of a batch with their images.

    Args:
        rendered: each prompt's text, and where in it the question stands.
        sizes: width and height of each prompt's pictures.
    """
    drafts = _drafts(vlm, processed, rendered)
    layouts = iter(layouts_of(vlm, processed, [pictures for _, pictures in drafts]))
    rows = []
    for (row, pictures), each in zip(drafts, sizes, strict=True):
        images = [
            Picture(size, positions, extent, next(layouts))
            for size, (positions, extent) in zip(each, pictures, strict=True)
        ]
        rows.append(dataclasses.replace(row, images=tuple(images)))
    return tuple(rows)


Positions = tuple[int, ...]
Draft = tuple[Row, list[tuple[Positions, Positions]]]


def _drafts(vlm: Any, processed: Processed, rendered: Sequence[tuple[str, tuple[int, int]]]) -> list[Draft]:
    """The rows without their images; those that differ in their pictures alone are made once."""
    tokens = [processed.inputs[name].tolist() for name in ("input_ids", "attention_mask")]
    keys = [
        (*given, text, places, tuple(ids), tuple(mask))
        for given, text, places, ids, mask in zip(rendered, processed.texts, processed.places, *tokens, strict=True)
    ]
    made: dict[Any, Draft] = {}
    for example, key in enumerate(keys):
        if key not in made:
            made[key] = draft_of(vlm, processed, example, *rendered[example])
    return [made[key] for key in keys]


def layouts_of(vlm: Any, processed: Processed, pictures: list[list[tuple[Positions, Positions]]]) -> list[ImageLayout]:
    """The layout of every image of the batch, from the counts of its tokens."""
    counts = tuple(len(positions) for each in pictures for positions, _ in each)
    alone = tuple(len(each) == 1 for each in pictures for _ in each)
    return vlm.layouts(processed.inputs, counts, alone) if counts else []


def draft_of(vlm: Any, processed: Processed, example: int, text: str, question: tuple[int, int]) -> Draft:
    """The row without its images, and per image the positions of its tokens and of all that stands for it."""
    ids = processed.inputs["input_ids"][example].tolist()
    present = [position for position, kept in enumerate(processed.inputs["attention_mask"][example].tolist()) if kept]
    characters = [(0, 0)] * len(ids)
    offsets = _offsets(vlm, processed.texts[example], [ids[position] for position in present], example)
    for position, offset in zip(present, offsets, strict=True):
        characters[position] = offset
    row = Row(
        tokens=tuple(vlm.tokenizer.convert_ids_to_tokens(ids)),
        present=tuple(present),
        offsets=tuple(characters),
        text=processed.texts[example],
        question=_question(vlm, processed, example, text, question),
        images=(),
    )
    pictures, image_token = [], vlm.image_token_id
    for first, last in processed.places[example]:
        inside = [position for position in present if first <= characters[position][0] < last]
        tokens = tuple(position for position in inside if ids[position] == image_token)
        pictures.append((tokens, tuple(inside)))
    found = sum(len(tokens) for tokens, _ in pictures)
    n_image_tokens = sum(ids[position] == image_token for position in present)
    if found != n_image_tokens:
        raise UsageError(f"example {example}: {n_image_tokens} image tokens, of which {found} belong to an image")
    return row, pictures


def _question(vlm: Any, processed: Processed, example: int, text: str, question: tuple[int, int]) -> tuple[int, int]:
    """Where the question stands in the expanded text."""
    start, end = question
    expanded, place = processed.texts[example], vlm.placeholder
    if place is None or place not in text[start:]:
        # Processors may change what is before the question, and append to the text, but keep the rest.
        first = expanded.rindex(text[start:])
    else:
        n_before = text[:start].count(place)
        spans = processed.places[example][:n_before]
        first = start + sum(stop - begin for begin, stop in spans) - n_before * len(place)
    if expanded[first : first + end - start] != text[start:end]:
        raise UsageError(f"example {example}: the question is not found in the processor's text {expanded!r}")
    return first, first + end - start


def _offsets(vlm: Any, text: str, ids: list[int], example: int) -> list[tuple[int, int]]:
    """Characters of every token that is no padding; the tokens must be exactly those that the processor made."""
    if vlm.family.queries_first and text.startswith(str(vlm.processor.image_token)):
        return _offsets_after_queries(vlm, text, ids, example)
    for special in (True, False):
        made = vlm.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        if made["input_ids"] == ids:
            return made["offset_mapping"]
    raise UsageError(f"example {example}: the processor's tokens do not match the text {text!r}")


def _offsets_after_queries(vlm: Any, text: str, ids: list[int], example: int) -> list[tuple[int, int]]:
    token, n_queries = str(vlm.processor.image_token), vlm.processor.num_query_tokens
    length = len(token) * n_queries
    made = tokenized(vlm.tokenizer, text[length:], return_offsets_mapping=True)
    if [vlm.image_token_id] * n_queries + made["input_ids"] != ids:
        raise UsageError(f"example {example}: the processor's tokens do not match the text {text!r}")
    queries = [(number * len(token), (number + 1) * len(token)) for number in range(n_queries)]
    return queries + [(start + length, end + length) if end else (0, 0) for start, end in made["offset_mapping"]]
