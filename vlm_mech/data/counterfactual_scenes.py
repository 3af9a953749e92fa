"""Counterfactual scenes: two that differ in exactly one attribute, so that the same question has another answer."""

import dataclasses
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlm_mech.data.scene_questions import Question, questions
from vlm_mech.data.scene_sampling import sample_scene
from vlm_mech.data.scenes import (
    COLOURS,
    PRIORS,
    SHAPES,
    SIZE,
    Family,
    Scene,
    Thing,
    check_split,
    in_conflict,
    overlapping,
)
from vlm_mech.errors import UsageError


@dataclass(frozen=True)
class ScenePair:
    """A scene, its counterfactual, the question asked of both, and its two answers."""

    scene: Scene
    counterfactual: Scene
    question: Question
    counterfactual_answer: str

    @property
    def attribute(self) -> str:
        """What the counterfactual changes."""
        return differing(self.scene, self.counterfactual)[0]

    @property
    def conflict(self) -> Literal["second"] | None:
        """Whether the counterfactual shows something unusual; the scene itself never does."""
        return "second" if in_conflict(self.counterfactual) else None


def differing(scene: Scene, counterfactual: Scene) -> tuple[str, ...]:
    """Names of the attributes in which two scenes differ, empty when they are the same.

    `order` means that the same things are drawn in another order, `count` that things were added or removed,
    `place` that two things changed places, `ground` that background or grain differ.
    """
    found = [] if (scene.background, scene.grain) == (counterfactual.background, counterfactual.grain) else ["ground"]
    if len(scene.things) != len(counterfactual.things):
        fewer, more = sorted((scene.things, counterfactual.things), key=len)
        return tuple([*found, "count"] if set(fewer) <= set(more) else [*found, "count", "things"])
    if scene.things == counterfactual.things:
        return tuple(found)
    if set(scene.things) == set(counterfactual.things):
        return (*found, "order")
    changes = {
        field.name
        for one, other in zip(scene.things, counterfactual.things, strict=True)
        for field in dataclasses.fields(Thing)
        if getattr(one, field.name) != getattr(other, field.name)
    }
    if changes and changes <= {"x", "y"}:
        places, others = ({(thing.x, thing.y) for thing in each.things} for each in (scene, counterfactual))
        return (*found, "place") if places == others else (*found, *sorted(changes))
    return (*found, *sorted(changes))


def _change(scene: Scene, name: str, **changes: object) -> Scene:
    things = tuple(dataclasses.replace(thing, **changes) if thing.kind == name else thing for thing in scene.things)
    return dataclasses.replace(scene, things=things)


def _free_colours(scene: Scene) -> list[str]:
    """Colours that nothing in the scene has, so that a change of colour makes nothing ambiguous."""
    used = {colour for thing in scene.things for colour in thing.colours}
    return [colour for colour in COLOURS if colour not in used]


def _recoloured(scene: Scene, asked: Question) -> list[Scene]:
    return [_change(scene, asked.about[0], colours=(colour,)) for colour in _free_colours(scene)]


def _renamed(scene: Scene, asked: Question) -> list[Scene]:
    return _other_kinds(scene, asked.about[0])


def _other_renamed(scene: Scene, asked: Question) -> list[Scene]:
    return _other_kinds(scene, asked.about[1])


def _other_kinds(scene: Scene, name: str) -> list[Scene]:
    present = {thing.kind for thing in scene.things}
    return [_change(scene, name, kind=kind) for kind in SHAPES if kind not in present]


def _swapped_places(scene: Scene, asked: Question) -> list[Scene]:
    one, other = (scene.of_kind(kind)[0] for kind in asked.about)
    moved = {one: dataclasses.replace(one, x=other.x, y=other.y), other: dataclasses.replace(other, x=one.x, y=one.y)}
    things = tuple(moved.get(thing, thing) for thing in scene.things)
    fits = all(thing.length // 2 < value < SIZE - thing.length // 2 for thing in things for value in (thing.x, thing.y))
    clear = all(not overlapping(a, b) for number, a in enumerate(things) for b in things[number + 1 :])
    return [dataclasses.replace(scene, things=things)] if fits and clear else []


def _reordered(scene: Scene, asked: Question) -> list[Scene]:
    return [dataclasses.replace(scene, things=scene.things[::-1])] if len(scene.things) == 2 else []


def _one_less(scene: Scene, asked: Question) -> list[Scene]:
    found = []
    for thing in scene.of_kind(asked.about[0]):
        rest = tuple(other for other in scene.things if other is not thing)
        if any(other.kind == thing.kind for other in rest):
            found.append(dataclasses.replace(scene, things=rest))
    return found


def _taken_away(scene: Scene, asked: Question) -> list[Scene]:
    rest = tuple(thing for thing in scene.things if thing.kind != asked.about[0])
    return [dataclasses.replace(scene, things=rest)] if rest and len(rest) < len(scene.things) else []


def _part_colours_swapped(scene: Scene, asked: Question) -> list[Scene]:
    thing = scene.of_kind(asked.about[0])[0]
    here = thing.parts.index(asked.about[1])
    found = []
    for there in range(len(thing.parts)):
        colours = list(thing.colours)
        colours[here], colours[there] = colours[there], colours[here]
        found.append(_change(scene, thing.kind, colours=tuple(colours)))
    return found


@dataclass(frozen=True)
class PairKind:
    """How pairs of one kind are made: scenes of which families, which question, which change."""

    families: tuple[Family, ...]
    type: str
    change: Callable[[Scene, Question], list[Scene]]
    fits: Callable[[Scene, Question], bool] = lambda scene, asked: True


def _no_prior(scene: Scene, asked: Question) -> bool:
    return asked.about[0] in SHAPES


def _there_by_colour(scene: Scene, asked: Question) -> bool:
    return asked.answer == "yes" and len(asked.text.split()) == 4


PAIR_SETS: dict[str, tuple[PairKind, ...]] = {
    "colour": (PairKind(("single", "few"), "colour", _recoloured, _no_prior),),
    "colour-conflict": (
        PairKind(("single", "few"), "colour", _recoloured, lambda scene, asked: asked.about[0] in PRIORS),
    ),
    "kind": (PairKind(("single", "few"), "kind", _renamed, _no_prior),),
    "presence": (PairKind(("few",), "presence", _taken_away, _there_by_colour),),
    "left-right": (PairKind(("few",), "left-right", _swapped_places),),
    "above-below": (PairKind(("few",), "above-below", _swapped_places),),
    "front-behind": (PairKind(("occlusion",), "front-behind", _reordered),),
    "count": (PairKind(("count",), "count", _one_less),),
    "part": (PairKind(("parts",), "part", _part_colours_swapped),),
    "phrases": (
        PairKind(("few",), "where", _swapped_places),
        PairKind(("few",), "neighbour", _recoloured, _no_prior),
        PairKind(("few",), "where", _other_renamed),
        PairKind(("few",), "neighbour", _renamed, _no_prior),
    ),
}
"""Sets of counterfactual pairs by name, each of one kind or of several in turn.

In `colour-conflict` the scene is usual and its counterfactual in conflict. The answers of `phrases` have several words;
those of a pair part at the first ("left of the star", "right of the star"), at the colour ("the red heart", "the blue
heart"), or at the last.
"""


def counterfactuals(kind: PairKind, scene: Scene, asked: Question) -> list[tuple[Scene, str]]:
    """Every counterfactual of the kind's change in which the same question has another answer, with that answer."""
    found = []
    for counterfactual in kind.change(scene, asked):
        answers = {other.answer for other in questions(counterfactual, (asked.type,)) if other.text == asked.text}
        if kind.type == "presence":
            answers = {"no"}
        if len(answers) == 1 and answers != {asked.answer} and len(differing(scene, counterfactual)) == 1:
            found.append((counterfactual, answers.pop()))
    return found


@functools.lru_cache(maxsize=2)
def sample_pairs(name: str, n: int, *, seed: int, split: str) -> tuple[ScenePair, ...]:
    """Pairs of a set whose two scenes both belong to the split; the same seed gives the same pairs everywhere.

    What was drawn last is kept: masks and captions are asked for after the pairs.
    """
    if name not in PAIR_SETS:
        raise UsageError(f"pair set {name!r} is not known; use one of {', '.join(PAIR_SETS)}")
    check_split(split)
    made: list[ScenePair] = []
    kinds, rng = PAIR_SETS[name], random.Random(f"{name}/{seed}/{split}")
    while len(made) < n:
        kind = kinds[len(made) % len(kinds)]
        scene = sample_scene(rng.choice(kind.families), rng)
        if scene.split != split or in_conflict(scene):
            continue
        asked = [question for question in questions(scene, (kind.type,)) if kind.fits(scene, question)]
        if not asked:
            continue
        question = rng.choice(asked)
        found = [pair for pair in counterfactuals(kind, scene, question) if pair[0].split == split]
        if found:
            counterfactual, answer = rng.choice(found)
            made.append(ScenePair(scene, counterfactual, question, answer))
    return tuple(made)
