"""The tests. `checked` checks types and shapes of every function of the package; an int is a float, as in PEP 484."""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

N_CHECKED = 6
"""Checks of a function in each test, of which a call takes two: checking all calls takes half as long again."""
N_MADE = 3
"""Functions of one place within another function that are checked: to make the checks takes longer than most calls."""
_calls: Counter[tuple[str, str]] = Counter()
_made: Counter[Any] = Counter()
_unchecked: list[Any] = []
_jaxtyped = jaxtyping.jaxtyped


def _some_jaxtyped(*given: Any, **options: Any) -> Any:
    """`jaxtyped`, which leaves a function as it is that was made in the same place often enough."""
    if given:
        return _jaxtyped(*given, **options)

    def decorated(made: Any) -> Any:
        place = getattr(made, "__code__", made)
        _made[place] += 1
        return made if _made[place] > N_MADE else _jaxtyped(**options)(made)

    return decorated


# The hook that `--jaxtyping-packages` asks for writes this name before each function and class.
jaxtyping.jaxtyped = _some_jaxtyped


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checked in its first calls of each test."""
    key = (function.__module__, function.__qualname__)
    if _calls[key] > N_CHECKED:
        # A function within another one, made once more.
        return function
    strict = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)

    @functools.wraps(function)
    def some(*arguments: Any, **named: Any) -> Any:
        _calls[key] += 1
        if _calls[key] == N_CHECKED:
            _leave_unchecked(*key)
        return strict(*arguments, **named)

    return some


def check_again() -> None:
    """Checks the next calls of each function; called before each test."""
    _calls.clear()
    while _unchecked:
        vars(_unchecked.pop()).pop("__no_type_check__", None)


def _leave_unchecked(module: str, name: str) -> None:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part, None)
    for attribute in ("__func__", "fget", "func"):
        found = getattr(found, attribute, found)
    if inspect.isfunction(found):
        found = inspect.unwrap(found)
        found.__no_type_check__ = True
        _unchecked.append(found)
