"""A folder of pairs: `pairs.jsonl`, one object a line, and the pictures that it names.

A line has `image`, `counterfactual_image` (paths from the folder, addresses, or pictures in base64), `question`,
`answer` and `counterfactual_answer`, and optionally `id`, `group` (pairs of one group share a scene) and `conflict`
(see `Pair`). Some methods read further fields (`pair_fields`).
"""

from collections import Counter
from pathlib import Path
from typing import Any

from vlm_mech.data.pair import Pair
from vlm_mech.data.user_files import Drawn, Row, draw, read_rows
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import image_named, load_image

FILE = "pairs.jsonl"
FIELDS = ("image", "counterfactual_image", "question", "answer", "counterfactual_answer")


def read_pairs(folder: Path, *, n: int | None, seed: int) -> Drawn[Pair]:
    """The pairs of a folder with their pictures opened, or n of them drawn with the seed.

    Raises:
        UsageError: no pair can be used, or an id occurs twice.
    """
    found = read_rows(folder / FILE, "pairs")
    twice = [name for name, count in Counter(row.id for row in found.rows).items() if count > 1]
    if twice:
        raise UsageError(f"pair id {twice[0]!r:.60} occurs twice in {str(folder / FILE)!r}")
    drawn = draw(found, n, seed, lambda row: _pair(folder, row))
    if not drawn.used:
        first = f"; the first was refused because {drawn.refused[0].reason}" if drawn.refused else ""
        raise UsageError(f"{str(folder / FILE)!r} holds no usable pair{first}")
    return drawn


def pair_fields(folder: Path) -> dict[str, dict[str, Any]]:
    """All that the lines of a folder say, by the ids of their pairs."""
    return {row.id: row.fields for row in read_rows(folder / FILE, "pairs").rows}


def _pair(folder: Path, row: Row) -> Pair:
    """The pair of a line.

    Raises:
        UsageError: a field that is none, a picture that cannot be read, or two of the same pixels.
    """
    for field in FIELDS:
        given = row.fields.get(field)
        if not isinstance(given, str) or not given.strip():
            raise UsageError(f"line {row.line}: {field} is {given!r:.60}; a non-empty text is needed")
    group = row.fields.get("group")
    images = [load_image(image_named(folder, row.fields[field])) for field in FIELDS[:2]]
    if images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes():
        raise UsageError("both pictures have the same pixels")
    question, *answers = (row.fields[field] for field in FIELDS[2:])
    group = None if group is None else str(group)
    return Pair(row.id, *images, question, *answers, group, row.fields.get("conflict"))
