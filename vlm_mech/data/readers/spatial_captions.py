"""COCO-spatial and GQA-spatial (Kamath et al. 2023, arXiv 2310.19785): a right and a wrong caption of a picture.

The questions are those of arXiv 2411.05195, which asks about left and right; about above and below, top and bottom they
are ours, in the same form. The two options are exchanged with probability one half, drawn with the seed.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from vlm_mech.data.readers.format import ReaderOptions, Table
from vlm_mech.data.readers.single import each_row
from vlm_mech.data.user_files import Row, Rows, written
from vlm_mech.errors import UsageError

ONE = re.compile(
    r"(?:a photo of )?(?:an? |the )?(?P<x>.+?) (?:on|at|to) the (?P<side>left|right|top|bottom)\.?", re.IGNORECASE
)
TWO = re.compile(
    r"(?:a photo of )?(?:an? |the )?(?P<x>.+?) (?:to the |on the )?(?P<side>left of|right of|above|below) "
    r"(?:an? |the )?(?P<y>.+?)\.?",
    re.IGNORECASE,
)
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
SIDES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}

FIRST = ("left", "above", "top", "right", "below", "bottom")
"""Sides in the order in which a question names two of them, before they are exchanged."""


def rows_of(tables: Sequence[Table], options: ReaderOptions, picture: Callable[[Table, int], Any]) -> Rows:
    """The items of tables of [number of the picture, right caption, wrong caption].

    Args:
        picture: where the picture of a number lies.
    """
    return each_row(tables, lambda row, table: _fields(row, table, options.seed, picture))


def _fields(row: Row, table: Table, seed: int, picture: Callable[[Table, int], Any]) -> dict[str, Any]:
    number, *captions = (row.fields.get(column) for column in "012")
    number = written(number) or ""
    if not number.isdecimal() or not all(isinstance(each, str) for each in captions):
        raise UsageError(f"{row.place}: it is {list(row.fields.values())!r:.80}; a number and two captions are needed")
    (x, side, y), (other_x, other, other_y) = (_read(str(each), row) for each in captions)
    if (x, y) != (other_x, other_y) or side == other:
        raise UsageError(f"{row.place}: its captions {captions!r:.100} differ in more than the side, or not in it")
    named = sorted((side, other), key=FIRST.index)
    if random.Random(f"{seed}/{table.path.name}/{row.line}").random() < 0.5:
        named.reverse()
    places = [f"{SIDES[each]} a {y}" if y else PLACES[each] for each in named]
    shown = picture(table, int(number))
    return {
        "image": shown,
        "question": f"Is the {x} {places[0]} or {places[1]}? Give a short answer.",
        "answer": side,
        "options": named,
        "category": "two objects" if y else "one object",
        "group": table.group_of(shown),
        "caption": captions[0],
        "counterfactual_caption": captions[1],
    }


def _read(caption: str, row: Row) -> tuple[str, str, str]:
    """The object, its side, and the object next to it, if there is one."""
    said = ONE.fullmatch(caption.strip()) or TWO.fullmatch(caption.strip())
    if said is None:
        raise UsageError(f"{row.place}: caption {caption!r:.80} tells no side such as left of, above or on the left")
    parts = said.groupdict()
    return parts["x"].lower(), parts["side"].lower().removesuffix(" of"), (parts.get("y") or "").lower()


def is_named(table: Table, *names: str) -> bool:
    """Whether the file has one of these names."""
    return table.path.name.lower() in names
