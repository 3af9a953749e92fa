"""What a span can be: a name, words, patches, an image, numbers, one for each example, or several of these together.

What is wrong with a span whatever the prompt is found where it is made. Lists are taken for tuples.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Union

from vlm_mech.errors import UsageError


@dataclass(frozen=True)
class Words:
    """The tokens of a sub-string of the question, which must occur in it exactly once."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UsageError(f"Words({self.text!r:.60}) is given a {type(self.text).__name__}; a text is needed")


@dataclass(frozen=True)
class Patches:
    """Image tokens by (row, column) in the grid of one view of one image (in most families an image has one view).

    In the tower and at the projector's input they mean the patches that those tokens are made from.
    """

    cells: tuple[tuple[int, int], ...]
    image: int = 0
    view: int = 0

    def __post_init__(self) -> None:
        needed = "pairs of a row and a column are needed, such as Patches(((0, 0), (0, 1)))"
        cells = tuple(_numbers("a cell of Patches", each, needed) for each in _listed("Patches", self.cells, needed))
        wrong = next((each for each in cells if len(each) != 2), None)
        if wrong is not None:
            raise UsageError(f"a cell of Patches is {wrong!r:.60}; {needed}")
        object.__setattr__(self, "cells", cells)


@dataclass(frozen=True)
class OneImage:
    """All tokens of one image of the prompt, or of one of its views."""

    image: int = 0
    view: int | None = None


@dataclass(frozen=True)
class Positions:
    """Positions as numbers in the padded row (the escape hatch: no check can tell what they mean)."""

    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        found = _numbers("Positions", self.positions, "whole numbers are needed, such as Positions((3, 4))")
        object.__setattr__(self, "positions", found)


@dataclass(frozen=True)
class Tokens:
    """Tokens of the prompt by number, padding not counted (another escape hatch, the same in every batch)."""

    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        found = _numbers("Tokens", self.numbers, "whole numbers are needed, such as Tokens((3, 4))")
        object.__setattr__(self, "numbers", found)


@dataclass(frozen=True)
class Each:
    """A span of its own for every example of the batch."""

    spans: tuple["Span", ...]

    def __post_init__(self) -> None:
        needed = "a span for each example is needed, such as Each((Words('cat'), Words('dog')))"
        spans = tuple(settled(each) for each in _listed("Each", self.spans, needed))
        if not spans or any(isinstance(each, Each) for each in spans):
            raise UsageError(f"Each of {'another Each' if spans else 'no span'} was given; {needed}")
        object.__setattr__(self, "spans", spans)


Span = Union[str, Words, Patches, OneImage, Positions, Tokens, Each, tuple["Span", ...]]  # noqa: UP007 - refers to itself
"""A named span, `Words`, `Patches`, `OneImage`, `Positions`, `Tokens`, `Each`, or a tuple of spans: their union."""


def settled(span: Any) -> Span:
    """The span in its plain form: lists are tuples, no tuple holds another, and an `Each` stands outermost.

    So whoever cuts an `Each` down to some examples has cut the whole span.

    Raises:
        UsageError: it is no span, or one of nothing.
    """
    if isinstance(span, str | Words | Patches | OneImage | Positions | Tokens | Each):
        return span
    if not isinstance(span, tuple | list):
        raise UsageError(
            f"{span!r:.60} is not a span; a name such as 'image', Words, Patches, OneImage, Positions, Tokens, Each "
            "are, and a tuple of them"
        )
    parts: list[Span] = []
    for part in map(settled, span):
        parts += part if isinstance(part, tuple) else (part,)
    if not parts:
        raise UsageError("an empty tuple is not a span: it names no token")
    lengths = {len(part.spans) for part in parts if isinstance(part, Each)}
    if len(lengths) > 1:
        raise UsageError(f"Each gives spans for {' and for '.join(map(str, sorted(lengths)))} examples in one span")
    if not lengths:
        return tuple(parts)
    return Each(
        tuple(
            tuple(part.spans[example] if isinstance(part, Each) else part for part in parts)
            for example in range(lengths.pop())
        )
    )


def _listed(what: str, given: Any, needed: str) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UsageError(f"{what} is given {given!r:.60}; {needed}")
    return tuple(given)


def _numbers(what: str, given: Any, needed: str) -> tuple[Any, ...]:
    """Whole numbers as a tuple, whatever holds them."""
    found = _listed(what, given, needed)
    if not all(isinstance(each, Integral) and not isinstance(each, bool) for each in found):
        raise UsageError(f"{what} is given {given!r:.60}; {needed}")
    return tuple(int(each) for each in found)
