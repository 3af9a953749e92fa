"""Results as plotly figures. Nothing is computed here but the result's own summary; functions return the figure."""

import dataclasses
import html
import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from vlm_mech.errors import UsageError
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.statistics import smallest_attainable_p

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["COLOURS", "drawn_by", "ending", "heatmap", "lines"]

# Okabe & Ito: distinguishable with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SIGNIFICANCE = 0.05
# Metrics of these units run from 0 to 1, and their scales show both ends.
FRACTIONS = ("fraction", "share", "probability")
MOST_NUMBERS = 12
MOST_TICKS = 16
USUAL_NAME = 16
"""Letters of a name in a legend that a figure has room for."""
LETTER = 8
"""Pixels that a letter of an upright title takes."""
SAME = 1e-9
CAPTION = "caption"
"""Name of the annotation below a figure that says n and what bands are; pages show it as text."""

Value = Literal["mean", "effect"]


def __dir__() -> list[str]:
    return __all__


def drawn_by(function: "Callable[..., go.Figure]", /, **options: Any) -> dict[str, Any]:
    """The `layout.meta` of a figure, by which `redraw` draws it again: as `function(result, **options)`."""
    return {"drawn_by": f"{function.__module__}:{function.__name__}", "options": options}


def ending(name: str, n: int) -> str:
    """A long name in n signs: its end, in which paths differ, after the format before a colon if that leaves room."""
    if len(name) <= n:
        return name
    kind, colon, rest = name.rpartition(":")
    kept, told = (f"{kind}{colon}…", rest) if len(kind) < n / 2 else ("…", name)
    return kept + told[len(kept) - n :]


def _text(value: Any) -> str:
    """Plotly reads a little HTML in its texts; names of spans or models must stay what they are."""
    return html.escape(str(value), quote=False)


def _format(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _hover(row: pd.Series, axes: tuple[str, ...], against: str) -> str:
    where = ", ".join(f"{_text(axis)} {_text(row[axis])}" for axis in axes)
    return (
        f"{where}<br>mean {_format(row['mean'])} {_text(row['unit'])}"
        f"<br>95 % interval {_format(row['ci_low'])} to {_format(row['ci_high'])}"
        f"<br>n {row['n']} (missing {row['n_missing']})"
        f"<br>{against} {_format(row['baseline'])}, change {_format(row['effect'])}"
        f"<br>95 % interval of the change {_format(row['effect_low'])} to {_format(row['effect_high'])}"
        f"<br>corrected p {_format(row['p_corrected'])}"
    )


def _held_against(metric: Metric) -> str:
    return "the unedited run" if metric.against == "unedited" else metric.against


def _range(metric: Metric, value: Value, numbers: pd.Series) -> tuple[float, float]:
    """Changes and signed metrics reach as far below 0 as above; fractions show at least 0 to 1, the rest at least 0."""
    low, high = float(numbers.min()), float(numbers.max())
    if metric.signed or value == "effect":
        reach = max(1e-9, abs(low), abs(high))
        return -reach, reach
    top = 1.0 if metric.unit in FRACTIONS else 1e-9
    return min(0.0, low), max(top, high)


def _scale(metric: Metric, value: Value, numbers: pd.Series) -> dict[str, Any]:
    low, high = _range(metric, value, numbers)
    if low == -high:
        return {"colorscale": "RdBu_r", "zmid": 0, "zmin": low, "zmax": high}
    return {"colorscale": "Viridis", "zmin": low, "zmax": high}


def _values(table: pd.DataFrame, column: str) -> list[Any]:
    """The values of an axis: numbers and ordered categories in their order, others as the table has them."""
    distinct = table[column].drop_duplicates()
    ordered = distinct.dtype.kind in "iuf" or getattr(distinct.dtype, "ordered", False)
    return list(distinct.sort_values() if ordered else distinct)


def _facets(summary: pd.DataFrame, facet: str | None) -> list[tuple[str, pd.DataFrame]]:
    if facet is None:
        return [("", summary)]
    return [(_text(value), summary.loc[summary[facet] == value]) for value in _values(summary, facet)]


def _check(result: Result, **columns: str | None) -> None:
    for role, column in columns.items():
        if column is not None and column not in result.axes:
            raise UsageError(f"{role}={column!r} is not an axis of {result.name}; its axes: {', '.join(result.axes)}")
    free = set(result.axes) - {column for column in columns.values() if column is not None}
    varied = sorted(axis for axis in free if len(set(result.table[axis])) > 1)
    if varied:
        raise UsageError(f"the axes {', '.join(varied)} take several values; give each a role or select one")


def selected(result: Result, where: dict[str, Any] | None) -> Result:
    """The result with the rows alone that have the value (or one of a list of values) of each named axis.

    What is corrected over cells is corrected over these.
    """
    rows = result.table
    for axis, wanted in (where or {}).items():
        if axis not in result.axes:
            raise UsageError(f"{axis!r} is not an axis of {result.name}; its axes: {', '.join(result.axes)}")
        rows = rows[rows[axis].isin(wanted if isinstance(wanted, list) else [wanted])]
        if rows.empty:
            raise UsageError(f"no cell of {result.name} has {axis} {wanted!r}")
    return result if where is None else dataclasses.replace(result, table=rows)


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
    return {"span": "span of tokens"}.get(axis, _text(axis))


def _title(result: Result, metric: Metric, value: Value) -> str:
    return _text(f"{result.name}: {_quantity(metric, value)}")


def _quantity(metric: Metric, value: Value) -> str:
    return f"{'change of ' if value == 'effect' else ''}{metric.name} ({metric.unit})"


def _caption(figure: "go.Figure", text: str) -> None:
    figure.add_annotation(
        text=text, xref="paper", yref="paper", x=0, y=0, yshift=-78, showarrow=False, xanchor="left", font={"size": 11},
        name=CAPTION,
    )  # fmt: skip


def _with_room(figure: "go.Figure", labels: pd.Series) -> "go.Figure":
    """Room for long names in the legend, and below for labels that are words, which may be turned."""
    longest = max(len(trace.name or "") for trace in figure.data)
    width = figure.layout.width + max(0, round(7.2 * (longest - USUAL_NAME)))
    more = 0 if labels.dtype.kind in "iu" else round(2.4 * labels.astype(str).str.len().max())
    figure.update_annotations(selector={"name": CAPTION}, yshift=-78 - more)
    return figure.update_layout(width=width, height=figure.layout.height + more, margin={"b": 110 + more})


def _counts(summary: pd.DataFrame) -> str:
    low, high = int(summary["n"].min()), int(summary["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def heatmap(
    result: Result,
    *,
    x: str,
    y: str,
    metric: str | None = None,
    facet: str | None = None,
    value: Value = "mean",
    where: dict[str, Any] | None = None,
    title: str | None = None,
) -> "go.Figure":
    """Cell means as colours, one panel per value of `facet`; hovering shows n, interval, baseline and corrected p.

    `value="effect"` shows the change against the unedited run instead. A dot marks cells in which that change is
    significant at 5 % after Holm's correction.

    Args:
        where: draws the cells alone that have this value, or one of a list of values, of each axis named.

    Raises:
        UsageError: an axis does not exist, or one with several values has no role.
    """
    result = selected(result, where)
    _check(result, x=x, y=y, facet=facet)
    chosen = result.metric(metric)
    summary = result.summary(chosen.name)
    panels = _facets(summary, facet)
    figure, height = _panels(panels), 220 + 56 * summary[y].nunique()
    for column, (_, panel) in enumerate(panels, 1):
        heat = _heat(result, panel, x, y, value)
        heat.update(_scale(chosen, value, summary[value]), showscale=column == len(panels))
        heat.colorbar = {"title": {"text": _beside(_quantity(chosen, value), height), "side": "right"}, "thickness": 14}
        figure.add_trace(heat, row=1, col=column)
        figure.add_trace(_dots(panel, x, y), row=1, col=column)
    figure.update_xaxes(title_text=_label(x), type="category")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_yaxes(title_text=_label(y), col=1)
    dots = f"dot: differs from {_held_against(chosen)}, Holm-corrected p < 0.05"
    n_groups, n_tests = len(set(result.groups())), int(summary["p"].notna().sum())
    if (p := smallest_attainable_p(n_groups, n_tests)) >= SIGNIFICANCE:
        dots = f"no dots: the smallest corrected p of {n_tests} cells and {n_groups} groups is {p:.2g}"
    _caption(figure, f"{_counts(summary)} per cell; {dots}")
    options = {"metric": chosen.name, "facet": facet, "value": value, "where": where, "title": title}
    figure.update_layout(meta=drawn_by(heatmap, x=x, y=y, **options))
    made = _layout(figure, _text(title) if title else _title(result, chosen, value), len(panels), height)
    return _with_room(made, summary[x])


def _beside(text: str, height: int) -> str:
    """The title of a scale of colours, upright in lines that the figure has room for, clear of the scale's numbers."""
    # plotly sets it at a fixed distance, where numbers of three signs end.
    return "<br>" + "<br>".join(_text(line) for line in textwrap.wrap(text, (height - 100) // LETTER))


def _panels(panels: list[tuple[str, pd.DataFrame]]) -> "go.Figure":
    from plotly.subplots import make_subplots

    names = [name for name, _ in panels]
    return make_subplots(cols=len(panels), shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.06)


def _heat(result: Result, panel: pd.DataFrame, x: str, y: str, value: Value) -> "go.Heatmap":
    import plotly.graph_objects as go

    across, down = _values(panel, x), _values(panel, y)
    rows = {(row[x], row[y]): row for _, row in panel.iterrows()}
    # Not every combination need have been measured: a hole stays a hole.
    cells = [[rows.get((one, other)) for one in across] for other in down]
    against = result.metric(str(panel["metric"].iloc[0])).against
    hovers = [
        ["not measured" if each is None else _hover(each, result.axes, against) for each in line] for line in cells
    ]
    return go.Heatmap(
        x=[_text(one) for one in across],
        y=[_text(other) for other in down],
        z=[[None if cell is None else cell[value] for cell in line] for line in cells],
        customdata=hovers,
        hovertemplate="%{customdata}<extra></extra>",
        # Numbers in the cells as long as they are readable, below the dot.
        texttemplate="<br><br>%{z:.2f}" if len(across) <= MOST_NUMBERS else None,
        textfont={"size": 11},
        xgap=2 if len(across) <= MOST_NUMBERS else 1,
        ygap=2,
    )


def _dots(panel: pd.DataFrame, x: str, y: str) -> "go.Scatter":
    import plotly.graph_objects as go

    marked, size = panel[panel["p_corrected"] < SIGNIFICANCE], 6 if len(set(panel[x])) <= MOST_NUMBERS else 4
    return go.Scatter(
        x=[_text(one) for one in marked[x]],
        y=[_text(other) for other in marked[y]],
        mode="markers",
        marker={"size": size, "color": "white", "line": {"color": "black", "width": 1}},
        hoverinfo="skip",
        showlegend=False,
    )


def lines(
    result: Result,
    *,
    x: str,
    colour: str | None = None,
    metric: str | None = None,
    facet: str | None = None,
    value: Value = "mean",
    where: dict[str, Any] | None = None,
    title: str | None = None,
) -> "go.Figure":
    """Cell means along `x` with 95 % bands, one line per value of `colour` (or one), one panel per value of `facet`.

    `value="effect"` shows the change against the unedited run instead. The unedited run is dotted, once where all
    lines of a panel share it and in the line's colour where they do not.

    Args:
        where: draws the cells alone that have this value, or one of a list of values, of each axis named.

    Raises:
        UsageError: an axis does not exist, or one with several values has no role.
    """
    result = selected(result, where)
    _check(result, x=x, colour=colour, facet=facet)
    chosen = result.metric(metric)
    summary = result.summary(chosen.name)
    panels = _facets(summary, facet)
    figure = _panels(panels)
    by = colour or "metric"
    colours = {one: COLOURS[number % len(COLOURS)] for number, one in enumerate(_values(summary, by))}
    seen: set[str | None] = {None}
    for column, (_, panel) in enumerate(panels, 1):
        for trace in _traces(panel, result.axes, x, by, colours, value, chosen.against):
            trace.showlegend = trace.name not in seen
            seen.add(trace.name)
            figure.add_trace(trace, row=1, col=column)
    whole = summary[x].dtype.kind in "iu"
    figure.update_xaxes(title_text=_label(x), dtick=1 if whole and len(set(summary[x])) <= MOST_TICKS else None)
    figure.update_yaxes(title_text=_text(_quantity(chosen, value)), col=1)
    if value == "mean" and chosen.unit in FRACTIONS:
        low, high = _range(chosen, value, summary[["ci_low", "ci_high", "mean", "baseline"]].stack())
        figure.update_yaxes(range=[low - 0.05 * (high - low), high + 0.05 * (high - low)])
    _caption(figure, f"{_counts(summary)} per point; bands: 95 % interval of the mean over examples")
    options = {"metric": chosen.name, "facet": facet, "value": value, "where": where, "title": title}
    figure.update_layout(legend={"title": {"text": _label(by)}}, meta=drawn_by(lines, x=x, colour=colour, **options))
    made = _layout(figure, _text(title) if title else _title(result, chosen, value), len(panels), 470)
    return _with_room(made, summary[x])


def _traces(
    panel: pd.DataFrame,
    axes: tuple[str, ...],
    x: str,
    colour: str,
    colours: dict[Any, str],
    value: Value,
    against: str,
) -> list[Any]:
    """The lines of a panel with their bands, and what they are held against."""
    place = {one: number for number, one in enumerate(_values(panel, x))}
    panel = panel.assign(against=panel["baseline"] if value == "mean" else 0.0)
    by_line = {one: panel[panel[colour] == one].sort_values(x, key=lambda xs: xs.map(place)) for one in colours}
    by_line = {one: rows for one, rows in by_line.items() if len(rows)}
    bands = [_band(rows, axes, x, _text(one), colours[one], value, against) for one, rows in by_line.items()]
    traces = [trace for band in bands for trace in band]
    spread = panel.groupby(x, observed=True)["against"].agg(lambda values: values.max() - values.min())
    # Nothing but missing values spreads nowhere.
    if float(spread.fillna(0).max()) <= SAME:
        longest = max(by_line.values(), key=len)
        return [*traces, _dotted(longest, x, "#888888", against)]
    return traces + [_dotted(rows, x, colours[one], f"{_text(one)}, {against}") for one, rows in by_line.items()]


def _band(
    rows: pd.DataFrame, axes: tuple[str, ...], x: str, name: str, colour: str, value: Value, against: str
) -> list[Any]:
    import plotly.graph_objects as go

    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    low, high = ("ci_low", "ci_high") if value == "mean" else ("effect_low", "effect_high")
    held = rows.dropna(subset=[low, high])
    band = go.Scatter(
        x=[*held[x], *held[x][::-1]],
        y=[*held[high], *held[low][::-1]],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.18)",
        line={"width": 0},
        hoverinfo="skip",
        legendgroup=name,
    )
    line = go.Scatter(
        x=rows[x],
        y=rows[value],
        mode="lines+markers",
        name=name,
        line={"color": colour, "width": 2.5},
        text=[_hover(row, axes, against) for _, row in rows.iterrows()],
        hovertemplate="%{text}<extra></extra>",
        legendgroup=name,
    )
    return [band, line]


def _dotted(rows: pd.DataFrame, x: str, colour: str, name: str) -> "go.Scatter":
    import plotly.graph_objects as go

    return go.Scatter(
        x=rows[x],
        y=rows["against"],
        mode="lines",
        name=name,
        line={"color": colour, "width": 1.5, "dash": "dot"},
        hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
        legendgroup=name,
    )
