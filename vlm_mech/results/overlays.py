"""Numbers of patches laid over a picture."""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from vlm_mech.inputs.image import Box

SHOWN_WIDTH = 288
"""Small pictures are enlarged to at least this width, in pixels."""
MARK = (0, 114, 178)
"""Colour of crosses."""
DARKEST = 0.15
"""Brightness that is left of a patch without any attention."""


def laid_over(
    picture: Image.Image,
    boxes: Sequence["Box"],
    weights: Float[np.ndarray, "patch"],
    *,
    most: float,
    outlined: Sequence[bool] = (),
    marked: Sequence[bool] = (),
) -> Image.Image:
    """The picture with each patch as bright as its share of the weight `most`.

    Args:
        picture: what is shown.
        boxes: the pixels of each patch.
        weights: a number for each patch.
        most: the weight that leaves a patch as bright as it is.
        outlined: patches that have a frame.
        marked: patches that have a cross, such as sinks.

    Raises:
        UsageError: another number of weights, outlines or marks than boxes, or weights above `most`.
    """
    if not most > 0 or weights.max() > most:
        raise UsageError(f"weights of up to {weights.max():.3g} cannot be shown as shares of {most:.3g}")
    if len(weights) != len(boxes) or len(outlined) not in (0, len(boxes)):
        raise UsageError(f"{len(weights)} weights and {len(outlined)} outlines for {len(boxes)} patches")
    if len(marked) not in (0, len(boxes)):
        raise UsageError(f"{len(marked)} marks for {len(boxes)} patches")
    scale = max(1, -(-SHOWN_WIDTH // picture.width))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    light = Image.new("L", picture.size, round(255 * DARKEST))
    pen = ImageDraw.Draw(light)
    edges = [_scaled(box, scale) for box in boxes]
    for edge, weight in zip(edges, weights, strict=True):
        pen.rectangle(edge, fill=round(255 * (DARKEST + (1 - DARKEST) * float(weight) / most)))
    shown = Image.composite(picture, Image.new("RGB", picture.size), light)
    frame = ImageDraw.Draw(shown)
    for edge, wanted in zip(edges, outlined or [False] * len(edges), strict=True):
        if wanted:
            frame.rectangle(edge, outline=(213, 94, 0), width=2)
    for (left, top, right, bottom), wanted in zip(edges, marked or [False] * len(edges), strict=True):
        if wanted:
            frame.line((left, top, right, bottom), fill=MARK, width=2)
            frame.line((left, bottom, right, top), fill=MARK, width=2)
    return shown


def _scaled(box: "Box", scale: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(edge * scale) for edge in (box.left, box.top, box.right, box.bottom))
    return left, top, max(left, right - 1), max(top, bottom - 1)


def which_picture(n: int, image: int = 0) -> str:
    """Which of the `n` pictures of a prompt is shown, as the end of a title; nothing where there is one alone."""
    return f" (picture {image + 1} of {n})" if n > 1 else ""


LONGEST_SIDE = 640
"""Width or height of the drawn picture in pixels of the screen."""
VEIL = ((0, "rgba(255, 255, 255, 0.4)"), (1, "rgba(230, 159, 0, 0.8)"))
"""Lets the picture through, keeps black words readable on dark ground, and adds one hue to the picture's own."""


def lay_out(figure: "go.Figure", picture: "Image.Image", title: str, *, panels: int = 1) -> None:
    """Puts the picture under the traces, its pixels as axes.

    Args:
        panels: how many there are beside each other.
    """
    width, height = picture.size
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    scale = LONGEST_SIDE / max(width, height) / (1 if panels == 1 else 1.6)
    figure.update_xaxes(range=[0, width], visible=False, constrain="domain")
    figure.update_yaxes(range=[height, 0], visible=False, constrain="domain")
    for number in range(panels):
        axis = str(number + 1) if number else ""
        figure.add_layout_image(
            source=source, xref=f"x{axis}", yref=f"y{axis}", x=0, y=0, sizex=width, sizey=height, sizing="stretch",
            layer="below",
        )  # fmt: skip
        figure.layout[f"yaxis{axis}"].update(scaleanchor=f"x{axis}")
    figure.update_layout(
        template="plotly_white",
        plot_bgcolor="rgba(0,0,0,0)",
        title={"text": html.escape(title, quote=False), "x": 0.01, "xanchor": "left", "font": {"size": 17}},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12},
        width=round(width * scale) * panels + 230,
        height=round(height * scale) + 220,
        margin={"l": 60, "r": 140, "t": 70, "b": 110},
    )
