"""What a loaded model is asked with: the picture, the words, and how much of a deep model is run over them."""

from collections.abc import Collection

import numpy as np
from PIL import Image
from torch import nn

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt

QUESTION = "What is in the picture?"
"""Words that any tokenizer takes."""
DEEP = 4
"""A stack at least so many times as deep as what has to be run of it is not run whole."""
FIRST_BLOCKS = (0, 1, 2)
"""Blocks that are run of a deep tower, where its own writes are asked about: the second of them is written to."""


def example(vlm: TracedModel) -> Prompt:
    """A question about a picture with structure at every scale."""
    return _asked(vlm, noise_picture(), f"{vlm.processor.image_token}\n")


def words(vlm: TracedModel) -> Prompt | None:
    """The same question without a picture; None for models that cannot run without one."""
    asked = _asked(vlm, None, "")
    try:
        vlm.encode(asked)
    except UsageError:
        return None
    return None if "pixel_values" in vlm.needed_inputs else asked


def _asked(vlm: TracedModel, picture: Image.Image | None, place: str) -> Prompt:
    if getattr(vlm.processor, "chat_template", None) is None and vlm.family.plain_text is None:
        return Prompt(QUESTION, picture, text=f"USER: {place}{QUESTION} ASSISTANT:")
    return Prompt(QUESTION, picture)


def noise_picture() -> Image.Image:
    """The picture that models are asked about: noise, smoothed so that every patch differs."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((144, 96), Image.Resampling.BICUBIC)


def shallow(vlm: TracedModel) -> int | None:
    """The blocks that a deep decoder runs over a picture: enough for each kind of attention and all that is added to
    image tokens on the way; None for a decoder that is not `DEEP` times as deep."""
    kinds = list(getattr(vlm.config.get_text_config(), "layer_types", None) or ())
    depth = max(2, len(vlm.taps) + 1, *(kinds.index(kind) + 1 for kind in kinds))
    return depth if DEEP * depth <= vlm.n_layers("llm") else None


def has_deep_tower(vlm: TracedModel) -> bool:
    """Whether writes in the tower are asked about in its first blocks alone."""
    return vlm.vision_depth >= DEEP * len(FIRST_BLOCKS)


def between(vlm: TracedModel, stream: str, asked: Collection[int]) -> list[nn.Module]:
    """Blocks of a deep stack that passes leave out: none that is asked about or the next, none the first of its kind.

    That they are made like the others is a question about the structure. None of a stack that is not deep.
    """
    blocks = list(vlm.model.get_submodule(vlm.blocks(stream).path).children())
    if len(blocks) < DEEP * len(FIRST_BLOCKS) or (stream == "llm" and shallow(vlm) is None):
        return []
    kinds = [type(block) for block in blocks]
    kept = {*asked, *(layer + 1 for layer in asked), *(kinds.index(kind) for kind in kinds)}
    return [block for layer, block in enumerate(blocks) if layer not in kept]
