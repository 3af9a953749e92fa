"""Figures of head roles, drawn from the result alone: recovered fractions of all heads, flips beside random heads."""

from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_mech.methods.head_roles.data import HEAD, INTO_FIRST, INTO_SECOND, PROMOTING, SUPPRESSING
from vlm_mech.results import figures
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["ablated_groups", "both_directions", "drawn"]

ROLES = {"none": "#999999", PROMOTING: COLOURS[0], SUPPRESSING: COLOURS[1]}
N_SD = 2.0
"""Where the lines of the scatter stand, in standard deviations of the scores."""


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """The recovered fraction by layer and head, the scatter of both directions, and flips of ablated groups.

    Args:
        result: that of `head_roles`.
    """
    found: dict[str, Any] = {
        f"recovered_{name}": figures.heatmap(
            result, x="head", y="layer", metric="recovered", where={"of": HEAD, "direction": direction}
        )
        for name, direction in (("into_first", INTO_FIRST), ("into_second", INTO_SECOND))
    }
    found["both_directions"] = both_directions(result)
    if result.provenance.get("ablations"):
        found["ablated_groups"] = ablated_groups(result)
    return found


def both_directions(result: Result, *, title: str | None = None) -> "go.Figure":
    """Each head's recovered fraction in both directions; lines stand two standard deviations along the first component.

    Args:
        result: that of `head_roles`.
        title: in place of the usual one.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    heads = [each for each in result.provenance["heads"] if each["score"] is not None]
    end = "" if result.provenance["by"] == "ratios" else "_of_means"
    for role, colour in ROLES.items():
        some = [each for each in heads if each["role"] == role]
        figure.add_trace(
            go.Scatter(
                x=[each[f"into_first{end}"] for each in some], y=[each[f"into_second{end}"] for each in some],
                text=[f"L{each['layer']}H{each['head']}" for each in some], name=role, marker={"color": colour},
                mode="markers" if role == "none" else "markers+text", textposition="top center",
                hovertemplate="%{text}: %{x:.3f}, %{y:.3f}<extra></extra>",
            )
        )  # fmt: skip
    for sign in (1, -1) if heads else ():
        figure.add_trace(_line(heads, end, sign))
    figure.update_layout(
        template="plotly_white", width=720, height=640, meta=drawn_by(both_directions, title=title),
        title={"text": title or "Recovered fraction of each head, in both directions", "x": 0.01, "xanchor": "left"},
        xaxis_title=f"recovered {INTO_FIRST}", yaxis_title=f"recovered {INTO_SECOND}",
        font={"family": "Helvetica, Arial, sans-serif", "size": 12},
    )  # fmt: skip
    return figure


def _line(heads: list[dict[str, Any]], end: str, sign: int) -> "go.Scatter":
    """Where scores are two standard deviations above, or below, their mean."""
    import plotly.graph_objects as go

    points = np.array([[each[f"into_first{end}"], each[f"into_second{end}"]] for each in heads])
    axis = np.array([heads[0]["axis_first"], heads[0]["axis_second"]])
    width = float(((points - points.mean(0)) @ axis).std(ddof=1)) if len(points) > 1 else 0.0
    middle, along = points.mean(0) + sign * N_SD * width * axis, np.array([-axis[1], axis[0]])
    reach = max(0.05, float(np.abs(points - points.mean(0)).max())) / 2
    ends = np.stack([middle - reach * along, middle + reach * along])
    return go.Scatter(
        x=ends[:, 0], y=ends[:, 1], mode="lines", name=f"{'+' if sign > 0 else '-'}{N_SD:g} SD",
        line={"color": "#666666", "dash": "dash", "width": 1}, hoverinfo="skip",
    )  # fmt: skip


def ablated_groups(result: Result, *, title: str | None = None) -> "go.Figure":
    """The share of examples that each ablated group flips, as bars, with dots for the random groups next to it.

    Args:
        result: that of `head_roles`.
        title: in place of the usual one.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = result.provenance["ablations"]
    runs, ways = (list(dict.fromkeys(row[name] for row in rows)) for name in ("run", "way"))
    figure = make_subplots(1, len(runs), subplot_titles=[f"{run} run" for run in runs], shared_yaxes=True)
    for column, run in enumerate(runs, 1):
        for number, way in enumerate(ways):
            some = [row for row in rows if (row["run"], row["way"]) == (run, way)]
            names = [row["group"] for row in some]
            figure.add_trace(
                go.Bar(
                    x=names, y=[row["flip"] for row in some], name=way, offsetgroup=way, legendgroup=way,
                    marker={"color": COLOURS[number]}, showlegend=column == 1,
                ),
                row=1, col=column,
            )  # fmt: skip
            figure.add_trace(
                go.Box(
                    x=[row["group"] for row in some for _ in row["flip_draws"]],
                    y=[draw for row in some for draw in row["flip_draws"]], name=f"random, {way}", offsetgroup=way,
                    legendgroup=way, boxpoints="all", pointpos=0, jitter=0.4, fillcolor="rgba(0,0,0,0)",
                    line={"width": 0}, marker={"color": "#333333", "size": 4}, showlegend=False,
                ),
                row=1, col=column,
            )  # fmt: skip
    figure.update_layout(
        template="plotly_white", width=560 * len(runs), height=480, barmode="group", boxmode="group",
        title={"text": title or "Flips by ablated groups; dots: random heads of the same layers", "x": 0.01},
        yaxis={"title": "share flipped (two logits)", "range": [-0.02, 1.02]},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12}, meta=drawn_by(ablated_groups, title=title),
    )  # fmt: skip
    return figure
