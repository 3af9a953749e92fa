"""Tables each row of which is an item, and answers that are letters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_mech.data.readers.format import Collector, Table, unlike_stems
from vlm_mech.data.readers.tables import read
from vlm_mech.data.user_files import Refused, Row, Rows, written
from vlm_mech.errors import UsageError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def each_row(
    tables: Sequence[Table],
    fields: Callable[[Row, Table], dict[str, Any]],
    *,
    id_column: str = "",
    held: Sequence[str] = (),
) -> Rows:
    """The rows of the tables as items.

    An item is called as a column says, or by the number of its row; of several tables that of the table comes first.

    Args:
        fields: the fields of a row's item; raises `UsageError` where there is none.
        held: columns whose pictures stay in the file.
    """
    found, stems = Collector(), unlike_stems(tables)
    for table in tables:
        for row in read(table, held):
            told = None if isinstance(row, Refused) else written(row.fields.get(id_column))
            name = (told or "").strip() or row.id
            name = f"{stems[table.path]}/{name}" if len(tables) > 1 else name
            try:
                if isinstance(row, Refused):
                    raise UsageError(row.reason)
                found.keep(row.place, name, fields(row, table))
            except UsageError as error:
                found.refuse(name, error)
            except KeyError as error:
                found.refuse(name, f"{row.place}: it has no {error.args[0]}")
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
