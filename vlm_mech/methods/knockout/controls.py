"""Controls that match what they are controls of: random edges of equal attention mass, or of equal distance.

As many random edges often carry far less attention than the edge that they are compared with. What matches is drawn
here, example by example, from what the unedited model attends to. Sinks (tokens that gather attention whatever they
hold) can be spared.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from vlm_mech.extraction.sink_rule import FIRST_LAYER, is_sink, leading_dims, values_at
from vlm_mech.interventions.attention_weights import attention_rows
from vlm_mech.methods.knockout.edges import Ends
from vlm_mech.sweeps.recorded_pass import RecordedPass

if TYPE_CHECKING:
    from vlm_mech.inputs.prompt import Encoded
    from vlm_mech.models.vlm import VLM

NO_EDGES = "there are too few other edges for such a control"
NO_MASS = "without any edit the edge has no attention at these layers"
CLOSE = 0.01
"""A control has enough mass when no larger share than this of the edge's is missing."""

Free = Bool[np.ndarray, "token token"]
"""Edges that a control may cut, by query and key."""


class Attended:
    """The attention of one example without any edit: rows are its tokens and then its answer's, columns its tokens."""

    def __init__(self, vlm: "VLM", encoded: "Encoded", *, by_head: bool) -> None:
        """One pass over the example, or one for each layer that is asked for.

        Args:
            encoded: the example alone, so that its numbers do not depend on others.
            by_head: heads will be asked for; the weights of one layer are kept at a time then.
        """
        row = encoded.rows[0]
        self._vlm, self._encoded, self._by_head = vlm, encoded, by_head
        self._keys, self._queries = list(row.present), [*row.present, *(row.answer or ())]
        self._known: dict[int, Float[np.ndarray, "*head query key"]] = {}

    def of(self, layers: Sequence[int], head: int | None = None) -> Float[np.ndarray, "query token"]:
        """Its sum over some layers, and over all heads or of one."""
        if not set(layers) <= set(self._known):
            asked = layers if self._by_head else list(self._vlm.llm_layers)
            found = attention_rows(self._vlm, self._encoded, [self._queries], asked, by_head=self._by_head)
            self._known = {layer: rows[0].double().numpy()[..., self._keys] for layer, rows in found.items()}
        each = [self._known[layer] for layer in layers]
        return np.sum(each if head is None else [one[head] for one in each], axis=0)


def sinks_of(clean: RecordedPass, example: int = 0) -> frozenset[int]:
    """Numbers of the tokens of an example of a pass that are sinks in some layer.

    The first token is one. Others are by the rule of `extraction.sink_rule`, as in `find_sinks`, with the dimensions
    that lead at this example's own first token, so that controls do not depend on what else is in the run. Whether they
    gather attention is not verified here: a token is spared once too often rather than too seldom.
    """
    present = list(clean.encoded.rows[example].present)
    layers = range(FIRST_LAYER, len(clean.blocks))
    if not layers:
        return frozenset({0})
    states = torch.stack([clean.hidden(layer)[example, present] for layer in layers])
    values = values_at(states, leading_dims(states[:, 0]))
    return frozenset({0, *is_sink(values, states.shape[-1]).any(0).nonzero()[0].tolist()})


def free_edges(ends: Ends, visible: Free, spared: Collection[int]) -> Free:
    """What a control of an edge may cut: visible edges that are none of its own, of no token to itself, to no sink."""
    free = visible & ~np.eye(len(visible), dtype=bool)
    free[np.ix_(ends.query, ends.key)] = False
    free[:, sorted(spared)] = False
    return free


def mass_of(parts: Sequence[Ends], visible: Free, attended: Float[np.ndarray, "query token"], *, own: bool) -> float:
    """The attention on all edges of some parts, those of the answer's tokens too.

    Args:
        own: edges of a token to itself are cut, as those of a control are not.
    """
    cut = np.zeros(attended.shape, dtype=bool)
    for part in parts:
        queries = [*part.query, *(range(len(visible), len(attended)) if part.answer else ())]
        cut[np.ix_(queries, part.key)] = True
    if not own:
        np.fill_diagonal(cut, False)
    return float(attended[cut].sum())


def control_of_mass(
    ends: Ends, free: Free, attended: Float[np.ndarray, "query token"], wanted: float, random: np.random.Generator
) -> tuple[Ends, ...] | str:
    """Random edges with as much attention as an edge has, as nearly as they can have it, or why there are none.

    As many queries are drawn as the edge has, and keys one after another. Of each key those edges are taken that leave
    the sum below what is wanted; more queries follow, one at a time, until no more than the share `CLOSE` is missing.
    Where no edge is left that would fit, one that goes less far beyond it than was missing is the last.

    Args:
        free: what may be taken (see `free_edges`).
        attended: the unedited attention at the layers and heads that are cut.
        wanted: the edge's own attention there.
    """
    if wanted <= 0:
        return NO_MASS
    if not free.any():
        return NO_EDGES
    chosen, missing = np.zeros_like(free), wanted
    n_queries = len(ends.query) + (len(attended) - len(free) if ends.answer else 0)
    for queries, keys in _in_order(free, n_queries, random):
        if missing <= CLOSE * wanted:
            break
        weights = attended[queries, keys]
        taken = _below(weights, missing)
        chosen[queries[taken], keys[taken]] = True
        missing -= weights[taken].sum()
    left = free & ~chosen
    if missing > CLOSE * wanted and left.any():
        beyond = np.where(left, np.abs(missing - attended[: len(free)]), np.inf)
        if beyond.min() < missing:
            chosen[np.unravel_index(beyond.argmin(), beyond.shape)] = True
    return parts_of(chosen) if chosen.any() else NO_EDGES


def _in_order(
    free: Free, n_queries: int, random: np.random.Generator
) -> Iterator[tuple[Int[np.ndarray, "edge"], Int[np.ndarray, "edge"]]]:
    """Queries and keys of all free edges: key by key those of some random queries, then those of each other query."""
    queries = random.permutation(np.flatnonzero(free.any(1)))
    first = queries[:n_queries]
    for key in random.permutation(len(free)):
        some = random.permutation(first[free[first, key]])
        yield some, np.full_like(some, key)
    for query in queries[n_queries:]:
        keys = random.permutation(np.flatnonzero(free[query]))
        yield np.full_like(keys, query), keys


def _below(weights: Float[np.ndarray, "edge"], limit: float) -> Int[np.ndarray, "taken"]:
    """Which of some weights, taken in order, leave their sum at most at a limit; those that would not are passed by."""
    taken, rest = [], np.arange(len(weights))
    while len(rest := rest[weights[rest] <= limit]):
        n_more = int((np.cumsum(weights[rest]) <= limit).sum())
        taken.append(rest[:n_more])
        limit -= weights[rest[:n_more]].sum()
        rest = rest[n_more:]
    return np.concatenate(taken) if taken else np.arange(0)


def control_of_distance(
    ends: Ends, free: Free, visible: Free, random: np.random.Generator, *, n_answer: int = 0
) -> tuple[Ends, ...] | str:
    """Random edges whose keys lie as far from their queries as those of an edge, or why there are too few.

    The edges of each query are taken over by random other queries, each of which takes all that it can. Where none can,
    the edge whose distance is nearest takes its place.

    Args:
        free: what may be taken (see `free_edges`).
        n_answer: tokens of the answer, which follow the prompt, that lose the edge too.
    """
    n_tokens = len(free)
    left, chosen, unplaced = free.copy(), np.zeros_like(free), list[int]()
    rows = [query - np.array(ends.key)[visible[query, list(ends.key)]] for query in ends.query]
    rows += [n_tokens + number - np.array(ends.key) for number in range(n_answer if ends.answer else 0)]
    if sum(map(len, rows)) > free.sum():
        return NO_EDGES
    for wanted in rows:
        distances = wanted
        for query in random.permutation(n_tokens):
            keys = query - distances
            inside = (keys >= 0) & (keys < n_tokens)
            fits = inside & left[query, np.where(inside, keys, 0)]
            chosen[query, keys[fits]], left[query, keys[fits]] = True, False
            distances = distances[~fits]
            if not len(distances):
                break
        unplaced += distances.tolist()
    number = np.arange(n_tokens)
    apart = number[:, None] - number
    for distance in unplaced:
        off = np.where(left, np.abs(apart - distance), n_tokens * 2)
        query, key = random.permutation(np.argwhere(off == off.min()))[0]
        chosen[query, key], left[query, key] = True, False
    return parts_of(chosen) if chosen.any() else NO_EDGES


def parts_of(chosen: Free) -> tuple[Ends, ...]:
    """Single edges as rectangles: the queries that lose the same keys together."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for query in np.flatnonzero(chosen.any(1)).tolist():
        rows.setdefault(tuple(np.flatnonzero(chosen[query]).tolist()), []).append(query)
    return tuple(Ends(tuple(queries), keys) for keys, queries in rows.items())
