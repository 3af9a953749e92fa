"""What a knockout could say: cutting an edge, at some layers or in a head, lowers the answer's lead, or raises it."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Knockout
from vlm_mech.methods.gates.removals import Removed
from vlm_mech.methods.knockout.data import CONTROL, DISTANCE, EDGE, MASS, SPARED, Scan, kind_of_control
from vlm_mech.results.claim import Claim, Condition, Side
from vlm_mech.results.claiming import least
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

NEEDED, HOLDS_BACK = "needed", "holds back"
"""Kinds of claims: the answer's lead over the other one is lower without it, or higher."""
NAMED = ("system", "image", "question", "last")
"""Groups of an edge that are spans by name."""
RANDOM = {
    CONTROL: "as many edges between random tokens",
    MASS: "random edges of as much attention",
    DISTANCE: "random edges as far apart",
}
WAYS: tuple[tuple[str, Side, str], ...] = ((NEEDED, "below", "lowers"), (HOLDS_BACK, "above", "raises"))


def pool_of(scan: Scan) -> Pool:
    """What can be said of a result of a scan."""
    return partial(pool, where=scan.layers.where)


def edit_of(scan: Scan) -> Callable[[Claim, "Pairs"], Knockout | None]:
    """What makes the cut of a claim by name; None for edges whose tokens differ from example to example."""

    def made(claim: Claim, pairs: "Pairs") -> Knockout | None:
        query, key = str(claim.about["edge"]).split("<-")
        if not {*query.split("+"), *key.split("+")} <= {*NAMED}:
            return None
        heads = (claim.about["head"],) if "head" in claim.about else None
        return Knockout(joined(query), joined(key), scan.layers.sets[claim.about["layer"]], heads=heads)

    return made


def removed_of(scan: Scan) -> Callable[[Claim], Removed | None]:
    """What attention, or a head, adds at the queries of a claim's edge: the cut of an edge takes a part of it away."""

    def found(claim: Claim) -> Removed | None:
        query = str(claim.about["edge"]).split("<-")[0]
        if not {*query.split("+")} <= {*NAMED}:
            return None
        heads, layers = (
            (claim.about["head"],) if "head" in claim.about else None,
            scan.layers.sets[claim.about["layer"]],
        )
        point = "attn_out" if heads is None else "head_out"
        return Removed(tuple(Site(f"llm.{point}", layer) for layer in layers), joined(query), heads)

    return found


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
                says = f"less what {_named(each['cut'])} do there:"
                conditions.append(Condition(metric.name, cell, side, least=enough, less=each, says=says))
            says = f"cutting {cell['edge']} {place} {does} {metric.name}"
            found.append(Claim(kind, about, says, tuple(conditions), metric.unit))
    return tuple(found)


def _named(cut: str) -> str:
    """A control in the words of a sentence."""
    return RANDOM[kind_of_control(cut)] + (f"{SPARED}," if cut.endswith(SPARED) else "")
