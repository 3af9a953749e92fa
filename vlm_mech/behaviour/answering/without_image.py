"""The same question without its picture."""

from dataclasses import replace
from typing import TYPE_CHECKING

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


def without_images(vlm: "VLM", encoded: Encoded) -> Encoded:
    """The same prompts with the picture and its placeholder left out.

    Raises:
        UsageError: the prompts have no picture, or the model cannot do without one.
    """
    if not all(prompt.images for prompt in encoded.prompts):
        raise UsageError("the prompts have no image, so there is nothing that could be left out")
    if "pixel_values" in vlm.needed_inputs:
        raise UsageError(f"{vlm.family.name} cannot run without an image, so nothing can be compared with that")
    place = vlm.placeholder or ""
    bare = [replace(each, image=None, text=each.text and each.text.replace(place, "")) for each in encoded.prompts]
    try:
        return vlm.encode(bare)
    except UsageError as error:
        raise UsageError(
            f"{vlm.family.name} cannot run without an image, so nothing can be compared with that: {error}"
        ) from error
