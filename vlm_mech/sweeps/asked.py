"""What a sweep is asked: refused before any work where it cannot be done, and distinguished from what was asked
before."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.data.pairs import Pairs, check_pairs
from vlm_mech.data.shared_pictures import pixel_hash
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.sweeps.axis_labels import label


def check_whole(**numbers: tuple[Any, int]) -> None:
    """Raises `UsageError` where a number is no whole one, or below the least that makes sense."""
    for name, (number, least) in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
            raise UsageError(f"{name} is {number!r}; a whole number of at least {least} is needed")


def check_call(vlm: Any, pairs: Pairs, call: str, **numbers: tuple[Any, int]) -> None:
    """Raises `UsageError` unless a decoder and some pairs are given, each once, with numbers as `check_whole` has them.

    Args:
        call: that they are given to, for the error.
    """
    check_decoder(vlm, call)
    check_pairs(pairs, call)
    check_whole(**numbers)
    check_once([pair.id for pair in pairs], "a pair with the id")


def check_listed(given: Any, kind: type, what: str) -> None:
    """Raises `UsageError` where something else than a list or tuple of a kind is given, such as one of it alone."""
    if not isinstance(given, list | tuple):
        raise UsageError(f"{what} are given as {_article(given)}; a list of {kind.__name__}s is needed")
    odd = next((each for each in given if not isinstance(each, kind)), None)
    if odd is not None:
        raise UsageError(f"{what} hold {_article(odd)}; a list of {kind.__name__}s is needed")


def check_once(names: Sequence[str], what: str, remedy: str = "") -> None:
    """Raises `UsageError` where a name stands twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"{what} {twice[0]!r:.60} is given twice; once is needed{remedy}")


def _article(given: Any) -> str:
    name = type(given).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def digest(given: Any) -> str:
    """A hash of what something holds, the same in every process: prompts by their pixels, tensors by their numbers."""
    return hashlib.sha256(_said(given, {}).encode()).hexdigest()[:16]


def _said(given: Any, known: dict[int, tuple[Any, str]]) -> str:
    # Sources are shared between points, and pictures take long.
    if id(given) not in known:
        known[id(given)] = (given, _spelt(given, known))
    return known[id(given)][1]


def _spelt(given: Any, known: dict[int, tuple[Any, str]]) -> str:
    if isinstance(given, Encoded):
        return _said(list(given.prompts), known)
    if isinstance(given, Prompt):
        return repr([*given.said, *map(pixel_hash, given.images)])
    if isinstance(given, Image.Image):
        return pixel_hash(given)
    if isinstance(given, torch.Tensor | np.ndarray):
        return label(given)
    if isinstance(given, list | tuple):
        return f"[{', '.join(_said(each, known) for each in given)}]"
    if isinstance(given, dict):
        return f"{{{', '.join(f'{_said(key, known)}: {_said(value, known)}' for key, value in given.items())}}}"
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        fields = [(each.name, _said(getattr(given, each.name), known)) for each in dataclasses.fields(given)]
        return f"{type(given).__name__}({', '.join(f'{name}={said}' for name, said in fields)})"
    text = repr(given)
    return getattr(given, "__qualname__", type(given).__name__) if " at 0x" in text else text
