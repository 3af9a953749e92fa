"""Pairs of files: a folder with `pairs.jsonl`, one object a line, or an official format (`data.readers`).

A line has `image`, `counterfactual_image` (paths from the folder, addresses, or pictures in base64), `question`,
`answer` and `counterfactual_answer`. A prompt with several pictures has the lists `images` and `counterfactual_images`
instead, of equal length; each picture stands in the place of its counterfactual. A line may also have `id`, `group`
(pairs of one group share a scene), `conflict`, `options`, `prior`, `category`, `caption` and `counterfactual_caption`
(see `Pair`). Some methods read further fields (`pair_fields`).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_mech.data.pair import Pair
from vlm_mech.data.readers.format import ReaderOptions
from vlm_mech.data.readers.registry import find_source
from vlm_mech.data.row_fields import as_given, kept_form, opened, options_of, pictures_of, text_of, told_of
from vlm_mech.data.user_files import Drawn, Row, Rows, draw, read_rows
from vlm_mech.errors import UsageError

FILE, ITEMS = "pairs.jsonl", "items.jsonl"
PICTURES = {"image": "images", "counterfactual_image": "counterfactual_images"}
"""What names a picture, and what names several instead."""
TEXTS = ("question", "answer", "counterfactual_answer")
CAPTIONS = ("caption", "counterfactual_caption")


def read_pairs(folder: Path, *, n: int | None, seed: int) -> Drawn[Pair]:
    """The pairs of a folder with their pictures opened, or n of them drawn with the seed.

    Raises:
        UsageError: no pair can be used, or an id occurs twice.
    """
    found = read_rows(folder / FILE, "pairs")
    return pairs_of(found, folder, str(folder / FILE), n=n, seed=seed, keep_pixels=True)


def pairs_of(
    found: Rows, folder: Path, name: str, *, n: int | None, seed: int, keep_pixels: bool = False
) -> Drawn[Pair]:
    """The pairs of rows, or n of them drawn with the seed; each picture that is used is opened once.

    Args:
        folder: from which pictures are named.
        name: what the source is called in errors.
        keep_pixels: keep pictures as pixels, not in the form (file, bytes) in which the rows have them.

    Raises:
        UsageError: no pair can be used, or an id occurs twice.
    """
    check_ids(found, "pair", name)
    drawn = draw(found, n, seed, lambda row: _pair(folder, row, keep_pixels))
    if not drawn.used:
        raise UsageError(f"{name!r} holds no usable pair{first_reason(drawn)}")
    check_unlike([pair.id for pair in drawn.used], "pair", name)
    return drawn


def check_ids(found: Rows, what: str, name: str) -> None:
    """Raises `UsageError` where two rows have one id; of rows that are not there yet it is not known."""
    if isinstance(found.rows, tuple):
        check_unlike([row.id for row in found.rows], what, name)


def check_unlike(ids: Sequence[str], what: str, name: str) -> None:
    """Raises `UsageError` where an id occurs twice."""
    twice = [each for each, count in Counter(ids).items() if count > 1]
    if twice:
        raise UsageError(f"{what} id {twice[0]!r:.60} occurs twice in {name!r}")


def first_reason(drawn: Drawn[Any]) -> str:
    """Why the first row that was refused was, to end an error."""
    return f"; the first was refused because {drawn.refused[0].reason}" if drawn.refused else ""


def pair_fields(source: Path) -> dict[str, dict[str, Any]]:
    """All that the rows of a folder or of an official format say, by the ids of their pairs or items."""
    own = next((source / each for each in (FILE, ITEMS) if (source / each).is_file()), None)
    if own is not None or (known := find_source(source)) is None:
        return {row.id: row.fields for row in read_rows(own or source / FILE, "rows").rows}
    return {row.id: row.fields for row in known.rows(ReaderOptions()).rows}


def _pair(folder: Path, row: Row, keep_pixels: bool) -> Pair:
    """The pair of a row.

    Raises:
        UsageError: a field that is none, a picture that cannot be read, unlike numbers of pictures, or the same pixels
            on both sides.
    """
    named = [pictures_of(row, folder, one, several) for one, several in PICTURES.items()]
    question, *answers = (text_of(row, field, row.fields.get(field)) for field in TEXTS)
    if len(named[0]) != len(named[1]):
        raise UsageError(
            f"{row.place}: {len(named[0])} images and {len(named[1])} counterfactual_images; as many of both are needed"
        )
    sides = [opened(each) for each in named]
    if all(one.size == other.size and one.tobytes() == other.tobytes() for one, other in zip(*sides, strict=True)):
        raise UsageError("both pictures have the same pixels" if len(sides[0]) == 1 else "both sides show equal pixels")
    kept = [kept_form(*each, keep_pixels=keep_pixels) for each in zip(named, sides, strict=True)]
    captions = [row.fields.get(field) for field in CAPTIONS]
    return Pair(
        row.id,
        *(as_given(each) for each in kept),
        question,
        *answers,
        told_of(row, "group"),
        row.fields.get("conflict"),
        options=options_of(row),
        prior=told_of(row, "prior"),
        category=told_of(row, "category"),
        captions=(captions[0], captions[1]) if all(isinstance(each, str) for each in captions) else None,
    )
