"""JSON lists and JSON lines in turn, a value in memory at a time, however large the file is."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_mech.errors import UsageError

PIECE = 1 << 20
"""Bytes that are read at once."""
SPACE = " \t\n\r"
LARGEST = 1 << 28
"""Characters of one value; what has more is no list of rows."""


def values(path: Path, *, piece: int = PIECE) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list, or of JSON lines, each with the place where it stands, such as `x.json row 3`.

    A line that is no JSON is handed out as a `ValueError`, with which the next one can still be read.

    Args:
        piece: bytes that are read at once.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or is no JSON; the place is told.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
        yield from _listed(path, piece) if begin.startswith(b"[") else _lines(path)
    except OSError as error:
        raise UsageError(f"file {str(path)!r} cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            bare = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not bare.strip():
                continue
            place = f"{path.name} row {number}"
            try:
                yield place, json.loads(bare.decode())
            except (ValueError, RecursionError) as error:
                yield place, ValueError(f"it is not JSON: {error}")


class _Text:
    """The text of a file from some place on, of which more is read when it is needed."""

    def __init__(self, path: Path, piece: int) -> None:
        self._pieces, self._decoder = path.open("rb"), codecs.getincrementaldecoder("utf-8-sig")()
        self._path, self._size = path, piece
        self.text, self.at, self.ended = "", 0, False

    def close(self) -> None:
        self._pieces.close()

    def more(self) -> None:
        """Reads on; a value that did not end takes twice as much each time, so that no text is read over often."""
        wanted = max(self._size, len(self.text) - self.at)
        read = self._pieces.read(wanted)
        self.ended = len(read) < wanted
        try:
            self.text, self.at = self.text[self.at :] + self._decoder.decode(read, self.ended), 0
        except UnicodeDecodeError as error:
            raise UsageError(f"file {str(self._path)!r} is not UTF-8: {error}") from error

    def next(self) -> str:
        """The next character that is no space, which stays; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def _listed(path: Path, piece: int) -> Iterator[tuple[str, Any]]:
    held, decoder, number = _Text(path, piece), json.JSONDecoder(), 0
    try:
        held.next()
        held.at += 1
        if held.next() == "]":
            return
        while True:
            number += 1
            place = f"{path.name} row {number}"
            held.next()
            yield place, _value(held, decoder, path, place)
            sign = held.next()
            held.at += 1
            if sign == "]":
                return
            if sign != ",":
                told = f"{sign!r} follows {place}" if sign else f"it ends after {place}"
                raise UsageError(f"file {str(path)!r} cannot be read: {told}; a comma or a ] is needed")
    finally:
        held.close()


def _value(held: _Text, decoder: json.JSONDecoder, path: Path, place: str) -> Any:
    """The value that begins here; a number may go on in the next piece, so what ends the text is read again."""
    while True:
        try:
            value, end = decoder.raw_decode(held.text, held.at)
        except (ValueError, RecursionError) as error:
            if held.ended or isinstance(error, RecursionError) or len(held.text) - held.at > LARGEST:
                raise UsageError(f"file {str(path)!r} cannot be read at {place}: {error}") from error
        else:
            if end < len(held.text) or held.ended:
                held.at = end
                return value
        held.more()
