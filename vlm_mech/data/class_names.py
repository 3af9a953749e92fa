"""Names of classes: as words that can be compared, distinguished where several are the same words, and refused."""

from collections import Counter
from collections.abc import Sequence

from vlm_mech.data.words import words_of
from vlm_mech.errors import UsageError


def normalised(name: str) -> str:
    """The words of a name (`data.words`), one space between them; punctuation and underscores part words."""
    return " ".join(words_of(name))


def unique_names(names: Sequence[str]) -> list[str]:
    """The names; those that are the same words as another with their number in the list, from 0 on: crane (134)."""
    words = [normalised(name) for name in names]
    counts = Counter(words)
    return [
        f"{name} ({number})" if said and counts[said] > 1 else name
        for number, (name, said) in enumerate(zip(names, words, strict=True))
    ]


def check_names(names: Sequence[str]) -> None:
    """Raises `UsageError` for fewer than two classes, a name without any word, or two names that are the same words."""
    if len(names) < 2:
        raise UsageError(f"there is only the class {', '.join(names) or '(none)'}; at least two are needed")
    known: dict[str, str] = {}
    for name in names:
        words = normalised(name)
        if not words:
            raise UsageError(f"class name {name!r} holds no word; one is needed to look for in an answer")
        if words in known:
            raise UsageError(f"class names {known[words]!r} and {name!r} are the same words {words!r}; rename one")
        known[words] = name
