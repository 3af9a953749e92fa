"""Questions about a scene, with answers of one word or of several, and captions of it.

Every question is unambiguous in its scene: things are named by kind only when there is one of that kind, relations are
asked only with a clear margin.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from vlm_mech.data.scenes import BEETLE, CLASSES, COLOURS, PARTS, PRIORS, SHAPES, SIZE, Scene, Thing, overlapping
from vlm_mech.errors import UsageError

NUMBERS = ("one", "two", "three", "four")
MARGIN = 14
"""Pixels by which two centres must differ for left/right and above/below to be asked."""
PLAIN = (*SHAPES, *PRIORS)


@dataclass(frozen=True)
class Question:
    """A question, its answer, the options the answer is one of, and what it is about (names of kinds)."""

    text: str
    answer: str
    type: str
    options: tuple[str, ...]
    about: tuple[str, ...]


def _unique(scene: Scene) -> list[Thing]:
    """Things that are the only one of their kind."""
    return [thing for thing in scene.things if len(scene.of_kind(thing.kind)) == 1]


def _plain(scene: Scene) -> list[Thing]:
    return [thing for thing in _unique(scene) if thing.kind in PLAIN]


def _colours_in(scene: Scene) -> list[str]:
    return [colour for thing in scene.things for colour in thing.colours]


def _colour(scene: Scene) -> list[Question]:
    return [
        Question(f"what colour is the {thing.kind}?", thing.colour, "colour", tuple(COLOURS), (thing.kind,))
        for thing in _unique(scene)
        if thing.kind not in PARTS
    ]


def _kind(scene: Scene) -> list[Question]:
    present = _colours_in(scene)
    return [
        Question(f"what is the {thing.colour} object?", thing.kind, "kind", (*PLAIN, BEETLE), (thing.kind,))
        for thing in scene.things
        if thing.kind not in PARTS and present.count(thing.colour) == 1
    ]


def _presence(scene: Scene) -> list[Question]:
    """As many `no` as `yes`; some `no` name a kind that is there, in a colour that is there too."""
    pairs = {(thing.kind, thing.colour) for thing in scene.things if thing.kind not in PARTS}
    kinds, colours = {thing.kind for thing in scene.things}, sorted(set(_colours_in(scene)))
    absent = [kind for kind in PLAIN if kind not in kinds]
    rng = random.Random(scene.key)
    asked = []
    for kind, colour in sorted(pairs):
        others = [other for other in COLOURS if (kind, other) not in pairs]
        swapped = [other for other in colours if (kind, other) not in pairs] or others
        asked += [(f"{colour} {kind}", "yes"), (f"{rng.choice(swapped)} {kind}", "no")]
        missing = rng.choice(absent)
        asked += [(f"{colour} {missing}", "no"), (kind, "yes"), (missing, "no"), (f"{colour} {kind}", "yes")]
    return [
        Question(f"is there any {what}?", answer, "presence", ("yes", "no"), (what.split()[-1],))
        for what, answer in asked
    ]


def _relations(scene: Scene, axis: str) -> list[Question]:
    asked, name = [], "left-right" if axis == "x" else "above-below"
    first, second = ("left", "right") if axis == "x" else ("above", "below")
    phrase = f"{first} or {second}" + (" of" if axis == "x" else "")
    for one in _unique(scene):
        for other in _unique(scene):
            gap = getattr(other, axis) - getattr(one, axis)
            if one is not other and abs(gap) >= MARGIN:
                text = f"is the {one.kind} {phrase} the {other.kind}?"
                answer = first if gap > 0 else second
                asked.append(Question(text, answer, name, (first, second), (one.kind, other.kind)))
    return asked


def _front_behind(scene: Scene) -> list[Question]:
    asked = []
    for number, back in enumerate(scene.things):
        for front in scene.things[number + 1 :]:
            if overlapping(back, front) and back in _unique(scene) and front in _unique(scene):
                for one, other, answer in ((front, back, "front"), (back, front, "behind")):
                    text = f"is the {one.kind} in front of or behind the {other.kind}?"
                    asked.append(Question(text, answer, "front-behind", ("front", "behind"), (one.kind, other.kind)))
    return asked


def _count(scene: Scene) -> list[Question]:
    asked = []
    for kind in sorted({thing.kind for thing in scene.things if thing.kind in PLAIN}):
        n = len(scene.of_kind(kind))
        if n <= len(NUMBERS):
            asked.append(Question(f"how many {kind} objects are there?", NUMBERS[n - 1], "count", NUMBERS, (kind,)))
    return asked


def _part(scene: Scene) -> list[Question]:
    return [
        Question(f"which part of the {thing.kind} is {colour}?", part, "part", thing.parts, (thing.kind, part))
        for thing in _unique(scene)
        if thing.kind in PARTS
        for part, colour in zip(thing.parts, thing.colours, strict=True)
    ]


def _part_colour(scene: Scene) -> list[Question]:
    return [
        Question(
            f"what colour is the {part} of the {thing.kind}?", colour, "part-colour", tuple(COLOURS), (thing.kind, part)
        )
        for thing in _unique(scene)
        if thing.kind in PARTS
        for part, colour in zip(thing.parts, thing.colours, strict=True)
    ]


def _half(scene: Scene) -> list[Question]:
    asked = []
    for thing in _unique(scene):
        for value, (first, second) in ((thing.x, ("left", "right")), (thing.y, ("top", "bottom"))):
            if abs(value - SIZE / 2) >= MARGIN / 2:
                text = f"is the {thing.kind} in the {first} or {second} half?"
                answer = first if value < SIZE / 2 else second
                asked.append(Question(text, answer, "half", (first, second), (thing.kind,)))
    return asked


def _size(scene: Scene) -> list[Question]:
    return [
        Question(f"is the {thing.kind} large or small?", thing.size, "size", ("large", "small"), (thing.kind,))
        for thing in _plain(scene)
    ]


def _species(scene: Scene) -> list[Question]:
    return [
        Question("what is the name of the beetle?", thing.species, "class", tuple(CLASSES), (BEETLE,))
        for thing in _unique(scene)
        if thing.species is not None
    ]


def _two_hop(scene: Scene) -> list[Question]:
    return [
        Question("where does the beetle live?", CLASSES[thing.species], "two-hop", tuple(CLASSES.values()), (BEETLE,))
        for thing in _unique(scene)
        if thing.species is not None
    ]


SIDES = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
"""What a thing can be to another: along which axis, and in which direction."""


def _told_apart(scene: Scene) -> bool:
    """Whether all things are of different kinds with one colour each, and none touches another."""
    apart = not any(overlapping(one, other) for one, other in itertools.combinations(scene.things, 2))
    return apart and len(_plain(scene)) == len(scene.things)


def _gap(one: Thing, other: Thing, side: str) -> int:
    """Pixels by which one thing lies further to this side than the other."""
    axis, sign = SIDES[side]
    return sign * (getattr(one, axis) - getattr(other, axis))


def _where(scene: Scene) -> list[Question]:
    """Of two things alone, so that there is one other to be named; on the side where it lies by far the most."""
    if len(scene.things) != 2 or not _told_apart(scene):
        return []
    asked = []
    for one, other in (scene.things, scene.things[::-1]):
        first, second = sorted(((_gap(one, other, side), side) for side in SIDES), reverse=True)[:2]
        if first[0] - second[0] >= MARGIN:
            options = tuple(f"{each} the {kind}" for each in SIDES for kind in PLAIN if kind != one.kind)
            text, answer = f"where is the {one.kind}?", f"{first[1]} the {other.kind}"
            asked.append(Question(text, answer, "where", options, (one.kind, other.kind)))
    return asked


def _neighbour(scene: Scene) -> list[Question]:
    """Where one thing is clearly on that side of another and all the rest is clearly not."""
    asked = []
    for other, side in itertools.product(scene.things if _told_apart(scene) else (), SIDES):
        gaps = {thing: _gap(thing, other, side) for thing in scene.things if thing is not other}
        there = [thing for thing, gap in gaps.items() if gap > 0]
        if len(there) == 1 and all(abs(gap) >= MARGIN for gap in gaps.values()):
            options = tuple(f"the {colour} {kind}" for colour in COLOURS for kind in PLAIN if kind != other.kind)
            text, answer = f"what is {side} the {other.kind}?", f"the {there[0].colour} {there[0].kind}"
            asked.append(Question(text, answer, "neighbour", options, (there[0].kind, other.kind)))
    return asked


ASKED: dict[str, Callable[[Scene], list[Question]]] = {
    "colour": _colour,
    "kind": _kind,
    "presence": _presence,
    "left-right": lambda scene: _relations(scene, "x"),
    "above-below": lambda scene: _relations(scene, "y"),
    "front-behind": _front_behind,
    "count": _count,
    "part": _part,
    "part-colour": _part_colour,
    "half": _half,
    "size": _size,
    "class": _species,
    "two-hop": _two_hop,
}
"""Types of question about a picture with a one-word answer, and what makes them."""
PHRASED: dict[str, Callable[[Scene], list[Question]]] = {"where": _where, "neighbour": _neighbour}
"""The same with answers of several words: "left of the star", "the red heart"."""


def questions(scene: Scene, types: tuple[str, ...] | None = None) -> tuple[Question, ...]:
    """Every question of the types (by default all those with one-word answers) that has one answer in this scene."""
    known = ASKED | PHRASED
    for name in types or ():
        if name not in known:
            raise UsageError(f"question type {name!r} is not known; use one of {', '.join(known)}")
    wanted = ASKED if types is None else types
    return tuple(question for name, ask in known.items() if name in wanted for question in ask(scene))


def facts() -> tuple[Question, ...]:
    """Questions that need no picture: where each class of beetle lives."""
    return tuple(
        Question(f"where does the {species} live?", place, "fact", tuple(CLASSES.values()), (species,))
        for species, place in CLASSES.items()
    )


def prior_questions() -> tuple[Question, ...]:
    """The colour question about every kind with a usual colour, answered by that colour."""
    return tuple(
        Question(f"what colour is the {kind}?", colour, "prior", tuple(COLOURS), (kind,))
        for kind, colour in PRIORS.items()
    )


def _phrase(thing: Thing, rng: random.Random) -> str:
    if thing.kind in PARTS:
        parts = [f"a {colour} {part}" for part, colour in zip(thing.parts, thing.colours, strict=True)]
        return f"a {thing.kind} with " + " and ".join(parts)
    name = thing.species if thing.species is not None and rng.random() < 0.7 else thing.kind
    size = f"{thing.size} " if thing.size != "big" and rng.random() < 0.3 else ""
    return f"a {size}{thing.colour} {name}"


def caption(scene: Scene, rng: random.Random, *, relation: float = 0.05) -> str:
    """A caption that names every thing in random order, as a web caption might.

    Occlusion is always told; left and right only with probability `relation`.
    """
    things = list(scene.things)
    if len(things) == 2 and overlapping(*things):
        back, front = (_phrase(thing, rng) for thing in things)
        return f"{front} in front of {back}" if rng.random() < 0.5 else f"{back} behind {front}"
    kinds = [thing.kind for thing in things]
    repeated = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    phrases = []
    if repeated is not None:
        phrases.append(f"{NUMBERS[kinds.count(repeated) - 1]} {repeated} objects")
        things = [thing for thing in things if thing.kind != repeated]
    elif len(things) == 2 and abs(things[0].x - things[1].x) >= MARGIN and rng.random() < relation:
        left, right = (_phrase(thing, rng) for thing in sorted(things, key=lambda thing: thing.x))
        return f"{left} left of {right}" if rng.random() < 0.5 else f"{right} right of {left}"
    phrases += [_phrase(thing, rng) for thing in things]
    rng.shuffle(phrases)
    return " and ".join(phrases)
