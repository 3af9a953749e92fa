"""How often lenses name what a patch shows, over depth, beside words of other patches; and in sentences."""

from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.methods.lens.named_patches import FLOORS, PATCHES
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

DASHES = dict(zip(FLOORS, ("dot", "dashdot"), strict=True))


def named_figure(result: Result, *, title: str | None = None) -> "go.Figure":
    """Shares of patches that each lens names, with 95 % bands over scenes; thin lines are the floors.

    What is drawn comes from `provenance["named"]` (see `lenses.named_by`).

    Raises:
        UsageError: the result holds none.
    """
    from plotly.subplots import make_subplots

    held = result.provenance.get("named")
    if not held:
        raise UsageError(f"{result.name} does not say what lenses name")
    metrics = list(dict.fromkeys(row["metric"] for row in held["rows"]))
    figure = make_subplots(1, len(metrics), shared_yaxes=True, subplot_titles=[_panel(name) for name in metrics])
    for column, metric in enumerate(metrics, 1):
        for number, name in enumerate(dict.fromkeys(row["lens"] for row in held["rows"])):
            rows = [row for row in held["rows"] if (row["metric"], row["lens"]) == (metric, name)]
            for trace in _lines(rows, name, COLOURS[number], shown=column == 1):
                figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(title_text="after block (-1: the decoder's input)")
    figure.update_yaxes(title_text="share of patches", row=1, col=1)
    n = held["rows"][0]["n"]
    figure.update_layout(
        template="plotly_white", width=1060, height=460, font={"family": "Helvetica, Arial, sans-serif", "size": 12},
        title={"text": title or f"patches whose best words name what they show ({n} generated scenes)", "x": 0.01},
        meta=drawn_by(named_figure, title=title),
    )  # fmt: skip
    return figure


def _panel(metric: str) -> str:
    return {"named": "kind or colour"}.get(metric, metric)


def _lines(rows: list[dict[str, Any]], name: str, colour: str, *, shown: bool) -> "list[go.Scatter]":
    """Band and line of a lens, and a line for each floor."""
    import plotly.graph_objects as go

    own = sorted((row for row in rows if row["floor"] == PATCHES), key=lambda row: row["layer"])
    layers, red, green, blue = [row["layer"] for row in own], *(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    edges = [*(row["ci_high"] for row in own), *(row["ci_low"] for row in reversed(own))]
    band = go.Scatter(
        x=[*layers, *reversed(layers)], y=edges, mode="lines", fill="toself", line={"width": 0}, hoverinfo="skip",
        fillcolor=f"rgba({red},{green},{blue},0.16)", showlegend=False,
    )  # fmt: skip
    line = go.Scatter(
        x=layers, y=[row["mean"] for row in own], mode="lines+markers", name=name, line={"color": colour, "width": 2.2},
        showlegend=shown, legendgroup=name, hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
    found = [band, line]
    for floor, dash in DASHES.items():
        of = sorted((row for row in rows if row["floor"] == floor), key=lambda row: row["layer"])
        found.append(
            go.Scatter(
                x=layers, y=[row["baseline"] for row in of], mode="lines", name=f"words of {floor}", showlegend=shown,
                line={"color": colour, "width": 1, "dash": dash}, legendgroup=name,
                hovertemplate=f"{floor}: %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
    return found
