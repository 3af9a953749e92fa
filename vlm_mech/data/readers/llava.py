"""Training text in the format of LLaVA (arXiv 2304.08485): conversations, most of them about a picture.

It is neither pairs nor items (see `data.training_text`), and read in turn, an entry in memory at a time.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.streamed import values
from vlm_mech.data.user_files import Refused, Row, Rows
from vlm_mech.errors import UsageError

IMAGE = "<image>"
"""Stands in a turn for the picture."""
ASSISTANT = ("gpt", "assistant")
"""Who gives the answers."""
SIDES = re.compile(r"\b(?:(?:on|at) the (?:left|right)|to the left)\b", re.IGNORECASE)
"""The phrases by which arXiv 2411.05195 keeps entries about left and right; `to the right` is none of them there."""


@dataclass(frozen=True)
class Entry:
    """An entry of training text: its picture (None: it has none), and its turns as (who, text)."""

    id: str
    place: str
    image: Any
    turns: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """All turns, a line each."""
        return "\n".join(text for _, text in self.turns)

    @property
    def answers(self) -> tuple[str, ...]:
        """What the assistant says."""
        return tuple(text for who, text in self.turns if who in ASSISTANT)

    @property
    def names_a_side(self) -> bool:
        """Whether its text has one of the phrases of `SIDES`."""
        return SIDES.search(self.text) is not None


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The entries as a stream of rows with `image`, `turns` and `place`; entries that are none are left out."""
    found = (each for each in read_entries(tables) if isinstance(each, Entry))
    named = ({"image": each.image, "turns": list(each.turns)} for each in found)
    return Rows((Row(number, str(number), fields) for number, fields in enumerate(named, 1)), {})


def read_entries(tables: Sequence[Table]) -> Iterator[Entry | Refused]:
    """The entries of the files in their order; what is none is refused.

    Raises:
        UsageError: a file cannot be read.
    """
    for table in tables:
        for place, value in values(table.path):
            try:
                yield _entry(table, place, value)
            except UsageError as error:
                yield Refused(place, str(error))


def _entry(table: Table, place: str, value: Any) -> Entry:
    if isinstance(value, ValueError):
        raise UsageError(str(value))
    if not isinstance(value, dict):
        raise UsageError(f"it is a {type(value).__name__}; an object is needed")
    told = value.get("conversations")
    given = told if isinstance(told, list) and all(isinstance(turn, dict) for turn in told) else []
    turns = [(turn.get("from"), turn.get("value")) for turn in given]
    if not turns or not all(isinstance(who, str) and isinstance(text, str) for who, text in turns):
        raise UsageError(f"conversations is {told!r:.60}; a list of objects with the texts from and value is needed")
    image = value.get("image") or None
    if image is not None and not isinstance(image, str):
        raise UsageError(f"image is {image!r:.60}; the name of one picture is needed")
    parted = tuple((who, _tidied(text)) for who, text in turns)
    return Entry(str(value.get("id", place)), place, table.picture(image, "images"), parted)


def _tidied(text: str) -> str:
    """The text without the picture's place; lines stay, spaces are one and empty lines none."""
    lines = (" ".join(line.split()) for line in text.replace(IMAGE, " ").splitlines())
    return "\n".join(line for line in lines if line)


FORMAT = Format(
    name="llava",
    holds="text",
    columns=("conversations",),
    rows=rows,
    layout="JSON list (of any length: it is read in turn) or JSON lines with `id`, `image` (a path from the folder, or "
    "from `images/` in it; lacking where there is no picture) and `conversations`, a list of objects with `from` "
    "(human or gpt) and `value`",
    becomes="training text: `contrastive_tuning --train` takes it as pictures with captions, `frequency` counts class "
    "names in it; `<image>` is taken out of the turns",
    fits=lambda table: isinstance(table.first.get("conversations"), list),
)
