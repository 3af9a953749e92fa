"""A share of correct answers of an embedded model, with its interval."""

from dataclasses import dataclass

from vlm_mech.results.statistics import share_interval


@dataclass(frozen=True)
class Score:
    """A share with its 95 % Wilson interval; `of` says what is counted, `chance` what guessing gives."""

    type: str
    of: str
    n: int
    share: float
    low: float
    high: float
    chance: float | None = None


def score(type: str, of: str, hits: list[bool], chance: float | None = None) -> Score:
    """The share of hits with its 95 % Wilson interval."""
    low, high = share_interval(sum(hits), len(hits))
    return Score(type, of, len(hits), sum(hits) / len(hits), low, high, chance)
