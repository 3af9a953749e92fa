"""Tables whose rows 2k-1 and 2k, by their own numbers, are a pair."""

from collections.abc import Callable
from typing import Any

from vlm_mech.data.readers.format import Collector, Table
from vlm_mech.data.readers.tables import read
from vlm_mech.data.user_files import Refused, Row, written
from vlm_mech.errors import UsageError


def in_twos(
    table: Table, column: str, found: Collector, fields: Callable[[Row, Row], dict[str, Any]], *, before: str = ""
) -> list[tuple[int, int]]:
    """Puts the pairs of a table into `found`, ordered by the numbers in a column, and gives these numbers.

    Args:
        fields: the fields of a pair, from its two rows; raises `UsageError` where there is none.
        before: what the names of pairs begin with.

    Raises:
        UsageError: a number occurs twice.
    """
    numbered: dict[int, Row] = {}
    for row in read(table):
        if isinstance(row, Refused):
            found.refuse(row.id, row.reason)
            continue
        given = (written(row.fields.get(column)) or "").strip()
        if not given.isdecimal() or int(given) < 1:
            found.refuse(given, f"{row.place}: {column} is {given!r:.40}; it must be a whole number of at least 1")
        elif int(given) in numbered:
            places = f"{numbered[int(given)].place} and {row.place}"
            raise UsageError(f"{column} {given} occurs twice, in {places}")
        else:
            numbered[int(given)] = row
    made = []
    for first in sorted({(number - 1) // 2 * 2 + 1 for number in numbered}):
        two = [numbered[number] for number in (first, first + 1) if number in numbered]
        made.append((first, first + 1))
        try:
            if len(two) < 2:
                raise UsageError(f"{two[0].place}: the other row of pair {first}/{first + 1} is missing")
            found.keep(two[0].place, f"{before}{first}/{first + 1}", fields(two[0], two[1]))
        except UsageError as error:
            found.refuse(f"{before}{first}/{first + 1}", error)
        except KeyError as error:
            found.refuse(f"{before}{first}/{first + 1}", f"{two[0].place}: it or its pair has no {error.args[0]}")
    return made
