"""Figures of a table of paths, drawn from its `Result` alone."""

from typing import TYPE_CHECKING

from vlm_mech.results.figures import heatmap
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["drawn"]


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """The mean effect of the path from every head, by layer and head."""
    return {"paths": heatmap(result, x="layer", y="head", value="effect")}
