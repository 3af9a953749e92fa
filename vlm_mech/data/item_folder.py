"""Items of files: a folder with `items.jsonl`, one object a line, or an official format (`data.readers`).

A line has `image` (a path from the folder, an address, or the picture in base64) or a list `images`, `question` and
`answer`. It may also have `id`, `options` (a list of texts), `prior`, `category`, `group`, `conflict`, `caption` and
`counterfactual_caption` (see `Item`).
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from vlm_mech.data.item import Item
from vlm_mech.data.pair_folder import CAPTIONS, READ_BY_METHODS, captions_of, drawn_examples
from vlm_mech.data.row_fields import as_given, kept_form, opened, options_of, pictures_of, text_of, told_of
from vlm_mech.data.shared_pictures import linked_groups, pixel_hash
from vlm_mech.data.user_files import Drawn, Row, Rows

FILE = "items.jsonl"
FIELDS = ("image", "images", "question", "answer", "id", "options", "prior", "category", "group", "conflict")
FIELDS += (*CAPTIONS, *READ_BY_METHODS)
"""All fields that are read, some by methods alone."""
OF_PAIRS = dict.fromkeys(
    ("counterfactual_image", "counterfactual_images", "counterfactual_answer", "counterfactual_question"),
    "it is a field of pairs, which pairs.jsonl holds",
)
"""Fields of pairs, which items do not have."""


def items_of(found: Rows, folder: Path, name: str, *, n: int | None, seed: int) -> Drawn[Item]:
    """The items of rows, or n of them drawn with the seed; those that share a picture are one group.

    Each picture is opened once, so that one which cannot be read is refused here, and is kept in the form (file, bytes)
    in which the row has it.

    Args:
        folder: from which pictures are named.
        name: what the source is called in errors.

    Raises:
        UsageError: no item can be used.
    """
    how: dict[str, Any] = {"n": n, "seed": seed, "known": FIELDS, "elsewhere": OF_PAIRS}
    drawn, shown = drawn_examples(found, "item", name, lambda row: _item(folder, row), **how)
    items = drawn.used
    named = {each.group for each in items}
    own = [each.group or (f"item {each.id}" if each.id in named else each.id) for each in items]
    groups = linked_groups(own, shown)
    made = [
        item if group is None else dataclasses.replace(item, group=group)
        for item, group in zip(items, groups, strict=True)
    ]
    return Drawn(tuple(made), drawn.refused, drawn.told, drawn.notes)


def _item(folder: Path, row: Row) -> tuple[Item, list[str]]:
    """The item of a row, and hashes of its pictures.

    Raises:
        UsageError: a field that is none, or a picture that cannot be read.
    """
    images = pictures_of(row, folder, "image", "images")
    question, answer = (text_of(row, field, row.fields.get(field)) for field in ("question", "answer"))
    pixels, conflict = opened(images), row.fields.get("conflict")
    item = Item(
        row.id,
        as_given(kept_form(images, pixels)),
        question,
        answer,
        options=options_of(row),
        prior=told_of(row, "prior"),
        category=told_of(row, "category"),
        group=told_of(row, "group"),
        conflict=bool(conflict) if isinstance(conflict, np.bool_) else conflict,
        captions=captions_of(row),
    )
    return item, [pixel_hash(each) for each in pixels]
