"""What differs between contrastive architectures: where their two towers live and what becomes an embedding.

A new one is a `DualFamily` record here, and its type in `CONTRASTIVE_TYPES` of `families.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlm_mech.architectures.families import CLIP_BLOCKS, FAMILIES, Blocks
from vlm_mech.architectures.site import DUAL_SITES
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import end_of_text, last_position, padded
from vlm_mech.inputs.image_layout import Kind, tiles

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DualFamily:
    """One contrastive architecture: two towers, and how each becomes an embedding."""

    name: str
    model_type: str
    vision: Blocks
    text: Blocks
    vision_embed: str
    """Module whose output is the image's embedding before normalisation."""
    text_embed: str
    """The same for the text."""
    embed_width: Callable[[Any], int]
    """Configuration -> width of both embeddings."""
    pooled: "Callable[[Any, Tensor], Tensor]"
    """Configuration and padded token ids -> position in each text whose last state becomes the embedding."""
    causal: bool = False
    """Whether the text tower attends to earlier positions only."""
    pads_fully: bool = True
    """Whether texts are padded to the greatest length, as in training, and not just to the longest of the batch."""
    class_tokens: int = 0
    """Tokens before the first patch; the first alone is pooled if there are any, all patches otherwise."""
    layout: Kind = tiles
    """How images become patches (`inputs/image_layout.py`, and `padded` in `contrastive_batch.py`)."""
    readout: str = "logits_per_image"
    """What of the model's output interventions are judged by."""
    site_names: tuple[str, ...] = DUAL_SITES
    """Names of the sites that such models have."""


CLIP = DualFamily(
    name="CLIP",
    model_type="clip",
    vision=replace(CLIP_BLOCKS, path="vision_model.encoder.layers", after="vision_model.post_layernorm"),
    text=replace(
        CLIP_BLOCKS, path="text_model.encoder.layers", after="text_model.final_layer_norm", config="text_config"
    ),
    vision_embed="visual_projection",
    text_embed="text_projection",
    embed_width=lambda config: config.projection_dim,
    pooled=end_of_text,
    causal=True,
    pads_fully=False,
    class_tokens=1,
)
SIGLIP = replace(
    CLIP,
    name="SigLIP",
    model_type="siglip",
    vision_embed="vision_model.head",
    text_embed="text_model.head",
    embed_width=lambda config: config.vision_config.hidden_size,
    pooled=last_position,
    causal=False,
    pads_fully=True,
    class_tokens=0,
)
SIGLIP2 = replace(SIGLIP, name="SigLIP2", model_type="siglip2", layout=padded)

DUAL_FAMILIES = (CLIP, SIGLIP, SIGLIP2)


def dual_family_of(config: Any) -> DualFamily:
    """The `DualFamily` record of a Hugging Face configuration.

    Raises:
        UsageError: the architecture has no record; the message says so if it is one for `VLM`.
    """
    model_type = getattr(config, "model_type", None)
    for family in DUAL_FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in DUAL_FAMILIES)
    if model_type in [family.model_type for family in FAMILIES]:
        raise UsageError(f"architecture {model_type!r} is not a contrastive model ({known}); use VLM")
    raise UsageError(f"architecture {model_type!r} is not supported; contrastive models of these types are: {known}")
