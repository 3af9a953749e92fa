"""Pictures blurred by a Gaussian kernel, or brought to their mean colour."""

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm_mech.errors import UsageError

LARGEST, LONG_SIDE = 61, 448
"""The largest kernel of arXiv 2606.06890 in pixels, and the long side of a picture (ours) that it is meant for."""
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


def mean_coloured(image: Image.Image) -> Image.Image:
    """A picture of the same size that shows the mean colour alone."""
    mean = np.rint(np.asarray(image, dtype=np.float64).mean((0, 1))).astype(np.uint8)
    return Image.new("RGB", image.size, tuple(mean.tolist()))


def scaled(size: int, image: Image.Image) -> int:
    """The size of a kernel meant for a long side of 448 pixels, for a picture of another size; it stays odd."""
    return 2 * round((size - 1) / 2 * max(image.size) / LONG_SIDE) + 1


def blurred_out(image: Image.Image) -> Image.Image:
    """The picture through the largest kernel, scaled from a long side of 448 pixels to its own."""
    return blurred(image, scaled(LARGEST, image))
