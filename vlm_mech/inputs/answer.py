"""How an answer is written where a model begins it: after a space or not, in which case, and with an article or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Case = Literal["as written", "capital", "lower"]


class Attached(str):
    """An answer that follows its prompt without a space between them."""

    __slots__ = ()


class Variants(str):
    """An answer with all its spellings, the likeliest of which counts; as a text it is the first."""

    spellings: tuple[str, ...]

    def __new__(cls, spellings: Sequence[str]) -> "Variants":
        made = super().__new__(cls, spellings[0])
        made.spellings = tuple(spellings)
        return made


def spellings(answer: str) -> tuple[str, ...]:
    """All ways in which an answer counts: one, or those of `Variants`."""
    return answer.spellings if isinstance(answer, Variants) else (answer,)


@dataclass(frozen=True)
class Spelling:
    """One way to write all answers of a data set: the case of their first letters, after a space or not, with "the"."""

    case: Case = "as written"
    space: bool = True
    article: bool = False

    def of(self, answer: str) -> str:
        """An answer written so."""
        bare = answer.strip()
        if self.article and bare.split(" ")[0].lower() not in ("the", "a", "an"):
            bare = f"the {bare}"
        text = {"as written": bare, "capital": bare[:1].upper() + bare[1:], "lower": bare[:1].lower() + bare[1:]}
        return text[self.case] if self.space else Attached(text[self.case])

    def __str__(self) -> str:
        case = {"as written": "as written", "capital": "with a capital", "lower": "in lower case"}[self.case]
        with_article = f'{case}, with "the"' if self.article else case
        return with_article if self.space else f"{with_article}, no space before"


CASES: tuple[Case, ...] = ("as written", "capital", "lower")
SPELLINGS = tuple(Spelling(case, space) for space in (True, False) for case in CASES)
WITH_ARTICLE = tuple(Spelling(case, space, True) for space in (True, False) for case in CASES)
