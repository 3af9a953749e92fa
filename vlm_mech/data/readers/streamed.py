"""JSON lists and JSON lines in turn, a value in memory at a time, however large the file is."""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlm_mech.data.text_files import not_utf8, opened_text
from vlm_mech.errors import UsageError

PIECE = 1 << 20
"""Bytes that are read at once."""
SPACE = " \t\n\r"
LARGEST = 1 << 28
"""Characters of one value; what has more is not a list of rows."""


def values(path: Path, *, piece: int = PIECE) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list, or of JSON lines, each with the place where it stands, such as `x.json row 3`.

    A line that is no JSON is handed out as a `ValueError`, with which the next one can still be read.

    Args:
        piece: bytes that are read at once.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or is no JSON; the place is told.
    """
    try:
        with opened_text(path) as file:
            numbered = enumerate(listed(file, piece=piece), 1) if is_list(file) else _lines(file)
            for number, value in numbered:
                yield f"{path.name} row {number}", value
    except (OSError, UsageError) as error:
        raise UsageError(f"file {str(path)!r} cannot be read: {error}") from error


def is_list(file: io.BufferedIOBase) -> bool:
    """Whether a file begins with a bracket; it is then read from its beginning again."""
    begin = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return begin.startswith(b"[")


def listed(
    file: io.BufferedIOBase, *, piece: int = PIECE, hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Iterator[Any]:
    """The values of a JSON list in turn.

    Args:
        piece: bytes that are read at once.
        hook: makes an object of its fields (`json.loads`); a dict by default.

    Raises:
        UsageError: it is not UTF-8, or from some row on no JSON list.
    """
    held, decoder, number = _Text(file, piece), json.JSONDecoder(object_pairs_hook=hook), 0
    held.next()
    held.at += 1
    if held.next() == "]":
        held.at += 1
    else:
        sign = ","
        while sign == ",":
            number += 1
            held.next()
            yield _value(held, decoder, number)
            sign = held.next()
            held.at += 1
        if sign != "]":
            told = f"{sign!r} follows row {number}" if sign else f"it ends after row {number}"
            raise UsageError(f"{told}; a comma or a ] is needed")
    if sign := held.next():
        raise UsageError(f"{sign!r} follows the end of its list; nothing may")


def _lines(file: io.BufferedIOBase) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        bare = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not bare.strip():
            continue
        try:
            yield number, json.loads(bare.decode())
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"it is not JSON: {error}")


class _Text:
    """The text of a file from some place on, of which more is read when it is needed."""

    def __init__(self, file: io.BufferedIOBase, piece: int) -> None:
        self._file, self._decoder, self._size = file, codecs.getincrementaldecoder("utf-8-sig")(), piece
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        """Reads on; a value that did not end takes twice as much each time, so that no text is read over often."""
        wanted = max(self._size, len(self.text) - self.at)
        read = self._file.read(wanted)
        self.ended = len(read) < wanted
        try:
            self.text, self.at = self.text[self.at :] + self._decoder.decode(read, self.ended), 0
        except UnicodeDecodeError as error:
            raise UsageError(not_utf8(error)) from error

    def next(self) -> str:
        """The next character that is no space, which stays; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def _value(held: _Text, decoder: json.JSONDecoder, number: int) -> Any:
    """The value that begins here; a number may go on in the next piece, so what ends the text is read again."""
    while True:
        try:
            value, end = decoder.raw_decode(held.text, held.at)
        except (ValueError, RecursionError) as error:
            if held.ended or isinstance(error, RecursionError) or len(held.text) - held.at > LARGEST:
                raise UsageError(f"it is not JSON at row {number}: {error}") from error
        else:
            if end < len(held.text) or held.ended:
                held.at = end
                return value
        held.more()
