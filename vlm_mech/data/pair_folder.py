"""A folder of pairs: `pairs.jsonl`, one object a line, and the pictures that it names.

A line has `image`, `counterfactual_image` (paths from the folder, addresses, or pictures in base64), `question`,
`answer` and `counterfactual_answer`. A prompt with several pictures has the lists `images` and `counterfactual_images`
instead, of equal length; each picture stands in the place of its counterfactual. A line may also have `id`, `group`
(pairs of one group share a scene) and `conflict` (see `Pair`). Some methods read further fields (`pair_fields`).
"""

from collections import Counter
from pathlib import Path
from typing import Any

from vlm_mech.data.pair import Pair
from vlm_mech.data.user_files import Drawn, Row, draw, read_rows
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import image_named, load_image

FILE = "pairs.jsonl"
PICTURES = {"image": "images", "counterfactual_image": "counterfactual_images"}
"""What names a picture, and what names several instead."""
TEXTS = ("question", "answer", "counterfactual_answer")


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
        UsageError: a field that is none, a picture that cannot be read, unlike numbers of pictures, or the same pixels
            on both sides.
    """
    named = [_named(row, one, several) for one, several in PICTURES.items()]
    question, *answers = (_text(row, field, row.fields.get(field)) for field in TEXTS)
    if len(named[0]) != len(named[1]):
        raise UsageError(
            f"line {row.line}: {len(named[0])} images and {len(named[1])} counterfactual_images; as many of both are "
            "needed"
        )
    group = row.fields.get("group")
    sides = [[load_image(image_named(folder, name)) for name in each] for each in named]
    if all(one.size == other.size and one.tobytes() == other.tobytes() for one, other in zip(*sides, strict=True)):
        raise UsageError("both pictures have the same pixels" if len(sides[0]) == 1 else "both sides show equal pixels")
    images = [each[0] if len(each) == 1 else tuple(each) for each in sides]
    group = None if group is None else str(group)
    return Pair(row.id, *images, question, *answers, group, row.fields.get("conflict"))


def _named(row: Row, one: str, several: str) -> list[str]:
    """The pictures that a line names, in either way."""
    if several not in row.fields:
        return [_text(row, one, row.fields.get(one))]
    if row.fields.get(one) is not None:
        raise UsageError(f"line {row.line}: both {one} and {several} are given; one of them is needed")
    given = row.fields[several]
    if not isinstance(given, list) or not given:
        raise UsageError(f"line {row.line}: {several} is {given!r:.60}; a list of at least one picture is needed")
    return [_text(row, f"number {number} of {several}", name) for number, name in enumerate(given)]


def _text(row: Row, field: str, given: Any) -> str:
    if not isinstance(given, str) or not given.strip():
        raise UsageError(f"line {row.line}: {field} is {given!r:.60}; a non-empty text is needed")
    return given
