"""Recipes of planted arbiters drawn at random, by kinds."""

import dataclasses
import random

from vlm_mech.errors import UsageError
from vlm_mech.organism.arbiter_recipe import ARBITER_KINDS, ARBITERS, Arbiter, ArbiterRecipe, Mechanism
from vlm_mech.organism.planted_recipe import COLOURS, OBJECTS, Head, Recipe

_Place = tuple[int, int]


def draw_arbiter(seed: int, kind: str) -> ArbiterRecipe:
    """A random recipe of a kind; the same seed and kind give the same one.

    6 to 14 layers of 4 or 6 heads; the colour is brought by one or two heads, on the direct route or over the
    question's object; two decoys. In half of the recipes with an arbiter it is also what answers the other question,
    else that is done by a mechanism of another kind; every mechanism left over is there, dormant, in half of the
    recipes. 2 to 5 of six objects are of conviction, in a fifth of the recipes all. In nulls nothing is lost to an
    arbiter: of `none` everything is said as shown, of `blind` nothing of the picture is read.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in ARBITER_KINDS:
        raise UsageError(f"kind {kind!r} is not known; use one of {', '.join(ARBITER_KINDS)}")
    rng = random.Random(f"arbiter/{kind}/{seed}")
    n_layers, n_heads = rng.randint(6, 14), rng.choice((4, 6))
    order = rng.sample(ARBITERS, len(ARBITERS))
    arbiter = kind if kind in ARBITERS else None
    switch = arbiter if arbiter is not None and rng.random() < 0.5 else next(each for each in order if each != arbiter)
    there = [each for each in ARBITERS if each in (arbiter, switch) or rng.random() < 0.5]
    places = [(layer, head) for layer in range(1, n_layers) for head in range(n_heads)]
    free = _Free(rng, rng.sample(places, len(places)))
    two_hop, n_bring = rng.random() < 0.4, rng.choice((1, 1, 2))
    first = rng.randint(3 if two_hop else 2, n_layers - 3)
    bring = sorted(free.take(first, min(first + n_bring - 1, n_layers - 2)) for _ in range(n_bring))
    share = rng.uniform(0.4, 0.6)
    weights = (1.0,) if n_bring == 1 else (share, 1 - share)
    bringers = tuple(Head(*place, weight) for place, weight in zip(bring, weights, strict=True))
    reads = (Head(*free.take(1, bring[0][0] - 1)),) if two_hop else bringers
    made = tuple(_mechanism(rng, free, each, bring, n_layers) for each in there)
    default = Head(*free.take(1, n_layers - 1), rng.uniform(0.35, 0.5))
    base = Recipe(
        seed=seed,
        n_layers=n_layers,
        n_heads=n_heads,
        reads=reads,
        carries=bringers if two_hop else (),
        decoys=tuple(Head(*free.take(1, n_layers - 1), 0.0) for _ in range(2)),
        blind=kind == "blind",
        n_cells=rng.randint(1, 3),
        jitter=rng.uniform(0, 0.1),
        texture=rng.uniform(0, 0.3),
        decoy_gain=rng.uniform(0, 0.04),
        noise=10 ** rng.uniform(-3.7, -3.2),
        priors=tuple(rng.sample(range(len(COLOURS)), len(COLOURS))),
    )
    n_lost = len(OBJECTS) if rng.random() < 0.2 else rng.randint(2, len(OBJECTS) - 1)
    lost = tuple(sorted(rng.sample(range(len(OBJECTS)), n_lost))) if arbiter is not None else ()
    return ArbiterRecipe(base, default, tuple(_woken(each, arbiter, switch) for each in made), lost)


def _woken(made: Mechanism, arbiter: str | None, switch: str | None) -> Mechanism:
    by_object, by_wording = made.kind == arbiter, made.kind == switch
    wakes = (("object",) if by_object else ()) + (("wording",) if by_wording else ())
    return dataclasses.replace(made, wakes=wakes)


class _Free:
    """Places of heads that nothing stands at yet, in random order."""

    def __init__(self, rng: random.Random, places: list[_Place]) -> None:
        self.rng, self.places = rng, places

    def take(self, low: int, high: int) -> _Place:
        """One at layers low to high: a layer drawn first, so that all are equally likely."""
        layers = sorted({layer for layer, _ in self.places if low <= layer <= high})
        layer = self.rng.choice(layers)
        found = next(place for place in self.places if place[0] == layer)
        self.places.remove(found)
        return found


def _mechanism(rng: random.Random, free: _Free, kind: Arbiter, bring: list[_Place], n_layers: int) -> Mechanism:
    lowest, highest = bring[0][0], bring[-1][0]
    if kind in ("route", "sink"):
        size = rng.uniform(1.3, 2.0) if kind == "route" else rng.uniform(0.04, 0.12)
        return Mechanism(kind, Head(*free.take(1, lowest - 1)), size)
    later = rng.randint(highest + 1, n_layers - 1)
    cue = Head(*free.take(1, later - 1))
    size = rng.uniform(2.0, 3.5)
    if kind == "late head":
        return Mechanism(kind, cue, size, Head(*free.take(later, later)))
    return Mechanism(kind, cue, size, Head(*free.take(1, later)), later)
