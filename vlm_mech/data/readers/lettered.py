"""Questions whose options have letters and stand in the text, a line each or all in one."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_mech.data.readers.format import Table
from vlm_mech.data.readers.single import LETTERS, chosen, each_row, text
from vlm_mech.data.user_files import Row, Rows

AT_LINES = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[).:])(?=\s|\w)", re.MULTILINE)
IN_BRACKETS = re.compile(r"(?<!\w)\(([A-Z])\)(?=\s|\w|\Z)")
BEFORE_MARKS = re.compile(r"(?<![\w.])([A-Z])[).:](?=\s|\Z)")
ASKING = re.compile(
    r"(?:(?<=\s)|^)(?:Please )?(?:answer|choose|select|pick|reply|respond|give|write)\b[^\n?]*"
    r"(?:\b(?:letters?|options?|choices?)\b|\b[A-Z], [A-Z]\b|\b[A-Z] or [A-Z]\b)[^\n?]*\s*\Z",
    re.IGNORECASE,
)
"""What ends a text by saying how to answer, such as "Choose A, B, C, or D."."""
ENDS = re.compile(r"(?:[?.:!]|\A)\s*\Z")
"""What ends before options with bare letters in one line; elsewhere `plan A. or B.` may be a part of the question."""
MOST = 4


@dataclass(frozen=True)
class Parted:
    """A question alone, and its options by letter; `certain` is False where letters stand in a text that is kept."""

    question: str
    options: dict[str, str]
    certain: bool = True


def parted(asked: str) -> Parted:
    """A question without the options that stand in its text, and without what says how to answer.

    Options may stand a line each, lines that follow one belonging to it, or in one line; their letters are A, B, ... in
    turn. Where they cannot be told from the text with certainty, it is as it was.
    """
    told = ASKING.search(asked)
    body = asked[: told.start()] if told else asked
    lines = list(AT_LINES.finditer(body))
    inline = [list(each.finditer(body)) for each in (IN_BRACKETS, BEFORE_MARKS)]
    for marks in (lines, *inline):
        found = _between(body, marks)
        if found is None or (marks is inline[1] and not ENDS.search(body[: marks[0].start()])):
            continue
        question, options = found
        # A letter that is next in turn, within the last option, begins one more.
        following = LETTERS[len(options)]
        if any(each in options[LETTERS[len(options) - 1]] for each in (f"({following})", f" {following}. ")):
            continue
        if _ends_plainly(body, marks):
            return Parted(question, options)
    return Parted(asked, {}, certain=max(len(marks) for marks in (lines, *inline)) < 2)


def _letter(mark: re.Match[str]) -> str:
    return next(each for each in mark.groups() if each)


def _between(body: str, marks: Sequence[re.Match[str]]) -> tuple[str, dict[str, str]] | None:
    """What stands before and between marks, if their letters are A, B, ... in turn and each has a text of its own."""
    letters = [_letter(each) for each in marks]
    if not 2 <= len(letters) < len(LETTERS) or letters != list(LETTERS[: len(letters)]):
        return None
    ends = [*(each.start() for each in marks[1:]), len(body)]
    texts = [_one_line(body[each.end() : end]) for each, end in zip(marks, ends, strict=True)]
    question = body[: marks[0].start()].strip()
    if not question or not all(texts) or len(set(texts)) < len(texts):
        return None
    return question, dict(zip(letters, texts, strict=True))


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.split("\n") if line.strip())


def _ends_plainly(body: str, marks: Sequence[re.Match[str]]) -> bool:
    """Whether nothing stands below the last option, parted from it by an empty line."""
    return not re.search(r"\n[ \t\r]*\n", body[marks[-1].end() :].strip())


def lettered_rows(
    tables: Sequence[Table],
    more: Callable[[Row, Any, Table], dict[str, Any]],
    *folders: str,
    id_column: str = "",
) -> Rows:
    """The items of rows with `image`, `text` and a letter in `label`.

    Where the text has no options the letter is the answer and the text the question; so it is where they cannot be told
    from it, which is noted.

    Args:
        more: further fields of an item, from its row and its picture.
        folders: where the layout has pictures (`Table.picture`).
    """
    kept: list[str] = []

    def fields(row: Row, table: Table) -> dict[str, Any]:
        found, picture = parted(text(row, "text")), table.picture(row.fields.get("image"), *folders)
        said = chosen(row, "label", found.options) if found.options else {"answer": text(row, "label")}
        made = {"image": picture, "question": found.question} | said | more(row, picture, table)
        if not found.certain:
            kept.append(row.place)
        return made

    rows = each_row(tables, fields, id_column=id_column)
    if not kept:
        return rows
    places = f"{', '.join(kept[:MOST])}{f' and {len(kept) - MOST} more' if len(kept) > MOST else ''}"
    told = f"options cannot be told from the text of {places}; it is the question as it stands, the letter the answer"
    return dataclasses.replace(rows, notes=(*rows.notes, told))


def has_letter(table: Table) -> bool:
    """Whether the label of its first row is a letter."""
    return str(table.first.get("label", "")).strip().strip("().").upper() in list(LETTERS)
