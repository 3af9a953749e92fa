"""Recipes of planted models drawn at random, by kinds."""

import dataclasses
import random

from vlm_mech.errors import UsageError
from vlm_mech.organism.planted_recipe import COLOURS, OBJECTS, Answer, Head, Neurons, Recipe, matched_null

TRAPS = ("dormant path", "sink", "mlp prior", "neighbouring readers", "two backups")
KINDS = ("plain", "null", "hard", "backup", *TRAPS)


def draw(seed: int, kind: str = "plain", *, answer: Answer = "word") -> Recipe:
    """A random recipe; the same seed and kind give the same one, however its answers are written.

    `plain`: one reading head, either route, strong suppression in 40 % of them, two decoys. `null`: the matched null of
    the plain recipe of that seed. `backup`: the direct route with a backup above it. `hard`: reading spread over three
    to five heads with unequal weights, colours superposed and spread over three patches, decoys that write noise,
    partial suppression in half of them, and an accuracy of 87.5 % aimed at.

    Traps (see `Recipe`), on the direct route with two decoys unless said otherwise. `dormant path`: a copy above or
    below the reading head, and units awake where the two differ. `sink`: either route, two heads that attend to one
    patch. `mlp prior`: a strong one, in half of them the object's, in the others the same for all. `neighbouring
    readers`: two to four heads in as many layers in a row, of similar weights. `two backups`: a reading head and two
    that stand in.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in KINDS:
        raise UsageError(f"kind {kind!r} is not known; use one of {', '.join(KINDS)}")
    if kind == "null":
        return matched_null(draw(seed, "plain", answer=answer))
    if answer != "word":
        return dataclasses.replace(draw(seed, kind), answer=answer)
    rng = random.Random(f"{kind}/{seed}")
    n_layers, n_heads = rng.randint(6, 16), rng.choice((4, 6))
    common = {"seed": seed, "n_layers": n_layers, "n_heads": n_heads}
    priors = tuple(rng.sample(range(len(COLOURS)), len(COLOURS)))
    if kind in TRAPS:
        return Recipe(**{**common, "priors": priors} | _trap(rng, kind, n_layers, n_heads))
    if kind == "hard":
        return Recipe(**common, **_hard(rng, n_layers, n_heads), priors=priors)
    two_hop = kind == "plain" and rng.random() < 0.5
    layers = sorted(rng.sample(range(1, n_layers), 3))
    reads, rest = (Head(layers[0], rng.randrange(n_heads)),), layers[1:]
    carries = (Head(rest.pop(0), rng.randrange(n_heads)),) if two_hop else ()
    suppressed = kind == "plain" and rng.random() < 0.4
    later = Head(rest.pop(0), rng.randrange(n_heads), 2.5 if suppressed else 0.0)
    roles = {"suppressor": later if suppressed else None, "backup": later if kind == "backup" else None}
    free = _free(rng, n_layers, n_heads, (*reads, *carries, later))
    return Recipe(**common, reads=reads, carries=carries, **roles, decoys=free[:2], priors=priors)


def _hard(rng: random.Random, n_layers: int, n_heads: int) -> dict:
    layers = sorted(rng.sample(range(1, n_layers), 5))
    two_hop = rng.random() < 0.5
    n_reads = rng.randint(3, 5)
    reads = _spread(rng, n_heads, layers[:2] if two_hop else layers[:4], n_reads)
    carries = _spread(rng, n_heads, layers[2:4], 2) if two_hop else ()
    suppressor = Head(layers[4], rng.randrange(n_heads), rng.uniform(0.2, 0.4)) if rng.random() < 0.5 else None
    taken = (*reads, *carries, *((suppressor,) if suppressor else ()))
    hardships = {"n_cells": 3, "superposed": True, "jitter": 0.1, "texture": 0.3, "target": 0.875}
    decoys = _free(rng, n_layers, n_heads, taken)[:3]
    return {"reads": reads, "carries": carries, "suppressor": suppressor, "decoys": decoys, **hardships}


def _trap(rng: random.Random, kind: str, n_layers: int, n_heads: int) -> dict:
    layers = sorted(rng.sample(range(1, n_layers), 3))
    one, two, three = (Head(layer, rng.randrange(n_heads)) for layer in layers)
    made: dict = {"reads": (one,)}
    taken = [one]
    if kind == "dormant path":
        read, copy = rng.sample((one, two), 2)
        made = {"reads": (read,), "copy": copy, "dormant": Neurons(three.layer, rng.uniform(1.2, 1.8))}
        taken = [read, copy]
    elif kind == "mlp prior":
        made["mlp_prior"] = Neurons(three.layer, 2.5)
        if rng.random() < 0.5:
            made["fetch"], taken = two, [one, two]
        else:
            made["priors"] = (rng.randrange(len(COLOURS)),) * len(OBJECTS)
    elif kind == "neighbouring readers":
        n = rng.randint(2, 4)
        first, raw = rng.randint(1, n_layers - n), [rng.uniform(0.7, 1.3) for _ in range(n)]
        places = ((first + number, rng.randrange(n_heads)) for number in range(n))
        made["reads"] = tuple(Head(*place, each / sum(raw)) for place, each in zip(places, raw, strict=True))
        taken = list(made["reads"])
    elif kind == "two backups":
        made |= {"backup": two, "second_backup": three}
        taken = [one, two, three]
    elif rng.random() < 0.5:
        made["carries"], taken = (two,), [one, two]
    free = _free(rng, n_layers, n_heads, tuple(taken))
    return made | {"decoys": free[:2]} | ({"sinks": free[2:4]} if kind == "sink" else {})


def _spread(rng: random.Random, n_heads: int, layers: list[int], n: int) -> tuple[Head, ...]:
    """Heads at some of these layers, each about two thirds as strong as the next stronger one."""
    places = rng.sample([(layer, head) for layer in layers for head in range(n_heads)], n)
    raw = [rng.uniform(0.55, 0.75) ** rank for rank in range(n)]
    return tuple(Head(*place, each / sum(raw)) for place, each in zip(places, sorted(raw), strict=True))


def _free(rng: random.Random, n_layers: int, n_heads: int, taken: tuple[Head, ...]) -> tuple[Head, ...]:
    """Every head that has nothing to do yet, shuffled; layer 0 is left alone."""
    busy = {(each.layer, each.head) for each in taken}
    places = [(layer, head) for layer in range(1, n_layers) for head in range(n_heads) if (layer, head) not in busy]
    return tuple(Head(*place, 0.0) for place in rng.sample(places, len(places)))
