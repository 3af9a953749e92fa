"""Images in, and the way back from an image token to the pixels it saw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vlm_mech.errors import UsageError

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
    """An RGB picture from a PIL image, a path or an http(s) address.

    Raises:
        UsageError: there is no such file, the address gives none, or what is there is not an image.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _fetch(image)
    if not isinstance(image, str | Path):
        raise UsageError(f"an image must be a PIL image, a path or an address, not {type(image).__name__}")
    path = Path(image)
    if not path.is_file():
        raise UsageError(f"image {str(path)!r} does not exist")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"image {str(path)!r} cannot be read: {error}") from error


def _fetch(address: str) -> Image.Image:
    from transformers.image_utils import load_image as fetch

    try:
        return fetch(address, timeout=30).convert("RGB")
    except (OSError, ValueError) as error:
        raise UsageError(f"image {address!r} cannot be fetched: {error}") from error


def pixel_boxes(
    image_processor: Any, size: tuple[int, int], *, grid: tuple[int, int], patch_size: int
) -> tuple[Box, ...]:
    """The pixels of the given image that each patch covers, row by row.

    Args:
        image_processor: the Hugging Face image processor; resize to a shortest edge or a fixed size and a centre
            crop are undone.
        size: width and height of the image as given, in pixels.
        grid: rows and columns of patches.
        patch_size: side of a patch after preprocessing, in pixels.

    Returns:
        One `Box` per patch, clipped to the image; a patch that saw only padding gets an empty box.

    Raises:
        UsageError: the processor pads images, which cannot be undone here.
    """
    if getattr(image_processor, "do_pad", False):
        raise UsageError(f"{type(image_processor).__name__} pads images: pixel boxes are not known for it")
    width, height = size
    new_width, new_height = _resized(image_processor, width, height)
    left, top = _crop_offset(image_processor, new_width, new_height)
    across, down = width / new_width, height / new_height
    boxes = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            x, y = column * patch_size + left, row * patch_size + top
            edges = (x * across, y * down, (x + patch_size) * across, (y + patch_size) * down)
            clipped = [min(max(edge, 0.0), limit) for edge, limit in zip(edges, (width, height) * 2, strict=True)]
            boxes.append(Box(*clipped))
    return tuple(boxes)


def _resized(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    if not image_processor.do_resize:
        return width, height
    size = dict(image_processor.size)
    if size.get("shortest_edge"):
        edge = size["shortest_edge"]
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge
    if size.get("height") and size.get("width"):
        return size["width"], size["height"]
    raise UsageError(
        f"image size {size} of {type(image_processor).__name__} is not a shortest edge nor height and width"
    )


def _crop_offset(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    if not getattr(image_processor, "do_center_crop", False):
        return 0, 0
    crop = dict(image_processor.crop_size)
    return (width - crop["width"]) // 2, (height - crop["height"]) // 2
