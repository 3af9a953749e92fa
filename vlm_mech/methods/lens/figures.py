"""Figures of an answer's lead in the lens, drawn from its `Result` alone."""

from typing import TYPE_CHECKING

from vlm_mech.methods.lens.claims import LEAD, STEP
from vlm_mech.methods.lens.leads import INPUT
from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["drawn"]


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """The lead by depth, and its change across each layer, with 95 % intervals; result is of `study.lens_lead`."""
    lens, axes = result.config["lens"], {"x": "layer", "colour": "rival"}
    layers = sorted(int(layer) for layer in result.cells["layer"].unique() if layer != INPUT)
    lead, step = f"{lens}: lead of the answer after each layer", f"{lens}: change of the lead across each layer"
    return {
        "lead": figures.lines(result, metric=LEAD, title=f"{lead} ({INPUT}: in the decoder's input)", **axes),
        "step": figures.lines(result, metric=STEP, where={"layer": layers}, title=step, **axes),
    }
