"""Figures of the search for an arbiter, drawn from its result alone."""

import html
from typing import TYPE_CHECKING, Any

from vlm_mech.methods.arbitration.data import HEAD, MLP, REMOVED, TOKEN
from vlm_mech.results import figures
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["drawn", "kinds_of_evidence"]

PLACES = {HEAD: "circle", MLP: "square", TOKEN: "diamond"}
"""Marks of parts."""
HALF = 0.5
"""Parts without which the shown answer is said more often are named."""


def __dir__() -> list[str]:
    return __all__


def drawn(result: Result) -> "dict[str, go.Figure]":
    """What is said without each head, and the plane in which parts of different kinds lie apart.

    Args:
        result: that of `find_arbiter`; nothing is drawn where too few pictures are lost.
    """
    if REMOVED not in set(result.table["what"]):
        return {}
    where = {"what": REMOVED, "part": HEAD}
    found: dict[str, Any] = {
        "restored_by_head": figures.heatmap(
            result, x="head", y="layer", metric="restored", where=where,
            title="Share of lost images answered with what is shown, by ablated head",
        )
    }  # fmt: skip
    return found | {"kinds_of_evidence": kinds_of_evidence(result)}


def kinds_of_evidence(result: Result, *, title: str | None = None) -> "go.Figure":
    """Each part by which answer moves without it (across) and what it writes itself (up); large marks restore.

    A head or MLP that writes the usual answer lies at the upper left, one that keeps the shown answer back at the lower
    right, what wakes an arbiter that writes at the left. Tokens write nothing.

    Args:
        result: that of `find_arbiter`.
        title: in place of the usual one.
    """
    import plotly.graph_objects as go

    rows = result.table[result.table["what"] == REMOVED]
    means = (
        rows.groupby(["part", "layer", "head"], sort=False)[["withheld", "written", "restored"]].mean().reset_index()
    )
    figure = go.Figure()
    for number, (part, symbol) in enumerate(PLACES.items()):
        some = means[means["part"] == part]
        if not len(some):
            continue
        names = [_name(result, part, *place) for place in zip(some["layer"], some["head"], strict=True)]
        told = [name if share > HALF else "" for name, share in zip(names, some["restored"], strict=True)]
        figure.add_trace(
            go.Scatter(
                x=some["withheld"], y=some["written"].fillna(0.0), mode="markers+text", name=part,
                text=told, textposition="top center", hovertext=names, customdata=some["restored"],
                marker={"symbol": symbol, "color": COLOURS[number], "size": 6 + 12 * some["restored"], "opacity": 0.8},
                hovertemplate="%{hovertext}<br>withheld %{x:.2f}, written %{y:.2f} logits<br>restored %{customdata:.2f}"
                "<extra></extra>",
            )
        )  # fmt: skip
    figure.add_vline(x=0, line={"color": "#999999", "width": 1})
    figure.add_hline(y=0, line={"color": "#999999", "width": 1})
    figure.update_layout(
        template="plotly_white", width=720, height=520,
        title={"text": title or "Ablated parts: which answer changes, and what they write (size: share restored)",
               "x": 0.01},
        xaxis={"title": "rise of the shown answer minus fall of the usual one (logits)"},
        yaxis={"title": "written for the usual answer by the part (logits)"},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12}, meta=drawn_by(kinds_of_evidence, title=title),
    )  # fmt: skip
    return figure


def _name(result: Result, part: str, layer: int, head: int) -> str:
    """A part in the figure: its layer and head, or the token."""
    if part == TOKEN:
        return html.escape(result.provenance["tokens"][head], quote=False)
    return f"L{layer}H{head}" if part == HEAD else f"MLP {layer}"
