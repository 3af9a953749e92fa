"""What differs between architectures: where the parts of a vision-language model live and how it lays out an image.

This is the only file that knows architectures. A new family is one `Family` record in `FAMILIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlm_mech.errors import UsageError


@dataclass(frozen=True)
class Blocks:
    """Where a stack of pre-norm transformer blocks lives, as module paths below the model.

    `attention`, `mlp`, `norm_1` and `norm_2` are paths below one block; `out` is the output projection below the
    attention module, whose input is the concatenated per-head output.
    """

    path: str
    attention: str
    out: str
    mlp: str
    norm_1: str
    norm_2: str
    after: str
    """Module whose input is the last block's output when all blocks are used."""
    causal: bool
    config: str
    """Name of the sub-configuration that holds the sizes of these blocks."""


@dataclass(frozen=True)
class Family:
    """One architecture: paths of its towers and the facts of its image layout."""

    name: str
    model_type: str
    vision: Blocks
    llm: Blocks
    projector: str
    projector_first: str
    """First sub-module of the projector: its input proves what the projector received."""
    head: str
    vision_depth: Callable[[Any], int]
    """Configuration -> number of vision blocks the projector depends on (the others can never matter)."""
    class_tokens: Callable[[Any], int]
    """Configuration -> tokens before the first patch in the vision tower."""
    drops_class_tokens: Callable[[Any], bool]
    """Configuration -> whether the class tokens are removed before the projector."""


def _llava_vision_depth(config: Any) -> int:
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise UsageError(f"vision_feature_layer is {layer!r}; one layer (an int) is supported")
    n_layers = config.vision_config.num_hidden_layers
    depth = layer if layer >= 0 else n_layers + 1 + layer
    if not 0 < depth <= n_layers:
        raise UsageError(f"vision_feature_layer is {layer}; the tower has blocks 0..{n_layers - 1}")
    return depth


def _class_tokens(config: Any) -> int:
    model_type = config.vision_config.model_type
    known = {"clip_vision_model": 1, "siglip_vision_model": 0}
    if model_type not in known:
        raise UsageError(f"vision tower {model_type!r} is not known; known: {', '.join(known)}")
    return known[model_type]


LLAVA = Family(
    name="LLaVA",
    model_type="llava",
    vision=Blocks(
        path="model.vision_tower.encoder.layers",
        attention="self_attn",
        out="out_proj",
        mlp="mlp",
        norm_1="layer_norm1",
        norm_2="layer_norm2",
        after="model.vision_tower.post_layernorm",
        causal=False,
        config="vision_config",
    ),
    llm=Blocks(
        path="model.language_model.layers",
        attention="self_attn",
        out="o_proj",
        mlp="mlp",
        norm_1="input_layernorm",
        norm_2="post_attention_layernorm",
        after="model.language_model.norm",
        causal=True,
        config="text_config",
    ),
    projector="model.multi_modal_projector",
    projector_first="linear_1",
    head="lm_head",
    vision_depth=_llava_vision_depth,
    class_tokens=_class_tokens,
    drops_class_tokens=lambda config: config.vision_feature_select_strategy == "default",
)

FAMILIES = (LLAVA,)


def family_of(config: Any) -> Family:
    """The `Family` record of a Hugging Face configuration.

    Raises:
        UsageError: the architecture has no record; the message names those that have.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UsageError(f"architecture {model_type!r} is not supported; supported model types: {known}")
