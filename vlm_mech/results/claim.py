"""`Claim`: something that is said of a model, declared on one half of the examples and tested on the other.

A method lists what it could say (its pool): each claim is one or several conditions on means over examples, such as
"cutting this edge at layer 3 lowers the logit difference, by more than a cut of as many random edges". Those that one
half of the examples speaks for are declared; they are made if the other half, which chose nothing, speaks for them too.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

LEVEL = 0.05
"""p-values below it are significant."""
SMALLEST = 0.1
"""Logits. A smaller change of the logit difference is no effect: it changes the odds of two answers by under 11 %."""
SHARE = 0.05
"""Share of the unedited difference. A smaller change is no effect either."""
FEWEST_GROUPS = 12
"""Groups without which no half can declare anything: the least p of five is above `LEVEL`."""
N_NAMED = 8
"""Claims that did not hold, of which a sentence tells."""
_NUMBER = r"\d+(?!\.?\d)"
NAMES = re.compile(rf"\b(layer|block|head)s?(?:\(s\))? ({_NUMBER}(?:,? (?:and )?{_NUMBER})*)", re.IGNORECASE)
"""What names a layer or a head, or several."""
_SHORT = re.compile(r"\bL(\d+)H(\d+)\b")
"""The short name of a head."""

DERIVED = ("made", "size_sure", "lost")
"""What `claims.json` says of a claim beside its fields, from which it follows."""

Side = Literal["above", "below"]


@dataclass(frozen=True)
class Condition:
    """That a mean over examples lies above, or below, a bound, and not closer to it than `least`.

    It is the mean of a metric in a cell; less its own baseline, or the same metric in another cell, where `less` says.
    """

    metric: str
    cell: dict[str, Any]
    side: Side
    least: float = 0.0
    bound: float = 0.0
    less: dict[str, Any] | Literal["baseline"] | None = None
    says: str = ""
    """What its mean is called in a sentence, after the claim's own."""

    @property
    def sign(self) -> int:
        """1 above, -1 below."""
        return 1 if self.side == "above" else -1


@dataclass(frozen=True)
class Tested:
    """A condition's mean on some examples: so many examples, 95 % interval, and p of the mean being the bound."""

    n: int
    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f}, n = {self.n})"


@dataclass(frozen=True)
class Gate:
    """A way in which a claim could have been lost, and whether it was; `verdict` is None where it was not tried."""

    name: str
    verdict: bool | None
    says: str
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What is said, of what, and the conditions under which it is true.

    `p` is the largest of its conditions' on the examples that tested it, corrected over all claims declared with it.
    `unit` is that of its first condition.
    """

    kind: str
    about: dict[str, Any]
    says: str
    conditions: tuple[Condition, ...]
    unit: str = ""
    declared: tuple[Tested, ...] = ()
    tested: tuple[Tested, ...] = ()
    p: float = float("nan")
    gates: tuple[Gate, ...] = ()

    @property
    def made(self) -> bool:
        """Whether it holds on the examples that did not choose it."""
        return self.p < LEVEL and self.met(self.tested)

    def met(self, found: Sequence[Tested]) -> bool:
        """Whether every mean is on its side of the bound, and far enough from it."""
        return bool(found) and self.met_by([told.mean for told in found])

    def met_by(self, means: Sequence[float]) -> bool:
        """The same of means alone, one a condition."""
        pairs = zip(self.conditions, means, strict=True)
        return all(each.sign * (mean - each.bound) > max(each.least, 0.0) for each, mean in pairs)

    def strength(self, found: Sequence[Tested]) -> float:
        """By how much the conditions are met: the least of the distances from their bounds; NaN if one has no mean."""
        each = [one.sign * (told.mean - one.bound) for one, told in zip(self.conditions, found, strict=True)]
        return float("nan") if any(map(math.isnan, each)) else min(each)

    @property
    def size_sure(self) -> bool:
        """Whether, on the examples that tested it, every condition's interval lies wholly beyond the least size.

        A claim needs no more than a mean of that size; this says whether the size is as sure as the direction.
        """
        return bool(self.tested) and all(
            min(one.sign * (end - one.bound) for end in (told.low, told.high)) > max(one.least, 0.0)
            for one, told in zip(self.conditions, self.tested, strict=True)
        )

    @property
    def lost(self) -> tuple[str, ...]:
        """The gates it did not pass."""
        return tuple(gate.name for gate in self.gates if gate.verdict is False)

    def __str__(self) -> str:
        if not self.tested:
            return f"{self.says}: not tested"
        others = [
            f"; {condition.says} {found}"
            for condition, found in zip(self.conditions[1:], self.tested[1:], strict=True)
            if condition.says
        ]
        lost = f"; fails the gates: {', '.join(self.lost)}" if self.lost else ""
        return f"{self.says}, by {self.tested[0]} {self.unit}{''.join(others)} (p = {self.p:.2g}){lost}"


def p_of(found: Sequence[Tested]) -> float:
    """The largest p of several conditions, which must all hold; 1 where one has none."""
    return max(1.0 if math.isnan(each.p) else each.p for each in found)


def sentences(claims: Sequence[Claim]) -> tuple[str, ...]:
    """What is claimed, a sentence a claim, after one that says how it came about and what did not hold.

    These are the only sentences that may name a layer or a head.
    """
    made, failed = [claim for claim in claims if claim.made], [claim for claim in claims if not claim.made]
    if not claims:
        return (
            "No claim was selected: no effect was large and significant on the selection half of the examples "
            f"(which takes {FEWEST_GROUPS} groups at least).",
        )
    least = f"{len(claims)} selected on half of the examples, {len(made)} confirmed on the held-out half"
    text = f"Claims: {least} (sign-flip test, p < {LEVEL}, Holm)"
    n = max((claim.tested[0].n for claim in claims), default=0)
    few = not made and len(claims) * 2.0 ** (1 - n) >= LEVEL
    text += f"; {n} examples are too few for a significant corrected p" if few else ""
    gated = any(claim.gates for claim in made)
    passed = sum(not claim.lost for claim in made)
    untried = sum(not claim.lost and any(gate.verdict is None for gate in claim.gates) for claim in made)
    text += f"; {passed} of these pass every gate that was run" if gated else ""
    text += f" ({untried} could not be run through all)" if untried else ""
    lost = f" Not confirmed: {'; '.join(claim.says for claim in failed[:N_NAMED])}" if failed else ""
    lost += f" and {len(failed) - N_NAMED} more." if len(failed) > N_NAMED else "." if lost else ""
    return (f"{text}.{lost}", *(f"{claim}." for claim in made))


def told(claims: Sequence[Claim]) -> tuple[Claim, ...]:
    """The made claims that need telling, in the order given: not those that follow from others.

    A claim follows from one that has all of its conditions (that a layer reads, from one that it reads and is needed)
    and that lost no gate which it passed itself.
    """
    made = [claim for claim in claims if claim.made]
    each = [frozenset(repr(dataclasses.replace(one, says="")) for one in claim.conditions) for claim in made]

    def follows(number: int, other: int) -> bool:
        if not set(made[other].lost) <= set(made[number].lost):
            return False
        return each[number] < each[other] or (each[number] == each[other] and other < number)

    numbers = range(len(made))
    return tuple(made[number] for number in numbers if not any(follows(number, other) for other in numbers))


def sentences_told(claims: Sequence[Claim]) -> tuple[str, ...]:
    """The `sentences` of claims, without those that follow from others, of which the last one tells the number."""
    first, *_ = sentences(claims)
    shown = told(claims)
    rest = sum(claim.made for claim in claims) - len(shown)
    more = (f"{rest} more claims follow from these and hold too (claims.json).",) if rest else ()
    return (first, *(f"{claim}." for claim in shown), *more)


def named_without_claim(findings: Sequence[str], claims: Sequence[Claim]) -> list[str]:
    """The sentences that name a layer, block or head, are rendered from no claim, and are about no claim that was made.

    A sentence is about claims where each place that it names, such as "layer 3" or "layer 3 head 1", is in the `about`
    of one of them, or is one of its `members` where a claim is about several places together.
    """
    said = set(sentences(claims))
    made = [place for claim in claims if claim.made for place in (claim.about, *claim.about.get("members", ()))]
    return [
        each
        for each in findings
        if each not in said
        and not all(any(place.items() <= known.items() for known in made) for place in _places(each))
    ]


def _places(sentence: str) -> list[dict[str, int]]:
    """The places that a sentence names, in its order; the next begins where a word comes again."""
    found: list[dict[str, int]] = []
    for name, numbers in NAMES.findall(_SHORT.sub(r"layer \1 head \2", sentence)):
        word = name.lower()
        for number in map(int, re.findall(r"\d+", numbers)):
            if not found or word in found[-1]:
                found.append({})
            found[-1][word] = number
    return found


def as_dicts(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Claims as `claims.json` has them; numbers that there are none of are null."""
    derived = ({name: getattr(claim, name) for name in DERIVED} for claim in claims)
    return [_finite(dataclasses.asdict(claim) | more) for claim, more in zip(claims, derived, strict=True)]


def of_dicts(rows: Sequence[dict[str, Any]]) -> tuple[Claim, ...]:
    """The claims that `as_dicts` wrote."""
    return tuple(_of_dict(dict(row)) for row in rows)


def _of_dict(row: dict[str, Any]) -> Claim:
    for name in DERIVED:
        row.pop(name, None)
    told = {
        name: tuple(
            Tested(**{key: float("nan") if value is None else value for key, value in each.items()})
            for each in row[name]
        )
        for name in ("declared", "tested")
    }
    told["conditions"] = tuple(Condition(**each) for each in row["conditions"])
    told["gates"] = tuple(Gate(**each) for each in row["gates"])
    return Claim(**row | told | {"p": float("nan") if row["p"] is None else row["p"]})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_rows(claims: Sequence[Claim]) -> pd.DataFrame:
    """A row a claim: what is said, effect, interval, n and p, whether its size is sure, what each gate said.

    Of a claim with several conditions the numbers are those of the one that `decides`, which has a column where any
    claim has several; it also names others whose means are not far enough beyond their bounds.
    """
    rows, several = [], any(len(claim.conditions) > 1 for claim in claims)
    for claim in claims:
        number = decides(claim)
        own = claim.tested[number]
        row: dict[str, Any] = {"claim": claim.says}
        if several:
            row |= {"condition that decides": _decided(claim, number) if len(claim.conditions) > 1 else ""}
        row |= {"effect": own.mean, "low": own.low, "high": own.high, "n": own.n}
        row |= {"p": claim.p, "other half": _word(claim.made), "size sure": "yes" if claim.size_sure else "no"}
        rows.append(row | {gate.name: _word(gate.verdict) for gate in claim.gates})
    return pd.DataFrame(rows).fillna({gate.name: "not tried" for claim in claims for gate in claim.gates})


def decides(claim: Claim) -> int:
    """The number of the condition that gives a claim its p: the largest; of several the first that is not met.

    `claim` has been tested.
    """
    unmet = _unmet(claim)
    order = [(p_of([each]), number in unmet, -number) for number, each in enumerate(claim.tested)]
    return -max(order)[2]


def _unmet(claim: Claim) -> list[int]:
    pairs = enumerate(zip(claim.conditions, claim.tested, strict=True))
    return [number for number, (one, told) in pairs if not one.sign * (told.mean - one.bound) > max(one.least, 0.0)]


def _decided(claim: Claim, number: int) -> str:
    others = [f"{named(claim, other)}, which is {claim.tested[other]}" for other in _unmet(claim) if other != number]
    return named(claim, number) + (f"; not met: {'; '.join(others)}" if others else "")


def named(claim: Claim, number: int) -> str:
    """A condition of a claim in words, such as `kl (layer 3) above 0.1`: of its cell what the claim does not say."""
    one = claim.conditions[number]
    more = {name: value for name, value in one.cell.items() if claim.about.get(name, value) != value}
    for other in claim.conditions:
        more |= {name: one.cell[name] for name in one.cell if other.cell.get(name) != one.cell[name]}
    text = one.metric + _in_words(more)
    if isinstance(one.less, dict):
        text += f" minus that of{_in_words({k: v for k, v in one.less.items() if one.cell.get(k) != v})}"
    elif one.less is not None:
        text += f" minus its {one.less}"
    return f"{text} {one.side} {one.bound:g}" + (f" by at least {one.least:.3g}" if one.least > 0 else "")


def _in_words(cell: dict[str, Any]) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in cell.items())})" if cell else ""


def _word(verdict: bool | None) -> str:
    return "not tried" if verdict is None else "passed" if verdict else "failed"
