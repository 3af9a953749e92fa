"""Training text as the texts in which a class counts once: LLaVA's conversations, files and folders of text."""

import re
from collections.abc import Iterator
from pathlib import Path

from vlm_mech.behaviour.classify.frequency import Rule
from vlm_mech.data.image_classes import check_names
from vlm_mech.data.readers.llava import Entry
from vlm_mech.data.readers.registry import is_file, named
from vlm_mech.data.training_text import entries
from vlm_mech.errors import UsageError

SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
TEXTS = (".txt", ".text", ".md")
"""What files of text are called in a folder."""


def texts(source: str, rule: Rule) -> Iterator[str]:
    """The texts of a source in its order, one in memory at a time.

    `contiguous` (the paper's): the sentences of each turn or line. `together`: each question with its answer, or each
    line as a whole. Sentences end at . ! or ? before a space, and at line breaks.

    Raises:
        UsageError: no such source, or one that cannot be read.
    """
    for text in _wholes(source, by_turn=rule == "contiguous"):
        if rule == "contiguous":
            yield from (part for part in SENTENCE.split(text) if part.strip())
        else:
            yield text


def _wholes(source: str, *, by_turn: bool) -> Iterator[str]:
    if named(source)[0] is not None:
        for each in entries(source):
            if isinstance(each, Entry):
                yield from (text for _, text in each.turns) if by_turn else exchanges(each)
        return
    for path in _files(Path(source)):
        yield from _lines(path)


def exchanges(entry: Entry) -> Iterator[str]:
    """Each turn of the assistant after what was said since the one before."""
    said: list[str] = []
    for who, text in entry.turns:
        said.append(text)
        if who != "human":
            yield " ".join(said)
            said = []
    if said:
        yield " ".join(said)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.suffix.lower() in TEXTS and each.is_file())
        if not found:
            raise UsageError(f"folder {str(path)!r} holds no text; files called *{', *'.join(TEXTS)} are read")
        return found
    if not is_file(path):
        raise UsageError(f"text {str(path)!r} is neither a file, nor a folder of texts, nor llava:FILE")
    return [path]


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.strip() for line in file if line.strip())
    except (OSError, ValueError) as error:
        raise UsageError(f"text {str(path)!r} cannot be read: {error}") from error


def names_in(path: Path) -> tuple[str, ...]:
    """The class names of a file, one a line; empty lines do not count.

    Raises:
        UsageError: it cannot be read, or two names are the same words.
    """
    found = tuple(line.strip() for line in _lines(path))
    check_names(found)
    return found
