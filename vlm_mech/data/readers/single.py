"""Tables each row of which is an item, and options that have letters."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_mech.data.readers.format import Collector, Table
from vlm_mech.data.readers.tables import read
from vlm_mech.data.user_files import Refused, Row, Rows
from vlm_mech.errors import UsageError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPTION = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*?)[ \t\r]*$", re.MULTILINE)


def each_row(
    tables: Sequence[Table],
    fields: Callable[[Row, Table], dict[str, Any]],
    *,
    id_column: str = "",
    held: Sequence[str] = (),
) -> Rows:
    """The rows of the tables as items.

    An item is called as a column says, or by the number of its row; of several tables the name of the file comes first.

    Args:
        fields: the fields of a row's item; raises `UsageError` where there is none.
        held: columns whose pictures stay in the file.
    """
    found = Collector()
    for table in tables:
        for row in read(table, held):
            told = None if isinstance(row, Refused) else row.fields.get(id_column)
            name = row.id if told is None or told == "" else str(told)
            name = f"{table.path.stem}/{name}" if len(tables) > 1 else name
            try:
                if isinstance(row, Refused):
                    raise UsageError(row.reason)
                found.keep(row.place, name, fields(row, table))
            except UsageError as error:
                found.refuse(name, error)
            except KeyError as error:
                found.refuse(name, f"{row.id}: it has no {error.args[0]}")
    return found.found


def text(row: Row, column: str) -> str:
    """What a cell says.

    Raises:
        UsageError: it is empty, or no text.
    """
    given = row.fields.get(column)
    if not isinstance(given, str) or not given.strip():
        raise UsageError(f"{row.place}: {column} is {given!r:.60}; a non-empty text is needed")
    return given.strip()


def chosen(row: Row, column: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Options and answer of a row whose right letter stands in a column.

    Args:
        options: texts by letter.

    Raises:
        UsageError: no option has that letter.
    """
    given = row.fields.get(column)
    letter = str(given or "").strip().strip("().").upper()
    if letter not in options:
        raise UsageError(f"{row.place}: {column} is {given!r:.60}, which is none of {', '.join(options)}")
    return {"options": list(options.values()), "answer": options[letter]}


def parted(asked: str) -> tuple[str, dict[str, str]]:
    """A question whose options stand below it, a line each, as the question alone and its options by letter.

    What follows the options is left out. None where the letters are not A, B, ... in turn.
    """
    lines = list(OPTION.finditer(asked))
    letters = [each[1] for each in lines]
    if len(letters) < 2 or letters != list(LETTERS[: len(letters)]):
        return asked, {}
    return asked[: lines[0].start()].strip(), {each[1]: each[2] for each in lines}


def lettered_item(row: Row, table: Table, *folders: str) -> dict[str, Any]:
    """The item of a row with `image`, `text` and a letter in `label`.

    Where the text has no option a line, the letter is the answer and the text the question.
    """
    question, options = parted(text(row, "text"))
    fields = {"image": table.picture(row.fields.get("image"), *folders), "question": question}
    return fields | (chosen(row, "label", options) if options else {"answer": text(row, "label")})


def has_letter(table: Table) -> bool:
    """Whether the label of the first row is a letter."""
    return str(table.first.get("label", "")).strip().strip("().").upper() in list(LETTERS)
