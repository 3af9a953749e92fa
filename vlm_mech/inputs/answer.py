"""How an answer is written where a model begins it: after a space or not, and in which case."""

from dataclasses import dataclass
from typing import Literal

Case = Literal["as written", "capital", "lower"]


class Attached(str):
    """An answer that follows its prompt without a space between them."""

    __slots__ = ()


@dataclass(frozen=True)
class Spelling:
    """One way to write all answers of a data set: the case of their first letters, and whether a space comes before."""

    case: Case = "as written"
    space: bool = True

    def of(self, answer: str) -> str:
        """An answer written so."""
        bare = answer.strip()
        text = {"as written": bare, "capital": bare[:1].upper() + bare[1:], "lower": bare[:1].lower() + bare[1:]}
        return text[self.case] if self.space else Attached(text[self.case])

    def __str__(self) -> str:
        case = {"as written": "as written", "capital": "with a capital", "lower": "in lower case"}[self.case]
        return case if self.space else f"{case}, no space before"


SPELLINGS = tuple(Spelling(case, space) for space in (True, False) for case in ("as written", "capital", "lower"))
