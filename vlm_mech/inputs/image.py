"""Images in, and the way back from an image token to the pixels it saw.

The way back is measured, not computed from each processor's rules: pictures whose colour is their position go through
the processor, and what each patch then holds tells where it comes from. Resizing, cropping, padding and tiling need no
formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import reduce
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image_layout import ImageLayout, Tile

ImageLike = Image.Image | str | Path


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the image as the user gave it; right and bottom are exclusive."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the two rectangles share an area larger than zero."""
        wide = min(self.right, other.right) > max(self.left, other.left)
        return wide and min(self.bottom, other.bottom) > max(self.top, other.top)


def load_image(image: object) -> Image.Image:
    """An RGB picture from a PIL image, a path or an http(s) address, turned upright as its EXIF data say.

    Transparency is dropped, as transformers does: what lies hidden under it shows.

    Raises:
        UsageError: there is no such file, the address gives none, what is there is not an image, or its values do not
            fit into 8 bits.
    """
    if isinstance(image, Image.Image):
        return _rgb(image, "image")
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _fetch(image)
    if not isinstance(image, str | Path):
        raise UsageError(f"an image must be a PIL image, a path or an address, not {type(image).__name__}")
    path = Path(image)
    if not path.is_file():
        raise UsageError(f"image {str(path)!r} does not exist")
    try:
        with Image.open(path) as opened:
            return _rgb(opened, f"image {str(path)!r}")
    except UsageError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"image {str(path)!r} cannot be read: {error}") from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """An upright RGB picture; grey values beyond 8 bits, which Pillow would cut off at white, are refused."""
    if image.mode == "F" or (image.mode.startswith("I") and max(image.getextrema()) > 255):  # pyright: ignore
        values = f"{image.mode} values from {image.getextrema()[0]:g} to {image.getextrema()[1]:g}"
        raise UsageError(f"{name} has {values}; 8 bits (0 to 255) are needed")
    return ImageOps.exif_transpose(image).convert("RGB")


def _fetch(address: str) -> Image.Image:
    from transformers.image_utils import load_image as fetch

    try:
        return fetch(address, timeout=30).convert("RGB")
    except (OSError, ValueError) as error:
        raise UsageError(f"image {address!r} cannot be fetched: {error}") from error


LEVELS = 254
"""Grey levels that a coded picture uses for a whole width or height."""
PHASES = (0, 1 / 3, 2 / 3)
"""Each coordinate is coded three times, shifted by parts of a level, so that rounding averages out."""


def coded_pictures(size: tuple[int, int]) -> tuple[Image.Image, ...]:
    """A black and a white picture of that width and height, and two whose colours code x and y (see `_coordinates`)."""
    width, height = size
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width)) * LEVELS
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width)) * LEVELS
    first = np.stack([across, down, across + PHASES[1]], axis=-1)
    second = np.stack([down + PHASES[1], across + PHASES[2], down + PHASES[2]], axis=-1)
    pictures = (np.zeros_like(first), np.full_like(first, 255), first.round(), second.round())
    return tuple(Image.fromarray(picture.astype(np.uint8)) for picture in pictures)


def _coordinates(first: Float[np.ndarray, "patch 3"], second: Float[np.ndarray, "patch 3"]) -> np.ndarray:
    """x and y of every patch's centre as shares of the picture, from the shares of full brightness it holds."""
    across = np.stack([first[:, 0], first[:, 2], second[:, 1]], axis=-1)
    down = np.stack([first[:, 1], second[:, 0], second[:, 2]], axis=-1)
    levels = np.stack([across, down], axis=1) * 255 - PHASES
    return levels.mean(-1) / LEVELS


def patch_means(
    pixel_values: Float[Tensor, "..."], patch_size: int, like: Float[Tensor, "..."]
) -> Float[np.ndarray, "patch channel"]:
    """Mean of every patch of the pixel values, in the order in which `Tile.pixels` counts them.

    Args:
        like: pixel values of a white picture, which say which of the pictures only pad.
    """
    if pixel_values.ndim == 2:
        return pixel_values.float().unflatten(1, (3, -1)).mean(-1).numpy()
    if pixel_values.ndim == 5:
        pixel_values = pixel_values.flatten(0, 1)[like.flatten(0, 1).flatten(1).any(1)]
    height, width = (length // patch_size * patch_size for length in pixel_values.shape[-2:])
    shown = pixel_values[..., :height, :width].float()
    pattern = "tile channel (row a) (column b) -> (tile row column) channel"
    return reduce(shown, pattern, "mean", a=patch_size, b=patch_size).numpy()


def measured_boxes(
    layouts: Sequence[ImageLayout],
    sizes: Sequence[tuple[int, int]],
    values: Sequence[Float[Tensor, "..."]],
    patch_size: int,
) -> tuple[tuple[tuple[Box, ...], ...], ...]:
    """The pixels of the image as given behind each image token, by image and view, row by row.

    Args:
        layouts: of the images of one prompt.
        sizes: width and height of each image, in pixels.
        values: pixel values that the processor made of the `coded_pictures` of those sizes.
    """
    low, high, *coded = (patch_means(each, patch_size, values[1]) for each in values)
    span = high - low
    inside = span > 0.999 * span.max(0)
    parts = [np.divide(each - low, span, out=np.zeros_like(span), where=span > 0) for each in coded]
    share = _coordinates(parts[0], parts[1])
    found = []
    for layout, (width, height) in zip(layouts, sizes, strict=True):
        edges = {}
        for tile in layout.tiles:
            rectangles = _tile_edges(tile, share[tile.pixels], inside[tile.pixels, 0])
            edges |= {tuple(cell): edge for cell, edge in zip(tile.cells.tolist(), rectangles, strict=True)}
        views = []
        for view in layout.views:
            sources = [[edges[tuple(cell)] for cell in token if cell[0] >= 0] for token in view.patches.tolist()]
            views.append(tuple(_box(np.array(each), width, height) for each in sources))
        found.append(tuple(views))
    return tuple(found)


def _tile_edges(tile: Tile, share: Float[np.ndarray, "patch 2"], inside: np.ndarray) -> Float[np.ndarray, "patch four"]:
    """Left, top, right and bottom of each patch as shares of the picture."""
    rows, columns = tile.grid
    number = np.arange(rows * columns)
    left, right = _edges(number % columns, share[:, 0], inside)
    top, bottom = _edges(number // columns, share[:, 1], inside)
    return np.stack([left, top, right, bottom], axis=-1)


def _edges(index: np.ndarray, share: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both edges of each patch along one axis, from a straight line through the centres of those inside the picture."""
    if len(set(index[inside].tolist())) < 2:
        return np.zeros_like(share), np.ones_like(share)
    step, start = np.polyfit(index[inside], share[inside], 1)
    return start + step * (index - 0.5), start + step * (index + 0.5)


def _box(edges: Float[np.ndarray, "source four"], width: int, height: int) -> Box:
    left, top = edges[:, :2].min(0) * (width, height)
    right, bottom = edges[:, 2:].max(0) * (width, height)
    limits = ((left, width), (top, height), (right, width), (bottom, height))
    return Box(*(float(min(max(edge, 0.0), limit)) for edge, limit in limits))
