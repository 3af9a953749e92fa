"""What a knockout could say: cutting an edge, at some layers or in a head, lowers the answer's lead, or raises it."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Intervention, Knockout, Together
from vlm_mech.methods.gates.manifold import EditOf
from vlm_mech.methods.gates.removals import Removed, RemovedOf
from vlm_mech.methods.knockout.data import (
    CONTROL,
    DISTANCE,
    EDGE,
    MASS,
    Masks,
    Scan,
    ending_of,
    kind_of_control,
)
from vlm_mech.methods.knockout.edges import ARROW, Cut, Edge, cut_of, parse_edge
from vlm_mech.results.claim import Claim, Condition, Side
from vlm_mech.results.claiming import least
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

NEEDED, HOLDS_BACK = "needed", "holds back"
"""Kinds of claims: the answer's lead over the other one is lower without it, or higher."""
NAMED = ("system", "image", "question", "last", "subject", "subject_last")
"""Groups of an edge that are spans by name."""
UNNAMED = "its tokens are no named span and may differ between examples"
NO_LAYER = "some example has the edge in none of these layers"
OF_ANSWERS = "tokens of answers are in no prompt"
RANDOM = {
    CONTROL: "the same number of random edges",
    MASS: "random edges of equal attention mass",
    DISTANCE: "random edges of equal distance",
}
WAYS: tuple[tuple[str, Side, str], ...] = ((NEEDED, "below", "lowers"), (HOLDS_BACK, "above", "raises"))


def pool_of(scan: Scan) -> Pool:
    """What can be said of a result of a scan."""
    return partial(pool, where=scan.layers.where)


def edit_of(scan: Scan, vlm: "VLM | None" = None, masks: Masks | None = None) -> EditOf:
    """What makes the cut of a claim, of one place or of several together.

    Args:
        vlm: finds the tokens of edges that are no spans by name, which may differ from example to example; without it
            such edges are told of and not cut.
        masks: pixels of the object by pair, for the groups `object` and `rest`.
    """
    known: dict[tuple[str, tuple[str, ...]], Cut | str] = {}

    def ends(edge: str, pairs: "Pairs") -> Cut | str:
        if vlm is None:
            return UNNAMED
        key = edge, tuple(pair.id for pair in pairs)
        if key not in known:
            known[key] = cut_of(vlm, pairs, parse_edge(edge), masks or {})
        return known[key]

    def made(claim: Claim, pairs: "Pairs") -> Intervention | str:
        edge = str(claim.about["edge"])
        query, key = edge.split(ARROW)
        found = Cut(joined(query), joined(key)) if _named(query) and _named(key) else ends(edge, pairs)
        if isinstance(found, str):
            return found
        cuts = [
            Knockout(found.query, found.key, layers, heads=heads) for heads, layers in _by_heads(scan, claim, found)
        ]
        return NO_LAYER if not cuts else cuts[0] if len(cuts) == 1 else Together(parts=tuple(cuts))

    return made


def removed_of(scan: Scan, vlm: "VLM | None" = None, masks: Masks | None = None) -> RemovedOf:
    """What attention, or a head, adds at the queries of a claim's edge: the cut of an edge takes a part of it away.

    Args:
        vlm, masks: as for `edit_of`.
    """

    def found(claim: Claim) -> Removed | str:
        edge = str(claim.about["edge"])
        query = edge.split(ARROW)[0]
        if "answer" in query.split("+"):
            return OF_ANSWERS
        span: Any = joined(query)
        if not _named(query):
            if vlm is None:
                return UNNAMED
            span = partial(_queries, vlm=vlm, edge=parse_edge(edge), masks=masks or {})
        parts = []
        for heads, layers in _by_heads(scan, claim, None):
            point = "attn_out" if heads is None else "head_out"
            parts.append(Removed(tuple(Site(f"llm.{point}", layer) for layer in layers), span, heads))
        return dataclasses.replace(parts[0], more=tuple(parts[1:]))

    return found


def ways_of(scan: Scan, vlm: "VLM", masks: Masks) -> tuple[EditOf, RemovedOf]:
    """Both of these."""
    return edit_of(scan, vlm, masks), removed_of(scan, vlm, masks)


def _named(group: str) -> bool:
    """Whether a group of tokens is a span by name."""
    return {*group.split("+")} <= {*NAMED}


def _queries(pairs: "Pairs", *, vlm: "VLM", edge: Edge, masks: Masks) -> Any:
    """The queries of an edge in each of some examples, or why one has none."""
    found = cut_of(vlm, pairs, edge, masks)
    return found if isinstance(found, str) else found.query


def _by_heads(scan: Scan, claim: Claim, cut: Cut | None) -> list[tuple[tuple[int, ...] | None, tuple[int, ...]]]:
    """Heads, or None for all, and the layers in which they are cut, of all places that a claim is about.

    Args:
        cut: leaves out layers in which the edge does not exist.
    """
    heads: dict[int, list[int]] = {}
    for place in claim.about.get("members", (claim.about,)):
        for layer in scan.layers.sets[place["layer"]]:
            if cut is None or cut.layers is None or layer in cut.layers:
                heads.setdefault(layer, []).extend([place["head"]] if "head" in place else [])
    found: dict[tuple[int, ...] | None, list[int]] = {}
    for layer, some in sorted(heads.items()):
        found.setdefault(tuple(some) or None, []).append(layer)
    return [(some, tuple(layers)) for some, layers in found.items()]


def pool(result: Result, *, where: str = "at") -> tuple[Claim, ...]:
    """Every edge at every place, both ways.

    A change counts from `claiming.least` on, and must be larger than that of every control that the result has.

    Args:
        where: the word before a layer.
    """
    metric = result.metrics[1]
    enough, found = least(result, metric.name), []
    cells = result.cells
    held = result.table[result.table[metric.name].notna()].groupby(list(result.axes), sort=False).size().to_dict()
    controls = [cut for cut in cells["cut"].drop_duplicates() if cut != EDGE]
    for cell in cells[cells["cut"] == EDGE].to_dict("records"):
        others = [{**cell, "cut": cut} for cut in controls]
        others = [each for each in others if held.get(tuple(each[axis] for axis in result.axes), 0) > 1]
        place = f"{where} layer {cell['layer']}" + (f" head {cell['head']}" if "head" in cell else "")
        about = {str(name): value for name, value in cell.items() if name != "cut"}
        for kind, side, does in WAYS:
            conditions = [Condition(metric.name, cell, side, least=enough, less="baseline")]
            for each in others:
                says = f"minus the effect of {_called(each['cut'])}:"
                conditions.append(Condition(metric.name, cell, side, least=enough, less=each, says=says))
            says = f"cutting {cell['edge']} {place} {does} {metric.name}"
            found.append(Claim(kind, about, says, tuple(conditions), metric.unit))
    return tuple(found)


def _called(cut: str) -> str:
    """A control in the words of a sentence."""
    return RANDOM[kind_of_control(cut)] + ending_of(cut)
