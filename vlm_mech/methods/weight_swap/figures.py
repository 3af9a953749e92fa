"""Figures of an exchange of blocks, drawn from its `Result` alone."""

from typing import Any

from vlm_mech.methods.weight_swap.study import GRAFT, METRICS, OUTSIDE, REVERT
from vlm_mech.results import figures
from vlm_mech.results.result import Result


def figures_of(result: Result) -> dict[str, Any]:
    """Lines of every metric by schedule, for each direction."""
    drawn: dict[str, Any] = {}
    schedules = [each for each in dict.fromkeys(result.table["schedule"]) if each != OUTSIDE]
    for name, direction in (("revert", REVERT), ("graft", GRAFT)):
        where = {"direction": direction, "schedule": schedules}
        for metric in METRICS:
            drawn[f"{name}_{metric.name}"] = figures.lines(
                result, x="layer", colour="donor", metric=metric.name, facet="schedule", where=where,
                title=f"{result.name}, {direction}: {metric.name} ({metric.unit})",
            )  # fmt: skip
    return drawn
