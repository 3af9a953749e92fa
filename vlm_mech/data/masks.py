"""Which pixels of a picture show something: masks in pictures, in segmentations of COCO, and in files of MATLAB.

They are opened when they are needed: `pixels_of` gives one as an array.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vlm_mech.data.readers.mat_files import annotated, parts_of
from vlm_mech.data.readers.stored_masks import CocoMask, MatMask
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import image_named, load_image


def pixels_of(mask: Any, folder: Path) -> Bool[np.ndarray, "height width"]:
    """The pixels that a mask marks.

    Args:
        mask: the name of a picture, or a picture, that is white where it marks (255; or 1, in one of 0 and 1 alone), or
            what a reader made of a segmentation.
        folder: from which pictures are named.

    Raises:
        UsageError: a mask that cannot be read.
    """
    if isinstance(mask, CocoMask):
        return _of_coco(mask)
    if isinstance(mask, MatMask):
        return _of_mat(mask)
    return _marked(load_image(image_named(folder, mask) if isinstance(mask, str) else mask))


def _marked(mask: Image.Image) -> Bool[np.ndarray, "height width"]:
    """Where a mask is white; of one that holds 0 and 1 alone, where it is 1."""
    grey = np.asarray(mask.convert("L"))
    return grey >= (1 if grey.max() == 1 else 128)


def coco_masks() -> Any:
    """The module that codes and decodes masks of COCO.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        told = 'masks of COCO need pycocotools, which is not installed: pip install "vlm_mech[data]"'
        raise UsageError(told) from error
    return mask


def _of_coco(mask: CocoMask) -> Bool[np.ndarray, "height width"]:
    """All its segmentations together: polygons, or run lengths, compressed or not."""
    coco = coco_masks()
    shows = np.zeros((mask.height, mask.width), dtype=bool)
    for each in mask.segmentations:
        try:
            made = each
            if isinstance(each, list) or isinstance(each.get("counts"), list):
                made = coco.frPyObjects(each, mask.height, mask.width)
            found = coco.decode(coco.merge(made) if isinstance(made, list) else made)
        except Exception as error:  # pycocotools raises bare exceptions
            raise UsageError(f"{mask.place}: its segmentation cannot be read: {error}") from error
        if found.shape != shows.shape:
            size, needed = (f"{shape[1]} x {shape[0]}" for shape in (found.shape, shows.shape))
            raise UsageError(f"{mask.place}: its segmentation has {size} pixels, the image {needed}")
        shows |= found.astype(bool)
    return shows


def _of_mat(mask: MatMask) -> Bool[np.ndarray, "height width"]:
    """The mask of an object, or all those of its parts of these numbers together."""
    thing = annotated(mask.path)[mask.object]
    found = [parts_of(thing)[number].mask for number in mask.parts] if mask.parts else [thing.mask]
    return np.any([np.asarray(each, dtype=bool) for each in found], axis=0)
