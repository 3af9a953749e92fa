"""Pairs that make a set: of one group, asked one question, their answers together being all of its options.

What'sUp's sets of four (two things in four relations) are two such pairs. A folder of the user's own has sets where
its lines have `group` and more than two `options`.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable
from typing import Any

from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import Pairs, load_pairs
from vlm_mech.data.user_files import fewer_than_asked


def sets_in(pairs: Iterable[Pair]) -> tuple[tuple[tuple[Pair, ...], ...], int]:
    """The whole sets among some pairs, and how many more are not whole, some of their pairs being missing.

    Where no two pairs belong to one set there are none, whole or not.
    """
    found: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        if pair.group is not None and len(pair.options) > 2:
            found.setdefault((pair.group, pair.question, tuple(pair.options)), []).append(pair)
    if all(len(some) < 2 for some in found.values()):
        return (), 0
    whole = tuple(tuple(some) for (_, _, options), some in found.items() if _cover(some, options))
    return whole, len(found) - len(whole)


def _cover(pairs: list[Pair], options: tuple[str, ...]) -> bool:
    return sorted(answer for pair in pairs for answer in (pair.answer, pair.counterfactual_answer)) == sorted(options)


def load_sets(name: str, *, n: int | None, seed: int, **options: Any) -> Pairs:
    """The pairs of `load_pairs`; where they make sets, n of these are drawn whole.

    Args:
        options: further ones of `load_pairs`.

    Raises:
        UsageError: as for `load_pairs`.
    """
    pairs = load_pairs(name, n=n, seed=seed, **options)
    if n is None or not any(pair.group is not None and len(pair.options) > 2 for pair in pairs):
        return pairs
    every = load_pairs(name, seed=seed, **options)
    sets, _ = sets_in(every)
    if not sets:
        return pairs
    if n >= len(sets):
        told = fewer_than_asked(n, len(sets), len(sets), "whole sets")
        return dataclasses.replace(every, notes=(*every.notes, *told))
    chosen = {pair.id for some in random.Random(seed).sample(sets, n) for pair in some}
    kept = tuple(pair for pair in every if pair.id in chosen)
    return dataclasses.replace(every, pairs=kept, drawn=f"{n} of {len(sets)} whole sets, drawn with seed {seed}")


def sets_together(pairs: Pairs) -> Pairs:
    """The pairs, those of a set one after the other; all in their order where there are no sets."""
    first = {pair.id: some[0].id for some in sets_in(pairs)[0] for pair in some}
    place = {pair.id: number for number, pair in enumerate(pairs)}
    order = sorted(pairs, key=lambda pair: (place[first.get(pair.id, pair.id)], place[pair.id]))
    return dataclasses.replace(pairs, pairs=tuple(order)) if first else pairs


def batch_starts(pairs: Pairs, size: int) -> list[int]:
    """Where batches of at most this many pairs begin, so that none parts a set; a set may be a larger batch alone.

    Args:
        pairs: those of a set one after the other (`sets_together`).
    """
    inside = {pair.id for some in sets_in(pairs)[0] for pair in some[1:]}
    units = [number for number, pair in enumerate(pairs) if pair.id not in inside]
    starts = [0]
    for unit, end in itertools.pairwise([*units, len(pairs)]):
        if end - starts[-1] > size and unit > starts[-1]:
            starts.append(unit)
    return starts
