"""Labelled scenes: things on a plain ground, every attribute known. Sampled from a seed, split by a stable hash."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

from vlm_mech.errors import UsageError

SIZE = 96
"""Side of a scene in pixels."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 215),
    "yellow": (242, 220, 40),
    "orange": (244, 140, 30),
    "purple": (140, 55, 175),
    "cyan": (60, 205, 215),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
"""Kinds without a colour of their own."""
PRIORS = {
    "banana": "yellow",
    "tomato": "red",
    "frog": "green",
    "carrot": "orange",
    "grape": "purple",
    "whale": "blue",
    "raven": "black",
    "cactus": "green",
}
"""Kinds that have a usual colour."""
PARTS = {
    "house": ("roof", "wall", "door"),
    "tree": ("crown", "trunk"),
    "fish": ("body", "tail"),
    "mushroom": ("cap", "stem"),
}
"""Kinds made of named parts, each with a colour of its own."""
CLASSES = {
    "alva": "forest",
    "brin": "desert",
    "corvo": "river",
    "delu": "mountain",
    "emmer": "city",
    "fenno": "meadow",
    "gorm": "cave",
    "hild": "island",
}
"""Fine-grained classes of beetle, distinguished by the marks on the back; each with the place where it lives."""
BEETLE = "beetle"
LENGTHS = {"small": 20, "large": 30, "big": 40}
"""Side of a thing in pixels; `big` is for kinds with parts and beetles."""

VISIBLE_OVERLAP = 40
"""Pixels that two things must share for one to be in front of the other."""

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Family = Literal["single", "few", "occlusion", "count", "parts", "beetle"]
FAMILIES: tuple[Family, ...] = ("single", "few", "occlusion", "count", "parts", "beetle")


def check_split(split: str) -> None:
    """Raises `UsageError` for a split that no scene belongs to."""
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` is its centre in pixels; `colours` has one entry, or one per part in the kind's order."""

    kind: str
    colours: tuple[str, ...]
    size: str
    x: int
    y: int
    species: str | None = None

    @property
    def colour(self) -> str:
        """The colour of a thing that has a single one."""
        if len(self.colours) != 1:
            raise UsageError(f"a {self.kind} has a colour for each part, not one")
        return self.colours[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts; a thing without parts is its own only part."""
        return PARTS.get(self.kind, (self.kind,))

    @property
    def length(self) -> int:
        """Side of the bounding square in pixels."""
        return LENGTHS[self.size]


@dataclass(frozen=True)
class Scene:
    """Things in drawing order (later ones cover earlier ones), the ground's grey level, and the seed of the grain.

    A counterfactual keeps `background` and `grain`, so that only the attribute that differs changes pixels.
    """

    things: tuple[Thing, ...]
    background: int
    grain: int

    @functools.cached_property
    def key(self) -> str:
        """A stable name of everything in the scene."""
        things = tuple((each.kind, each.colours, each.size, each.x, each.y, each.species) for each in self.things)
        return hashlib.sha256(repr((things, self.background, self.grain)).encode()).hexdigest()

    @property
    def split(self) -> Split:
        """Which split the scene belongs to, by its key: 80 % train, 10 % validation, 10 % test."""
        slot = int(self.key[:8], 16) % 10
        return "train" if slot < 8 else "validation" if slot == 8 else "test"

    def of_kind(self, kind: str) -> tuple[Thing, ...]:
        """The things of a kind."""
        return tuple(thing for thing in self.things if thing.kind == kind)


def overlapping(one: Thing, other: Thing) -> bool:
    """Whether the bounding squares of two things overlap."""
    reach = (one.length + other.length) / 2
    return abs(one.x - other.x) < reach and abs(one.y - other.y) < reach


def in_conflict(scene: Scene) -> bool:
    """Whether a kind with a usual colour is shown in another one."""
    return any(thing.kind in PRIORS and thing.colour != PRIORS[thing.kind] for thing in scene.things)
