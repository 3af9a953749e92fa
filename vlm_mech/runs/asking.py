"""The options that say how questions are put: one wording, or several that are compared."""

from collections.abc import Sequence
from pathlib import Path

from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import QUESTION, Wording


def templates_of(one_by_one: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The wordings that the options give one by one and in a file, in their order; none where none is given.

    Raises:
        UsageError: a file that cannot be read or has none, a wording that is none, or one twice.
    """
    found = [*one_by_one]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UsageError(f"wordings {str(file)!r} cannot be read: {error}") from error
        kept = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not kept:
            raise UsageError(f"wordings {str(file)!r} has no line with a wording, such as '{QUESTION} One word.'")
        found += kept
    for text in found:
        Wording(text)
    twice = next((text for text in found if found.count(text) > 1), None)
    if twice is not None:
        raise UsageError(f"wording {twice!r} is given twice; once is needed")
    return tuple(found)


def wording_of(templates: Sequence[str], *, suffix: str | None, system: str | None, prefix: str | None) -> Wording:
    """The one wording of a run.

    Raises:
        UsageError: an option that cannot be, or several wordings.
    """
    template, *others = templates or (QUESTION,)
    if others:
        raise UsageError(f"{len(others) + 1} wordings are given where one run takes one")
    if suffix is not None:
        if not suffix.strip():
            raise UsageError(f"the suffix is {suffix!r}; a text that follows every question is needed, or none")
        template = f"{template.rstrip()} {suffix.strip()}"
    return Wording(template, system, prefix)
