"""Objects with masks of their parts, as items: one for each part that an object shows.

A question is ours, and names the part beside one that is not shown: one that other objects of the kind have, or, where
this one shows all of them, one that its kind has not. So it has one right answer, as far as the masks are complete.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_mech.data.readers.format import Collector

QUESTION = "Which part of the {object} is in the picture, the {one} or the {other}?"


@dataclass(frozen=True)
class ShownObject:
    """An object of a picture, its mask, and by name the masks of its parts; masks are as `data.masks` opens them."""

    name: str
    place: str
    picture: Any
    group: str | None
    kind: str
    mask: Any
    parts: dict[str, Any]


def keep_parts(found: Collector, objects: Sequence[ShownObject], seed: int) -> None:
    """Puts an item for each part of each object into `found`.

    Args:
        seed: draws the part that is named next to it, and their order.
    """
    known = dict[str, set[str]]()
    for each in objects:
        known.setdefault(each.kind, set()).update(each.parts)
    every = set[str]().union(*known.values())
    for each in objects:
        absent = sorted(known[each.kind] - set(each.parts)) or sorted(every - known[each.kind])
        for part, mask in each.parts.items():
            name = f"{each.name}/{part}"
            rng = random.Random(f"{seed}/{name}")
            if not absent:
                found.refuse(name, f"{each.place}: there is no part that it does not show, to be named beside {part!r}")
                continue
            named = rng.sample([part, rng.choice(absent)], 2)
            fields = {
                "image": each.picture,
                "question": QUESTION.format(object=each.kind, one=named[0], other=named[1]),
                "answer": part,
                "options": named,
                "category": each.kind,
                "group": each.group,
                "part_mask": mask,
                "object_mask": each.mask,
            }
            found.keep(each.place, name, fields)


def in_words(name: str) -> str:
    """A name of a category as words: `mouse_(computer_equipment)` is a mouse."""
    return " ".join(re.sub(r"\(.*?\)", " ", name).replace("_", " ").split())
