"""What states depend on beside the weights, as hashes: the pictures as models see them, the texts, the processor."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.extraction.saved_states import file_hash
from vlm_mech.inputs.image import ADDRESSES, load_image
from vlm_mech.inputs.prompt import Prompt, render


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """A hash of what the prompts say and show, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        images = [_image_hash(image) for image in prompt.images]
        begun = [] if prompt.prefix is None else [prompt.prefix]
        digest.update(json.dumps([prompt.question, prompt.system, prompt.text, images, *begun]).encode())
    return digest.hexdigest()


def _image_hash(image: Any) -> str:
    """Hash of a file's content or of the pixels that a model gets of a picture; addresses stand for themselves."""
    if isinstance(image, str) and image.startswith(ADDRESSES):
        return image
    try:
        if isinstance(image, str | Path) and Path(image).is_file():
            return file_hash(Path(image))
    except OSError:  # a picture in base64 is longer than a name may be
        pass
    try:
        # Palette and EXIF orientation decide on the pixels, but are no part of the bytes that Pillow holds.
        loaded = load_image(image)
    except (UsageError, OSError) as error:
        return f"unreadable: {error}"
    return hashlib.sha256(f"{loaded.size}".encode() + loaded.tobytes()).hexdigest()


def processor_hash(vlm: TracedModel, prompts: Sequence[Prompt]) -> str:
    """A hash of the processor's settings, and of the token ids that the prompts become in its chat template.

    Raises:
        UsageError: a prompt that the template does not take.
    """
    distinct = {(len(each.images), *each.said): each for each in prompts}
    ids = vlm.tokenizer([render(vlm, prompt)[0] for prompt in distinct.values()])["input_ids"]
    settings = json.dumps([vlm.processor.to_dict(), ids], default=str, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]
