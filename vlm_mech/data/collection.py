"""What data sets of pairs and of items have in common: their parts checked, a row by its number, their description."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, TypeVar

from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import Wording

PartT = TypeVar("PartT")


def check_parts(data: Any, **kinds: type) -> None:
    """Makes tuples of the fields of a data set that hold several of a kind.

    Raises:
        UsageError: a field that holds something else.
    """
    for name, kind in kinds.items():
        given = getattr(data, name)
        odd = [each for each in given if not isinstance(each, kind)] if isinstance(given, list | tuple) else [given]
        if odd:
            what = type(odd[0]).__name__
            raise UsageError(f"{name} of {data.name!r} holds a {what}; a tuple of {kind.__name__} is needed")
        object.__setattr__(data, name, tuple(given))


def row_of(parts: Sequence[PartT], row: Any, what: str) -> PartT:
    """One part by its number.

    Args:
        what: what the parts are called, for the error.

    Raises:
        UsageError: something that is no number.
    """
    if not isinstance(row, Integral):
        one = "an item" if what == "items" else "a pair"
        raise UsageError(
            f"{row!r} is not a row of {what}; a number gives {one}, a slice such as [:8] gives {what.title()}"
        )
    return parts[int(row)]


def described(data: Any, wordings: Iterable[Wording]) -> dict[str, Any]:
    """What the provenance of a run says of a data set.

    Args:
        wordings: how its questions are put.
    """
    told: dict[str, Any] = {"name": data.name, "n": len(data), "hash": data.digest}
    told |= {"drawn": data.drawn} if data.drawn else {}
    told |= {"notes": list(data.notes)} if data.notes else {}
    several = list(dict.fromkeys(wordings))
    if any(each.told for each in several):
        told["wording"] = several[0].told if len(several) == 1 else [each.told for each in several]
    return told
