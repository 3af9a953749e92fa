"""What is claimed: that ablating a part restores the shown answer, and of which kind the arbiter is."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.methods.arbitration.data import (
    HEAD,
    KINDS,
    LATE_HEAD,
    MATCHED,
    MLP,
    MLP_WRITES,
    REMOVED,
    ROUTE,
    SINK,
    TOKEN,
    Part,
    edits_of,
)
from vlm_mech.methods.arbitration.study import AXES, BEYOND, BROUGHT, DIFF, RESTORED, TURNED, WITHHELD
from vlm_mech.methods.gates.manifold import ClaimEdit, EditOf
from vlm_mech.results.claim import LEVEL, SHARE, Claim, Condition, p_of
from vlm_mech.results.claiming import checked_on, least, means_on
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

RESTORES, EASES = "restores the shown answer", "favours the shown answer"
"""Kinds of claims about a part alone; the others are called by the kind of the arbiter. That a part helps, which is
less, is asked where none brings the answer back."""
HALF = 0.5
"""Share of the lost pictures of which the shown answer must be said."""
ENOUGH_TURNED = 0.1
"""Share of their attention that must move in the heads which then bring the shown answer."""
N_EXAMINED = 8
"""Parts of which it is asked what other heads do without them."""
CONTROL = {HEAD: "other heads of the layer", MLP: "the MLPs of other layers", TOKEN: "cutting off other tokens"}
DOES = {
    ROUTE: "diverts the heads that would carry the shown answer",
    LATE_HEAD: "overwrites the shown answer with the usual one",
    MLP_WRITES: "overwrites the shown answer with the usual one",
    SINK: "draws the last token's attention away from what is shown",
}


@dataclass(frozen=True)
class Choice:
    """What the selection half chooses: a part, the kind of arbiter that it would be, and the best part of other kinds.

    `restoring` are all parts that restore the shown answer there, those that move the difference most first;
    `kinds` what the evidence there makes of each of them. `easing` are those that only help it, where none restores.
    """

    kind: str | None = None
    part: Part | None = None
    rivals: tuple[Part, ...] = ()
    restoring: tuple[Part, ...] = ()
    kinds: tuple[str | None, ...] = ()
    easing: tuple[Part, ...] = ()


def _taken(part: Part) -> str:
    if part.what == TOKEN:
        return f"cutting the last token off from {part}"
    return f"removing {part} at the last token"


@dataclass(frozen=True, eq=False)
class _Measured:
    """What claims need to know of a result: which cells it has, and what change of the difference counts."""

    cells: frozenset[Any]
    enough: float

    @classmethod
    def of(cls, result: Result) -> "_Measured":
        return cls(frozenset(result.cells.itertuples(index=False, name=None)), least(result, DIFF.name))

    def has(self, cell: dict[str, object]) -> bool:
        return tuple(cell[axis] for axis in AXES) in self.cells


def _base(known: _Measured, part: Part) -> tuple[Condition, ...]:
    """The difference rises, the shown answer is said in half of the pictures, and in more than what matches brings."""
    said = "share of images then answered with what is shown:"
    found = [
        Condition(DIFF.name, part.cell, "above", known.enough, less="baseline"),
        Condition(RESTORED.name, part.cell, "above", bound=HALF, says=said),
    ]
    matched = {**part.cell, "what": MATCHED}
    if known.has(matched):
        says = f"minus the effect of {CONTROL[part.what]}:"
        found.append(Condition(RESTORED.name, part.cell, "above", SHARE, less=matched, says=says))
    return tuple(found)


def restores(result: Result, parts: Sequence[Part]) -> list[Claim]:
    """Of each part that ablating it restores the shown answer."""
    known = _Measured.of(result)
    return [Claim(RESTORES, part.place, f"{_taken(part)} {RESTORES}", _base(known, part), DIFF.unit) for part in parts]


def eases(result: Result, parts: Sequence[Part]) -> list[Claim]:
    """Of each part that ablating it raises the lead of the shown answer, by more than what matches it."""
    known, found = _Measured.of(result), []
    for part in parts:
        conditions = [Condition(DIFF.name, part.cell, "above", known.enough, less="baseline")]
        matched = {**part.cell, "what": MATCHED}
        if known.has(matched):
            says = f"minus the effect of {CONTROL[part.what]}:"
            conditions.append(Condition(DIFF.name, part.cell, "above", known.enough, less=matched, says=says))
        says = f"{_taken(part)} {EASES}"
        found.append(Claim(EASES, part.place, says, tuple(conditions), DIFF.unit))
    return found


def arbiter(result: Result, choice: Choice) -> Claim:
    """That a part is the arbiter, and of which kind."""
    part, kind, known = choice.part, choice.kind, _Measured.of(result)
    assert part is not None and kind is not None, "something is chosen"
    enough = known.enough
    writes = kind in (LATE_HEAD, MLP_WRITES)
    conditions = [*_base(known, part)]
    if writes:
        says = "fall of the usual answer beyond the rise of the shown one:"
        conditions.append(Condition(WITHHELD.name, part.cell, "below", enough, says=says))
        says = "what it writes itself, minus half of that rise:"
        conditions.append(Condition(BEYOND.name, part.cell, "above", says=says))
    else:
        says = "rise of the shown answer beyond the fall of the usual one:"
        conditions.append(Condition(WITHHELD.name, part.cell, "above", enough, says=says))
    if kind == ROUTE:
        says = "what it writes itself, minus half of that rise:"
        conditions.append(Condition(BEYOND.name, part.cell, "below", says=says))
        says = "what other heads add to the shown answer, minus half of that rise:"
        conditions.append(Condition(BROUGHT.name, part.cell, "above", says=says))
        says = "share of their attention that shifts:"
        conditions.append(Condition(TURNED.name, part.cell, "above", ENOUGH_TURNED, says=says))
    for rival in choice.rivals:
        says = f"minus the effect of {_taken(rival)}:"
        conditions.append(Condition(DIFF.name, part.cell, "above", enough, less=rival.cell, says=says))
    says = f"the arbiter is of the kind {kind}: {part} {DOES[kind]}; {_taken(part)} {RESTORES}"
    return Claim(kind, {**part.place, "kind": kind}, says, tuple(conditions), DIFF.unit)


def pool(result: Result, *, parts: Sequence[Part], choice: Choice) -> tuple[Claim, ...]:
    """That each part restores the shown answer, and the arbiter that was chosen; or that each helps.

    Args:
        parts: all that are ablated.
        choice: made on the selection half.
    """
    if not choice.restoring:
        return tuple(eases(result, parts))
    found = restores(result, parts)
    return (*found, arbiter(result, choice)) if choice.part is not None else tuple(found)


def pool_of(parts: Sequence[Part], choice: Choice) -> Pool:
    """The pool of a result."""
    return partial(pool, parts=tuple(parts), choice=choice)


# The rule


def examined(half: Result, found: Sequence[Part]) -> tuple[Part, ...]:
    """Parts of which it is asked what other heads do without them: the strongest, and those without which the shown
    answer rises by more than the usual one falls.

    Args:
        half: that declares.
        found: those that restore, or help, the strongest first.
    """
    rows = half.table[half.table["what"] == REMOVED]
    means: dict[Any, float] = dict(rows.groupby(["part", "layer", "head"])[WITHHELD.name].mean().items())
    keeps = (part for part in found[1:] if means[part.what, part.layer, part.head] > 0)
    return (*found[:1], *keeps)[:N_EXAMINED]


def declared(half: Result, parts: Sequence[Part], asked: Sequence[Claim], *, seed: int = 0) -> tuple[Part, ...]:
    """The parts whose claims a half declares, those that move the difference most first.

    Args:
        asked: a claim of each part; the first condition is about the difference.
    """
    far = means_on(asked, half)
    both = [(part, claim) for part, claim, mean in zip(parts, asked, far, strict=True) if claim.met_by(mean)]
    told = checked_on([claim for _, claim in both], half, seed=seed) if both else []
    found = [(float(each[0].mean), part) for (part, _), each in zip(both, told, strict=True) if p_of(each) < LEVEL]
    return tuple(part for _, part in sorted(found, key=lambda pair: -pair[0]))


def kind_of(part: Part, means: dict[str, float]) -> str | None:
    """Which kind of arbiter a restoring part would be by its means on some examples; None where it is none.

    Without an arbiter that writes the prior, the usual answer falls and the part itself wrote most of it. Without one
    that keeps the shown answer back, that answer rises: other heads bring it, whose attention moves; or the part is a
    token whose key is cut off. What wakes an arbiter writes neither, nor does the shown answer rise by its like.
    """
    withheld = means[WITHHELD.name] > 0
    if part.what == TOKEN:
        return SINK if withheld else None
    if not withheld:
        writes = LATE_HEAD if part.what == HEAD else MLP_WRITES
        return writes if means[BEYOND.name] > 0 else None
    turns = means[BROUGHT.name] > 0 and means[TURNED.name] > ENOUGH_TURNED and means[BEYOND.name] < 0
    return ROUTE if turns and part.what == HEAD else None


def chosen(half: Result, found: Sequence[Part]) -> Choice:
    """The arbiter that the selection half chooses, among parts that restore the shown answer there.

    Of every kind the part counts that moves the difference most, and of the kinds the one whose part does. A head that
    turns others away comes before a sink that moves it by less than twice as much: its removal leaves the sink where
    it is and undoes it, so that the sink is only where attention rests.

    Args:
        half: with what other heads do without these parts.
        found: the strongest first.
    """
    table = half.table
    kinds, rises, best = list[str | None](), dict[str, float](), dict[str, Part]()
    for part in found:
        rows = table[(table[list(AXES)] == pd.Series(part.cell)).all(axis=1)]
        names = (WITHHELD.name, BEYOND.name, BROUGHT.name, TURNED.name)
        kind = kind_of(part, {name: float(rows[name].mean()) for name in names})
        kinds.append(kind)
        if kind is not None and kind not in best:
            best[kind], rises[kind] = part, float((rows[DIFF.name] - rows[f"{DIFF.name}_baseline"]).mean())
    if ROUTE in best and SINK in best and 2 * rises[ROUTE] >= rises[SINK]:
        del best[SINK], rises[SINK]
    if not best:
        return Choice(restoring=tuple(found), kinds=tuple(kinds))
    kind = max(rises, key=lambda name: rises[name])
    others = tuple(best[name] for name in KINDS if name in best and name != kind)
    return Choice(kind, best[kind], others, tuple(found), tuple(kinds))


# Gates


def edit_of(vlm: "VLM", parts: Sequence[Part], choice: Choice, *, seed: int = 0) -> EditOf:
    """What takes the part of a claim away."""
    by_place = {repr(part.place): part for part in parts}

    def made(claim: Claim, pairs: "Pairs") -> ClaimEdit | str:
        place = {name: value for name, value in claim.about.items() if name != "kind"}
        part = by_place[repr(place)]
        return ClaimEdit(edits_of(vlm, pairs, (part,), seed=seed)[part])

    return made
