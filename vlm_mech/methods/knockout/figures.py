"""Figures of a knockout, drawn from its `Result` alone; pictures of examples and of where the strongest heads look."""

from typing import TYPE_CHECKING

import pandas as pd
from PIL import Image

from vlm_mech.inputs.image import load_image, side_by_side
from vlm_mech.methods.knockout.data import Scan
from vlm_mech.methods.knockout.follow_up import N_SHOWN, AttentionMap, FollowUp
from vlm_mech.results import figures
from vlm_mech.results.overlays import laid_over, which_picture
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from vlm_mech.data.pairs import Pairs

Pictures = tuple[tuple[str, Image.Image], ...]
"""Pictures with their captions."""


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Changes of probability and of the answers' difference as heatmaps over layers and edges, or heads; and lines."""
    by_head = "head" in result.axes
    across, down = ("head", "layer") if by_head else ("layer", "edge")
    found = {
        f"{metric}_heatmap": figures.heatmap(result, x=across, y=down, metric=metric, facet="cut", value=value)
        for metric, value in {"relative_change": "mean", result.metrics[1].name: "effect"}.items()
    }
    if not by_head:
        found["relative_change_lines"] = figures.lines(
            result, x="layer", colour="edge", metric="relative_change", facet="cut"
        )
    return found


def pictures(pairs: "Pairs", scan: Scan, more: FollowUp) -> Pictures:
    """Some examples, or where each of the strongest heads looks in them; then the examples that were written about."""
    if pairs.is_text:
        return ()
    if scan.heads is None:
        shown = [(f"{pair.question} {pair.answer}", side_by_side(pair.images)) for pair in list(pairs)[:N_SHOWN]]
    else:
        query = scan.edges[0].query
        shown = [_attention(each, f"{head.head}, from {query}") for head in more.attention for each in head.maps]
    return (*shown, *(() if more.texts is None else _written(pairs, more.texts)))


def _attention(found: AttentionMap, what: str) -> tuple[str, Image.Image]:
    """Every patch as bright as its share of the largest weight on any token; the object's framed, sinks crossed."""
    picture = load_image(found.pair.images[0])
    marks = {"outlined": found.of_object, "marked": found.of_sink}
    shown = laid_over(picture, found.boxes, found.weights, most=found.most, **marks)
    images = "image" if len(found.pair.images) == 1 else "images"
    amounts = f"{100 * found.on_image:.0f} % on the {images}, brightest patch {100 * found.weights.max():.0f} %"
    amounts += f", {sum(found.of_sink)} sinks by their states (crossed)" if any(found.of_sink) else ""
    which = which_picture(len(found.pair.images))
    return f"{found.pair.question} {found.pair.answer}{which} - {what}: {amounts}", shown


def _written(pairs: "Pairs", texts: pd.DataFrame) -> Pictures:
    """Each picture with everything that was written about it."""
    shown = []
    for pair in pairs:
        rows = texts[texts["example"] == pair.id]
        if rows.empty:
            continue
        without = "; ".join(f"without {edge}: {cut!r}" for edge, cut in zip(rows["edge"], rows["cut"], strict=True))
        shown.append((f"{pair.question} {rows['clean'].iloc[0]!r}; {without}", side_by_side(pair.images)))
    return tuple(shown)
