"""What visual decay asks: the same questions on pictures of one level.

After arXiv 2606.06890, which names eight Gaussian kernels from 1 x 1 to 61 x 61; the sizes between, the size of
the image before the blur, and how answers are compared were not found and are ours.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vlm_mech.behaviour.answering.asked_options import of_all_options
from vlm_mech.behaviour.blur_decay.blur import AS_USUAL, NONE, Scale, decayed
from vlm_mech.data.derived_pairs import lenders
from vlm_mech.data.examples import check_made, load_examples
from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike, images_of, load_image, side_by_side
from vlm_mech.inputs.prompt import Prompt

SWAPPED = ("1", "11", "29", "61")
"""Levels at which states are swapped where none are named, as far as they are among the kernels."""


def with_images(pairs: Pairs, level: str, scale: Scale = AS_USUAL) -> Pairs:
    """The pairs with both pictures resized and brought to a level."""
    changed = [
        dataclasses.replace(
            pair,
            image=_at(pair.images, level, scale),
            counterfactual_image=_at(pair.counterfactual_images, level, scale) if pair.made != "none" else (),
        )
        for pair in pairs
    ]
    return dataclasses.replace(pairs, pairs=tuple(changed))


@dataclass(eq=False)
class KeptImages:
    """Pairs brought to levels as `with_images` does it, each pair once at each level as long as there is room.

    Pairs are distinguished by their ids; those asked about again may have other answers, but must have the same
    pictures.
    """

    scale: Scale = AS_USUAL
    room: int = 2**28
    """Bytes of pixels that are kept at most."""
    kept: dict[tuple[str, str], Pair] = field(default_factory=dict)

    def __call__(self, pairs: Pairs, level: str) -> Pairs:
        """The pairs at a level."""
        shown = []
        for pair in pairs:
            at = self.kept.get((level, pair.id))
            if at is None:
                (at,) = with_images(dataclasses.replace(pairs, pairs=(pair,)), level, self.scale)
                taken = sum(3 * each.width * each.height for each in map(load_image, _both(at)))
                if taken <= self.room:
                    self.room -= taken
                    self.kept[level, pair.id] = at
            pictures = {"image": at.image, "counterfactual_image": at.counterfactual_image}
            shown.append(dataclasses.replace(pair, **pictures))
        return dataclasses.replace(pairs, pairs=tuple(shown))


def _both(pair: Pair) -> tuple[ImageLike, ...]:
    return (*pair.images, *pair.counterfactual_images)


def asked_at(pairs: Pairs, level: str, scale: Scale = AS_USUAL) -> list[Prompt]:
    """The questions about the first pictures at a level."""
    return [pair.asked(_at(pair.images, level, scale)) for pair in pairs]


def _at(images: tuple[ImageLike, ...], level: str, scale: Scale) -> tuple[Image.Image, ...] | Image.Image:
    """The pictures of a prompt resized and brought to a level; one of one."""
    found = tuple(decayed(load_image(image), level, scale) for image in images)
    return found if len(images) > 1 else found[0]


def load_decaying(data: str, **options: Any) -> Pairs:
    """The examples (see `data.examples.load_examples`); of items that are asked about alone all options are read."""
    pairs = load_examples(data, **options)
    return of_all_options(pairs) if pairs.made == "none" else pairs


def floor_of(pairs: Pairs, rows: slice, *, seed: int) -> list[Pair]:
    """For each example of a batch another one, whose picture it is asked about as the floor (see `lenders`).

    It is of the same batch; where all of that share a picture, of any.

    Args:
        rows: the batch.
        seed: draws them.

    Raises:
        UsageError: all examples share a picture.
    """
    some = pairs[rows]
    try:
        return [some.pairs[number] for number in lenders(some, seed=seed)]
    except UsageError:
        return [pairs.pairs[number] for number in lenders(pairs, seed=seed)[rows]]


def batches_of(pairs: Pairs, batch: int, *, seed: int) -> list[tuple[slice, list[Pair]]]:
    """The rows of each batch, with the others whose pictures its examples are asked about (see `floor_of`).

    No batch has a single example: others are of the same batch where they can be.

    Args:
        batch: examples at most, unless that is one.
        seed: draws the others.

    Raises:
        UsageError: all examples share a picture.
    """
    n_batches = min(math.ceil(len(pairs) / batch), len(pairs) // 2)
    parts = np.array_split(np.arange(len(pairs)), n_batches)
    rows = [slice(int(some[0]), int(some[-1]) + 1) for some in parts]
    return [(some, floor_of(pairs, some, seed=seed)) for some in rows]


def swapped_levels(
    given: Sequence[str], kernels: Sequence[int], pairs: Pairs, *, batch: int, probe_data: str | None = None
) -> tuple[str, ...]:
    """The levels at which states are swapped; by default none where items have no counterfactual pictures.

    Args:
        batch: examples at a time.
        probe_data: what probes are to be fitted on, if that was asked for.

    Raises:
        UsageError: a level that is no kernel, levels for items without counterfactual pictures, probes without levels
            or of items, or batches of one example, which has no other one's picture for its floor.
    """
    if pairs.made == "none" and tuple(given) not in (SWAPPED, ("none",)):
        check_made(pairs.name, pairs.made, f"--mechanism {' '.join(given)}")
    if probe_data is not None and (pairs.made or tuple(given) == ("none",)):
        why = "single items do not say it" if pairs.made else "--mechanism none leaves no level to read at"
        raise UsageError(
            f"--probe-data {probe_data}: probes read the patches where the two images of a pair differ; {why}"
        )
    levels = () if tuple(given) == ("none",) or pairs.made == "none" else tuple(given)
    if levels == SWAPPED:
        levels = tuple(level for level in levels if level in map(str, kernels))
    unknown = [each for each in levels if each not in map(str, kernels)]
    if unknown:
        raise UsageError(f"level {unknown[0]!r} is none of the kernels {' '.join(map(str, kernels))}")
    if min(len(pairs), batch) < 2:
        counted = f"{len(pairs)} {nouns_of(pairs).many} of {pairs.name}"
        raise UsageError(f"{counted} in batches of {batch}; at least two of both are needed")
    return levels


def ladder(
    pairs: Pairs, levels: Sequence[str], scale: Scale = AS_USUAL, *, n: int = 3
) -> list[tuple[Pair, str, Image.Image]]:
    """The first pictures of some pairs at every level that has one, with pair and level."""
    shown = []
    for pair in list(pairs)[:n]:
        some = [level for level in levels if level != NONE]
        shown += [(pair, level, side_by_side(images_of(_at(pair.images, level, scale)))) for level in some]
    return shown
