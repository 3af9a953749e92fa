"""Every family, tiny: name -> function(attn, seed) -> (model, processor)."""

import pytest
from transformers import PreTrainedModel, VipLlavaConfig, VipLlavaForConditionalGeneration

from tests.zoo.gemma_idefics_blip import FAMILIES as GEMMA_IDEFICS_BLIP
from tests.zoo.gemma_idefics_blip import build
from tests.zoo.llava_qwen_glm import FAMILIES as LLAVA_QWEN_GLM
from tests.zoo.tiny import tiny_config, tiny_model, tiny_processor


def vipllava(attn: str, seed: int) -> tuple[PreTrainedModel, object]:
    """LLaVA whose projector reads several vision layers side by side."""
    plain = tiny_config()
    config = VipLlavaConfig(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_index=plain.image_token_id,
        image_seq_length=plain.image_seq_length,
        vision_feature_layers=[-2, -4, 2],
    )
    return build(VipLlavaForConditionalGeneration, config, attn, seed), tiny_processor("clip")


ZOO = {
    "llava_clip": lambda attn, seed: (tiny_model("llama", "clip", attn=attn, seed=seed), tiny_processor("clip")),
    "llava_siglip_mistral": lambda attn, seed: (
        tiny_model("mistral", "siglip", attn=attn, seed=seed),
        tiny_processor("siglip"),
    ),
    "vipllava": vipllava,
    **LLAVA_QWEN_GLM,
    **GEMMA_IDEFICS_BLIP,
}
ONE_IMAGE = ("instructblip", "blip2")
"""Families that take one image a prompt."""

# Towers, masks and image layouts of every kind; the other families share theirs with one of these.
OF_EACH_KIND = (
    "llava_clip",
    "qwen3_vl",
    "gemma3",
    "llava_next_mistral",
    "qwen2_5_vl",
    "paligemma",
    "mistral3",
    "blip2",
)


def _long(case: object, *, always: bool) -> object:
    return case if always else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)


FAMILIES = [_long(family, always=family in OF_EACH_KIND) for family in ZOO]
"""Every family, for tests that take long: `make test` takes one of each kind, `make test-all` the others too."""
BACKENDS = [
    _long((family, attn), always=family in OF_EACH_KIND[: 8 if attn == "sdpa" else 3])
    for attn in ("sdpa", "eager")
    for family in ZOO
]
"""The same under both back ends: in `make test` one of each kind under SDPA, and three under eager attention."""
FEW = [_long(family, always=family in OF_EACH_KIND[:3]) for family in ZOO]
"""Every family, for what other tests ask of one of each kind too: `make test` takes three."""
FEW_AND_EAGER = [
    _long((family, attn), always=family in OF_EACH_KIND[: 3 if attn == "sdpa" else 1])
    for attn in ("sdpa", "eager")
    for family in ZOO
]
"""The same under both back ends: in `make test` three under SDPA, and one under eager attention."""
ALL_AND_EAGER = [
    _long((family, attn), always=attn == "sdpa" or family in OF_EACH_KIND)
    for attn in ("sdpa", "eager")
    for family in ZOO
]
"""Every family under both back ends: in `make test` all under SDPA, and one of each kind under eager attention."""
