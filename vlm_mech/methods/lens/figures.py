"""Figures of an answer's lead in the lens, drawn from its `Result` alone."""

from typing import TYPE_CHECKING

from vlm_mech.methods.lens.claims import LEAD, STEP
from vlm_mech.methods.lens.leads import INPUT
from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["drawn"]

MOST_TICKS = 16
"""Layers that are numbered on the axis, about."""


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """The lead by depth, and its change across each layer, with 95 % intervals; result is of `study.lens_lead`."""
    lens, axes = result.config["lens"], {"x": "layer", "colour": "rival"}
    layers = sorted(int(layer) for layer in result.cells["layer"].unique() if layer != INPUT)
    lead = figures.lines(result, metric=LEAD, title=f"{lens}: the answer's lead", **axes)
    step = figures.lines(result, metric=STEP, where={"layer": layers}, title=f"{lens}: change of the lead", **axes)
    every = max(1, len(layers) // MOST_TICKS)
    lead.update_xaxes(tickvals=[INPUT, *layers[::every]], ticktext=["input", *map(str, layers[::every])])
    lead.update_xaxes(title="output of layer")
    step.update_xaxes(title="across layer")
    unit = result.metric(STEP).unit
    step.update_yaxes(title=f"change of the lead ({unit})")
    return {"lead": lead, "step": step}
