"""The fields of a row of pairs or items: its texts, the pictures that it names, and what it may say beside these."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_mech.data.user_files import Row, id_of, written
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ADDRESSES, ImageLike, image_named, load_image

LISTED = (list, tuple)


def text_of(row: Row, field: str, given: Any) -> str:
    """A text that a row must have.

    Raises:
        UsageError: there is none.
    """
    if not isinstance(given, str) or not given.strip():
        raise UsageError(f"{row.place}: {field} is {given!r:.60}; a non-empty text is needed")
    return given


def told_of(row: Row, field: str) -> str | None:
    """A text that a row may have; a number is written out (7.0 as 7), and what is not a number is missing.

    Raises:
        UsageError: something else.
    """
    given = row.fields.get(field)
    if given is None or (isinstance(given, float) and given != given):
        return None
    told = written(given)
    if told is None:
        raise UsageError(f"{row.place}: {field} is {given!r:.60}; a text is needed, or none")
    return told


def check_id(row: Row) -> None:
    """Raises `UsageError` for an id that is neither a text nor a number."""
    try:
        id_of(row.fields, row.line)
    except UsageError as error:
        raise UsageError(f"{row.place} {error}") from error


def options_of(row: Row) -> Any:
    """The options that a row may have, arrays and columns as lists; `checked_options` says what is wrong with them."""
    given: Any = row.fields.get("options")
    given = given.tolist() if hasattr(given, "tolist") else given
    return () if given is None or given in ([], ()) else given


def pictures_of(row: Row, folder: Path, one: str, several: str) -> list[ImageLike]:
    """The pictures of a row in the form in which it has them, named in either way; a text names a file from the folder.

    Raises:
        UsageError: both ways are used, or something that is no picture.
    """
    if row.fields.get(several) is None and (several not in row.fields or row.fields.get(one) is not None):
        return [_picture(row, folder, one, row.fields.get(one))]
    if row.fields.get(one) is not None:
        raise UsageError(f"{row.place}: both {one} and {several} are given; one of them is needed")
    given = row.fields[several]
    if not isinstance(given, LISTED) or not given:
        raise UsageError(f"{row.place}: {several} is {given!r:.60}; a list of at least one image is needed")
    return [_picture(row, folder, f"number {number} of {several}", each) for number, each in enumerate(given)]


def _picture(row: Row, folder: Path, field: str, given: Any) -> ImageLike:
    if isinstance(given, dict) and given.get("bytes") is None and isinstance(given.get("path"), str):
        given = given["path"]  # a mapping of the hub's form, whose path goes out from the folder like any other
    if isinstance(given, Image.Image | np.ndarray | bytes | Path) or (isinstance(given, Mapping) and given):
        return given
    if not isinstance(given, str) or not given.strip():
        plain = isinstance(given, str | int | float | list | tuple | dict)
        told = "missing" if given is None else f"{given!r:.60}" if plain else f"a {type(given).__name__}"
        raise UsageError(f"{row.place}: {field} is {told}; an image is needed (path, address, PIL, uint8 array, bytes)")
    return image_named(folder, text_of(row, field, given))


def opened(images: list[ImageLike]) -> list[Image.Image]:
    """The pictures as pixels.

    Raises:
        UsageError: one that cannot be read.
    """
    return [load_image(image) for image in images]


def kept_form(images: list[ImageLike], pixels: list[Image.Image], *, keep_pixels: bool = False) -> list[ImageLike]:
    """The pictures in the form in which they are kept: as the row has them, but what was fetched as pixels."""
    return [
        loaded if keep_pixels or (isinstance(image, str) and image.startswith(ADDRESSES)) else image
        for image, loaded in zip(images, pixels, strict=True)
    ]


def as_given(images: list[ImageLike]) -> ImageLike | tuple[ImageLike, ...]:
    """One picture, or several, as `Pair` and `Item` take them."""
    return images[0] if len(images) == 1 else tuple(images)
