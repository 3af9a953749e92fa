"""Figures of a layer swap, drawn from its `Result` alone."""

from typing import TYPE_CHECKING

from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Recovered fraction as heatmap and as lines, and the change of the answers' difference, by depth and span."""
    depth, difference = result.axes[-1], result.metrics[1].name
    axes = {"x": depth, "y": "span", "facet": "direction"}
    return {
        "recovered_heatmap": figures.heatmap(result, metric="recovered", **axes),
        "recovered_lines": figures.lines(result, x=depth, colour="span", metric="recovered", facet="direction"),
        f"{difference}_heatmap": figures.heatmap(result, metric=difference, value="effect", **axes),
    }
