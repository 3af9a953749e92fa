"""Figures of an exchange of blocks, drawn from its `Result` alone."""

from typing import TYPE_CHECKING

from vlm_mech.methods.weight_swap.study import GRAFT, OUTSIDE, REVERT
from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Lines of every metric by schedule, for each direction."""
    found = {}
    schedules = [each for each in dict.fromkeys(result.table["schedule"]) if each != OUTSIDE]
    for name, direction in (("revert", REVERT), ("graft", GRAFT)):
        where = {"direction": direction, "schedule": schedules}
        for metric in result.metrics:
            found[f"{name}_{metric.name}"] = figures.lines(
                result, x="layer", colour="donor", metric=metric.name, facet="schedule", where=where,
                title=f"{result.name}, {direction}: {metric.name} ({metric.unit})",
            )  # fmt: skip
    return found
