"""Figures of a run of erroneous agreements, drawn from a saved `Result` alone."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.behaviour.answering.by_category import categories, has_categories
from vlm_mech.behaviour.erroneous_agreement.study import AMONG, BY_CATEGORY, POOLED, READERS, SIMILARITIES, TO_TEXT
from vlm_mech.errors import UsageError
from vlm_mech.results.figures import COLOURS, drawn_by, ending
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

GREY = "#888888"
WHO = ("both correct", "VLM alone", "contrastive alone", "neither")
A_ROW, A_SET, AN_ENTRY = 16, 22, 31
NAME, NARROWEST = 38, 720
"""Signs of a data set's name at most, and pixels that title and plotly's tools, and the caption, need."""
CHANCE = ("pair", "individual", "set")
"""Metrics whose baseline is guessing; that of the others is images of different pairs."""
DASHES = ("solid", "dash", "dot")


def dots(result: Result, *, metric: str, views: Sequence[str], title: str) -> "go.Figure":
    """Means of a metric with 95 % intervals, data sets below each other; a grey mark is the baseline.

    Raises:
        UsageError: no data set has the metric in these views.
    """
    import plotly.graph_objects as go

    rows = result.summary(metric)
    rows = rows[rows["view"].isin(list(views)) & (rows["n"] > 0)]
    if rows.empty:
        raise UsageError(f"{result.name} has no {metric} of {', '.join(views)}")
    figure, data = go.Figure(), list(rows["data"].drop_duplicates())
    step = 0.8 / len(views)
    for number, view in enumerate(views):
        some = rows[rows["view"] == view]
        y = np.array([data.index(name) for name in some["data"]]) + (number - (len(views) - 1) / 2) * step
        errors = {
            "type": "data", "symmetric": False, "thickness": 1.5, "width": 3,
            "array": some["ci_high"] - some["mean"], "arrayminus": some["mean"] - some["ci_low"],
        }  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=some["mean"], y=y, mode="markers", name=html.escape(view), error_x=errors, legendgroup=view,
                marker={"color": COLOURS[number], "size": 8}, customdata=some[["data", "n"]].to_numpy(),
                hovertemplate="%{customdata[0]}: %{x:.3f}, n = %{customdata[1]}",
            )
        )  # fmt: skip
        mark = {"symbol": "line-ns-open", "size": 11, "color": GREY}
        name = "chance" if metric in CHANCE else "unpaired images"
        figure.add_trace(
            go.Scatter(x=some["baseline"], y=y, mode="markers", name=name, marker=mark, legendgroup=name,
                       legendrank=2000, showlegend=number == 0, hovertemplate=f"{name}: %{{x:.3f}}<extra></extra>")
        )  # fmt: skip
    told = result.metric(metric)
    figure.update_xaxes(title_text=f"{told.name} ({told.unit})")
    if told.unit == "share":
        figure.update_xaxes(range=[-0.02, 1.02])
    _named_rows(figure, data)
    note = f"{_n(rows['n'])}; bars: 95 % interval over {'sets' if metric == 'set' else 'pairs'}"
    figure.update_layout(meta=drawn_by(dots, metric=metric, views=list(views), title=title))
    return _dressed(figure, title, note, max(len(data) * (A_SET + A_ROW * len(views)), AN_ENTRY * (len(views) + 1)))


def _named_rows(figure: "go.Figure", names: Sequence[str]) -> None:
    shown = [html.escape(ending(name, NAME), quote=False) for name in names]
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=shown, range=[len(names) - 0.5, -0.5], zeroline=False, showgrid=False
    )
    for edge in range(1, len(names)):
        figure.add_hline(y=edge - 0.5, line={"color": "#dddddd", "width": 1})


def who_is_right(result: Result, *, view: str, title: str) -> "go.Figure":
    """Similarity of every pair, by who gets the pair right, a panel a data set; grey: 90 % of unpaired images."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    told = result.provenance
    floors = {each["data"]: each for each in told["floors"] if each["view"] == view and each["n"]}
    names = list(result.table["data"].drop_duplicates())
    n_columns = min(3, len(names))
    n_rows = -(-len(names) // n_columns)
    figure = make_subplots(
        rows=n_rows, cols=n_columns, subplot_titles=[_heading(name, floors.get(name)) for name in names],
        shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=min(0.3, 0.2 / n_rows + 0.03),
    )  # fmt: skip
    for heading, name in zip(figure.layout.annotations, names, strict=True):
        heading.update(font={"size": 13}, hovertext=html.escape(name))
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        where = {"row": 1 + number // n_columns, "col": 1 + number % n_columns}
        pairs = _who(result, name, view)
        jitter = rng.uniform(-0.28, 0.28, len(pairs))
        dots = go.Scatter(
            x=pairs["similarity"], y=pairs["who"].map(WHO.index) + jitter, mode="markers", showlegend=False,
            marker={"color": [COLOURS[WHO.index(who)] for who in pairs["who"]], "size": 6, "opacity": 0.65},
            text=pairs.index, hovertemplate="%{text}<br>%{x:.4f}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(dots, **where)
        if name in floors:
            low, high = floors[name]["low"], floors[name]["high"]
            figure.add_vrect(x0=low, x1=high, fillcolor=GREY, opacity=0.15, line_width=0, **where)
        figure.add_vline(x=told["tau"], line={"color": "#000000", "dash": "dot", "width": 1}, **where)
        least = min(pairs["similarity"].min(), told["tau"])
        # Room for the counts at the left.
        figure.update_xaxes(range=[least - 0.13 * (1 - least), 1 + 0.04 * (1 - least)], **where)
        counts = pairs["who"].value_counts()
        for place, who in enumerate(WHO):
            figure.add_annotation(
                text=f"{counts.get(who, 0)}", x=0.012, xref="x domain", y=place, showarrow=False, xanchor="left",
                font={"size": 11, "color": COLOURS[place]}, **where,
            )  # fmt: skip
    figure.update_yaxes(tickvals=list(range(4)), ticktext=list(WHO), range=[3.5, -0.5], zeroline=False)
    figure.update_xaxes(title_text=f"similarity: {view}", row=n_rows)
    figure.update_layout(meta=drawn_by(who_is_right, view=view, title=title))
    note = f"numbers: pairs; unpaired images: 90 % of similarities, grey where within; dotted: tau = {told['tau']:g}"
    return _dressed(figure, title, note, 215 * n_rows, width=max(NARROWEST, 330 * n_columns + 190))


def _heading(name: str, floor: dict[str, Any] | None) -> str:
    shown = html.escape(ending(name, NAME), quote=False)
    return shown if floor is None else f"{shown}<br><sup>unpaired: {floor['low']:.2f} to {floor['high']:.2f}</sup>"


def _n(counts: pd.Series) -> str:
    return f"n = {counts.min()}" if counts.min() == counts.max() else f"n = {counts.min()} to {counts.max()}"


def _who(result: Result, data: str, view: str) -> pd.DataFrame:
    """Similarity of each pair of a data set, and who gets it right."""
    table = result.table[result.table["data"] == data]
    right = table.pivot(index="example", columns="view", values="pair")[[TO_TEXT, AMONG]].dropna()
    codes = (1 - right[AMONG]) * 2 + (1 - right[TO_TEXT])
    # Right in both 0, VLM alone 1, contrastive alone 2, neither 3.
    likeness = table[table["view"] == view].set_index("example")["similarity"]
    return pd.DataFrame(
        {"who": codes.astype(int).map(dict(enumerate(WHO))), "similarity": likeness.reindex(right.index)}
    )


def aligned_layers(result: Result, *, title: str) -> "go.Figure":
    """Debiased CKA along the layers of the contrastive tower, a panel a pooling; grey: shuffled pairings."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    table = pd.DataFrame(result.provenance["alignment"])
    panels, names = list(table["pooled"].drop_duplicates()), list(table["data"].drop_duplicates())
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=panels, shared_yaxes=True, horizontal_spacing=0.05)
    for column, pooled in enumerate(panels, 1):
        part = table[table["pooled"] == pooled]
        floor = part.groupby("layer").agg(low=("floor_low", "min"), high=("floor_high", "max"))
        band = go.Scatter(
            x=[*floor.index, *floor.index[::-1]], y=[*floor["low"], *floor["high"][::-1]], fill="toself", mode="lines",
            fillcolor="rgba(136,136,136,0.2)", line={"width": 0}, name="shuffled pairings", showlegend=column == 1,
            hoverinfo="skip",
        )  # fmt: skip
        figure.add_trace(band, row=1, col=column)
        for number, name in enumerate(names):
            some = part[part["data"] == name].sort_values("layer")
            dash = DASHES[number // len(COLOURS) % len(DASHES)]
            # Side by side, so that intervals do not cover each other.
            shift = (number - (len(names) - 1) / 2) * 0.06
            errors = {
                "type": "data", "symmetric": False, "thickness": 1, "width": 2,
                "array": some["high"] - some["value"], "arrayminus": some["value"] - some["low"],
            }  # fmt: skip
            figure.add_trace(
                go.Scatter(
                    x=some["layer"] + shift, y=some["value"], name=html.escape(ending(name, NAME), quote=False),
                    mode="lines+markers", legendgroup=name, showlegend=column == 1, error_y=errors,
                    line={"color": COLOURS[number % len(COLOURS)], "width": 2, "dash": dash},
                ),
                row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(
        title_text="layer of the vision encoder (resid_post)", dtick=1 if int(table["layer"].max()) < 16 else None
    )
    figure.update_yaxes(title_text="debiased linear CKA", col=1)
    figure.update_layout(meta=drawn_by(aligned_layers, title=title))
    n_pairs = _n(pd.Series(table["n"]))
    note = f"{n_pairs} pairs; bars: 95 % jackknife interval; grey: 95 % of shuffles"
    return _dressed(figure, title, note, 300, width=max(NARROWEST, 420 * len(panels) + 220))


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Every figure of a run."""
    views = [view for view in READERS if view in set(result.table["view"])]
    found = {
        "pair": dots(result, metric="pair", views=views, title="both images of a pair correct"),
        "individual": dots(result, metric="individual", views=views, title="images correct"),
        "who_is_right": who_is_right(result, view=POOLED, title="are pairs missed because they are similar?"),
        "similarity": dots(result, metric="similarity", views=SIMILARITIES, title="similarity of a pair's images"),
        "above_tau": dots(
            result, metric="above_tau", views=SIMILARITIES,
            title=f"pairs more similar than {result.provenance['tau']:g}",
        ),
        "alignment": aligned_layers(result, title="both images along the contrastive vision encoder"),
    }  # fmt: skip
    if has_categories(result):
        found["categories"] = categories(result, **BY_CATEGORY, named=["data", "view"])
    if bool(result.table["set"].notna().any()):
        found["set"] = dots(result, metric="set", views=views, title="all four images of a set correct")
    return found


def _dressed(figure: "go.Figure", title: str, note: str, height: int, *, width: int = 900) -> "go.Figure":
    figure.update_layout(
        template="plotly_white", width=width, height=height + 190, margin={"l": 150, "r": 40, "t": 80, "b": 100},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        title={"text": html.escape(title), "x": 0.01, "xanchor": "left", "y": 0.98, "yanchor": "top"},
    )  # fmt: skip
    figure.add_annotation(
        text=note, xref="paper", yref="paper", x=0, y=0, yshift=-78, showarrow=False, xanchor="left",
        font={"size": 11}, name="caption",
    )  # fmt: skip
    return figure
