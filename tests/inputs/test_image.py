"""Pictures that Pillow opens but that are none: closed, cut off, empty, of odd modes, of several frames."""

import io

import pytest
from PIL import Image

from tests.zoo.tiny import picture
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image


def saved(kind: str, *images: Image.Image) -> bytes:
    buffer = io.BytesIO()
    images[0].save(buffer, kind, **({"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}))
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def closed() -> Image.Image:
    found = opened(saved("PNG", picture(0)))
    found.close()
    return found


ODD = {
    "cut off": (lambda: opened(saved("JPEG", picture(0).resize((300, 300)))[:2000]), "cannot be read: .*truncated"),
    "closed": (closed, "cannot be read: "),
    "La": (lambda: picture(0).convert("LA").convert("La"), "cannot be read: conversion from La"),
    "empty": (lambda: Image.new("RGB", (0, 5)), "has 0 x 5 pixels"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_picture_without_pixels_is_refused(name):
    """Whatever Pillow raised came through; one of no pixel divided by zero in the processor."""
    make, told = ODD[name]
    with pytest.raises(UsageError, match=f"^the image {told}"):
        load_image(make())


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_none_is_chosen(kind, tmp_path):
    """The first was taken without a word."""
    content = saved(kind, picture(0), picture(1), picture(2))
    (tmp_path / "a").write_bytes(content)
    for given in (opened(content), content, tmp_path / "a"):
        with pytest.raises(UsageError, match="has 3 frames or pages"):
            load_image(given)
    assert load_image(opened(content).convert("RGB")).mode == "RGB"
    assert load_image(saved(kind, picture(0))).size == picture(0).size


def test_previews_of_a_camera_are_no_frames():
    assert load_image(saved("MPO", picture(0), picture(1).resize((9, 9)))).size == picture(0).size
