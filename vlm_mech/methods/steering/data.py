"""What a direction is for: the contrast of two answers, pairs turned so that it has a sign, and their three parts."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_mech.data.derived_pairs import by_groups, checked, conflict_first, turned, with_conflict
from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.sweeps.asked import check_once

AUTO, SHOWN = "auto", "shown"
OVER = "/"
"""Between the two answers of a contrast, as in "left/right"."""
TOWARD, AGAINST = "toward", "against"
"""Which picture of a pair is asked about: that whose answer the direction is for, or the other one."""
SHARES = (0.4, 0.2)
"""Shares of the groups that the direction is found on, and that its place and dose are chosen on; the rest tests."""
DOSES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
"""Doses, in shares of the mean norm of the states that are steered."""


@dataclass(frozen=True)
class Contrast:
    """The answers that a direction stands between.

    `shown`: what a picture in conflict shows, over the usual answer, whatever the two are. Otherwise `toward` is an
    answer, and `over` the other one, or empty where every other answer is meant.
    """

    toward: str
    over: str = ""

    @property
    def pooled(self) -> bool:
        """Whether it is that of pictures in conflict, over all their answers."""
        return self.toward == SHOWN and not self.over

    @property
    def asked(self) -> str:
        """As `contrast_of` takes it."""
        return f"{self.toward}{OVER}{self.over}" if self.over else self.toward

    def __str__(self) -> str:
        if self.pooled:
            return "what is shown over the usual answer"
        return f"{self.toward!r} over {f'{self.over!r}' if self.over else 'other answers'}"


def contrast_of(pairs: Pairs, asked: str = AUTO) -> Contrast:
    """The contrast that is asked for, or that pairs have.

    By itself it is `shown` where pairs say which of their pictures is in conflict; otherwise, of pairs with two answers
    in all, the first of these in the alphabet over the second; of others, the commonest answer (of as common ones, the
    first in the alphabet) over every answer that it is paired with.

    Args:
        asked: `auto`, `shown`, two answers as in "left/right", or one, over all others.

    Raises:
        UsageError: single items, or an answer that no pair has.
    """
    if pairs.made is not None:
        raise UsageError(f"{pairs.name} has single items; a direction needs pairs, both answers of which are known")
    if asked == SHOWN or (asked == AUTO and any(pair.conflict for pair in pairs)):
        return Contrast(SHOWN)
    counts = Counter(answer for pair in pairs for answer in _answers(pair))
    if asked == AUTO:
        ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
        return Contrast(*sorted(counts)) if len(counts) == 2 else Contrast(ordered[0])
    named = (asked.strip(),) if asked.strip() in counts else tuple(each.strip() for each in asked.split(OVER))
    missing = [each for each in named if each not in counts]
    if missing or len(set(named)) != len(named) or len(named) > 2:
        known = ", ".join(sorted(counts)[:12])
        raise UsageError(
            f"contrast {asked!r} is none of {pairs.name}: one answer, or two as in A/B, is needed of {known}; or shown"
        )
    return Contrast(*named)


def _answers(pair: Pair) -> tuple[str, str]:
    return pair.answer.strip(), pair.counterfactual_answer.strip()


def oriented(pairs: Pairs, contrast: Contrast) -> Pairs:
    """The pairs that have the contrast, each turned so that its first picture is the one whose answer it is for.

    The others move to `refused`.

    Raises:
        UsageError: none has it.
    """
    if contrast.pooled:
        return conflict_first(with_conflict(pairs))
    wanted = {contrast.toward, contrast.over} if contrast.over else {contrast.toward}

    def check(pair: Pair) -> None:
        if not wanted <= {*_answers(pair)}:
            raise UsageError(f"its answers are {' and '.join(map(repr, _answers(pair)))}, not {contrast}")

    kept = checked(pairs, check, f"has the contrast {contrast}")
    both = zip(kept, turned(kept), strict=True)
    faced = tuple(other if _answers(pair)[1] == contrast.toward else pair for pair, other in both)
    return dataclasses.replace(kept, pairs=faced)


def three_parts(pairs: Pairs, shares: Sequence[float] = SHARES, *, seed: int = 0) -> tuple[Pairs, Pairs, Pairs]:
    """Pairs to find a direction on, to choose its place and dose on, and to test it on; groups are never parted.

    Args:
        shares: of the groups, for the first two parts.
        seed: draws the groups.

    Raises:
        UsageError: shares that leave nothing for the third part, or too few groups.
    """
    if len(shares) != 2 or min(shares) <= 0 or sum(shares) >= 1:
        raise UsageError(f"shares are {tuple(shares)}; two above 0 are needed, which leave some for the test")
    one, two, three = by_groups(pairs, shares, seed=seed)
    if min(map(len, (one, two, three))) < 2:
        raise UsageError(
            f"{pairs.name} has {len(pairs)} pairs for the direction: {len(one)} to find it on, {len(two)} to choose "
            f"place and dose, {len(three)} to test; two of each are needed"
        )
    return one, two, three


def check_doses(doses: Sequence[float]) -> tuple[float, ...]:
    """The doses in order.

    Raises:
        UsageError: one that is named twice or is not finite, or not 0 and both signs among them.
    """
    found = tuple(sorted(float(each) for each in doses))
    check_once(list(map(str, found)), "the dose")
    if not found or 0.0 not in found or found[0] >= 0 or found[-1] <= 0 or max(map(abs, found)) == float("inf"):
        raise UsageError(f"doses are {', '.join(f'{each:g}' for each in found) or 'none'}; 0 and both signs are needed")
    return found
