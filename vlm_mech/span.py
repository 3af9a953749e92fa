"""Spans: which positions of each example a name, a word or a set of patches stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    import torch

LLM_SPANS = ("all", "system", "image", "question", "answer_prompt", "last")
VISION_SPANS = ("all", "class", "image")
PROJECTOR_SPANS = ("image",)


@dataclass(frozen=True)
class Words:
    """The tokens of a sub-string of the question, which must occur in it exactly once."""

    text: str


@dataclass(frozen=True)
class Patches:
    """Image tokens by (row, column) in the patch grid."""

    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Positions:
    """Positions as numbers in the padded row (the escape hatch: no check can tell what they mean)."""

    positions: tuple[int, ...]


@dataclass(frozen=True)
class Each:
    """A span of its own for every example of the batch."""

    spans: tuple["Span", ...]


Span = Union[str, Words, Patches, Positions, Each, tuple["Span", ...]]  # noqa: UP007 - refers to itself
"""A named span, `Words`, `Patches`, `Positions`, `Each`, or a tuple of spans meaning their union."""


@dataclass(frozen=True)
class Row:
    """One example's tokens (padding included) and what is known of each position.

    `offsets` gives each token's characters in `text`; `question` the question's; `image` the positions of the patch
    tokens in the decoder, row by row over `grid` (rows, columns).
    """

    tokens: tuple[str, ...]
    first: int
    offsets: tuple[tuple[int, int], ...]
    text: str
    question: tuple[int, int]
    image: tuple[int, ...]
    grid: tuple[int, int] | None
    n_class_tokens: int
    image_index: int | None


@dataclass(frozen=True, eq=False)
class Cells:
    """Flat (row, position) pairs of a span over a batch, and how many belong to each example."""

    rows: "torch.Tensor"
    positions: "torch.Tensor"
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)


def resolve(row: Row, span: Span, stream: str, example: int) -> tuple[int, ...]:
    """Sorted positions of the span in one example.

    Args:
        stream: `llm` for positions in the prompt, `vision` for positions in the tower (class tokens first),
            `projector` for patch numbers.
        example: number of the example, for `Each` and for error messages.

    Raises:
        UsageError: nothing matches, or a sub-string matches more than once; the tokens are printed.
    """
    if isinstance(span, Each):
        span = span.spans[example]
    if isinstance(span, Positions):
        return _numbered(row, span, stream, example)
    if isinstance(span, tuple):
        parts = {position for part in span for position in resolve(row, part, stream, example)}
        return tuple(sorted(parts))
    positions = _in_prompt(row, span, example) if stream == "llm" else _in_tower(row, span, stream, example)
    if not positions:
        raise UsageError(f"span {span!r} is empty in example {example}; its tokens: {_shown(row)}")
    return tuple(sorted(positions))


def _in_prompt(row: Row, span: Span, example: int) -> Sequence[int]:
    n_pos = len(row.tokens)
    if isinstance(span, Patches):
        return [row.image[number] for number in _numbers(row, span, example)]
    if isinstance(span, Words):
        return _words(row, span, example)
    named = {
        "all": range(row.first, n_pos),
        "system": range(row.first, min((*row.image, *_covering(row, row.question)))),
        "image": row.image,
        "question": _covering(row, row.question),
        "answer_prompt": range(max((*row.image, *_covering(row, row.question))) + 1, n_pos),
        "last": (n_pos - 1,),
    }
    return _named(named, span)


def _in_tower(row: Row, span: Span, stream: str, example: int) -> Sequence[int]:
    if row.grid is None:
        raise UsageError(f"example {example} has no image, so it has no {stream} positions")
    n_patches = row.grid[0] * row.grid[1]
    n_class = row.n_class_tokens if stream == "vision" else 0
    if isinstance(span, Patches):
        return [n_class + number for number in _numbers(row, span, example)]
    patches = range(n_class, n_class + n_patches)
    named = {"image": patches}
    if stream == "vision":
        named |= {"class": range(n_class), "all": range(n_class + n_patches)}
    return _named(named, span)


def _numbered(row: Row, span: Positions, stream: str, example: int) -> tuple[int, ...]:
    everything = resolve(row, "image" if stream == "projector" else "all", stream, example)
    outside = set(span.positions) - set(everything)
    if outside or not span.positions:
        first, last = everything[0], everything[-1]
        raise UsageError(f"{span!r} does not fit example {example}: its {stream} positions are {first}..{last}")
    return tuple(sorted(set(span.positions)))


def _named(named: dict[str, Sequence[int]], span: Span) -> Sequence[int]:
    if not isinstance(span, str) or span not in named:
        raise UsageError(f"span {span!r} is not known here; named spans: {', '.join(named)}")
    return named[span]


def _covering(row: Row, characters: tuple[int, int]) -> list[int]:
    """Positions whose characters overlap the range. Image tokens have characters of the placeholder only."""
    start, end = characters
    return [
        position
        for position, (left, right) in enumerate(row.offsets)
        if position >= row.first and left < end and right > start and right > left
    ]


def _words(row: Row, span: Words, example: int) -> list[int]:
    start, end = row.question
    question = row.text[start:end]
    found = question.count(span.text) if span.text else 0
    if found != 1:
        raise UsageError(
            f"{span.text!r} occurs {found} times in the question of example {example}, once is needed; "
            f"its tokens: {_shown(row)}"
        )
    left = start + question.index(span.text)
    return _covering(row, (left, left + len(span.text)))


def _numbers(row: Row, span: Patches, example: int) -> list[int]:
    if row.grid is None:
        raise UsageError(f"span {span!r} asks for patches, but example {example} has no image")
    n_rows, n_columns = row.grid
    for cell in span.cells:
        if not (0 <= cell[0] < n_rows and 0 <= cell[1] < n_columns):
            raise UsageError(f"patch {cell} is outside the grid of {n_rows} rows x {n_columns} columns")
    return [patch_row * n_columns + column for patch_row, column in span.cells]


def _shown(row: Row) -> str:
    """The tokens of a row on one line, runs of the same token folded."""
    shown: list[str] = []
    position = row.first
    while position < len(row.tokens):
        run = 1
        while position + run < len(row.tokens) and row.tokens[position + run] == row.tokens[position]:
            run += 1
        token = row.tokens[position]
        shown.append(repr(token) if run == 1 else f"{token!r} x {run}")
        position += run
    return " ".join(shown)


def flatten(rows: Sequence[Row], span: Span, stream: str) -> Cells:
    """The span's positions in every example, as flat index tensors into batch (or image) x pos."""
    import torch

    if isinstance(span, Each) and len(span.spans) != len(rows):
        raise UsageError(f"Each gives {len(span.spans)} spans for a batch of {len(rows)} examples")
    row_index, positions, counts = [], [], []
    for example, row in enumerate(rows):
        found = resolve(row, span, stream, example)
        index = example if stream == "llm" else row.image_index
        row_index += [index] * len(found)
        positions += found
        counts.append(len(found))
    return Cells(torch.tensor(row_index), torch.tensor(positions), tuple(counts))
