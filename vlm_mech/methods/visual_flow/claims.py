"""What a map of the visual flow could say of a layer: that it reads, writes, carries, pushes or suppresses, and where
a swap flips the answer, where the rival leads, and where a probe finds the answer.

Each is a claim with one or several conditions on the cells of `effects.flow_effects`; one half of the examples declares
and the other half tests (`results.claiming`), so that a layer is never named on the examples that chose it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Intervention, Replace
from vlm_mech.methods.gates.gated import Asked, gated
from vlm_mech.methods.gates.manifold import ClaimEdit, EditOf
from vlm_mech.methods.gates.removals import Removed, RemovedOf
from vlm_mech.methods.knockout import claims as knockout
from vlm_mech.methods.knockout.claims import NEEDED, WAYS
from vlm_mech.methods.knockout.data import Scan
from vlm_mech.methods.lens.claims import CHANGED, OVERTAKEN, PUSH, RISEN, SUPPRESS, lead_claims
from vlm_mech.methods.lens.leads import INPUT, depth_named, depth_sites
from vlm_mech.methods.visual_flow.data import LAST, WHOLE, Cases, edges
from vlm_mech.methods.visual_flow.effects import (
    CUT,
    CUT_AT_RANDOM,
    DECODED,
    EFFECT,
    READS,
    SWAPPED,
    TURNED,
    WRITES,
    again_of,
    layers_of,
    means_of,
)
from vlm_mech.results.claim import Claim, Condition, Side
from vlm_mech.results.claiming import enough_of
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

READ, READ_NEEDED, WRITE, CARRY = "reads", "reads and is needed", "writes", "carries"
TURNS, FOUND = "swap turns", "decoded"
"""Kinds of claims, beside those of knockouts, `NEEDED` and `HOLDS_BACK`, and of the lens (`OF_THE_LENS`)."""
OF_THE_LENS = (PUSH, SUPPRESS, OVERTAKEN)
WHY_NOT = {
    READ: "it compares patches at two depths and edits no single site",
    WRITE: "it compares patches at two depths and edits no single site",
    PUSH: "it reads states and edits none",
    SUPPRESS: "it reads states and edits none",
    OVERTAKEN: "it reads states and edits none",
    FOUND: "it reads states and edits none",
}
"""Why claims that rest on no cut and no single swap have no edit."""
NAMES_OF = {
    READ: "layers that read the image's answer",
    WRITE: "layers that write it",
    CARRY: "layers that move it from the question",
    NEEDED: "cuts that lower the answer's lead",
    SUPPRESS: "layers that suppress the answer",
    OVERTAKEN: "depths from which the rival leads",
}
"""What findings tell of, where there is no such claim."""
TOKENS = {LAST: "the last token", WHOLE: "the last token and the answers' tokens"}
PLACES = {"object": "the object's patches", "last": "the last token"}
AT_RANDOM = "minus the effect of the same number of random edges:"


@dataclass(frozen=True)
class FlowClaims:
    """The claims that a map makes, those first that were strongest on the examples that declared them."""

    made: tuple[Claim, ...]

    @classmethod
    def of(cls, claims: Sequence[Claim]) -> "FlowClaims":
        """Those of some claims that are made."""
        made = [claim for claim in claims if claim.made]
        return cls(tuple(sorted(made, key=lambda claim: -claim.strength(claim.declared))))

    def layers(self, kind: str) -> tuple[int, ...]:
        """The layers of a kind of claims, each once."""
        return tuple(dict.fromkeys(claim.about["layer"] for claim in self.made if claim.kind == kind))

    @property
    def overtaken(self) -> int | None:
        """The first layer from whose output on the rival is claimed to lead."""
        return min(self.layers(OVERTAKEN), default=None)

    @property
    def route(self) -> Literal["direct", "two-hop", "none"]:
        """`direct`, `two-hop`, or `none` where nothing reads."""
        if not self.layers(READ):
            return "none"
        return "two-hop" if self.layers(CARRY) else "direct"


# What is edited


def edit_of(scan: Scan, sites: Sequence[Site]) -> EditOf:
    """The edit of a claim: the cut that it is about, or the swap that flips the answer; others edit nothing by name.

    Args:
        scan: what is cut.
        sites: where states are swapped: the decoder's input, and the output of each block (`leads.depth_sites`).
    """
    cut = knockout.edit_of(scan)

    def made(claim: Claim, pairs: "Pairs") -> Intervention | ClaimEdit | str | None:
        if claim.kind == TURNS:
            removed = _swapped(sites, claim)
            if isinstance(removed, str):
                return removed
            return Replace(removed.sites, joined(claim.about["span"]), source=pairs.counterfactual)
        one = _cut_condition(claim)
        return WHY_NOT.get(claim.kind) if one is None else cut(_about_cut(claim, one), pairs)

    return made


def removed_of(scan: Scan, sites: Sequence[Site]) -> RemovedOf:
    """The states that such a swap exchanges, or what attention adds at the queries of such a cut.

    Args:
        scan, sites: as for `edit_of`.
    """
    cut = knockout.removed_of(scan)

    def found(claim: Claim) -> Removed | str | None:
        if claim.kind == TURNS:
            return _swapped(sites, claim)
        one = _cut_condition(claim)
        if one is None:
            return WHY_NOT.get(claim.kind)
        removed = cut(_about_cut(claim, one))
        return dataclasses.replace(removed, condition=one) if isinstance(removed, Removed) else removed

    return found


def _swapped(sites: Sequence[Site], claim: Claim) -> Removed | str:
    """The states that the swap of a claim exchanges at its own depth, or why these are not asked about."""
    if "answer" in claim.about["span"].split("+"):
        return knockout.OF_ANSWERS
    site = sites[claim.about["layer"] - INPUT]
    # Beyond half of what the other image changes is the claim; that the answer moves is what other removals are asked.
    return Removed((site,), joined(claim.about["span"]), exchanged=True, condition=claim.conditions[0])


def _cut_condition(claim: Claim) -> Condition | None:
    """The condition about an edge that is cut, which is not about less than its control; None where there is none."""
    return next((one for one in claim.conditions if one.cell["kind"] == CUT and one.less is None), None)


def _about_cut(claim: Claim, cut: Condition) -> Claim:
    """The claim as a knockout would have it."""
    return dataclasses.replace(claim, about={"edge": cut.cell["span"], "layer": cut.cell["layer"]})


def with_claims(effects: Result, asked: Asked, vlm: "VLM", cases: Cases, scan: Scan, **how: Any) -> Result:
    """The effects of a map (`effects.flow_effects`) with what is claimed of them.

    Args:
        asked: how claims are tested.
        how: options of `study.flow`.
    """
    ways, again = (
        (edit_of(scan, depth_sites(vlm)), removed_of(scan, depth_sites(vlm))),
        again_of(cases, scan, **how),
    )
    return dataclasses.replace(effects, claims=gated(asked, vlm, cases.pairs, effects, pool_of(scan), again, *ways))


# The pool


def pool_of(scan: Scan) -> Pool:
    """What can be said of the effects of a map whose attention was cut as this scan says."""
    return partial(pool, where=scan.layers.where)


def pool(effects: Result, *, where: str = "at") -> tuple[Claim, ...]:
    """All that could be said of the effects of a map (`effects.flow_effects`).

    An effect on an answer counts from `SMALLEST` logits (or nats) and `SHARE` of half of what a swap of the image does
    in the decoder's input on; a change of the lead from `SHARE` of its largest rise or fall on. What a cut does must go
    beyond what as many edges between random tokens do, where the result has such a control.

    Args:
        where: the word before a layer that is cut.
    """
    asked = _Asked.of(effects, where)
    return (*_layers(asked), *_cuts(asked), *_turning(asked), *_leading(asked), *_decoded(asked))


@dataclass(frozen=True)
class _Asked:
    """What can be asked of some effects: layers by kind and span, and the least sizes that count."""

    layers: dict[tuple[str, str], list[int]]
    controlled: frozenset[tuple[str, int]]
    said: str
    where: str
    unit: str
    enough: float
    enough_of_lead: float

    @classmethod
    def of(cls, effects: Result, where: str) -> "_Asked":
        """What some effects can be asked, with `where` the word before a layer that is cut."""
        means, layers = means_of(effects), layers_of(effects)
        (said,) = (span for kind, span in layers if kind == WRITES)
        held = effects.table.dropna(subset=[EFFECT])
        counts = held[held["kind"] == CUT_AT_RANDOM].value_counts(["span", "layer"])
        controlled = frozenset(counts[counts > 1].index.tolist())
        enough = enough_of(means[SWAPPED, "image", INPUT] / 2)
        of_lead = enough_of(max(abs(means[RISEN, said, layer]) for layer in layers[RISEN, said]))
        return cls(layers, controlled, said, where, effects.metrics[0].unit, enough, of_lead)

    def spans(self, kind: str) -> list[str]:
        return [span for each, span in self.layers if each == kind]

    def cut(self, edge: str, layer: int, side: Side) -> tuple[Condition, ...]:
        """What cutting an edge must do, and beyond its control; none where it is not cut."""
        if layer not in self.layers.get((CUT, edge), ()):
            return ()
        says = f"cutting {edge} {self.where} it:"
        cut = _condition(CUT, edge, layer, side, self.enough, says=says)
        if (edge, layer) not in self.controlled:
            return (cut,)
        control = {"kind": CUT_AT_RANDOM, "span": edge, "layer": layer}
        return cut, _condition(CUT, edge, layer, side, less=control, says=AT_RANDOM)


def _condition(kind: str, span: str, layer: int, side: Side, least: float = 0.0, **more: Any) -> Condition:
    return Condition(EFFECT, {"kind": kind, "span": span, "layer": layer}, side, least, **more)


def _layers(asked: _Asked) -> list[Claim]:
    """Layers that read, write and carry."""
    found, said = [], asked.said
    of_last, of_question, taken_over = edges(said)
    does = "the effect of patching {} on the answer's lead {} across it"
    lost, grows = does.format("the image", "is lost"), does.format(TOKENS[said], "grows")
    for layer in asked.layers[READS, "image"]:
        reads, about = _condition(READS, "image", layer, "above", asked.enough), {"layer": layer}
        found.append(Claim(READ, about, f"layer {layer} reads: {lost}", (reads,), asked.unit))
        for edge in (of_last, of_question):
            if cut := asked.cut(edge, layer, "below"):
                says = f"layer {layer} reads and is needed, by {edge}: {lost}"
                found.append(Claim(READ_NEEDED, about | {"edge": edge}, says, (reads, *cut), asked.unit))
        writes = _condition(WRITES, said, layer, "below", asked.enough)
        found.append(Claim(WRITE, about, f"layer {layer} writes: {grows}", (writes,), asked.unit))
        if cut := asked.cut(taken_over, layer, "below"):
            held = "patching the question before it:"
            holds = _condition(SWAPPED, "question", layer - 1, "below", asked.enough, says=held)
            says = f"layer {layer} moves it from the question: {grows}"
            found.append(Claim(CARRY, about, says, (writes, *cut, holds), asked.unit))
    return found


def _cuts(asked: _Asked) -> list[Claim]:
    """Edges whose cut lowers the answer's lead over the other image's, or raises it."""
    found = []
    for edge in asked.spans(CUT):
        for layer in asked.layers[CUT, edge]:
            for kind, side, does in WAYS:
                says = f"cutting {edge} {asked.where} layer {layer} {does} the answer's lead over the other image's"
                about = {"layer": layer, "edge": edge}
                found.append(Claim(kind, about, says, asked.cut(edge, layer, side), asked.unit))
    return found


def _turning(asked: _Asked) -> list[Claim]:
    """Depths at which a swap flips the answer: it does more than half of what the other image changes.

    Left out are those at which it must, whatever the model does: the image in the decoder's input, and the last output.
    """
    found, said = [], asked.said
    for span in ("image", "question", said):
        layers = asked.layers[TURNED, span][:-1]
        layers = layers[1:] if span == "image" else layers
        for layer in layers:
            if span == "image":
                depths, at = (
                    [each for each in layers if each <= layer][::-1],
                    f"at every depth up to {depth_named(layer)}",
                )
            elif span == "question":
                depths, at = [layer], f"at {depth_named(layer)}"
            else:
                depths, at = (
                    [each for each in layers if each >= layer],
                    f"at every depth from {depth_named(layer)} onwards",
                )
            conditions = tuple(_condition(TURNED, span, each, "below", asked.enough) for each in depths)
            what = TOKENS[said] if span == said else f"the {span}"
            says = f"patching {what} flips the answer (more than half of the other image's effect) {at}"
            about = {"layer": layer, "span": span}
            found.append(Claim(TURNS, about, says, conditions, f"{asked.unit} beyond half"))
    return found


def _leading(asked: _Asked) -> list[Claim]:
    """Layers across which the answer's lead over its rival falls, and depths from which on the rival leads for good."""

    def on(what: str, layer: int, side: Side, least: float, says: str) -> Condition:
        return _condition(what, asked.said, layer, side, least, says=says)

    layers = asked.layers[CHANGED, asked.said]
    return lead_claims(on, layers, asked.enough_of_lead, kinds=OF_THE_LENS, unit=asked.unit)


def _decoded(asked: _Asked) -> list[Claim]:
    """Depths up to which a probe finds the answer likelier than its rival at the object, and from which on at the last
    token: what is there at first may be lost, and what comes there may stay.
    """
    found = []
    for span in asked.spans(DECODED):
        layers = asked.layers[DECODED, span]
        likelier = f"decodable: at {PLACES.get(span, span)} a probe's P(answer) exceeds P(rival) at every depth"
        for layer in layers:
            if span == "object":
                depths, run = [each for each in layers if each <= layer][::-1], f"up to {depth_named(layer)}"
            else:
                depths, run = [each for each in layers if each >= layer], f"from {depth_named(layer)} onwards"
            conditions = tuple(_condition(DECODED, span, each, "above") for each in depths)
            found.append(Claim(FOUND, {"layer": layer, "span": span}, f"{likelier} {run}", conditions, "there"))
    return found
