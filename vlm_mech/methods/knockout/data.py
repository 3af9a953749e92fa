"""What a knockout scan cuts in each cell: sets of layers, the edges of every example, and random edges as controls."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Each, Span, Tokens
from vlm_mech.interventions.specification import Intervention, Knockout, Together
from vlm_mech.methods.knockout.controls import (
    Attended,
    control_of_distance,
    control_of_mass,
    free_edges,
    mass_of,
    sinks_of,
)
from vlm_mech.methods.knockout.default_edges import edges_where_none_is_named, with_answers
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
from vlm_mech.methods.knockout.layers import Layers, layer_sets, usual_layers
from vlm_mech.sweeps.measures import said
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.sweeps.sweep import Point, grid

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

EDGE, CONTROL = "edge", "control of equal size"
MASS, DISTANCE = "control of equal mass", "control of equal distance"
CUTS = (EDGE, CONTROL)
CONTROLS = {"size": CONTROL, "mass": MASS, "distance": DISTANCE}
"""Kinds of controls by the names that options have for them."""
SPARED = ", sinks spared"
"""Ends the names of controls that cut no sink."""
MATCHED = ", as many sinks"
"""Ends the names of controls that cut as many sinks as their edge."""
Sinks = Literal["include", "exclude", "match"]
WRONG = "not answered correctly"

Place = tuple[Any, ...]
"""Layers that are cut together, by their value of the axis `layer`, and a head where heads are cut apart."""
Masks = dict[str, Bool[np.ndarray, "height width"]]
"""Pixels of what a question is about, by pair."""


@dataclass(frozen=True)
class Scan:
    """What is cut: every edge and its controls at every set of layers, and every head of `heads` apart if given.

    `cuts` are `EDGE`, and controls as `cuts_of` names them. `only` are the heads that are cut in each layer of a value
    of the axis `layer`; the values that it does not name are cut for all heads.
    """

    edges: tuple[Edge, ...]
    layers: Layers
    heads: tuple[int, ...] | None = None
    cuts: tuple[str, ...] = CUTS
    only: dict[int | str, dict[int, tuple[int, ...]]] = dataclasses.field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the result."""
        return ("edge", "cut", "layer") if self.heads is None else ("edge", "cut", "layer", "head")

    @property
    def places(self) -> tuple[Place, ...]:
        """Values of the axis `layer`, with every head where these are cut apart; those of a layer follow each other."""
        if self.heads is None:
            return tuple((name,) for name in self.layers.sets)
        return tuple((name, head) for name in self.layers.sets for head in self.heads)

    def kinds(self, edge: Edge) -> "tuple[Kind, ...]":
        """What is cut of an edge, as `kind_of` has it of a cell."""
        found: list[Kind] = []
        for cut in self.cuts:
            kind = str(edge), cut
            found += [(*kind, *place) for place in self.places] if kind_of_control(cut) == MASS else [kind]
        return tuple(found)

    @property
    def weighed(self) -> bool:
        """Whether it is measured how much attention is cut."""
        return bool({kind_of_control(cut) for cut in self.cuts} - {EDGE, CONTROL})

    @property
    def about(self) -> str:
        """What is cut together, in words."""
        return self.layers.about if self.heads is None else "heads are cut one at a time, at single layers."

    def points(self) -> tuple[Point, ...]:
        """Every cell."""
        values = {"edge": [str(edge) for edge in self.edges], "cut": self.cuts, "layer": tuple(self.layers.sets)}
        return grid(**values) if self.heads is None else grid(**values, head=self.heads)


def cuts_of(controls: Sequence[str], *, sinks: Sinks = "include") -> tuple[str, ...]:
    """The edge itself and its controls by their names in a result.

    Args:
        controls: kinds of them, as `CONTROLS` has them; each counts once.
        sinks: whether they may cut attention to sinks, cut none, or cut as many as their edge.

    Raises:
        UsageError: another kind, or one that cannot match the number of sinks.
    """
    for each in controls:
        if each not in CONTROLS:
            raise UsageError(f"control {each!r} is not known; use one of {', '.join(CONTROLS)}")
        if sinks == "match" and CONTROLS[each] != CONTROL:
            raise UsageError(f"controls of equal {each} cut sinks as they come; sinks are matched by equal size alone")
    ending = {"include": "", "exclude": SPARED, "match": MATCHED}[sinks]
    return (EDGE, *(CONTROLS[each] + ending for each in dict.fromkeys(controls)))


def kind_of_control(cut: str) -> str:
    """The name of a control whatever it does with sinks; `EDGE` for the edge itself."""
    return cut.removesuffix(SPARED).removesuffix(MATCHED)


def ending_of(cut: str) -> str:
    """What the name of a control ends with: what it does with sinks, or nothing."""
    return cut.removeprefix(kind_of_control(cut))


def scan_of(
    vlm: "VLM",
    pairs: Pairs,
    masks: Masks,
    edges: Sequence[str] = (),
    *,
    layers: str | None = "each",
    size: int | None = None,
    heads: bool = False,
    during: Literal["prompt", "answer"] = "prompt",
    controls: Sequence[str] = ("size",),
    sinks: Sinks = "include",
) -> Scan:
    """The edges and layers of a scan by name, checked.

    Args:
        edges: as `parse_edge` takes them; by default those of `edges_where_none_is_named`.
        layers, size: see `layer_sets`; `usual_layers` where `layers` is none.
        heads: all heads one by one, at single layers, for one edge.
        during: `answer` adds the answer's own tokens to the queries of edges from `last`, or `after`, which holds it.
        controls, sinks: see `cuts_of`.

    Raises:
        UsageError: an edge, a control or layers that are not known, an edge twice, several edges or windows for heads.
    """
    if heads and (len(edges) > 1 or layers not in ("each", None) or size not in (None, 1)):
        raise UsageError("heads are cut one by one, for one edge and at single layers")
    n_layers, cuts = vlm.n_layers("llm"), cuts_of(controls, sinks=sinks)
    if heads:
        (name,) = edges or edges_where_none_is_named(vlm, pairs, set(), heads=True)
        edge = with_answers(parse_edge(name), during)
        return Scan((edge,), layer_sets(n_layers, "each", 1), tuple(range(vlm.n_heads("llm"))), cuts)
    edges = edges or edges_where_none_is_named(vlm, pairs, set(masks))
    parsed = tuple(with_answers(parse_edge(each), during) for each in edges)
    if len(set(parsed)) < len(parsed):
        raise UsageError(f"edge {next(each for each in parsed if parsed.count(each) > 1)} is named twice")
    return Scan(parsed, layer_sets(n_layers, layers or usual_layers(n_layers, size), size), cuts=cuts)


Reason = str
Kind = tuple[Any, ...]
"""An edge and a cut; of a control of equal mass, which is another at all layers and heads, the place too."""


@dataclass(frozen=True)
class Found:
    """The tokens of an edge or a control in one example, and the layers in which it exists.

    `mass` is the unedited attention on its edges by place, where the scan asks for it: the sum over heads and layers.
    """

    parts: tuple[Ends, ...]
    layers: frozenset[int]
    mass: dict[Place, float] = dataclasses.field(default_factory=dict)


FoundBy = dict[Kind, list[Found | Reason]]
"""For every edge and its controls, what there is in each example, or why it is left out."""


def kind_of(point: Point) -> Kind:
    """What is cut in a cell."""
    kind = point.edge, point.cut
    return (*kind, *place_of(point)) if kind_of_control(point.cut) == MASS else kind


def place_of(point: Point) -> Place:
    """The value of the axis `layer`, and of `head` where there is one."""
    return tuple(value for axis, value in point.axes if axis not in ("edge", "cut"))


def sweeps(
    pairs: Pairs, points: Sequence[Point], found: FoundBy, scan: Scan
) -> list[tuple[Pairs, list[Point], Callable[[Point], Intervention]]]:
    """Examples that have the same edges in the same layers, the cells that they have, and what is cut at each."""
    sets, only = scan.layers.sets, scan.only
    made = []
    for layers, numbers in _alike(found).items():
        chosen, seen = dataclasses.replace(pairs, pairs=tuple(pairs.pairs[number] for number in numbers)), dict(layers)
        cuts = {kind: _parts([found[kind][number] for number in numbers], kind) for kind in seen}
        at = {
            point: tuple(layer for layer in sets[point.layer] if layer in seen.get(kind_of(point), ()))
            for point in points
        }
        some = [point for point in points if at[point]]
        made.append((chosen, some, lambda point, cuts=cuts, at=at: _cut(cuts[kind_of(point)], at[point], point, only)))
    return made


def found_edges(vlm: "VLM", pairs: Pairs, scan: Scan, masks: Masks, *, only_correct: bool, seed: int) -> FoundBy:
    """What a scan can cut in each example.

    Where attention is weighed, each example is also run alone, so that its controls do not depend on others.

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
    found: FoundBy = {kind: [] for edge in scan.edges for kind in scan.kinds(edge)}
    for number, pair in enumerate(pairs):
        visible, n_answer = visible_edges(clean, number), len(clean.encoded.rows[number].answer or ())
        draws = _Draws(vlm, pairs[number : number + 1], scan, seed, visible, n_answer)
        for edge in scan.edges:
            ends = ends_of(clean.encoded, number, edge, visible, masks.get(pair.id))
            if not isinstance(ends, str) and not ends.query and not n_answer:
                ends = NOTHING_GIVEN
            if only_correct and not right[number]:
                ends = WRONG
            drawn, masses = draws.of(edge, ends) if isinstance(ends, Ends) else ({}, {})
            for kind in scan.kinds(edge):
                here = ends if isinstance(ends, str) else drawn[kind]
                if not isinstance(here, str):
                    here = Found(here, layers_with(clean, number, here), masses.get(kind, {}))
                found[kind].append(here)
    return found


@dataclass(frozen=True, eq=False)
class _Draws:
    """Draws the controls of one example, given alone: of what its prompt sees, with `n_answer` tokens after it."""

    vlm: "VLM"
    alone: Pairs
    wanted: Scan
    seed: int
    visible: Bool[np.ndarray, "token token"]
    n_answer: int

    @functools.cached_property
    def encoded(self) -> Encoded:
        """The example with its answer after it."""
        return readings_of(self.vlm, self.vlm.encode(self.alone.base), [said(self.alone.answer)]).encoded

    @functools.cached_property
    def attended(self) -> Attended:
        """What attends to what without any edit."""
        return Attended(self.vlm, self.encoded, by_head=self.wanted.heads is not None)

    @functools.cached_property
    def sinks(self) -> frozenset[int]:
        """Its sinks."""
        return sinks_of(record(self.vlm, self.encoded))

    def of(
        self, edge: Edge, ends: Ends
    ) -> tuple[dict[Kind, tuple[Ends, ...] | Reason], dict[Kind, dict[Place, float]]]:
        """What the edge and each control cut, or why there is no such control; and the attention on it by place."""
        n_answer, drawn = self.n_answer if ends.answer else 0, dict[Kind, tuple[Ends, ...] | Reason]()
        for cut in self.wanted.cuts:
            spared = self.sinks if cut.endswith(SPARED) else ()
            if cut == EDGE:
                drawn[str(edge), cut] = (ends,)
            elif kind_of_control(cut) == CONTROL:
                how: dict[str, Any] = {"n_answer": n_answer, "spared": spared}
                how |= {"sinks": self.sinks} if cut.endswith(MATCHED) else {}
                drawn[str(edge), cut] = control_of(ends, self.visible, self._random(edge), **how)
            elif kind_of_control(cut) == DISTANCE:
                free, random = free_edges(ends, self.visible, spared), self._random(edge, DISTANCE)
                drawn[str(edge), cut] = control_of_distance(ends, free, self.visible, random, n_answer=n_answer)
        return drawn, self._weighed(edge, ends, drawn) if self.wanted.weighed else {}

    def _weighed(
        self, edge: Edge, ends: Ends, drawn: dict[Kind, tuple[Ends, ...] | Reason]
    ) -> dict[Kind, dict[Place, float]]:
        """The attention on what is cut by place; draws the controls of equal mass too."""
        masses: dict[Kind, dict[Place, float]] = {}
        everywhere = dict(drawn)
        for place in self.wanted.places:
            attended = self.attended.of(self.wanted.layers.sets[place[0]], *place[1:])
            own, here = mass_of((ends,), self.visible, attended, own=True), dict(everywhere)
            for cut in self.wanted.cuts:
                if kind_of_control(cut) == MASS:
                    free = free_edges(ends, self.visible, self.sinks if cut.endswith(SPARED) else ())
                    random = self._random(edge, MASS, *place)
                    here[str(edge), cut, *place] = control_of_mass(ends, free, attended, own, random)
            for kind, parts in here.items():
                if not isinstance(parts, str):
                    mass = mass_of(parts, self.visible, attended, own=kind[1] == EDGE)
                    masses.setdefault(kind, {})[place] = mass
            drawn |= here
        return masses

    def _random(self, edge: Edge, *more: Any) -> np.random.Generator:
        named = " ".join(map(str, (self.alone.pairs[0].id, edge, *more)))
        return np.random.default_rng([self.seed, zlib.crc32(named.encode())])


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
        made.append(Knockout(query, key, 0, keep_self=kind[1] != EDGE))
    return made


def queries_of(ends: Ends) -> Span:
    """The span of the queries of an edge."""
    if not ends.answer:
        return Tokens(ends.query)
    return (Tokens(ends.query), ANSWER) if ends.query else ANSWER


def _cut(
    parts: Sequence[Knockout],
    layers: tuple[int, ...],
    point: Point,
    only: dict[int | str, dict[int, tuple[int, ...]]],
) -> Intervention:
    heads = (point.head,) if "head" in dict(point.axes) else None
    where = [(layers, heads)]
    if point.layer in only:
        where = [((layer,), some) for layer, some in only[point.layer].items() if layer in layers]
    cut = tuple(dataclasses.replace(part, layers=each, heads=some) for each, some in where for part in parts)
    return cut[0] if len(cut) == 1 else Together(parts=cut)
