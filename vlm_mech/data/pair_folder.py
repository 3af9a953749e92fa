"""Pairs of files: a folder with `pairs.jsonl`, one object a line, or an official format (`data.readers`).

A line has `image`, `counterfactual_image` (paths from the folder, addresses, or pictures in base64), `question`,
`answer` and `counterfactual_answer`. A prompt with several pictures has the lists `images` and `counterfactual_images`
instead, of equal length; each picture stands in the place of its counterfactual. A line may also have `id`, `group`
(pairs of one group share a scene), `conflict`, `options`, `prior`, `prior_question`, `category`, `caption` and
`counterfactual_caption` (see `Pair`). Some methods read further fields (`pair_fields`). A pair of two texts has no
picture but a `counterfactual_question`, and perhaps `subject`, `counterfactual_subject` and `completion`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlm_mech.data.pair import Pair
from vlm_mech.data.readers.format import ReaderOptions
from vlm_mech.data.row_fields import as_given, check_id, kept_form, opened, options_of, pictures_of, text_of, told_of
from vlm_mech.data.row_remarks import FieldRemarks, repeats
from vlm_mech.data.shared_pictures import pixel_hash
from vlm_mech.data.sources import find_data
from vlm_mech.data.user_files import Drawn, Row, Rows, draw, same_id, with_reason
from vlm_mech.errors import UsageError

FILE, ITEMS = "pairs.jsonl", "items.jsonl"
PICTURES = {"image": "images", "counterfactual_image": "counterfactual_images"}
"""What names a picture, and what names several instead."""
TEXTS = ("question", "answer", "counterfactual_answer")
CAPTIONS = ("caption", "counterfactual_caption")
READ_BY_METHODS = ("object", "part_mask", "object_mask")
FIELDS = (*PICTURES, *PICTURES.values(), *TEXTS, *CAPTIONS, "id", "group", "conflict", "options", "prior", "category")
OF_TEXTS = ("counterfactual_question", "subject", "counterfactual_subject", "completion")
FIELDS += ("prior_question", *OF_TEXTS, *READ_BY_METHODS)
"""All fields that are read, some by methods alone."""
PartT = TypeVar("PartT")


def pairs_of(
    found: Rows, folder: Path, name: str, *, n: int | None, seed: int, keep_pixels: bool = False
) -> Drawn[Pair]:
    """The pairs of rows, or n of them drawn with the seed; each picture that is used is opened once.

    Args:
        folder: from which pictures are named.
        name: what the source is called in errors.
        keep_pixels: keep pictures as pixels, not in the form (file, bytes) in which the rows have them.

    Raises:
        UsageError: no pair can be used.
    """
    return drawn_examples(
        found, "pair", name, lambda row: _pair(folder, row, keep_pixels), n=n, seed=seed, known=FIELDS
    )[0]


def drawn_examples(
    found: Rows,
    what: str,
    name: str,
    use: Callable[[Row], tuple[PartT, list[str]]],
    *,
    n: int | None,
    seed: int,
    known: Collection[str],
    elsewhere: Mapping[str, str] | None = None,
) -> tuple[Drawn[PartT], list[list[str]]]:
    """What `use` makes of rows, or of n of them drawn with the seed, and hashes of the pictures of each.

    Of rows with one id the first counts, and the later ones are refused; the first that is drawn where the rows are not
    all there (a stream, a table in memory). Notes tell of fields that are not read, and of examples there twice.

    Args:
        what: what one is called in errors. name: what the source is called there.
        use: gives an example of a row, and hashes of its pictures.
        known: fields that a row may have.
        elsewhere: others that are not read here, and what is to be told of them.

    Raises:
        UsageError: none can be used.
    """
    remarks, places = FieldRemarks(known, elsewhere), dict[str, str]()

    def used(row: Row) -> tuple[Row, PartT, list[str]]:
        remarks.look(row)
        check_id(row)
        if (place := places.setdefault(row.id, row.place)) != row.place:
            raise UsageError(same_id(row, place))
        return row, *use(row)

    drawn = draw(found, n, seed, used)
    if not drawn.used:
        told = "".join(f"; {note}" for note in remarks.notes)
        raise UsageError(f"{name!r} holds no usable {what}{first_reason(drawn)}{told}")
    rows, examples, shown = zip(*drawn.used, strict=True)
    said = [_said(example, hashes) for example, hashes in zip(examples, shown, strict=True)]
    notes = (*drawn.notes, *remarks.notes, *repeats([row.id for row in rows], said))
    return Drawn(examples, drawn.refused, drawn.told, notes), list(shown)


def _said(example: Any, hashes: Sequence[str]) -> tuple[Any, ...]:
    """All that tells an example from another."""
    answers = example.answer, getattr(example, "counterfactual_answer", None)
    return *hashes, example.question, *answers, tuple(example.options)


def first_reason(drawn: Drawn[Any]) -> str:
    """Why the first row that was refused was, or that there are none, to end an error."""
    if not drawn.refused:
        return ": it has no rows"
    name, reason = drawn.refused[0].id, drawn.refused[0].reason
    return f"; the first{'' if with_reason(name, reason) == reason else f' ({name})'} was refused because {reason}"


def pair_fields(source: str | Path) -> dict[str, dict[str, Any]]:
    """All that the rows of a folder or of an official format say, by the ids of their pairs."""
    known = find_data(source)
    return {} if known is None else {row.id: row.fields for row in known.rows(ReaderOptions()).rows}


def _pair(folder: Path, row: Row, keep_pixels: bool) -> tuple[Pair, list[str]]:
    """The pair of a row, and hashes of its pictures.

    Raises:
        UsageError: a field that is none, a picture that cannot be read, unlike numbers of pictures, or the same pixels
            on both sides.
    """
    if (other := told_of(row, "counterfactual_question")) is not None:
        return _of_texts(row, other)
    named = [pictures_of(row, folder, one, several) for one, several in PICTURES.items()]
    question, *answers = (text_of(row, field, row.fields.get(field)) for field in TEXTS)
    if len(named[0]) != len(named[1]):
        raise UsageError(
            f"{row.place}: {len(named[0])} images and {len(named[1])} counterfactual_images; as many of both are needed"
        )
    sides = [opened(each) for each in named]
    shown = [[pixel_hash(each) for each in side] for side in sides]
    if shown[0] == shown[1]:
        raise UsageError("both images have the same pixels" if len(sides[0]) == 1 else "both sides show equal pixels")
    kept = [kept_form(*each, keep_pixels=keep_pixels) for each in zip(named, sides, strict=True)]
    pair = Pair(
        row.id,
        *(as_given(each) for each in kept),
        question,
        *answers,
        told_of(row, "group"),
        row.fields.get("conflict"),
        options=options_of(row),
        prior=told_of(row, "prior"),
        category=told_of(row, "category"),
        captions=captions_of(row),
        prior_question=told_of(row, "prior_question"),
    )
    return pair, [*shown[0], *shown[1]]


def _of_texts(row: Row, other: str) -> tuple[Pair, list[str]]:
    """The pair of two questions of a row, which shows no picture; and both questions.

    Args:
        other: the counterfactual question.
    """
    question, *answers = (text_of(row, field, row.fields.get(field)) for field in TEXTS)
    given = [name for name in (*PICTURES, *PICTURES.values()) if row.fields.get(name) is not None]
    if given:
        raise UsageError(f"{row.place}: {given[0]} and counterfactual_question are given; one of them is needed")
    subjects = told_of(row, "subject"), told_of(row, "counterfactual_subject")
    if (subjects[0] is None) != (subjects[1] is None):
        raise UsageError(f"{row.place}: subject and counterfactual_subject go together; one of them is missing")
    completion = row.fields.get("completion") or False
    if completion not in (True, False):
        raise UsageError(f"{row.place}: completion is {completion!r:.60}; true or false is needed")
    pair = Pair(
        row.id,
        (),
        (),
        question,
        *answers,
        told_of(row, "group"),
        options=options_of(row),
        prior=told_of(row, "prior"),
        category=told_of(row, "category"),
        prior_question=told_of(row, "prior_question"),
        counterfactual_question=other,
        subjects=None if subjects[0] is None or subjects[1] is None else (subjects[0], subjects[1]),
        completion=bool(completion),
    )
    return pair, pair.shown


def captions_of(row: Row) -> tuple[str, str] | None:
    """The captions of both pictures, or of an item a right and a wrong one; none where there are none.

    Raises:
        UsageError: one alone, or something that is no text.
    """
    one, other = (told_of(row, field) for field in CAPTIONS)
    if one is None and other is None:
        return None
    if one is None or other is None:
        lacking = CAPTIONS[0 if one is None else 1]
        raise UsageError(f"{row.place}: it has a caption, but no {lacking}; both are needed, or neither")
    return one, other
