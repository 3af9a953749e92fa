"""Scenes sampled from a seed, family by family, and split by a stable hash."""

import dataclasses
import random
from collections.abc import Iterator

from vlm_mech.data.render import shared_pixels
from vlm_mech.data.scenes import (
    BEETLE,
    CLASSES,
    COLOURS,
    FAMILIES,
    PARTS,
    PRIORS,
    SHAPES,
    SIZE,
    VISIBLE_OVERLAP,
    Scene,
    Thing,
    check_split,
    overlapping,
)
from vlm_mech.errors import UsageError


def _colour(kind: str, rng: random.Random, conflict: float) -> str:
    usual = PRIORS.get(kind)
    if usual is None:
        return rng.choice(list(COLOURS))
    if rng.random() < conflict:
        return rng.choice([colour for colour in COLOURS if colour != usual])
    return usual


def _thing(kind: str, rng: random.Random, conflict: float, size: str | None = None) -> Thing:
    species = None
    if kind in PARTS:
        colours = tuple(rng.sample(list(COLOURS), len(PARTS[kind])))
        size = "big"
    else:
        colours = (_colour(kind, rng, conflict),)
        if kind == BEETLE:
            colours = (rng.choice([colour for colour in COLOURS if colour != "black"]),)
            species, size = rng.choice(list(CLASSES)), "big"
    size = size or rng.choice(("small", "large"))
    return _moved(Thing(kind, colours, size, 0, 0, species), rng)


def _moved(thing: Thing, rng: random.Random) -> Thing:
    margin = thing.length // 2 + 1
    return dataclasses.replace(thing, x=rng.randint(margin, SIZE - margin), y=rng.randint(margin, SIZE - margin))


def _placed(things: list[Thing], rng: random.Random) -> list[Thing] | None:
    """The things moved apart, or None when no room was found."""
    done: list[Thing] = []
    for thing in things:
        for _ in range(60):
            moved = _moved(thing, rng)
            if not any(overlapping(moved, other) for other in done):
                done.append(moved)
                break
        else:
            return None
    return done


def _plain_kinds(rng: random.Random, n: int) -> list[str]:
    return rng.sample([*SHAPES, *PRIORS], n)


def _occluding(rng: random.Random, conflict: float) -> list[Thing]:
    """Two large things of different colours, the second in front of the first and hiding a good piece of it."""
    while True:
        back, front = (_thing(kind, rng, conflict, "large") for kind in _plain_kinds(rng, 2))
        if back.colours == front.colours:
            continue
        # Far enough apart to recognise both, close enough for a clear overlap.
        dx, dy = rng.choice((-1, 1)) * rng.randint(11, 17), rng.choice((-1, 1)) * rng.randint(0, 10)
        x, y = back.x + dx, back.y + dy
        margin = front.length // 2 + 1
        front = dataclasses.replace(front, x=x, y=y)
        inside = margin <= x <= SIZE - margin and margin <= y <= SIZE - margin
        if inside and shared_pixels(back, front) >= VISIBLE_OVERLAP:
            return [back, front]


def _things(family: str, rng: random.Random, conflict: float) -> list[Thing] | None:
    if family == "single":
        return [_thing(_plain_kinds(rng, 1)[0], rng, conflict)]
    if family == "few":
        kinds = _plain_kinds(rng, rng.choice((2, 2, 3)))
        return _placed([_thing(kind, rng, conflict) for kind in kinds], rng)
    if family == "occlusion":
        return _occluding(rng, conflict)
    if family == "count":
        kind, *others = _plain_kinds(rng, 1 + rng.choice((0, 1, 1)))
        same = [_thing(kind, rng, conflict, "small") for _ in range(rng.randint(1, 4))]
        return _placed(same + [_thing(other, rng, conflict, "small") for other in others], rng)
    main = rng.choice(list(PARTS)) if family == "parts" else BEETLE
    others = _plain_kinds(rng, rng.choice((0, 1)))
    return _placed([_thing(main, rng, conflict)] + [_thing(other, rng, conflict, "small") for other in others], rng)


def sample_scene(family: str, rng: random.Random, *, conflict: float = 0.0) -> Scene:
    """One scene of a family: `single`, `few`, `occlusion`, `count`, `parts` or `beetle`.

    Args:
        conflict: probability that a kind with a usual colour is given another one.
    """
    if family not in FAMILIES:
        raise UsageError(f"scene family {family!r} is not known; use one of {', '.join(FAMILIES)}")
    things = None
    while things is None:
        things = _things(family, rng, conflict)
    return Scene(tuple(things), rng.randint(205, 250), rng.getrandbits(32))


def sample_scenes(
    n: int, *, seed: int, split: str, families: tuple[str, ...] = FAMILIES, conflict: float = 0.0
) -> Iterator[Scene]:
    """Scenes of a split, families in equal shares; the same seed gives the same scenes everywhere."""
    check_split(split)
    rng = random.Random(f"{seed}/{split}")
    made = 0
    while made < n:
        scene = sample_scene(families[made % len(families)], rng, conflict=conflict)
        if scene.split == split:
            made += 1
            yield scene
