"""Figures of a layer swap, drawn from its `Result` alone."""

from typing import TYPE_CHECKING

from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Recovered fraction as heatmap and as lines, and the answers' difference, over depth and span, by direction."""
    depth, difference = result.axes[-1], result.metrics[1].name
    return {
        "recovered_heatmap": figures.heatmap(result, x=depth, y="span", metric="recovered", facet="direction"),
        "recovered_lines": figures.lines(result, x=depth, colour="span", metric="recovered", facet="direction"),
        f"{difference}_heatmap": figures.heatmap(result, x=depth, y="span", metric=difference, facet="direction"),
    }
