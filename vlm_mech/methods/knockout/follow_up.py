"""What is measured once the table of a knockout is there: where the strongest heads look, texts without an edge."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.methods.knockout.claims import NEEDED
from vlm_mech.methods.knockout.controls import sinks_of
from vlm_mech.methods.knockout.data import Masks, Scan
from vlm_mech.methods.knockout.edges import Edge, Ends, ends_of, object_positions, visible_edges
from vlm_mech.methods.knockout.study import RELATIVE, texts_without
from vlm_mech.results.claiming import halves
from vlm_mech.results.result import Result
from vlm_mech.sweeps.recorded_pass import record

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pair, Pairs
    from vlm_mech.inputs.image import Box
    from vlm_mech.models.vlm import VLM

N_SHOWN, N_HEADS, N_MAPPED = 4, 3, 32
"""Examples shown, heads told of, and examples on which these heads' attention is averaged, at most."""


@dataclass(frozen=True, eq=False)
class Head:
    """A head without which the answer's lead is claimed to be lower."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"layer {self.layer} head {self.head}"


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """What one head attends to in one example: a weight for each patch of the first image's first view.

    `most` is the largest weight on any token, `on_image` the sum over image tokens; `of_object` says which patches show
    the object, `of_sink` which are sinks by their states (see `controls.sinks_of`).
    """

    pair: "Pair"
    boxes: "tuple[Box, ...]"
    weights: Float[np.ndarray, "patch"]
    most: float
    on_image: float
    of_object: tuple[bool, ...]
    of_sink: tuple[bool, ...] = ()


@dataclass(frozen=True, eq=False)
class HeadAttention:
    """Where a head looks from the queries of an edge, with nothing cut: means over `n` examples, and maps of some.

    `on_image` and `on_object` are shares of its attention, `object_share` that of the image tokens which show the
    object. Where the object is not known in every example, `object_known` is false.
    """

    head: Head
    on_image: float
    on_object: float
    object_share: float
    object_known: bool
    n: int
    maps: tuple[AttentionMap, ...]


@dataclass(frozen=True, eq=False)
class FollowUp:
    """The strongest heads with what they attend to, and a row a text that was generated with and without an edge.

    `heads` is empty where edges were cut for all heads, `texts` None where none were asked for.
    """

    heads: tuple[Head, ...] = ()
    attention: tuple[HeadAttention, ...] = ()
    texts: pd.DataFrame | None = None

    @property
    def generated(self) -> list[dict[str, Any]]:
        """The texts as JSON values."""
        rows = [] if self.texts is None else self.texts.to_dict("records")
        return [{str(name): value for name, value in row.items()} for row in rows]


def follow_up(
    vlm: "VLM", result: Result, pairs: "Pairs", scan: Scan, masks: Masks, *, n_generated: int = 0, seed: int = 0
) -> FollowUp:
    """What claimed heads attend to, where heads were cut, and `n_generated` examples written out without each edge.

    Args:
        seed: that claims were made with, which says on which examples heads were not chosen.
    """
    counted = _counted(result)
    heads: tuple[Head, ...] = ()
    attention: tuple[HeadAttention, ...] = ()
    if scan.heads is not None:
        heads, parts = claimed_heads(result, N_HEADS), halves(result, seed=seed)
        others = _counted(parts[1]) if parts is not None else []
        attention = attention_of(vlm, _named(pairs, others[:N_MAPPED]), scan.edges[0], heads, masks)
    texts = texts_without(vlm, _named(pairs, counted[:n_generated]), scan.edges, masks) if n_generated else None
    return FollowUp(heads, attention, texts)


def _named(pairs: "Pairs", names: Sequence[str]) -> "Pairs":
    return dataclasses.replace(pairs, pairs=tuple(pair for pair in pairs if pair.id in set(names)))


def _counted(result: Result) -> list[str]:
    return result.table[result.table[RELATIVE.name].notna()]["example"].drop_duplicates().tolist()


def claimed_heads(result: Result, n: int) -> tuple[Head, ...]:
    """The heads that are claimed to be needed, those first whose cut lowered the lead most where they were declared."""
    made = [claim for claim in result.claims if claim.made and claim.kind == NEEDED]
    made.sort(key=lambda claim: claim.strength(claim.declared), reverse=True)
    return tuple(Head(claim.about["layer"], claim.about["head"]) for claim in made[:n])


def attention_of(
    vlm: "VLM", pairs: "Pairs", edge: Edge, heads: Sequence[Head], masks: Masks, *, n_maps: int = N_SHOWN
) -> tuple[HeadAttention, ...]:
    """Where these heads look from the queries of an edge (the mean over them), with nothing cut.

    Args:
        masks: pixels of the object by pair, where they are known.
        n_maps: examples of each head whose patches are given.

    Returns:
        One for each head; none where image tokens are no patches.
    """
    if not heads or not len(pairs):
        return ()
    encoded = vlm.encode(pairs.base)
    if not all(row.images and row.images[0].layout.views for row in encoded.rows):
        return ()
    clean = record(vlm, encoded)
    ends = [ends_of(encoded, at, edge, visible_edges(clean, at), masks.get(pair.id)) for at, pair in enumerate(pairs)]
    queries = [
        [row.present[number] for number in each.query] if isinstance(each, Ends) and each.query else [encoded.n_pos - 1]
        for row, each in zip(encoded.rows, ends, strict=True)
    ]
    held = [(at, pair) for at, (pair, each) in enumerate(zip(pairs, ends, strict=True)) if isinstance(each, Ends)]
    if not held:
        return ()
    shown = {at: _object_positions(encoded, at, pair, masks) for at, pair in held}
    sinks = {at: sinks_of(clean, at) for at, _ in held[:n_maps]}
    weights = attention_from(vlm, encoded, queries, [head.layer for head in heads])
    found = []
    for head in heads:
        own = {at: weights[head.layer][at, head.head].numpy() for at, _ in held}
        means = np.array([_shares(encoded, at, own[at], shown[at]) for at, _ in held]).mean(0).tolist()
        maps = tuple(_map(encoded, at, pair, own[at], shown[at], sinks[at]) for at, pair in held[:n_maps])
        found.append(HeadAttention(head, *means, all(pair.id in masks for _, pair in held), len(held), maps))
    return tuple(found)


def _object_positions(encoded: Encoded, example: int, pair: "Pair", masks: Masks) -> set[int]:
    """Positions that show the object; empty where it is not known."""
    mask = masks.get(pair.id)
    return set() if mask is None else object_positions(encoded, example, mask)


def _shares(
    encoded: Encoded, example: int, weights: Float[np.ndarray, "pos"], shown: set[int]
) -> tuple[float, float, float]:
    """Attention on the image, on the object, and the object's share of the image tokens."""
    image = list(encoded.rows[example].image)
    return float(weights[image].sum()), float(weights[sorted(shown)].sum()), len(shown) / len(image)


def _map(
    encoded: Encoded,
    example: int,
    pair: "Pair",
    weights: Float[np.ndarray, "pos"],
    shown: set[int],
    sinks: frozenset[int],
) -> AttentionMap:
    picture = encoded.rows[example].images[0]
    positions = [picture.positions[slot] for slot in picture.layout.views[0].slots]
    return AttentionMap(
        pair,
        encoded.boxes(example),
        weights[positions],
        most=float(weights.max()),
        on_image=float(weights[list(encoded.rows[example].image)].sum()),
        of_object=tuple(position in shown for position in positions),
        of_sink=tuple(encoded.rows[example].present.index(position) in sinks for position in positions),
    )
