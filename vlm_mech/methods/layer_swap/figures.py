"""Figures of a layer swap, drawn from its `Result` alone."""

from typing import TYPE_CHECKING

from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Recovered fraction as heatmap and as lines, and the logit difference, over depth and span, by direction."""
    depth = result.axes[-1]
    return {
        "recovered_heatmap": figures.heatmap(result, x=depth, y="span", metric="recovered", facet="direction"),
        "recovered_lines": figures.lines(result, x=depth, colour="span", metric="recovered", facet="direction"),
        "logit_diff_heatmap": figures.heatmap(result, x=depth, y="span", metric="logit_diff", facet="direction"),
    }
