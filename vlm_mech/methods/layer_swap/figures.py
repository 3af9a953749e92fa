"""Figures of a layer swap, drawn from its `Result` alone."""

from typing import TYPE_CHECKING, Any

from vlm_mech.methods.layer_swap.claims import claimable, words_of
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL, DONOR
from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Recovered fraction as heatmap and as lines, and the change of the answers' difference, by depth and span.

    Where the run has controls, these are of swaps with the counterfactual's states; lines by span compare them with
    those of each control, which has a heatmap of its own too.
    """
    depth, difference = result.axes[-1], result.metrics[1].name
    axes: dict[str, Any] = {"x": depth, "y": "span", "facet": "direction"}
    lines: dict[str, Any] = {"x": depth, "colour": "span", "facet": "direction"}
    if DONOR in result.axes:
        axes, lines = ({**each, "where": {DONOR: COUNTERFACTUAL}} for each in (axes, lines))
    found = {
        "recovered_heatmap": figures.heatmap(result, metric="recovered", **axes),
        "recovered_lines": figures.lines(result, metric="recovered", **lines),
        f"{difference}_heatmap": figures.heatmap(result, metric=difference, value="effect", **axes),
    }
    return found | (_controls(result, depth, difference) if DONOR in result.axes else {})


def _controls(result: Result, depth: str, difference: str) -> "dict[str, go.Figure]":
    """The same swaps with the states of each donor: lines by donor, a figure a span; and a heatmap of each control."""
    found = {}
    for span in claimable(result.table["span"].drop_duplicates().tolist()):
        how: dict[str, Any] = {"x": depth, "colour": DONOR, "facet": "direction", "where": {"span": span}}
        title = f"{result.name}, {words_of(span)}: recovered (fraction) by donor of the patched states"
        found[f"controls_{span}"] = figures.lines(result, metric="recovered", title=title, **how)
    for donor in result.provenance["controls"]:
        how = {"x": depth, "y": "span", "facet": "direction", "value": "effect", "where": {DONOR: donor}}
        title = f"{result.name}, control ({donor}): change of {difference} ({result.metrics[1].unit})"
        found[f"{donor.replace(' ', '_')}_heatmap"] = figures.heatmap(result, metric=difference, title=title, **how)
    return found
