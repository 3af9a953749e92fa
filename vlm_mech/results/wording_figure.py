"""The means of several wordings beside their mean over wordings, as a figure."""

import html
import math
import textwrap
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result
from vlm_mech.results.wordings import AXIS, means_of_wordings, over_wordings, spread, wordings_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_PANELS = 12
"""Panels of a figure; those in which wordings lie furthest apart are shown."""
MOST_TICKS = 16
LETTERS, LINE = 70, 46
"""Letters of a wording in the legend, and of a line in a panel's title."""
REACH = 0.28
"""How far the dots of a cell are set apart, where cells have a distance of 1."""


def wording_dots(result: Result) -> "go.Figure":
    """One dot a wording beside the mean over wordings with its interval over examples, of the first metric.

    Along the last axis of numbers (else the last axis), a panel for each combination of the others.

    Args:
        result: of `results.wordings.side_by_side`.
    """
    from plotly.subplots import make_subplots

    over, metric, wordings = over_wordings(result), result.metrics[0], wordings_of(result)
    rows = pd.DataFrame() if over is None else spread(result, over)
    if over is None or not (rows["wording_sd"].notna() & (rows["metric"] == metric.name)).to_numpy().any():
        return _without_panels(len(wordings))
    rows = rows[rows["metric"] == metric.name].dropna(subset=["wording_sd"])
    x, facets = _along(over)
    panels, n_panels = _panels(rows, facets)
    dots, ticks = means_of_wordings(result, metric.name), list(rows[x].drop_duplicates())
    n_columns = min(3, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure = make_subplots(
        n_rows, n_columns, shared_yaxes="all", subplot_titles=_titles(facets, panels),
        vertical_spacing=min(0.3, 0.5 / n_rows), horizontal_spacing=0.04,
    )  # fmt: skip
    for number, key in enumerate(panels):
        place: dict[str, Any] = {"row": number // n_columns + 1, "col": number % n_columns + 1}
        place |= {"showlegend": number == 0}
        _draw_dots(figure, _of(dots, facets, key), wordings, (x, ticks), place)
        _draw_mean(figure, _of(rows, facets, key), (x, ticks), place)
    _name_ticks(figure, (x, ticks), len(panels), n_columns)
    figure.update_yaxes(title_text=f"{metric.name} ({metric.unit})", col=1)
    figure.update_annotations(font_size=12)
    some = "" if len(panels) == n_panels else f"; {len(panels)} of {n_panels} panels, where wordings differ most"
    return figure.update_layout(
        title=f"{metric.name} by wording{some}", template="plotly_white",
        height=150 + 250 * n_rows + 20 * len(wordings),
        legend={"orientation": "v", "yanchor": "top", "y": -60 / (250 * n_rows), "x": 0},
        margin={"t": 110, "b": 80 + 20 * len(wordings)}, meta=drawn_by(wording_dots),
    )  # fmt: skip


def _without_panels(n_wordings: int) -> "go.Figure":
    import plotly.graph_objects as go

    why = "no cell has a value of the same example in all wordings" if n_wordings > 1 else "one wording has a result"
    return go.Figure().add_annotation(text=why, showarrow=False).update_layout(meta=drawn_by(wording_dots))


Ticks = tuple[str, list[Any]]
"""The axis along which a panel is drawn, and its values."""


def _draw_dots(
    figure: "go.Figure", dots: pd.DataFrame, wordings: list[str], along: Ticks, place: dict[str, Any]
) -> None:
    """The mean of each wording, beside each other in every cell."""
    x, ticks = along
    for shown, wording in enumerate(wordings):
        own, shift = dots[dots[AXIS] == wording], REACH * (2 * (shown + 1) / len(wordings) - 1)
        figure.add_scatter(
            x=[ticks.index(value) + shift for value in own[x]], y=own["mean"], mode="markers",
            marker={"color": COLOURS[shown % (len(COLOURS) - 1)], "size": 7, "opacity": 0.8},
            name=f"{shown + 1}: {_cut(wording)}", legendgroup=str(shown), **place,
        )  # fmt: skip


def _draw_mean(figure: "go.Figure", own: pd.DataFrame, along: Ticks, place: dict[str, Any]) -> None:
    """The mean over wordings in every cell, with its interval over examples."""
    x, ticks = along
    figure.add_scatter(
        x=[ticks.index(value) - REACH for value in own[x]], y=own["mean"], mode="markers",
        marker={"color": COLOURS[-1], "size": 8, "symbol": "diamond"},
        error_y={
            "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
            "array": own["ci_high"] - own["mean"], "arrayminus": own["mean"] - own["ci_low"],
        },
        name="mean over wordings, 95 % interval over examples", legendgroup="mean", **place,
    )  # fmt: skip


def _name_ticks(figure: "go.Figure", along: Ticks, n_panels: int, n_columns: int) -> None:
    """Some values of the axis by name, and the axis below the lowest panel of each column."""
    x, ticks = along
    every = range(0, len(ticks), math.ceil(len(ticks) / MOST_TICKS))
    labels = [_cut(str(ticks[number]), 24) for number in every]
    figure.update_xaxes(tickvals=list(every), ticktext=labels, range=[-0.6, len(ticks) - 0.4], title_standoff=4)
    for number in range(max(0, n_panels - n_columns), n_panels):
        # The lowest panel of each column: the last row need not be full.
        row, column = divmod(number, n_columns)
        figure.update_xaxes(title_text=x.replace("_", " "), row=row + 1, col=column + 1)


def _along(over: Result) -> tuple[str, list[str]]:
    """The axis that panels show, and the others of which there is more than one value."""
    numeric = [axis for axis in over.axes if pd.api.types.is_numeric_dtype(over.cells[axis])]
    x = (numeric or list(over.axes))[-1]
    return x, [axis for axis in over.axes if axis != x and len(set(over.cells[axis])) > 1]


def _panels(rows: pd.DataFrame, facets: list[str]) -> tuple[list[tuple[Any, ...]], int]:
    """The combinations that are shown, in the order of the table, and how many there are."""
    if not facets:
        return [()], 1
    widest: dict[tuple[Any, ...], float] = {}
    for *key, apart in rows[[*facets, "wording_sd"]].itertuples(index=False):
        widest[tuple(key)] = max(apart, widest.get(tuple(key), 0.0))
    keys = list(widest)
    chosen = sorted(range(len(keys)), key=lambda number: -widest[keys[number]])[:MOST_PANELS]
    return [keys[number] for number in sorted(chosen)], len(keys)


def _titles(facets: list[str], panels: list[tuple[Any, ...]]) -> list[str]:
    """What tells the panels apart, in lines that do not run into the next one."""
    apart = [place for place in range(len(facets)) if len({key[place] for key in panels}) > 1]
    said = [", ".join(f"{facets[place]} {key[place]}" for place in apart) for key in panels]
    return ["<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, LINE)) for text in said]


def _of(rows: pd.DataFrame, facets: list[str], key: tuple[Any, ...]) -> pd.DataFrame:
    for name, value in zip(facets, key, strict=True):
        rows = rows.loc[rows[name] == value]
    return rows


def _cut(text: str, most: int = LETTERS) -> str:
    shown = text if len(text) <= most else f"{text[: most - 3]}..."
    return html.escape(shown, quote=False)
