"""What an example says of its question beside the answer: options, the usual answer, a category."""

from collections.abc import Sequence
from typing import Any

from vlm_mech.errors import UsageError


def checked_options(given: Any, answers: Sequence[str], *, of: str) -> tuple[str, ...]:
    """The options of a question; none where there are none.

    Args:
        answers: those that must be among them.
        of: whose options they are, for the error.

    Raises:
        UsageError: no list of texts, fewer than two, one twice, or an answer that is none of them.
    """
    if given is None or given == ():
        return ()
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) and each.strip() for each in given):
        raise UsageError(f"{of}: options is {given!r:.60}; a list of texts is needed")
    if len(given) < 2:
        raise UsageError(f"{of}: there are {len(given)} options; at least two are needed")
    twice = next((each for each in given if list(given).count(each) > 1), None)
    if twice is not None:
        raise UsageError(f"{of}: option {twice!r:.60} is given twice; once is needed")
    stray = next((each for each in answers if each not in given), None)
    if stray is not None:
        raise UsageError(f"{of}: answer {stray!r:.60} is none of the options {', '.join(given):.100}")
    return tuple(given)


def checked_text(given: Any, name: str, *, of: str) -> str | None:
    """A text that may be missing.

    Raises:
        UsageError: something else.
    """
    if given is None or isinstance(given, str):
        return given
    raise UsageError(f"{of}: {name} is {given!r:.60}; a text is needed, or none")
