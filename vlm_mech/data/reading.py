"""The one reader of answers: which of the options an answer names, and whether two answers say the same.

An option is named by all its words in a row, or by its letter. The longest option counts where one stands in another
(`cat fish` is no cat), and an answer that names several, or a letter that no option has, is none. Denial is not
understood: `not left` names left.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_mech.data.words import ALIKE, folded, is_number, words_of
from vlm_mech.errors import UsageError

ARTICLES = ("a", "an", "the")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUOTES = r"[\s*_\"'`\u2018\u201c]*"
HEAD = re.compile(rf"{QUOTES}(?:[(\[]\s*([a-zA-Z])\s*[)\]]|([a-zA-Z])(?:[):,\]]|\.(?!\w\b)|[\s*_\"'`\u2019\u201d]*$))")
"""A letter that begins the answer: in brackets, before a mark, or alone; `a` before a word is an article."""
INSIDE = (
    re.compile(r"(?<!\w)[(\[]\s*([a-zA-Z])\s*[)\]]"),
    re.compile(r"\b(?:option|choice|letter|answer)\s+([A-Z])(?![\w'\u2019-])", re.IGNORECASE),
    re.compile(r"(?<![\w.'\u2019-])([B-HJ-Z])(?![\w'\u2019-]|\.\w)"),
    re.compile(r"(?<![\w.'\u2019-])([AI])(?=\W*$|[.,;:!?)](?!\w)|\s+(?:or|and|is|because)\b)"),
)
"""A letter further on: in brackets, called an option, or a capital; A and I only where no article or pronoun stands."""


def check_options(options: Sequence[str]) -> None:
    """Raises `UsageError` for fewer than two options, one without a word, or two that read alike."""
    if len(options) < 2:
        raise UsageError(f"there is one option, {', '.join(options)!r}; at least two are needed to choose from")
    check_readable(options)


def check_readable(options: Sequence[str]) -> None:
    """Raises `UsageError` for an option without a word, or two that read alike."""
    known: dict[tuple[str, ...], str] = {}
    for number, option in enumerate(options, 1):
        words = _bare(option)
        if not words:
            raise UsageError(f"option number {number} is {option!r}; a text with a word is needed")
        if words in known:
            raise UsageError(f"options {known[words]!r} and {option!r} read alike; no answer could tell them apart")
        known[words] = option


@dataclass(frozen=True)
class Reading:
    """What an answer says: its words without an article before them, and the numbers of the options that it names."""

    words: tuple[str, ...]
    named: tuple[int, ...]
    stray: bool = False
    """Whether it gives a letter that no option has."""

    @property
    def only(self) -> int | None:
        """The number of the one option that is named; None if none is, or several, or a letter that no option has."""
        return self.named[0] if len(self.named) == 1 and not self.stray else None

    def same(self, other: "Reading") -> bool:
        """Whether two answers name the same option or, where neither names one, are the same words.

        What says nothing is never the same.
        """
        if self.only is None and other.only is None:
            return bool(self.words) and self.words == other.words
        return self.only == other.only


def read_answer(answer: str, options: Sequence[str], *, letters: Sequence[str] = ()) -> Reading:
    """Which of the options an answer names.

    Args:
        letters: letter of each option, where options have some; an option that is one letter is read by it alone.

    Raises:
        UsageError: an option without a word, or two that read alike.
    """
    check_readable(options)
    given = letters or [""] * len(options)
    texts = [_bare(option, letter) for option, letter in zip(options, given, strict=True)]
    known = [letter.upper() or _lone(words) for letter, words in zip(given, texts, strict=True)]
    words = words_of(answer)
    # `a` and `I` stand in answers as words of their own.
    unsafe = set(known) if letters else {"A", "I"}
    named = set(_standing(words, [() if _lone(text) in unsafe - {""} else text for text in texts]))
    bare, stray = _bare(answer), False
    if bare in texts:
        named.add(texts.index(bare))
    if any(known):
        found, stray = _letters(answer, known, every=bool(letters))
        named |= found
    if not named and len(bare) == 1 and is_number(bare[0]):
        # `3` is said for `3 apples`, where one option alone has this number.
        named = {number for number, text in enumerate(texts) if [each for each in text if is_number(each)] == [*bare]}
    if {("yes",), ("no",)} == set(texts) and len(named) == 2 and _affirms(words):
        named = {texts.index(("yes",))}
    return Reading(bare, tuple(sorted(named)), stray)


def says(answer: str, option: str) -> bool:
    """Whether an answer is an option and nothing else, but for what follows a yes, a no or a number.

    A reward must be this strict: naming every option but one could be learnt without the picture.
    """
    words, wanted = _bare(answer), _bare(option)
    headed = len(wanted) == 1 and (wanted[0] in ("yes", "no") or is_number(wanted[0]))
    return bool(wanted) and (words[:1] if headed else words) == wanted


def letters_of(options: Sequence[str]) -> tuple[str, ...]:
    """The letter at the head of each option, as in `(a)` or `B. open`; none of all where one has none."""
    found = [HEAD.match(_narrow(option)) for option in options]
    return tuple((each[1] or each[2]).upper() for each in found if each) if all(found) else ()


def mentions(answer: str, label: str) -> bool:
    """Whether a label stands anywhere in an answer, be it within a word; case and composition do not count."""
    return folded(label) in folded(answer)


def _narrow(text: str) -> str:
    return text.translate(ALIKE)


def _bare(text: str, letter: str = "") -> tuple[str, ...]:
    """The words of a text without an article, or its own letter, before others."""
    words = words_of(text)
    return words[1:] if len(words) > 1 and words[0] in (*ARTICLES, letter.lower()) else words


def _lone(words: tuple[str, ...]) -> str:
    """The letter that is all an option says; empty if it says more."""
    letter = words[0].upper() if len(words) == 1 else ""
    return letter if len(letter) == 1 and letter in ALPHABET else ""


def _standing(words: tuple[str, ...], texts: Sequence[tuple[str, ...]]) -> list[int]:
    """Numbers of the texts whose words stand in a row, but where a longer one that counts covers some of them."""
    found: list[int] = []
    taken: set[int] = set()
    for length in sorted({len(text) for text in texts if text}, reverse=True):
        runs: dict[tuple[str, ...], list[int]] = {}
        for start in range(len(words) - length + 1):
            if taken.isdisjoint(range(start, start + length)):
                runs.setdefault(words[start : start + length], []).append(start)
        here = [number for number, text in enumerate(texts) if len(text) == length and text in runs]
        found += here
        taken |= {start + step for number in here for start in runs[texts[number]] for step in range(length)}
    return found


def _letters(answer: str, known: Sequence[str], *, every: bool) -> tuple[set[int], bool]:
    """Numbers of the options whose letters are given, and whether the answer begins with one that none has."""
    text = _narrow(answer)
    head = HEAD.match(text)
    first = (head[1] or head[2]).upper() if head else ""
    rest = text[head.end() :] if head else text
    said = {first, *(found[1].upper() for pattern in INSIDE for found in pattern.finditer(rest))} - {""}
    return {number for number, letter in enumerate(known) if letter in said}, every and first not in ("", *known)


def _affirms(words: tuple[str, ...]) -> bool:
    """Whether an answer that holds both words begins with a yes that the other one does not take back."""
    return words[0] == "yes" and words[1:2] != ("no",) and words[1:3] not in (("and", "no"), ("or", "no"))
