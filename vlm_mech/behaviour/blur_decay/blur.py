"""Progressive visual decay: an image that is blurred more and more, until there is none."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm_mech.behaviour.answering.without_image import without_images
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

KERNELS = (1, 5, 11, 19, 29, 39, 49, 61)
"""Eight odd sizes from 1 to 61 cannot be evenly spaced; these are ours."""
MEAN, NONE = "mean colour", "no image"
LONG_SIDE = 448
"""Pixels of the long side before the blur: a kernel of 61 hardly touches a picture of 4,000."""
SMALL = {1: (1.0,), 3: (0.25, 0.5, 0.25), 5: (0.0625, 0.25, 0.375, 0.25, 0.0625),
         7: (0.03125, 0.109375, 0.21875, 0.28125, 0.21875, 0.109375, 0.03125)}  # fmt: skip
"""Kernels that OpenCV takes for these sizes when no sigma is given."""


def kernel(size: int) -> Float[np.ndarray, "size"]:
    """A Gaussian of that many pixels with OpenCV's rule, `sigma = 0.3 ((size - 1) / 2 - 1) + 0.8`, and its small ones.

    Raises:
        UsageError: the size is even or below 1.
    """
    if size < 1 or size % 2 == 0:
        raise UsageError(f"kernel size {size} is not known; an odd number from 1 on is needed")
    if size in SMALL:
        return np.array(SMALL[size])
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    weights = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def blurred(image: Image.Image, size: int) -> Image.Image:
    """The picture through a square Gaussian kernel, edges mirrored without repeating them (as OpenCV does)."""
    from scipy.ndimage import convolve1d

    weights = kernel(size)
    if size == 1:
        return image
    values = np.asarray(image, dtype=np.float64)
    for axis in (0, 1):
        values = convolve1d(values, weights, axis=axis, mode="mirror")
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def resized(image: Image.Image, long_side: int = LONG_SIDE) -> Image.Image:
    """The picture with its long side that long."""
    scale = long_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BICUBIC)


def decayed(image: Image.Image, level: str) -> Image.Image:
    """The picture at a level: a kernel size, or `MEAN` for a picture of its mean colour alone."""
    if level != MEAN:
        return blurred(image, int(level))
    mean = np.rint(np.asarray(image, dtype=np.float64).mean((0, 1))).astype(np.uint8)
    return Image.new("RGB", image.size, tuple(mean.tolist()))


def levels_of(vlm: "VLM", kernels: Sequence[int] = KERNELS) -> tuple[str, ...]:
    """The levels in order of decay: kernels, a picture of the mean colour, and no image where the model can do without.

    Raises:
        UsageError: the kernels do not begin with 1 or do not grow.
    """
    if not kernels or kernels[0] != 1 or list(kernels) != sorted(set(kernels)):
        raise UsageError(f"kernels {' '.join(map(str, kernels))}: they must grow from 1, which is the picture as it is")
    for size in kernels:
        kernel(size)
    try:
        without_images(vlm, vlm.encode(Prompt("what is this?", Image.new("RGB", (LONG_SIDE, LONG_SIDE)))))
    except UsageError:
        return (*map(str, kernels), MEAN)
    return (*map(str, kernels), MEAN, NONE)


def level_name(level: str) -> str:
    """A level as figures and findings name it."""
    return f"kernel {level}" if level.isdigit() else level
