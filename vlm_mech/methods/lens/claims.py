"""What the lens could say of an answer and its rival: across which layers the lead rises or falls, and who leads where.

Every layer is asked, none is selected. The map of the visual flow asks the same of its own table.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm_mech.methods.lens.leads import INPUT, depth_named
from vlm_mech.results.claim import SMALLEST, Claim, Condition, Side
from vlm_mech.results.claiming import enough_of
from vlm_mech.results.result import Result

RISE, PUSH, SUPPRESS = "lead rises", "lead falls", "suppresses"
AHEAD, OVERTAKEN = "answer leads", "rival leads"
"""Kinds of claims."""
KINDS = (RISE, PUSH, SUPPRESS, AHEAD, OVERTAKEN)
LEAD, STEP = "lead", "step"
"""Metrics of `study.lens_lead`: the lead at a depth, its baseline in the decoder's input, and its change across one."""
CHANGED, RISEN, LED = "lead changed", "lead risen", "lead"
"""What a condition is about: the change of the lead across a layer, its rise since the decoder's input, and itself."""

ConditionOn = Callable[[str, int, Side, float, str], Condition]
"""Makes a condition: what it is about, its layer, on which side of 0 and how far from it, what it is called."""


def pool(result: Result) -> tuple[Claim, ...]:
    """All that could be said of a result of `study.lens_lead`.

    A change of the lead counts from `claiming.enough_of` its largest mean rise or fall since the decoder's input on.
    """
    unit, found = result.metric(LEAD).unit, []
    risen = dict(zip(_places(result), _mean(result.matrix(LEAD) - result.matrix(f"{LEAD}_baseline")), strict=True))
    for over in dict.fromkeys(over for over, _ in risen):
        layers = sorted(layer for each, layer in risen if each == over and layer != INPUT)
        enough = enough_of(max(abs(risen[over, layer]) for layer in layers))
        on = partial(_condition, over)
        found += lead_claims(on, layers, enough, over=over, unit=unit, about={"rival": over})
    return tuple(found)


def _places(result: Result) -> list[tuple[str, int]]:
    """What the answer leads, and the layer, of each cell."""
    return [(str(over), int(layer)) for over, layer in zip(result.cells["rival"], result.cells["layer"], strict=True)]


def _mean(values: Float[np.ndarray, "example cell"]) -> list[float]:
    return [float(mean) for mean in np.ma.masked_invalid(values).mean(0).filled(np.nan)]


def _condition(over: str, what: str, layer: int, side: Side, least: float, says: str) -> Condition:
    """A condition on a cell of `study.lens_lead`."""
    metric, less = STEP if what == CHANGED else LEAD, "baseline" if what == RISEN else None
    return Condition(metric, {"rival": over, "layer": layer}, side, least, less=less, says=says)


def lead_claims(
    on: ConditionOn,
    layers: Sequence[int],
    enough: float,
    *,
    kinds: Sequence[str] = KINDS,
    over: str = "its rival",
    unit: str = "logits",
    about: dict[str, Any] | None = None,
) -> list[Claim]:
    """Layers across which the answer's lead rises or falls, and depths from which on one of the two leads for good.

    Args:
        on: makes a condition on the cells of a result.
        layers: all layers of the decoder in order.
        enough: the least change of the lead that counts.
        kinds: of `KINDS`.
        over: what the answer leads, in words.
        unit: that of the lead.
        about: what claims are about beside their layer.
    """
    found, lead = [], f"the answer's lead over {over}"
    for layer in layers:
        each: dict[str, tuple[str, tuple[Condition, ...]]] = {}
        each[RISE] = f"{lead} rises across layer {layer}", (on(CHANGED, layer, "above", enough, ""),)
        falls, step = f"{lead} falls across", on(CHANGED, layer, "below", enough, "")
        each[PUSH] = f"{falls} layer {layer}", (step,)
        if layer > layers[0]:
            before = on(RISEN, layer - 1, "above", enough, "its rise from the decoder's input to there:")
            each[SUPPRESS] = f"layer {layer} suppresses: {falls} it after rising", (step, before)
        # However sure a tie is at the end, nobody leads by it.
        ends = [(depth, SMALLEST if depth == layers[-1] else 0.0) for depth in layers if depth >= layer]
        sides: tuple[tuple[str, Side, str], ...] = ((AHEAD, "above", "positive"), (OVERTAKEN, "below", "negative"))
        for kind, side, sign in sides:
            says = f"{lead} is {sign} at every depth from {depth_named(layer)} onwards"
            each[kind] = says, tuple(on(LED, depth, side, least, "") for depth, least in ends)
        place = {"layer": layer} | (about or {})
        found += [Claim(kind, place, *each[kind], unit) for kind in kinds if kind in each]
    return found
