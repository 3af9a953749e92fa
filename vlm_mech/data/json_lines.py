"""Files of JSON lines: an object a line, of which one is in memory at a time, however large the file is."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_mech.data.text_files import opened_text
from vlm_mech.data.user_files import Later, Refused, Row, Rows, id_of
from vlm_mech.errors import UsageError

BOM = b"\xef\xbb\xbf"


def read_rows(path: Path, what: str) -> Rows:
    """Every object of a file that holds one a line (see `lines_of`); it is read again when it is used.

    Args:
        what: what the file is called where it cannot be read.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    heads, refused = list[Row](), dict[int, Refused]()
    starts, named = dict[int, int](), set[str]()
    for number, start, each in lines_of(path, what):
        if isinstance(each, Refused):
            refused[number] = each
            continue
        has_id = each.fields.get("id") is not None
        named |= {each.id} if has_id else set()
        starts[number] = start
        heads.append(dataclasses.replace(each, fields={"id": each.id} if has_id else {}))
    # One that is called by its number, which another gives as its id, is called `line 2` instead.
    heads = [
        dataclasses.replace(head, fields={}, id=head.id if head.fields or head.id not in named else f"line {head.line}")
        for head in heads
    ]

    def fields_of(head: Row) -> dict[str, Any]:
        with opened_text(path) as file:
            file.seek(starts[head.line])
            return object_of(file.readline().removeprefix(BOM))

    return Rows(Later(heads, fields_of), refused)


def lines_of(path: Path, what: str) -> Iterator[tuple[int, int, Row | Refused]]:
    """The objects of a file in turn, each with the number of its line and the byte at which that begins.

    Empty lines do not count. Lines end at a line feed alone, which a carriage return may precede: other signs that end
    lines, such as U+2028, may stand within a JSON text. What is no object is refused.

    Args:
        what: what the file is called where it cannot be read.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    empty, start = True, 0
    try:
        with opened_text(path) as file:
            for number, line in enumerate(file, 1):
                begins, start = start, start + len(line)
                bare = line.removeprefix(BOM) if number == 1 else line
                if not bare.strip():
                    continue
                empty = False
                try:
                    fields = object_of(bare)
                    yield number, begins, Row(number, id_of(fields, number), fields)
                except UsageError as error:
                    yield number, begins, Refused(str(number), f"line {number} {error}")
    except (OSError, UsageError) as error:
        raise UsageError(f"{what} {str(path)!r} cannot be read: {error}") from error
    if empty:
        raise UsageError(f"{what} {str(path)!r} is empty")


def object_of(line: bytes) -> dict[str, Any]:
    """The object that a line of JSON lines holds.

    Raises:
        UsageError: it is not UTF-8, not JSON, no object, or one that names a field twice.
    """
    try:
        fields = json.loads(line.decode(), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise UsageError(f"is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"is a {type(fields).__name__}; an object is needed")
    if isinstance(fields, Twice):
        raise UsageError(fields.told)
    return fields


class Twice(dict[str, Any]):
    """An object of JSON that names a field twice, of which JSON keeps the last alone."""

    told = ""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields; a `Twice` where one is named twice."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    odd = Twice(fields)
    odd.told = f"names {next(name for name in names if names.count(name) > 1)!r:.60} twice"
    return odd
