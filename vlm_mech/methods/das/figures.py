"""Figures of trained subspaces: interchange accuracy over the number of dimensions, beside the controls."""

from typing import TYPE_CHECKING

from vlm_mech.methods.das.study import IIA, LEAD, WHOLE
from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["drawn"]


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Interchange accuracy and the lead of the lender's answer over k, a line for each kind of subspace.

    All dimensions are left out, whose number is far off; the findings have their numbers.
    """
    kinds = [each for each in dict.fromkeys(result.table["subspace"]) if each != WHOLE]
    how = {"x": "k", "colour": "subspace", "where": {"subspace": kinds}}
    return {name: figures.lines(result, metric=name, **how) for name in (IIA, LEAD)}
