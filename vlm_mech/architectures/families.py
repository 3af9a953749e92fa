"""What differs between architectures: where the parts of a vision-language model live and how it lays out an image.

This is the only file that knows architectures. A new family is one `Family` record in `FAMILIES`.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from vlm_mech.architectures.site import VLM_SITES
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image_layout import Kind, flattened, mosaic, packed, packed_in_windows, queries, tiles


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
    after: str | None
    """Module whose input is the output of the last block that is used; None where that is the projector."""
    config: str
    """Name of the sub-configuration that holds the sizes of these blocks."""
    heads: str = "num_attention_heads"
    """Name of the number of heads in that sub-configuration."""
    attention_added: str | None = None
    """Module whose output is added to the residual stream, where that is not the attention's own (a norm after it)."""
    mlp_added: str | None = None
    """The same for the MLP."""
    scales: tuple[str, str] | None = None
    """Parameters that multiply the attention's and the MLP's output before they are added (layer scale)."""


@dataclass(frozen=True)
class Family:
    """One architecture: paths of its towers and the facts of its image layout."""

    name: str
    model_type: str
    vision: Blocks
    llm: Blocks
    projector: str
    projector_first: str | None
    """First sub-module of the projector: its input proves what the projector received. None: it has no sub-modules."""
    decoder: str
    """Module that is called with `inputs_embeds`, text and image embeddings merged."""
    head: str
    vision_reads: Callable[[Any], tuple[int, ...]]
    """Configuration -> after how many vision blocks the stream is read; several are put side by side in this order."""
    layout: Kind = tiles
    """How images become tokens (`inputs/image_layout.py`)."""
    merge: Callable[[Any], int] = lambda config: 1
    """Configuration -> patches on a side that become one image token."""
    class_tokens: Callable[[Any], int] = lambda config: 0
    """Configuration -> tokens before the first patch in the vision tower."""
    drops_class_tokens: Callable[[Any], bool] = lambda config: True
    """Configuration -> whether the class tokens are removed before the projector."""
    takes: Literal["patches", "tokens"] = "patches"
    """Whether the projector receives patches, or tokens already merged."""
    placeholder: str | None = "image_token"
    """Attribute of the processor that holds the text to be put for an image; None: the processor adds it itself."""
    resampler: tuple[str, ...] = ()
    """Modules and parameters between tower and projector (a Q-Former and its queries), trained with the projector."""
    queries_first: bool = False
    """Whether the processor puts query tokens before the whole text, padding included (Q-Former families)."""
    plain_text: str | None = None
    """Prompt for processors without a chat template, with {images} and {question}."""
    added_later: str | None = None
    """Modules whose outputs are added at image positions after the first decoder blocks (deepstack)."""
    both_ways: Literal["", "image", "prefix"] = ""
    """Where the decoder attends both ways: nowhere, within each image, or over image and prompt."""
    readout: str = "logits"
    """What of the model's output interventions are judged by."""
    site_names: tuple[str, ...] = VLM_SITES
    """Names of the sites that such models have."""


def _reads(config: Any) -> tuple[int, ...]:
    """The blocks that `vision_feature_layer` names, one or several, counted as Hugging Face counts them."""
    chosen = config.vision_feature_layer
    layers = tuple(chosen) if isinstance(chosen, list | tuple) else (chosen,)
    n_layers = config.vision_config.num_hidden_layers
    depths = tuple(layer if layer >= 0 else n_layers + 1 + layer for layer in layers)
    if not depths or any(not 0 < depth <= n_layers for depth in depths):
        raise UsageError(f"vision_feature_layer is {chosen}; the vision encoder has blocks 0..{n_layers - 1}")
    return depths


def _all(name: str = "num_hidden_layers") -> Callable[[Any], tuple[int, ...]]:
    return lambda config: (getattr(config.vision_config, name),)


def _all_by_choice(config: Any) -> tuple[int, ...]:
    """All blocks, and the tower's last norm, which is skipped if another layer is chosen."""
    if config.vision_feature_layer != -1:
        raise UsageError(f"vision_feature_layer is {config.vision_feature_layer!r}; only -1 is supported here")
    return (config.vision_config.num_hidden_layers,)


def _class_tokens(config: Any) -> int:
    model_type = config.vision_config.model_type
    known = {"clip_vision_model": 1, "siglip_vision_model": 0}
    if model_type not in known:
        raise UsageError(f"vision tower {model_type!r} is not known; known: {', '.join(known)}")
    return known[model_type]


def _drops(config: Any) -> bool:
    return config.vision_feature_select_strategy == "default"


CLIP_BLOCKS = Blocks(
    path="model.vision_tower.encoder.layers",
    attention="self_attn",
    out="out_proj",
    mlp="mlp",
    norm_1="layer_norm1",
    norm_2="layer_norm2",
    after=None,
    config="vision_config",
)
LLAMA_BLOCKS = Blocks(
    path="model.language_model.layers",
    attention="self_attn",
    out="o_proj",
    mlp="mlp",
    norm_1="input_layernorm",
    norm_2="post_attention_layernorm",
    after="model.language_model.norm",
    config="text_config",
)

LLAVA = Family(
    name="LLaVA",
    model_type="llava",
    vision=CLIP_BLOCKS,
    llm=LLAMA_BLOCKS,
    projector="model.multi_modal_projector",
    projector_first="linear_1",
    decoder="model.language_model",
    head="lm_head",
    vision_reads=_reads,
    class_tokens=_class_tokens,
    drops_class_tokens=_drops,
)
VIPLLAVA = replace(
    LLAVA,
    name="VipLLaVA",
    model_type="vipllava",
    projector_first="projector_layernorm",
    drops_class_tokens=lambda config: True,
)
LLAVA_NEXT = replace(LLAVA, name="LLaVA-NeXT", model_type="llava_next", layout=mosaic)
LLAVA_ONEVISION = replace(LLAVA, name="LLaVA-OneVision", model_type="llava_onevision", layout=mosaic)

QWEN2_VL = Family(
    name="Qwen2-VL",
    model_type="qwen2_vl",
    vision=Blocks(
        path="model.visual.blocks",
        attention="attn",
        out="proj",
        mlp="mlp",
        norm_1="norm1",
        norm_2="norm2",
        after="model.visual.merger",
        config="vision_config",
        heads="num_heads",
    ),
    llm=LLAMA_BLOCKS,
    projector="model.visual.merger",
    projector_first="ln_q",
    decoder="model.language_model",
    head="lm_head",
    vision_reads=_all("depth"),
    layout=packed,
    merge=lambda config: config.vision_config.spatial_merge_size,
)
QWEN2_5_VL = replace(QWEN2_VL, name="Qwen2.5-VL", model_type="qwen2_5_vl", layout=packed_in_windows)
QWEN3_VL = replace(
    QWEN2_VL,
    name="Qwen3-VL",
    model_type="qwen3_vl",
    projector_first="norm",
    added_later="model.visual.deepstack_merger_list",
)
GLM4V = replace(
    QWEN2_VL,
    name="GLM-4V",
    model_type="glm4v",
    vision=replace(QWEN2_VL.vision, after="model.visual.post_layernorm"),
    llm=replace(LLAMA_BLOCKS, attention_added="post_self_attn_layernorm", mlp_added="post_mlp_layernorm"),
    projector_first="proj",
    takes="tokens",
)

PALIGEMMA = replace(
    LLAVA,
    name="PaliGemma",
    model_type="paligemma",
    vision=replace(CLIP_BLOCKS, after="model.vision_tower.post_layernorm"),
    projector_first="linear",
    vision_reads=_all(),
    drops_class_tokens=lambda config: True,
    plain_text="{images}{question}",
    both_ways="prefix",
)
GEMMA3 = replace(
    PALIGEMMA,
    name="Gemma-3",
    model_type="gemma3",
    llm=replace(
        LLAMA_BLOCKS,
        norm_2="pre_feedforward_layernorm",
        attention_added="post_attention_layernorm",
        mlp_added="post_feedforward_layernorm",
    ),
    projector_first="avg_pool",
    merge=lambda config: round(
        config.vision_config.image_size // config.vision_config.patch_size / config.mm_tokens_per_image**0.5
    ),
    placeholder="boi_token",
    plain_text=None,
    both_ways="image",
)

IDEFICS3 = Family(
    name="Idefics3",
    model_type="idefics3",
    vision=replace(CLIP_BLOCKS, path="model.vision_model.encoder.layers", after="model.vision_model.post_layernorm"),
    llm=replace(LLAMA_BLOCKS, path="model.text_model.layers", after="model.text_model.norm"),
    projector="model.connector",
    projector_first="modality_projection",
    decoder="model.text_model",
    head="lm_head",
    vision_reads=_all(),
    merge=lambda config: config.scale_factor,
)
SMOLVLM = replace(IDEFICS3, name="SmolVLM", model_type="smolvlm")

INTERNVL = replace(
    LLAVA,
    name="InternVL",
    model_type="internvl",
    vision=Blocks(
        path="model.vision_tower.encoder.layer",
        attention="attention",
        out="projection_layer",
        mlp="mlp",
        norm_1="layernorm_before",
        norm_2="layernorm_after",
        after="model.vision_tower.layernorm",
        config="vision_config",
        scales=("lambda_1", "lambda_2"),
    ),
    projector_first="layer_norm",
    vision_reads=_all_by_choice,
    merge=lambda config: round(1 / config.downsample_ratio),
    class_tokens=lambda config: 1,
    takes="tokens",
)
MISTRAL3 = replace(
    LLAVA,
    name="Mistral3",
    model_type="mistral3",
    vision=Blocks(
        path="model.vision_tower.transformer.layers",
        attention="attention",
        out="o_proj",
        mlp="feed_forward",
        norm_1="attention_norm",
        norm_2="ffn_norm",
        after=None,
        config="vision_config",
    ),
    projector_first="norm",
    layout=flattened,
    merge=lambda config: config.spatial_merge_size,
    class_tokens=lambda config: 0,
    drops_class_tokens=lambda config: True,
)

INSTRUCTBLIP = Family(
    name="InstructBLIP",
    model_type="instructblip",
    vision=replace(
        CLIP_BLOCKS,
        path="vision_model.encoder.layers",
        out="projection",
        after="vision_model.post_layernorm",
    ),
    llm=replace(LLAMA_BLOCKS, path="language_model.model.layers", after="language_model.model.norm"),
    projector="language_projection",
    projector_first=None,
    decoder="language_model",
    head="language_model.lm_head",
    vision_reads=_all(),
    layout=queries,
    class_tokens=lambda config: 1,
    drops_class_tokens=lambda config: False,
    takes="tokens",
    placeholder=None,
    resampler=("qformer", "query_tokens"),
    queries_first=True,
    plain_text="{images}{question}",
)
BLIP2 = replace(
    INSTRUCTBLIP,
    name="BLIP-2",
    model_type="blip-2",
    llm=Blocks(
        path="language_model.model.decoder.layers",
        attention="self_attn",
        out="out_proj",
        mlp="fc2",
        norm_1="self_attn_layer_norm",
        norm_2="final_layer_norm",
        after="language_model.model.decoder.final_layer_norm",
        config="text_config",
    ),
    plain_text="{images}Question: {question} Answer:",
)

FAMILIES = (
    LLAVA, VIPLLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, GLM4V, PALIGEMMA, GEMMA3, IDEFICS3,
    SMOLVLM, INTERNVL, MISTRAL3, INSTRUCTBLIP, BLIP2,
)  # fmt: skip


CONTRASTIVE_TYPES = ("clip", "siglip", "siglip2")
"""Architectures with a record in `contrastive_families.py`."""


def family_of(config: Any) -> Family:
    """The `Family` record of a Hugging Face configuration.

    Raises:
        UsageError: the architecture has no record; the message names the nearest that has, or says that the model has
            no vision tower.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = [family.model_type for family in FAMILIES]
    if model_type in CONTRASTIVE_TYPES:
        raise UsageError(f"architecture {model_type!r} is a contrastive model without a decoder; use DualEncoder")
    if config is not None and getattr(config, "vision_config", None) is None:
        raise UsageError(
            f"architecture {model_type!r} has no vision encoder; vision-language models of these types are supported: "
            + ", ".join(known)
        )
    nearest = difflib.get_close_matches(str(model_type), known, n=1, cutoff=0.0)[0]
    raise UsageError(
        f"architecture {model_type!r} is not supported (nearest: {nearest!r}; all: {', '.join(known)}); a record in "
        "vlm_mech/architectures/families.py adds it, see 'Adding a family' in docs/architecture.md"
    )
