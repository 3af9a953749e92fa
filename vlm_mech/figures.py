"""Results as plotly figures. Nothing is computed here but the result's own summary; functions return the figure."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.errors import UsageError
from vlm_mech.result import Metric, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe & Ito: distinguishable with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SIGNIFICANCE = 0.05


def _format(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _hover(row: pd.Series, axes: tuple[str, ...]) -> str:
    where = ", ".join(f"{axis} {row[axis]}" for axis in axes)
    return (
        f"{where}<br>mean {_format(row['mean'])} {row['unit']}"
        f"<br>95 % interval {_format(row['ci_low'])} to {_format(row['ci_high'])}"
        f"<br>n {row['n']} (missing {row['n_missing']})"
        f"<br>unedited {_format(row['baseline'])}, change {_format(row['effect'])}"
        f"<br>corrected p {_format(row['p_corrected'])}"
    )


def _scale(metric: Metric, values: pd.Series) -> dict[str, Any]:
    """Signed metrics diverge around 0; fractions and shares keep 0 and 1 on the scale."""
    if metric.signed:
        reach = max(1e-9, float(values.abs().max()))
        return {"colorscale": "RdBu_r", "zmid": 0, "zmin": -reach, "zmax": reach}
    low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
    return {"colorscale": "Viridis", "zmin": low, "zmax": high}


def _facets(summary: pd.DataFrame, facet: str | None) -> list[tuple[str, pd.DataFrame]]:
    if facet is None:
        return [("", summary)]
    return [(str(value), panel) for value, panel in summary.groupby(facet, sort=False, observed=True)]


def _check(result: Result, **columns: str | None) -> None:
    for role, column in columns.items():
        if column is not None and column not in result.axes:
            raise UsageError(f"{role}={column!r} is no axis of {result.name}; its axes: {', '.join(result.axes)}")
    free = set(result.axes) - {column for column in columns.values() if column is not None}
    varied = sorted(axis for axis in free if len(set(result.table[axis])) > 1)
    if varied:
        raise UsageError(f"the axes {', '.join(varied)} take several values; give each a role or select one")


def _layout(figure: "go.Figure", title: str, n_facets: int, height: int) -> "go.Figure":
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0.01, "xanchor": "left", "y": 0.98, "yanchor": "top", "font": {"size": 17}},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        width=max(640, 520 * n_facets),
        height=height,
        margin={"l": 90, "r": 40, "t": 90, "b": 110},
    )
    return figure


def _label(axis: str) -> str:
    return {"layer": "layer", "span": "tokens swapped"}.get(axis, axis)


def _caption(figure: "go.Figure", text: str) -> None:
    figure.add_annotation(
        text=text, xref="paper", yref="paper", x=0, y=0, yshift=-78, showarrow=False, xanchor="left", font={"size": 11}
    )


def _counts(summary: pd.DataFrame) -> str:
    low, high = int(summary["n"].min()), int(summary["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def heatmap(
    result: Result, *, x: str, y: str, metric: str | None = None, facet: str | None = None, title: str | None = None
) -> "go.Figure":
    """Cell means as colours, one panel per value of `facet`; hovering shows n, interval, baseline and corrected p.

    A dot marks cells whose change against the unedited run is significant at 5 % after Holm's correction.

    Raises:
        UsageError: an axis does not exist, or one with several values has no role.
    """
    from plotly.subplots import make_subplots

    _check(result, x=x, y=y, facet=facet)
    chosen = result.metric(metric)
    summary = result.summary(chosen.name)
    panels = _facets(summary, facet)
    figure = make_subplots(
        cols=len(panels), shared_yaxes=True, subplot_titles=[name for name, _ in panels], horizontal_spacing=0.06
    )
    for column, (_, panel) in enumerate(panels, 1):
        figure.add_trace(_heat(result, chosen, summary, panel, x, y, last=column == len(panels)), row=1, col=column)
        marked = panel[panel["p_corrected"] < SIGNIFICANCE]
        figure.add_trace(_dots(marked, x, y), row=1, col=column)
    figure.update_xaxes(title_text=_label(x), type="category")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_yaxes(title_text=_label(y), col=1)
    _caption(
        figure, f"{_counts(summary)} per cell; dot: change from the unedited run has p < 0.05 after Holm's correction"
    )
    n_rows = summary[y].nunique()
    return _layout(figure, title or f"{result.name}: {chosen.name} ({chosen.unit})", len(panels), 220 + 56 * n_rows)


def _heat(
    result: Result, metric: Metric, summary: pd.DataFrame, panel: pd.DataFrame, x: str, y: str, *, last: bool
) -> "go.Heatmap":
    import plotly.graph_objects as go

    across, down = list(panel[x].drop_duplicates()), list(panel[y].drop_duplicates())
    rows = {(row[x], row[y]): row for _, row in panel.iterrows()}
    return go.Heatmap(
        x=[str(value) for value in across],
        y=[str(value) for value in down],
        z=[[rows[value, other]["mean"] for value in across] for other in down],
        customdata=[[_hover(rows[value, other], result.axes) for value in across] for other in down],
        hovertemplate="%{customdata}<extra></extra>",
        # Numbers in the cells as long as they are readable.
        texttemplate="<br><br>%{z:.2f}" if len(across) <= 12 else None,
        textfont={"size": 11},
        xgap=2,
        ygap=2,
        showscale=last,
        colorbar={"title": {"text": f"{metric.name}<br>({metric.unit})"}, "thickness": 14},
        **_scale(metric, summary["mean"]),
    )


def _dots(marked: pd.DataFrame, x: str, y: str) -> "go.Scatter":
    import plotly.graph_objects as go

    return go.Scatter(
        x=marked[x].astype(str),
        y=marked[y].astype(str),
        mode="markers",
        marker={"size": 6, "color": "white", "line": {"color": "black", "width": 1}},
        hoverinfo="skip",
        showlegend=False,
    )


def lines(
    result: Result,
    *,
    x: str,
    colour: str,
    metric: str | None = None,
    facet: str | None = None,
    title: str | None = None,
) -> "go.Figure":
    """Cell means along `x` with 95 % bands, one line per value of `colour`, one panel per value of `facet`.

    Raises:
        UsageError: an axis does not exist, or one with several values has no role.
    """
    from plotly.subplots import make_subplots

    _check(result, x=x, colour=colour, facet=facet)
    chosen = result.metric(metric)
    summary = result.summary(chosen.name)
    panels = _facets(summary, facet)
    figure = make_subplots(
        cols=len(panels), shared_yaxes=True, subplot_titles=[name for name, _ in panels], horizontal_spacing=0.06
    )
    for column, (_, panel) in enumerate(panels, 1):
        for number, value in enumerate(panel[colour].drop_duplicates()):
            some = panel[panel[colour] == value]
            for trace in _band(some, result.axes, x, str(value), COLOURS[number % len(COLOURS)], named=column == 1):
                figure.add_trace(trace, row=1, col=column)
        figure.add_trace(_unedited(panel, x, named=column == 1), row=1, col=column)
    figure.update_xaxes(title_text=_label(x), dtick=1 if summary[x].dtype.kind in "iu" else None)
    figure.update_yaxes(title_text=f"{chosen.name} ({chosen.unit})", col=1)
    _caption(figure, f"{_counts(summary)} per point; bands: 95 % bootstrap interval of the mean over examples")
    figure.update_layout(legend={"title": {"text": _label(colour)}})
    return _layout(figure, title or f"{result.name}: {chosen.name} ({chosen.unit})", len(panels), 470)


def _band(rows: pd.DataFrame, axes: tuple[str, ...], x: str, name: str, colour: str, *, named: bool) -> list[Any]:
    import plotly.graph_objects as go

    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    held = rows.dropna(subset=["ci_low", "ci_high"])
    band = go.Scatter(
        x=[*held[x], *held[x][::-1]],
        y=[*held["ci_high"], *held["ci_low"][::-1]],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.18)",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
    )
    line = go.Scatter(
        x=rows[x],
        y=rows["mean"],
        mode="lines+markers",
        name=name,
        line={"color": colour, "width": 2.5},
        text=[_hover(row, axes) for _, row in rows.iterrows()],
        hovertemplate="%{text}<extra></extra>",
        legendgroup=name,
        showlegend=named,
    )
    return [band, line]


def _unedited(panel: pd.DataFrame, x: str, *, named: bool) -> "go.Scatter":
    import plotly.graph_objects as go

    rows = panel.drop_duplicates(x)
    return go.Scatter(
        x=rows[x],
        y=rows["baseline"],
        mode="lines",
        name="unedited",
        line={"color": "#888888", "width": 1.5, "dash": "dot"},
        hovertemplate="unedited run: %{y:.3g}<extra></extra>",
        showlegend=named,
    )


def save_figure(figure: "go.Figure", folder: Path, name: str) -> None:
    """Writes `NAME.html`, which opens without a network, and `NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.write_html(folder / f"{name}.html", include_plotlyjs=True)
    figure.write_json(folder / f"{name}.json")
