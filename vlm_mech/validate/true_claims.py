"""Which claims about a planted model are true: what was planted says so of single layers, heads and spans."""

from collections.abc import Mapping
from typing import Any

from vlm_mech.methods.attribution.claims import LOWERS, RAISES
from vlm_mech.methods.knockout.claims import HOLDS_BACK, NEEDED
from vlm_mech.methods.layer_swap.claims import MOVES, NO_LONGER, NOT_YET, TURNS
from vlm_mech.methods.lens import claims as lens
from vlm_mech.methods.lens.study import GIVEN
from vlm_mech.methods.probing.claims import READS, does_of
from vlm_mech.methods.visual_flow import claims as flow
from vlm_mech.methods.visual_flow.data import LAST, WHOLE
from vlm_mech.organism.planted_recipe import Edge, Role, Truth, recovered
from vlm_mech.results.claim import SHARE, Claim
from vlm_mech.validate.heads import EXCHANGED, ZEROED

HALF, UNSURE = 0.5, 0.05
"""A recovered fraction so near to a half is on neither side of it."""


def holds(claim: Claim, truth: Truth) -> bool | None:
    """Whether a claim is true of runs without edits; None where that is not planted.

    A cut lowers the answer's lead where a reading or carrying head has that edge, at that layer and, if the claim names
    one, in that head; cuts of what brings a prior in go either way, as answers fall. A swap flips the answer where more
    than half of what the reading heads pass on is not yet read (image), was written before (last), or is between
    (question): `planted_recipe.recovered`, which knows nothing of dormant paths. A layer reads, writes, carries or
    suppresses where a head, or units, are planted that do. Where the rival leads, and what the probe of a map finds, is
    not planted. Changing a head's output lowers the answer's lead where it reads or carries and writes there; what
    those do that bring a prior in is not planted. The lead in the lens rises across the layers that write the answer,
    and falls over the prior's across those that bring it in; what these do to the lead over another answer is not
    planted. A probe can read the answer in the image, and at the last position after the first layer that writes there;
    traces that it may read before are not planted.
    """
    if "probe" in claim.about:
        return _of_probe(claim, truth)
    if "rival" in claim.about:
        return _of_lens(claim, truth)
    if claim.kind in (LOWERS, RAISES, EXCHANGED, ZEROED):
        return _of_head(claim, truth)
    if "direction" in claim.about:
        return _of_swap(claim, truth, claim.kind.removeprefix(f"{claim.about['span']} "))
    if claim.kind in (NEEDED, HOLDS_BACK):
        if any(_is_at(edge, claim) for edge in truth.of("suppress", "fetch")):
            return None
        return claim.kind == NEEDED and any(_is_at(edge, claim) for edge in truth.of("read", "carry") if edge.weight)
    return _of_flow(claim, truth)


def _of_probe(claim: Claim, truth: Truth) -> bool | None:
    """Whether the answer is planted where a probe is claimed to read it, or not to; None where it need not be.

    Behind what suppresses it, it may be drowned.
    """
    written, depth, span = written_from(truth), depth_of(claim.about), claim.about["span"]
    drowned = min((each + 1 for each in _suppressing(truth)), default=depth + 1)
    planted = span == "image" or (span == LAST and written is not None and written <= depth < drowned)
    return does_of(claim) == READS if planted else None


def _suppressing(truth: Truth) -> set[int]:
    """The layers that bring a prior in."""
    return {each.layer for each in (*truth.of("suppress"), *truth.units) if each.role == "suppress"}


def written_from(truth: Truth) -> int | None:
    """The number of blocks after which the answer is first planted at the last position; None where nothing writes."""
    writers = [edge for edge in truth.of("carry") or truth.of("read") if edge.weight]
    # A copy is readable too, though nothing uses it.
    return min((edge.layer + 1 for edge in (*writers, *truth.of("copy"))), default=None)


def depth_of(about: Mapping[str, Any]) -> int:
    """The number of blocks before the states that a claim of a probe is about."""
    return about["layer"] + (about["point"] == "resid_post")


def _of_flow(claim: Claim, truth: Truth) -> bool | None:
    if claim.kind == flow.TURNS:
        return _of_swap(claim, truth, TURNS)
    if claim.kind in (flow.SUPPRESS, flow.PUSH):
        return claim.about["layer"] in _suppressing(truth)
    if claim.kind == flow.READ_NEEDED:
        return any(_is_at(edge, claim) for edge in truth.of("read") if edge.weight)
    roles: dict[str, tuple[Role, ...]] = {flow.READ: ("read",), flow.CARRY: ("carry",)}
    roles[flow.WRITE] = ("carry",) if truth.of("carry") else ("read",)
    if claim.kind not in roles:
        return None
    return any(edge.layer == claim.about["layer"] for edge in truth.of(*roles[claim.kind]) if edge.weight)


def _of_lens(claim: Claim, truth: Truth) -> bool | None:
    if claim.kind not in (lens.RISE, lens.PUSH, lens.SUPPRESS):
        return None
    layer = claim.about["layer"]
    planted = {each.layer for each in (*truth.of("suppress"), *truth.units) if each.role == "suppress"}
    if layer in planted:
        return True if claim.kind != lens.RISE and claim.about["rival"] == GIVEN else None
    writes = truth.of("carry") or truth.of("read")
    return claim.kind == lens.RISE and any(edge.layer == layer for edge in writes if edge.weight)


def _of_head(claim: Claim, truth: Truth) -> bool | None:
    """Of the output of one head changed; exchanged towards the other picture, or away from it (denoising)."""
    if not {"place", "layer", "head"} <= set(claim.about):
        return None
    layer, head = claim.about["layer"], claim.about["head"]
    here = [edge for edge in truth.edges if (edge.layer, edge.head) == (layer, head)]
    here = [edge for edge in here if claim.about["place"] in _places(edge, claim.about["place"])]
    if any(edge.role in ("suppress", "fetch") for edge in here):
        return None
    lowers = (claim.kind == RAISES) == (claim.about.get("direction") == "denoising")
    return lowers and any(edge.weight for edge in here if edge.role in ("read", "carry"))


def _places(edge: Edge, place: str) -> tuple[str, ...]:
    """The spans at which an edge acts, as a claim about a place calls them."""
    return tuple(WHOLE if place == WHOLE and each in (LAST, "answer") else each for each in edge.queries)


def _is_at(edge: Edge, claim: Claim) -> bool:
    """Whether an edge is the one that a claim is about."""
    query, key = str(claim.about["edge"]).split("<-")
    same = query in _places(edge, query) and key == edge.key and claim.about["layer"] == edge.layer
    return same and claim.about.get("head", edge.head) == edge.head


def _of_swap(claim: Claim, truth: Truth, does: str) -> bool | None:
    """Whether states after a layer flip the answer, as the next layer would read them."""
    edge = (truth.of("carry") or truth.of("read"))[0]
    said = edge.query
    span, layer = claim.about["span"], claim.about["layer"] + 1
    if span == WHOLE or (span == LAST and edge.queries == (LAST,)):
        span = said
    elif span not in ("image", "question"):
        return None
    share, most = recovered(truth, span, layer), recovered(truth, span, 0 if span == "image" else 10**6)
    if does == MOVES:
        return share > 0 if share >= SHARE or share == 0 else None
    if abs(share - HALF) < UNSURE or does not in (TURNS, NO_LONGER, NOT_YET):
        return None
    return share > HALF if does == TURNS else share < HALF and most > share


def on_dormant_path(claim: Claim, truth: Truth) -> bool:
    """Whether a claim says that a swap does what it does through a dormant path alone."""
    does = claim.kind.removeprefix(f"{claim.about.get('span')} ")
    dormant = any(each.role == "dormant" for each in truth.units)
    return dormant and "direction" in claim.about and does in (TURNS, MOVES) and holds(claim, truth) is False
