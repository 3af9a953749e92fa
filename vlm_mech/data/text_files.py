"""Text files as UTF-8: with a byte order mark or without, also those that a mark says to be UTF-16 or UTF-32."""

import codecs
import functools
import io
from pathlib import Path

from vlm_mech.errors import UsageError

WIDE = {  # the first of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD = 1 << 10
"""Bytes in which a zero says that a file is not UTF-8 text."""


def opened_text(path: Path) -> io.BufferedIOBase:
    """The bytes of a text file as UTF-8; a mark of UTF-8 stays, and what is UTF-16 or UTF-32 is in memory as a whole.

    Raises:
        OSError: the file cannot be read.
        UsageError: it is UTF-16 without a mark, or no text.
    """
    file = path.open("rb")
    head = file.read(HEAD)
    coding = next((coding for mark, coding in WIDE.items() if head.startswith(mark)), "")
    if not coding and b"\0" not in head:
        file.seek(0)
        return file
    file.close()
    if not coding:
        raise UsageError("it is not UTF-8 text (it holds zero bytes); save it as UTF-8")
    told = path.stat()
    return io.BytesIO(_recoded(path, coding, told.st_mtime_ns, told.st_size))


@functools.lru_cache(maxsize=2)
def _recoded(path: Path, coding: str, changed: int, size: int) -> bytes:
    """The file as UTF-8, kept as long as it does not change, since pictures in its cells are read one by one."""
    try:
        return path.read_bytes().decode(coding).encode()
    except UnicodeDecodeError as error:
        raise UsageError(f"it is no {coding.upper()}, as which it is marked: {error}") from error


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with a text that is not UTF-8, and what would be right."""
    return f"it is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
