"""Training text as the texts in which a class counts once: LLaVA's conversations, files and folders of text."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlm_mech.behaviour.classify.frequency import Rule
from vlm_mech.data.class_names import check_names
from vlm_mech.data.text_sources import text_lines, whole_texts
from vlm_mech.data.words import words_of

SENTENCE = re.compile(r"(?<=[.!?])\s+|\n[^\S\n]*\n\s*")
"""What parts two sentences: a space after . ! or ?, or an empty line."""


def texts(source: str, rule: Rule, names: Sequence[str] = ()) -> Iterator[str]:
    """The texts of a source in its order, one in memory at a time.

    `contiguous` (the paper's): the sentences (`sentences`) of each turn, or of each line of a file. `together`: each
    question with its answer, or each line as a whole.

    Args:
        names: what is looked for; none of them is cut in two.

    Raises:
        UsageError: no such source, or one that cannot be read.
    """
    cuts = cuts_within(names)
    for text in whole_texts(source, by_turn=rule == "contiguous"):
        if rule == "contiguous":
            yield from sentences(text, cuts)
        else:
            yield text


Cuts = Mapping[str, Sequence[tuple[tuple[str, ...], tuple[str, ...]]]]
"""Words before and after each place at which a name would be cut, by the last word before it."""


def cuts_within(names: Sequence[str]) -> Cuts:
    """Where names hold what would end a sentence, as "St. Bernard" does."""
    found = defaultdict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]](list)
    for name in names:
        for cut in SENTENCE.finditer(name):
            before, after = words_of(name[: cut.start()]), words_of(name[cut.end() :])
            if before and after:
                found[before[-1]].append((before, after))
    return found


def sentences(text: str, cuts: Cuts) -> Iterator[str]:
    """The sentences of a text: a line break is a space, an empty line ends one; no name is cut in two.

    Args:
        cuts: where names would be (`cuts_within`).
    """
    start = 0
    for cut in SENTENCE.finditer(text):
        if cuts and _within_a_name(text, cut, cuts):
            continue
        if part := text[start : cut.start()].strip():
            yield part
        start = cut.end()
    if part := text[start:].strip():
        yield part


def _within_a_name(text: str, cut: re.Match[str], cuts: Cuts) -> bool:
    if not cut[0] or cut[0].count("\n") > 1:
        return False
    last = words_of.__wrapped__(text[: cut.start()].rsplit(None, 1)[-1])
    for before, after in cuts.get(last[-1], ()) if last else ():
        head = " ".join(text[: cut.start()].rsplit(None, len(before))[-len(before) :])
        tail = " ".join(text[cut.end() :].split(None, len(after))[: len(after)])
        if words_of(head)[-len(before) :] == before and words_of(tail)[: len(after)] == after:
            return True
    return False


def names_in(path: Path) -> tuple[str, ...]:
    """The class names of a file, one a line; empty lines do not count.

    Raises:
        UsageError: it cannot be read, or two names are the same words.
    """
    found = tuple(line.strip() for line in text_lines(path))
    check_names(found)
    return found
