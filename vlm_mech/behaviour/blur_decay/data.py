"""What visual decay asks: the same questions on pictures of one level.

After arXiv 2606.06890, which names eight Gaussian kernels from 1 x 1 to 61 x 61; the sizes between, the size of
the image before the blur, and how answers are compared were not found and are ours.
"""

import dataclasses
from collections.abc import Sequence

from PIL import Image

from vlm_mech.behaviour.blur_decay.blur import NONE, decayed, resized
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Prompt


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


def ladder(pairs: Pairs, levels: Sequence[str], *, n: int = 3) -> list[tuple[Pair, str, Image.Image]]:
    """The first pictures of some pairs at every level that has one, with pair and level."""
    shown = []
    for pair in list(pairs)[:n]:
        whole = resized(load_image(pair.image))
        shown += [(pair, level, decayed(whole, level)) for level in levels if level != NONE]
    return shown
