"""Progressive visual decay: the same question on an image that is blurred more and more, until there is none.

After arXiv 2606.06890, which names eight Gaussian kernels from 1 x 1 to 61 x 61; the sizes between, the size of
the image before the blur, and how answers are compared were not found and are ours.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from PIL import Image

from vlm_mech.behaviour.decoding import without_images
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.image import load_image
from vlm_mech.prompt import Prompt
from vlm_mech.trace import generate

if TYPE_CHECKING:
    from vlm_mech.model import VLM

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


# Answers


@dataclass(frozen=True)
class Said:
    """An answer brought to a common form; `kind` is letter, yes/no, number, text, or none for what says nothing."""

    kind: str
    value: str

    def same(self, other: "Said") -> bool:
        """Whether both say the same; what says nothing is never the same."""
        return self.kind != "none" and self == other


def said(text: str, *, letters: bool = False) -> Said:
    """What an answer says: a letter (where options have letters), yes or no, a number, or its words.

    The first of these that begins the answer counts; case, punctuation and articles do not.
    """
    bare = " ".join(re.findall(r"[\w.'-]+", text.lower())).strip(" .'-")
    if letters and (found := re.match(r"\s*\(?([a-zA-Z])(\)|[.:]|\s|$)", text)):
        return Said("letter", found[1].upper())
    if found := re.match(r"(yes|no)\b", bare):
        return Said("yes/no", found[1])
    if found := re.match(r"-?\d+(\.\d+)?\b", bare):
        return Said("number", str(float(found[0])))
    words = re.sub(r"^(a|an|the)\s+", "", bare)
    return Said("text", words) if words else Said("none", "")


# One batch


def with_images(pairs: Pairs, level: str) -> Pairs:
    """The pairs with both pictures resized and brought to a level."""
    changed = [
        dataclasses.replace(
            pair,
            image=decayed(resized(load_image(pair.image)), level),
            counterfactual_image=decayed(resized(load_image(pair.counterfactual_image)), level),
        )
        for pair in pairs
    ]
    return dataclasses.replace(pairs, pairs=tuple(changed))


def asked_at(pairs: Pairs, level: str) -> list[Prompt]:
    """The questions about the first pictures at a level."""
    return [Prompt(pair.question, decayed(resized(load_image(pair.image)), level)) for pair in pairs]


def answers_at(vlm: "VLM", pairs: Pairs, pictures: Sequence[Image.Image | None], *, max_new_tokens: int) -> list[str]:
    """Greedy answers to the questions of the pairs about these pictures, or about none."""
    prompts = [Prompt(pair.question, image) for pair, image in zip(pairs, pictures, strict=True)]
    return list(generate(vlm, prompts, max_new_tokens=max_new_tokens).texts)


def compared(
    answers: dict[str, list[str]], clean: Sequence[str], right: Sequence[str], *, letters: bool
) -> pd.DataFrame:
    """One row per example and level: whether the answer is the clean one, has been so all along, and is right.

    Args:
        answers: by level, in order of decay; the first is the clean one for the images themselves.
        clean: answers to the clean images, what all are compared with.
    """
    first = [said(each, letters=letters) for each in clean]
    wanted = [said(each, letters=letters) for each in right]
    unchanged = np.ones(len(first), bool)
    tables = []
    for level, texts in answers.items():
        now = [said(each, letters=letters) for each in texts]
        same = np.array([one.same(other) for one, other in zip(now, first, strict=True)])
        unchanged &= same
        correct = np.array([one.same(other) for one, other in zip(now, wanted, strict=True)])
        clean_right = np.array([one.same(other) for one, other in zip(first, wanted, strict=True)])
        table = pd.DataFrame({"same": same, "unchanged": unchanged.copy(), "correct": correct}).astype(float)
        table["correct_unchanged"] = np.where(unchanged, correct, np.nan)
        baselines = {"same": 1.0, "unchanged": 1.0, "correct": clean_right.astype(float)}
        baselines["correct_unchanged"] = np.where(unchanged, clean_right, np.nan)
        table = table.assign(**{f"{name}_baseline": value for name, value in baselines.items()})
        unread = np.array([each.kind == "none" for each in now])
        tables.append(table.assign(level=level, answer=texts, clean_right=clean_right, unread=unread))
    return pd.concat(tables, ignore_index=True)
