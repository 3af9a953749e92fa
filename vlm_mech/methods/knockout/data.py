"""What a knockout scan cuts in each cell: sets of layers, the edges of every example, and random edges as controls."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Each, Span, Tokens
from vlm_mech.interventions.specification import Intervention, Knockout, Together, window
from vlm_mech.methods.knockout.edges import (
    ANSWER,
    NOTHING_GIVEN,
    Edge,
    Ends,
    control_of,
    ends_of,
    layers_with,
    parse_edge,
    visible_edges,
)
from vlm_mech.sweeps.measures import said
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.sweeps.sweep import Point, grid

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

EDGES = ("after<-image", "question<-image", "last<-image", "last<-question", "last<-last")
OBJECT_EDGES = ("after<-object", "after<-rest")
HEAD_EDGE = "last<-image"
EDGE, CONTROL = "edge", "control of equal size"
CUTS = (EDGE, CONTROL)
PAPER_WINDOW = 9
MANY_LAYERS = 27
"""From this many layers on the paper's window is at most a third of the model."""
WRONG = "not answered right"

Masks = dict[str, Bool[np.ndarray, "height width"]]
"""Pixels of what a question is about, by pair."""


@dataclass(frozen=True)
class Layers:
    """Which layers are cut together: for each value of the axis `layer` its layers; `about` says it in words."""

    sets: dict[int | str, tuple[int, ...]]
    about: str
    where: str


def layer_sets(n_layers: int, layers: str, size: int | None = None) -> Layers:
    """The layers that are cut together.

    Args:
        layers: `each` for a window around every layer, `groups:K` for K runs of layers that partition the model (their
            sizes differ by one at most), `all` for all at once.
        size: of the windows of `each`. By default 9, as in Zhang et al., in a model of 27 layers or more, otherwise 1:
            nine layers of six are the whole model. Windows are clipped at the borders.

    Raises:
        UsageError: another word, more groups than layers, or a size for what has no windows.
    """
    kind, _, count = layers.partition(":")
    if kind != "each" and size is not None:
        raise UsageError(f"layers {layers!r} have no windows; a window's size goes with layers 'each'")
    if layers == "all":
        return Layers({f"0-{n_layers - 1}": tuple(range(n_layers))}, f"all {n_layers} layers are cut at once.", "in")
    if kind == "groups" and count.isdigit():
        return _groups(n_layers, int(count))
    if layers != "each":
        raise UsageError(f"layers {layers!r} is not known; each, all or groups:K is")
    chosen = size or (PAPER_WINDOW if n_layers >= MANY_LAYERS else 1)
    if size is not None and size < 1:
        raise UsageError(f"a window of {size} layers is none; 1 or more is needed")
    sets: dict[int | str, tuple[int, ...]] = {
        layer: window(layer, chosen, n_layers=n_layers) for layer in range(n_layers)
    }
    if chosen == 1:
        return Layers(sets, "layers are cut one at a time.", "at")
    n_clipped = sum(len(each) < chosen for each in sets.values())
    about = f"{chosen} layers around each are cut; at the borders {n_clipped} of {n_layers} windows are clipped."
    return Layers(sets, about, "around")


def _groups(n_layers: int, count: int) -> Layers:
    if not 1 <= count <= n_layers:
        raise UsageError(f"{n_layers} layers cannot be parted into {count} groups; 1 to {n_layers} are possible")
    parts = [tuple(part.tolist()) for part in np.array_split(np.arange(n_layers), count)]
    sets: dict[int | str, tuple[int, ...]] = {f"{part[0]}-{part[-1]}": part for part in parts}
    return Layers(sets, f"the {n_layers} layers are cut in {count} groups, each layer in one of them.", "in")


@dataclass(frozen=True)
class Scan:
    """What is cut: every edge and its control at every set of layers, and every head of `heads` apart if given.

    `cuts` are `EDGE`, `CONTROL`, or both.
    """

    edges: tuple[Edge, ...]
    layers: Layers
    heads: tuple[int, ...] | None = None
    cuts: tuple[str, ...] = CUTS

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the result."""
        return ("edge", "cut", "layer") if self.heads is None else ("edge", "cut", "layer", "head")

    @property
    def about(self) -> str:
        """What is cut together, in words."""
        return self.layers.about if self.heads is None else "heads are cut one at a time, at single layers."

    def points(self) -> tuple[Point, ...]:
        """Every cell."""
        values = {"edge": [str(edge) for edge in self.edges], "cut": self.cuts, "layer": tuple(self.layers.sets)}
        return grid(**values) if self.heads is None else grid(**values, head=self.heads)


def scan_of(
    vlm: "VLM",
    pairs: Pairs,
    masks: Masks,
    edges: Sequence[str] = (),
    *,
    layers: str = "each",
    size: int | None = None,
    heads: bool = False,
    during: Literal["prompt", "answer"] = "prompt",
) -> Scan:
    """The edges and layers of a scan by name, checked.

    Args:
        edges: as `parse_edge` takes them. By default `EDGES`, with `OBJECT_EDGES` where the object of every pair is
            known and image tokens are patches, without last<-question where both overlap; for heads last<-image alone.
        layers, size: see `layer_sets`.
        heads: all heads one by one, at single layers, for one edge.
        during: `answer` adds the answer's own tokens to the queries of edges from `last`, or `after`, which holds it.

    Raises:
        UsageError: an edge or layers that are not known, an edge twice, several edges or windows for heads.
    """
    if heads and (len(edges) > 1 or layers != "each" or size not in (None, 1)):
        raise UsageError("heads are cut one by one, for one edge and at single layers")
    n_layers = vlm.n_layers("llm")
    if heads:
        edge = _during(parse_edge(edges[0] if edges else HEAD_EDGE), during)
        return Scan((edge,), layer_sets(n_layers, "each", 1), tuple(range(vlm.n_heads("llm"))))
    parsed = tuple(_during(parse_edge(each), during) for each in edges or _default_edges(vlm, pairs, masks))
    if len(set(parsed)) < len(parsed):
        raise UsageError(f"edge {next(each for each in parsed if parsed.count(each) > 1)} is named twice")
    return Scan(parsed, layer_sets(n_layers, layers, size))


def _during(edge: Edge, during: str) -> Edge:
    """The edge, with the answer's tokens among its queries where these are to lose it too."""
    if (
        during == "prompt"
        or edge.of_answer
        or not {"last", "after"} & {*edge.query.split("+")}
        or edge.query == edge.key
    ):
        return edge
    return Edge(f"{edge.query}+{ANSWER}", edge.key)


def _default_edges(vlm: "VLM", pairs: Pairs, masks: Masks) -> tuple[str, ...]:
    encoded = vlm.encode(pairs[:1].base)
    # Where nothing follows the question, its last token is `last` itself.
    ends_there = set(encoded.positions("last")) <= set(encoded.positions("question"))
    edges = tuple(edge for edge in EDGES if edge != "last<-question" or not ends_there)
    known = {pair.id for pair in pairs} <= set(masks) and all(image.layout.views for image in encoded.rows[0].images)
    return (*edges, *OBJECT_EDGES) if known else edges


Reason = str
Kind = tuple[str, str]


@dataclass(frozen=True)
class Found:
    """The tokens of an edge or a control in one example, and the layers in which it exists."""

    parts: tuple[Ends, ...]
    layers: frozenset[int]


FoundBy = dict[Kind, list[Found | Reason]]
"""For every edge and its control, what there is in each example, or why it is left out."""


def sweeps(
    pairs: Pairs, points: Sequence[Point], found: FoundBy, sets: dict[int | str, tuple[int, ...]]
) -> list[tuple[Pairs, list[Point], Callable[[Point], Intervention]]]:
    """Examples that have the same edges in the same layers, the cells that they have, and what is cut at each."""
    made = []
    for layers, numbers in _alike(found).items():
        chosen = dataclasses.replace(pairs, pairs=tuple(pairs.pairs[number] for number in numbers))
        cuts = {kind: _parts([found[kind][number] for number in numbers], kind) for kind, _ in layers}
        at = {
            (*kind, name): tuple(layer for layer in each if layer in seen)
            for kind, seen in layers
            for name, each in sets.items()
        }
        some = [point for point in points if at.get((point.edge, point.cut, point.layer))]
        made.append(
            (
                chosen,
                some,
                lambda point, cuts=cuts, at=at: _cut(
                    cuts[point.edge, point.cut], at[point.edge, point.cut, point.layer], point
                ),
            )
        )
    return made


def found_edges(vlm: "VLM", pairs: Pairs, scan: Scan, masks: Masks, *, only_correct: bool, seed: int) -> FoundBy:
    """What a scan can cut in each example.

    Args:
        masks: pixels of the object by pair, for the groups `object` and `rest`.
        only_correct: leave out the pairs that the model answers wrongly.
        seed: draws the controls.

    Raises:
        UsageError: an edge does not fit (see `edges.ends_of`).
    """
    read = readings_of(vlm, vlm.encode(pairs.base), [said(pairs.answer)])
    clean = record(vlm, read.encoded)
    right = read.value(0, clean.reads).bool().tolist()
    found: FoundBy = {(str(edge), cut): [] for edge in scan.edges for cut in scan.cuts}
    for number, pair in enumerate(pairs):
        visible = visible_edges(clean, number)
        for edge in scan.edges:
            ends = ends_of(clean.encoded, number, edge, visible, masks.get(pair.id))
            if not isinstance(ends, str) and not ends.query and not clean.encoded.rows[number].answer:
                ends = NOTHING_GIVEN
            if only_correct and not right[number]:
                ends = WRONG
            for cut in scan.cuts:
                parts: tuple[Ends, ...] | Reason = ends if isinstance(ends, str) else (ends,)
                if cut == CONTROL and not isinstance(ends, str):
                    drawn = np.random.default_rng([seed, zlib.crc32(f"{pair.id} {edge}".encode())])
                    n_answer = len(clean.encoded.rows[number].answer or ()) if ends.answer else 0
                    parts = control_of(ends, visible, drawn, n_answer=n_answer)
                here = parts if isinstance(parts, str) else Found(parts, layers_with(clean, number, parts))
                found[str(edge), cut].append(here)
    return found


def _alike(found: FoundBy) -> dict[tuple[tuple[Kind, frozenset[int]], ...], list[int]]:
    """Numbers of the examples that have the same edges in the same layers; those that have none are left out."""
    numbers: dict[tuple[tuple[Kind, frozenset[int]], ...], list[int]] = {}
    for number, each in enumerate(zip(*found.values(), strict=True)):
        has = tuple((kind, here.layers) for kind, here in zip(found, each, strict=True) if not isinstance(here, str))
        if has:
            numbers.setdefault(has, []).append(number)
    return numbers


def _parts(found: Sequence[Any], kind: Kind) -> list[Knockout]:
    """Knockouts of no layer in particular; an example with fewer parts than others has its first one again."""
    made = []
    ends = [here.parts for here in found]
    for part in range(max(len(each) for each in ends)):
        chosen = [each[part] if part < len(each) else each[0] for each in ends]
        query, key = Each(tuple(map(queries_of, chosen))), Each(tuple(Tokens(each.key) for each in chosen))
        made.append(Knockout(query, key, 0, keep_self=kind[1] == CONTROL))
    return made


def queries_of(ends: Ends) -> Span:
    """The span of the queries of an edge."""
    if not ends.answer:
        return Tokens(ends.query)
    return (Tokens(ends.query), ANSWER) if ends.query else ANSWER


def _cut(parts: Sequence[Knockout], layers: tuple[int, ...], point: Point) -> Intervention:
    heads = (point.head,) if "head" in dict(point.axes) else None
    cut = tuple(dataclasses.replace(part, layers=layers, heads=heads) for part in parts)
    return cut[0] if len(cut) == 1 else Together(parts=cut)
