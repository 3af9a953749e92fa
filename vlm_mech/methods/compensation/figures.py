"""Figures of a compensation run, and pictures of which patches show what."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlm_mech.inputs.image import load_image
from vlm_mech.methods.compensation.data import PartMap
from vlm_mech.methods.compensation.study import difference_of
from vlm_mech.methods.compensation.variants import BACKGROUND
from vlm_mech.results import figures
from vlm_mech.results.overlays import laid_over
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """What each variant changes at each site as heatmaps, and reciprocal ranks as lines, tower and decoder apart.

    The lines show the first range of layers only: all thirds in one figure could not be distinguished.
    """
    axes = {"x": "site", "facet": "layers"}
    found = {
        f"{metric}_change": figures.heatmap(result, y="variant", metric=metric, value="effect", **axes)
        for metric in dict.fromkeys(("reciprocal_rank", "logit_diff", difference_of(result)))
    }
    first, chosen = result.table["layers"].iloc[0], result.metric("reciprocal_rank")
    here = list(dict.fromkeys(result.table[result.table["layers"] == first]["variant"]))
    for name, prefix in {"tower": "V-", "decoder": "L-", "both": "V+L-"}.items():
        variants = [each for each in here if each.startswith(prefix) and not each.endswith(BACKGROUND)]
        if variants:
            found[f"reciprocal_rank_{name}"] = figures.lines(
                result, colour="variant", metric=chosen.name, where={"variant": variants, "layers": first}, **axes,
                title=f"compensation, knockout in {name}: {chosen.name} ({chosen.unit})",
            )  # fmt: skip
    return found


def pictures(maps: Sequence[PartMap]) -> tuple[tuple[str, Image.Image], ...]:
    """Some examples: the part's patches framed, the object's bright, the background patches in between."""
    shown = []
    for each in maps:
        levels = np.where(each.object, 1.0, np.where(each.background, 0.5, 0.0))
        picture = laid_over(load_image(each.pair.images[0]), each.boxes, levels, most=1.0, outlined=each.part)
        caption = f"{each.pair.question} {each.pair.answer}: part framed, object bright, control dim"
        shown.append((caption, picture))
    return tuple(shown)
