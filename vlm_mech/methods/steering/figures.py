"""Figures of steering, drawn from its `Result` alone."""

from typing import TYPE_CHECKING, Any

from vlm_mech.methods.steering.data import AGAINST, TOWARD
from vlm_mech.methods.steering.states import FOUND, OTHERS
from vlm_mech.results import figures
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["by_dose", "drawn"]

SHADES = {FOUND: COLOURS[0], **dict(zip(OTHERS, ("#999999", COLOURS[1], COLOURS[2]), strict=True))}
ASKED = {AGAINST: "images that show the other answer", TOWARD: "images that show its answer"}


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """The difference of answers and what is said over doses, by direction; and the dose chosen at every layer."""
    told, metric = result.provenance["direction"], result.metrics[0].name
    names = {"dose_response": metric, "dose_says": "says_toward", "dose_right": "right"}
    found = {name: by_dose(result, metric=each) for name, each in names.items()}
    if len(result.table[["span", "layer"]].drop_duplicates()) > 1:
        maps: dict[str, Any] = {"x": "layer", "y": "span", "facet": "picture"}
        for word, sign in (("toward", 1), ("back", -1)):
            where = {"direction": FOUND, "dose": sign * told["dose"]}
            title = f"steering: change of {metric} by a dose of {where['dose']:+g} ({AGAINST}: {ASKED[AGAINST]})"
            found[f"layers_{word}"] = figures.heatmap(
                result, metric=metric, value="effect", where=where, title=title, **maps
            )
    return found


def by_dose(result: Result, *, metric: str, title: str | None = None) -> "go.Figure":
    """A metric over doses at the place chosen: the direction with its 95 % band, and a thin line for each control.

    Args:
        result: of steering.
        metric: which is drawn.
        title: in place of the usual one.
    """
    from plotly.subplots import make_subplots

    told, chosen, rows = result.provenance["direction"], result.metric(metric), result.summary(metric)
    rows = rows[(rows["span"] == told["span"]) & (rows["layer"] == told["layer"])]
    pictures = [each for each in ASKED if each in set(rows["picture"])]
    titles = [ASKED[each] for each in pictures]
    figure = make_subplots(cols=len(pictures), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.06)
    for column, picture in enumerate(pictures, 1):
        for trace in _traces(rows[rows["picture"] == picture].sort_values("dose"), column == 1):
            figure.add_trace(trace, row=1, col=column)
    low, high = int(rows["n"].min()), int(rows["n"].max())
    counts = f"n = {low}" if low == high else f"n = {low} to {high}"
    figure.add_annotation(
        text=f"{counts} per point; band: 95 % interval of the mean over examples; thin lines: means of controls",
        xref="paper", yref="paper", x=0, y=0, yshift=-78, showarrow=False, xanchor="left", font={"size": 11},
        name="caption",
    )  # fmt: skip
    figure.update_xaxes(title_text="dose (fraction of the mean state norm)")
    figure.update_yaxes(title_text=f"{chosen.name} ({chosen.unit})", col=1)
    if not chosen.signed:
        figure.update_yaxes(range=[-0.05, 1.05])
    where = f"{told['span']}, layer {told['layer']}"
    figure.update_layout(
        template="plotly_white", width=max(640, 560 * len(pictures)), height=470,
        title={"text": title or f"steering ({where}): {chosen.name} ({chosen.unit})", "x": 0.01, "xanchor": "left"},
        legend={"title": {"text": "direction"}}, margin={"l": 90, "r": 40, "t": 90, "b": 110},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        meta=drawn_by(by_dose, metric=metric, title=title),
    )  # fmt: skip
    return figure


def _traces(rows: "pd.DataFrame", in_legend: bool) -> "list[go.Scatter]":
    """Controls, a name in the legend for each kind, the unedited run dotted; on top the direction and its band."""
    import plotly.graph_objects as go

    names = list(rows["direction"].drop_duplicates())
    made, seen = [], set[str]()
    for name in sorted((each for each in names if each != FOUND), key=lambda each: OTHERS.index(each.split()[0])):
        some, kind = rows[rows["direction"] == name], name.split()[0]
        told = f"{kind} ({sum(each.split()[0] == kind for each in names)})"
        made.append(
            go.Scatter(
                x=some["dose"], y=some["mean"], mode="lines", name=told, legendgroup=kind, opacity=0.7,
                showlegend=in_legend and kind not in seen, line={"color": SHADES[kind], "width": 1.2},
                hovertemplate=f"{name}, dose %{{x:g}}: %{{y:.3g}}<extra></extra>",
            )
        )  # fmt: skip
        seen.add(kind)
    own, shade = rows[rows["direction"] == FOUND], SHADES[FOUND]
    red, green, blue = (int(shade[at : at + 2], 16) for at in (1, 3, 5))
    band = go.Scatter(
        x=[*own["dose"], *own["dose"][::-1]], y=[*own["ci_high"], *own["ci_low"][::-1]], mode="lines", fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.18)", line={"width": 0}, hoverinfo="skip", legendgroup=FOUND,
        showlegend=False,
    )  # fmt: skip
    line = go.Scatter(
        x=own["dose"], y=own["mean"], mode="lines+markers", name=FOUND, legendgroup=FOUND, showlegend=in_legend,
        line={"color": shade, "width": 3}, customdata=own[["ci_low", "ci_high", "n"]],
        hovertemplate=(
            "found, dose %{x:g}: %{y:.3g}<br>95 % interval %{customdata[0]:.3g} to %{customdata[1]:.3g}"
            "<br>n %{customdata[2]}<extra></extra>"
        ),
    )  # fmt: skip
    unedited = go.Scatter(
        x=own["dose"], y=own["baseline"], mode="lines", name="unedited", legendgroup="unedited", showlegend=in_legend,
        line={"color": "#333333", "width": 1.5, "dash": "dot"}, hovertemplate="unedited: %{y:.3g}<extra></extra>",
    )  # fmt: skip
    return [*made, unedited, band, line]
