"""Images in, and the way back from an image token to the pixels it saw.

The way back is measured, not computed from each processor's rules: pictures whose colour is their position go through
the processor, and what each patch then holds tells where it comes from. Resizing, cropping, padding and tiling need no
formula.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from einops import reduce
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlm_mech.errors import UsageError, shortened
from vlm_mech.inputs.image_layout import ImageLayout, Tile


@dataclass(frozen=True, eq=False)
class Altered:
    """A picture made from another whenever it is opened, so that it takes no memory meanwhile."""

    image: Any
    change: Callable[[Image.Image], Image.Image]


ImageLike = Image.Image | str | Path | bytes | np.ndarray | Mapping[str, Any] | Altered
"""A picture in any form that `load_image` opens."""
ADDRESSES = ("http://", "https://")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, or a broken or enormous one."""

ONE_PICTURE = ("MPO", "PSD")
"""Formats whose frames are previews or layers of the one picture that comes first."""


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
    """An RGB picture, turned upright as its EXIF data say.

    Transparency is dropped, as transformers does: what lies hidden under it shows.

    Args:
        image: a PIL image, a path, an http(s) address, a picture file's content as bytes or as text in base64 (a
            `data:` address or bare), an array of uint8 (height x width, or height x width x 3 or 4), or a mapping with
            `bytes` or `path`, as data sets of the Hugging Face hub hold pictures; or what is made of one of these.

    Raises:
        UsageError: there is no such file, the address gives none, what is there is not an image, has no pixel or
            several frames, or its values do not fit into 8 bits.
    """
    if isinstance(image, Image.Image):
        try:
            return _rgb(image, "the image")
        except UsageError:
            raise
        except UNREADABLE as error:  # opened, but not yet read, or closed, or of a mode that has no way to RGB
            raise UsageError(f"the image cannot be read: {error}") from error
    if isinstance(image, np.ndarray):
        return _rgb(_from_array(image), "the image")
    if isinstance(image, Mapping):
        return load_image(_held(image))
    if isinstance(image, Altered):
        return image.change(load_image(image.image))
    if isinstance(image, bytes):
        return _opened(io.BytesIO(image), "the image")
    if isinstance(image, str) and image.startswith(ADDRESSES):
        return _fetch(image)
    if not isinstance(image, str | Path):
        raise UsageError(
            f"an image must be a PIL image, a path, an address, bytes, base64, an array or a mapping, not "
            f"{type(image).__name__}"
        )
    name = f"image {shortened(repr(str(image)), 80)}"
    if _is_file(Path(image)):
        return _opened(Path(image), name)
    content = _from_base64(image) if isinstance(image, str) else None
    if content is None:
        raise UsageError(f"{name} does not exist")
    return _opened(io.BytesIO(content), name)


def images_of(given: "ImageLike | Sequence[ImageLike] | None") -> tuple[ImageLike, ...]:
    """The images in order: of one, of several, or none."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, list | tuple) else (cast(ImageLike, given),)


def side_by_side(images: "Sequence[ImageLike]") -> Image.Image:
    """Pictures in a row on white, for reports; one alone is as it is."""
    loaded = [load_image(image) for image in images]
    if len(loaded) == 1:
        return loaded[0]
    gap = max(image.width for image in loaded) // 20 + 1
    size = sum(image.width + gap for image in loaded) - gap, max(image.height for image in loaded)
    row, left = Image.new("RGB", size, "white"), 0
    for image in loaded:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def image_named(folder: Path, text: str) -> ImageLike:
    """What a file in the folder calls a picture: a path from there, an address, or the picture itself in base64."""
    path = folder / text
    if text.startswith(ADDRESSES) or (not _is_file(path) and _from_base64(text) is not None):
        return text
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than a name may be
        return False


def _from_base64(text: str) -> bytes | None:
    """The content of the picture that a text holds in base64; None where it holds none."""
    marked = text.startswith("data:")
    try:
        content = base64.b64decode("".join((text.partition(",")[2] if marked else text).split()), validate=True)
        Image.open(io.BytesIO(content)).close()
    except Image.DecompressionBombError:
        pass
    except UNREADABLE:
        return b"" if marked else None
    return content


def _from_array(pixels: np.ndarray) -> Image.Image:
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not fits or not pixels.size:
        raise UsageError(
            f"the image is an array of {pixels.dtype} of shape {pixels.shape}; uint8 of (height, width), "
            "(height, width, 3) or (height, width, 4) is needed"
        )
    return Image.fromarray(pixels)


def _held(image: Mapping[str, Any]) -> Any:
    """The content or else the path of a picture given as a mapping."""
    content, path = image.get("bytes"), image.get("path")
    if content is None and path is None:
        raise UsageError(
            f"the image is a mapping of {', '.join(map(str, image)) or 'nothing'}; bytes or path is needed"
        )
    return path if content is None else content


def _opened(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as opened:
            return _rgb(opened, name)
    except UsageError:
        raise
    except UnidentifiedImageError as error:
        empty = isinstance(source, Path) and not source.stat().st_size
        told = "it is empty" if empty else "it is in no format that Pillow knows"
        raise UsageError(f"{name} cannot be read: {told}") from error
    except UNREADABLE as error:
        raise UsageError(f"{name} cannot be read: {error}") from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """An upright RGB picture; grey values beyond 8 bits, which Pillow would cut off at white, are refused.

    So are several frames, of which Pillow would show one; the further pictures of an MPO file are previews.
    """
    if not all(image.size):
        raise UsageError(f"{name} has {image.width} x {image.height} pixels; at least one is needed")
    n_frames = getattr(image, "n_frames", 1)
    if n_frames > 1 and image.format not in ONE_PICTURE:
        raise UsageError(f"{name} has {n_frames} frames or pages; give one of them as an image of its own")
    if image.mode == "F" or (image.mode.startswith("I") and max(image.getextrema()) > 255):  # pyright: ignore
        values = f"{image.mode} values from {image.getextrema()[0]:g} to {image.getextrema()[1]:g}"
        raise UsageError(f"{name} has {values}; 8 bits (0 to 255) are needed")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P":
        # Pillow warns of a palette whose transparency is dropped.
        upright.info.pop("transparency", None)
    return upright.convert("RGB")


def _fetch(address: str) -> Image.Image:
    from transformers.image_utils import load_image as fetch

    try:
        return fetch(address, timeout=30).convert("RGB")
    except Exception as error:  # of requests or of httpx, whichever transformers fetches with
        raise UsageError(f"image {shortened(repr(address), 80)} cannot be fetched: {error}") from error


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
