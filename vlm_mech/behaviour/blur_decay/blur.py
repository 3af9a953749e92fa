"""Progressive visual decay: an image that is blurred more and more, until there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from vlm_mech.behaviour.answering.without_image import without_images
from vlm_mech.data.blur import LONG_SIDE, blurred, kernel, mean_coloured, scaled
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

KERNELS = (1, 5, 11, 19, 29, 39, 49, 61)
"""Eight odd sizes from 1 to 61 cannot be evenly spaced; these are ours."""
MEAN, NONE = "mean colour", "no image"


@dataclass(frozen=True)
class Scale:
    """How large pictures are when they are blurred: a kernel of 61 hardly touches a picture of 4,000 pixels.

    `long_side` None leaves pictures as they are; with `scaled` kernels grow with them, from their size at 448 pixels.
    """

    long_side: int | None = LONG_SIDE
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.long_side is not None and self.long_side < 1:
            raise UsageError(f"long_side is {self.long_side}; pixels from 1 on, or none to leave images as they are")


AS_USUAL = Scale()


def scale_of(long_side: str, scaled: bool) -> Scale:
    """The same from options: a number of pixels or `none`.

    Raises:
        UsageError: something else.
    """
    if long_side != "none" and not long_side.isdecimal():
        raise UsageError(f"long_side is {long_side!r}; a number of pixels, or none, is needed")
    return Scale(None if long_side == "none" else int(long_side), scaled)


def resized(image: Image.Image, long_side: int | None = LONG_SIDE) -> Image.Image:
    """The picture with its long side that long, or as it is."""
    if long_side is None:
        return image
    scale = long_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BICUBIC)


def decayed(image: Image.Image, level: str, scale: Scale = AS_USUAL) -> Image.Image:
    """The picture resized and at a level: a kernel size, or `MEAN` for a picture of its mean colour alone."""
    shown = resized(image, scale.long_side)
    if level == MEAN:
        return mean_coloured(shown)
    return blurred(shown, scaled(int(level), shown) if scale.scaled else int(level))


def levels_of(vlm: "VLM", kernels: Sequence[int] = KERNELS) -> tuple[str, ...]:
    """The levels in order of decay: kernels, a picture of the mean colour, and no image where the model can do without.

    Raises:
        UsageError: the kernels do not begin with 1 or do not grow.
    """
    if not kernels or kernels[0] != 1 or list(kernels) != sorted(set(kernels)):
        raise UsageError(f"kernels {' '.join(map(str, kernels))}: they must grow from 1, which is the image as it is")
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
