"""Spans: which positions of each example a name, a word or a set of patches stands for."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image_layout import ImageLayout, View
from vlm_mech.inputs.span_kinds import Each, OneImage, Patches, Positions, Span, Tokens, Words, settled

if TYPE_CHECKING:
    import torch

LLM_SPANS = ("all", "system", "image", "separator", "question", "answer_prompt", "last", "answer", "subject")
LLM_SPANS += ("subject_last",)
VISION_SPANS = ("all", "class", "image")
PROJECTOR_SPANS = ("image",)
ONE_BY_ONE = (Patches, Positions, Tokens)
"""Spans that name their tokens one by one."""
PLACES = ("llm", "vision", "projector.in", "projector.out")


with contextlib.suppress(AttributeError, TypeError):  # from Python 3.14 on a union has no text of its own
    Span.__doc__ = f"""Which positions of each example are meant: a name, an object, or a tuple of spans (their union).

    Names in the decoder: {", ".join(LLM_SPANS)}. In the vision tower: {", ".join(VISION_SPANS)}. At the projector:
    {", ".join(PROJECTOR_SPANS)}. Generated tokens: generated.

    Objects: Words("banana"), Patches(((2, 3),)), OneImage(1), Positions((4, 5)), Tokens((4, 5)), and Each((span, ...)),
    which gives every example a span of its own.
    """


def listed(names: str | Sequence[Any]) -> tuple[Any, ...]:
    """Names given one alone (`"image"`) or several together, as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)


def joined(names: str) -> Span:
    """The span that names joined by + stand for, as in `last+answer`."""
    return tuple(names.split("+")) if "+" in names else names


@dataclass(frozen=True, eq=False)
class Picture:
    """One image of a prompt: width and height as given, positions of its tokens in the prompt, and how it was cut.

    `extent` are the positions of everything the processor put in the placeholder's place, row ends and tags included.
    """

    size: tuple[int, int]
    positions: tuple[int, ...]
    extent: tuple[int, ...]
    layout: ImageLayout


@dataclass(frozen=True, eq=False)
class Row:
    """One example's tokens (padding included) and what is known of each position.

    `text` is the prompt as it was tokenized, placeholders expanded; `present` are the positions that are no padding;
    `offsets` gives each token's characters in `text`; `question` the question's. `answer` are the positions of the
    tokens of an answer that follows the prompt, without its last one; all else is about the prompt alone. `subject` are
    the characters of the words that the question is about, where the prompt names them.
    """

    tokens: tuple[str, ...]
    present: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    text: str
    question: tuple[int, int]
    images: tuple[Picture, ...]
    answer: tuple[int, ...] | None = None
    subject: tuple[int, int] | None = None

    def about(self, subject: str | None) -> "Row":
        """The row with these words of its question, which stand there once, as its subject."""
        if subject is None:
            return self
        start = self.text.index(subject, self.question[0])
        return dataclasses.replace(self, subject=(start, start + len(subject)))

    @property
    def beside_subject(self) -> tuple[int, ...]:
        """Positions of all tokens before the last that are none of the subject's."""
        own = {len(self.tokens) - 1} | (set() if self.subject is None else {*_covering(self, self.subject)})
        return tuple(position for position in self.present if position not in own)

    @property
    def image(self) -> tuple[int, ...]:
        """Positions of all image tokens."""
        return tuple(position for picture in self.images for position in picture.positions)


@dataclass(frozen=True, eq=False)
class Cells:
    """Flat (row, position) pairs of a span over a batch, and how many belong to each example."""

    rows: "torch.Tensor"
    positions: "torch.Tensor"
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def by_row(self) -> dict[int, tuple[int, ...]]:
        """Positions of each row that has any."""
        found: dict[int, list[int]] = {}
        for row, position in zip(self.rows.tolist(), self.positions.tolist(), strict=True):
            found.setdefault(row, []).append(position)
        return {row: tuple(positions) for row, positions in found.items()}


Cell = tuple[int, int]


def resolve(row: Row, span: Span, place: str, example: int) -> tuple[Cell, ...]:
    """Sorted (row, position) cells of the span in one example.

    Args:
        place: `llm` for positions in the prompt (the row is the example's), `vision` for the tower's rows and
            positions, `projector.in` and `projector.out` for those of the projector.
        example: number of the example.

    Raises:
        UsageError: nothing matches, or a sub-string matches more than once; the tokens are printed.
    """
    return tuple(sorted(set(_cells(row, span, place, example))))


def resolve_in_order(row: Row, span: Span, place: str, example: int) -> tuple[Cell, ...]:
    """The span's cells in the order in which it gives them; those of a whole image or of words are sorted.

    Raises:
        UsageError: as for `resolve`, or a token is named twice, so that its place in the order is not known.
    """
    if isinstance(span, Each):
        span = span.spans[example]
    given = []
    for part in span if isinstance(span, tuple) else (span,):
        cells = _cells(row, part, place, example)
        given += cells if isinstance(part, ONE_BY_ONE) else sorted(set(cells))
    once = tuple(dict.fromkeys(given))
    if len(once) < len(given) and once != tuple(sorted(once)):
        raise UsageError(f"span {span!r} names a token of example {example} twice, so its order is not known")
    return once


def in_order(span: Span, other: Span) -> bool:
    """Whether two spans pair their tokens in the order given: both name tokens one by one, or whole images or words.

    Other pairs of spans, with names such as `image` in them, pair the tokens from the first to the last.
    """
    kinds = _kinds(span) | _kinds(other)
    return kinds <= set(ONE_BY_ONE) or kinds <= {OneImage, Words}


def _kinds(span: Span) -> set[type]:
    if isinstance(span, Each | tuple):
        return {kind for part in (span.spans if isinstance(span, Each) else span) for kind in _kinds(part)}
    return {type(span)}


def _cells(row: Row, span: Span, place: str, example: int) -> Sequence[Cell]:
    """The cells of a span in the order in which it gives them."""
    if isinstance(span, Each):
        span = span.spans[example]
    if isinstance(span, Positions):
        return _numbered(row, span, place, example)
    if isinstance(span, tuple):
        return [cell for part in span for cell in _cells(row, part, place, example)]
    if place == "llm":
        cells = [(example, position) for position in _in_prompt(row, span, example)]
    else:
        cells = _in_tower(row, span, place, example)
    # Of an answer of one token the model is given none, since nothing comes after it.
    if not cells and (span != "answer" or row.answer is None):
        why = ", which no answer follows" if span == "answer" else ""
        why = ", whose prompt names no subject" if span in ("subject", "subject_last") else why
        raise UsageError(f"span {span!r} is empty in example {example}{why}; its tokens: {shown(row)}")
    return cells


def _in_prompt(row: Row, span: Span, example: int) -> Sequence[int]:
    if isinstance(span, Patches):
        picture, view = _view(row, span, example)
        return [picture.positions[view.slots[number]] for number in _numbers(view, span)]
    if isinstance(span, OneImage):
        picture = _picture(row, span.image, example)
        slots = range(len(picture.positions)) if span.view is None else _view(row, span, example)[1].slots
        return [picture.positions[slot] for slot in slots]
    if isinstance(span, Words):
        return _words(row, span, example)
    if isinstance(span, Tokens):
        return _of_numbers(row, span, example)
    question, image = set(_covering(row, row.question)), set(row.image)
    named_already = question | image
    subject = [] if row.subject is None else _covering(row, row.subject)
    extent = {position for picture in row.images for position in picture.extent}
    first, last = min(extent | image | question), max(extent | image | question)
    named = {
        "all": row.present,
        "system": [position for position in row.present if position < first],
        "image": row.image,
        "separator": [
            position
            for position in (row.present if row.images else ())
            if first <= position <= last and position not in named_already
        ],
        "question": sorted(question),
        "answer_prompt": [position for position in row.present if position > last],
        "last": (len(row.tokens) - 1,),
        "answer": row.answer or (),
        "subject": subject,
        "subject_last": subject[-1:],
    }
    return _named(named, span)


def _of_numbers(row: Row, span: Tokens, example: int) -> list[int]:
    outside = [number for number in span.numbers if not 0 <= number < len(row.present)]
    if outside:
        raise UsageError(f"{span!r} does not fit example {example}: its tokens are 0..{len(row.present) - 1}")
    return [row.present[number] for number in span.numbers]


def _in_tower(row: Row, span: Span, place: str, example: int) -> Sequence[Cell]:
    if not row.images:
        raise UsageError(f"example {example} has no image, so it has no {place} positions")
    if isinstance(span, Patches):
        _, view = _view(row, span, example)
        return _of_view(row, span.image, view, place, _numbers(view, span))
    if isinstance(span, OneImage):
        picture = _picture(row, span.image, example)
        if span.view is None:
            return _of_image(picture.layout, place)
        _, view = _view(row, span, example)
        return _of_view(row, span.image, view, place, range(len(view.slots)))
    layouts = [picture.layout for picture in row.images]
    image = [cell for layout in layouts for cell in _of_image(layout, place)]
    named = {"image": image}
    if place == "vision":
        of_class = [cell for layout in layouts for cell in _pairs(layout.class_cells)]
        named |= {"class": of_class, "all": of_class + image}
    return _named(named, span)


def _pairs(cells: np.ndarray) -> list[Cell]:
    return [(int(row), int(position)) for row, position in cells.reshape(-1, 2) if row >= 0]


def _of_image(layout: ImageLayout, place: str) -> list[Cell]:
    if place == "vision":
        return [cell for tile in layout.tiles for cell in _pairs(tile.cells)]
    return _pairs(layout.taken if place == "projector.in" else layout.given)


def _of_view(row: Row, image: int, view: View, place: str, numbers: Sequence[int]) -> list[Cell]:
    patches = _pairs(view.patches[list(numbers)])
    if place == "vision":
        return patches
    layout = row.images[image].layout
    if place == "projector.in" and layout.taken is not layout.given:
        in_tower = np.concatenate([tile.cells for tile in layout.tiles])
        taken = dict(zip(_pairs(in_tower), _pairs(layout.taken), strict=True))
        return [taken[patch] for patch in patches]
    given = view.given[list(numbers)]
    if (given < 0).any():
        raise UsageError(
            f"view {view.name!r} mixes several outputs of the projector into one token; choose the span "
            "OneImage(...) there, or patches in the tower or the decoder"
        )
    return _pairs(given)


def _numbered(row: Row, span: Positions, place: str, example: int) -> tuple[Cell, ...]:
    everything = resolve(row, "all" if place in ("llm", "vision") else "image", place, example)
    known = {position for _, position in everything}
    if set(span.positions) - known or not span.positions:
        first, last = min(known), max(known)
        raise UsageError(f"{span!r} does not fit example {example}: its {place} positions are {first}..{last}")
    found: dict[int, list[Cell]] = {}
    for cell in everything:
        found.setdefault(cell[1], []).append(cell)
    return tuple(cell for position in span.positions for cell in found[position])


def _named(named: dict[str, Any], span: Span) -> Any:
    if not isinstance(span, str) or span not in named:
        raise UsageError(f"span {span!r} is not known here; named spans: {', '.join(named)}")
    return named[span]


def _covering(row: Row, characters: tuple[int, int]) -> list[int]:
    """Positions whose characters overlap the range."""
    start, end = characters
    return [
        position
        for position in row.present
        if row.offsets[position][0] < end and row.offsets[position][1] > max(start, row.offsets[position][0])
    ]


def _words(row: Row, span: Words, example: int) -> list[int]:
    start, end = row.question
    question = row.text[start:end]
    found = sum(question.startswith(span.text, at) for at in range(len(question))) if span.text else 0
    if found != 1:
        raise UsageError(
            f"{span.text!r} occurs {found} times in the question of example {example}, once is needed; "
            f"its tokens: {shown(row)}"
        )
    left = start + question.index(span.text)
    return _covering(row, (left, left + len(span.text)))


def _picture(row: Row, image: int, example: int) -> Picture:
    if not 0 <= image < len(row.images):
        raise UsageError(f"image {image} was requested, but example {example} has {len(row.images)} image(s)")
    return row.images[image]


def _view(row: Row, span: Patches | OneImage, example: int) -> tuple[Picture, View]:
    picture = _picture(row, span.image, example)
    views = picture.layout.views
    if not views:
        raise UsageError("the image tokens of this model are learned queries over the whole image, not patches")
    if span.view is None or not -len(views) <= span.view < len(views):
        raise UsageError(f"view {span.view} is not there; views: {', '.join(view.name for view in views)}")
    return picture, views[span.view]


def _numbers(view: View, span: Patches) -> list[int]:
    n_rows, n_columns = view.grid
    for cell in span.cells:
        if not (0 <= cell[0] < n_rows and 0 <= cell[1] < n_columns):
            raise UsageError(f"patch {cell} is outside the grid of {n_rows} rows x {n_columns} columns")
    return [row * n_columns + column for row, column in span.cells]


def shown(row: Row) -> str:
    """The tokens of a row on one line, runs of the same token folded."""
    tokens = [row.tokens[position] for position in row.present]
    runs = [(token, len(list(run))) for token, run in itertools.groupby(tokens)]
    return " ".join(repr(token) if length == 1 else f"{token!r} x {length}" for token, length in runs)


def whole_images(row: Row, span: Span, example: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of the views that a span of an example holds all of by name, without naming their tokens."""
    if isinstance(span, Each):
        span = span.spans[example]
    if isinstance(span, tuple):
        return tuple(grid for part in span for grid in whole_images(row, part, example))
    if isinstance(span, OneImage):
        views = _picture(row, span.image, example).layout.views
        return tuple(view.grid for view in (views if span.view is None else (_view(row, span, example)[1],)))
    pictures = row.images if span in ("image", "all") else ()
    return tuple(view.grid for picture in pictures for view in picture.layout.views)


def flatten(rows: Sequence[Row], span: Span, place: str, *, ordered: bool = False) -> Cells:
    """The span's cells in every example, as flat index tensors into rows x pos of that place.

    Args:
        ordered: in the order in which the span gives them, instead of sorted.
    """
    span = settled(span)
    if isinstance(span, Each) and len(span.spans) != len(rows):
        raise UsageError(f"Each gives {len(span.spans)} spans for a batch of {len(rows)} examples")
    if place not in PLACES:
        raise UsageError(f"place {place!r} is not known; use one of {', '.join(PLACES)}")
    resolved = resolve_in_order if ordered else resolve
    return cells_of([resolved(row, span, place, example) for example, row in enumerate(rows)])


def cells_of(found: Sequence[Sequence[Cell]]) -> Cells:
    """The cells of every example as flat index tensors."""
    import torch

    cells = torch.tensor([cell for each in found for cell in each], dtype=torch.long).reshape(-1, 2)
    return Cells(cells[:, 0], cells[:, 1], tuple(len(each) for each in found))
