"""Every family, tiny: name -> function(attn, seed) -> (model, processor)."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, VipLlavaConfig, VipLlavaForConditionalGeneration

from tests.helpers import some_long
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


def of_each_kind(names: Iterable[str]) -> list[Any]:
    """The families, for tests that take long: `make test` takes one of each kind, `make test-all` the others too."""
    return some_long(names, OF_EACH_KIND)


BOTH = [(family, attn) for attn in ("sdpa", "eager") for family in ZOO]


def _both(sdpa: Iterable[str], eager: Iterable[str]) -> list[Any]:
    """Every family under both back ends, of which `make test` takes some."""
    return some_long(BOTH, [*((family, "sdpa") for family in sdpa), *((family, "eager") for family in eager)])


FAMILIES = of_each_kind(ZOO)
"""Every family, for tests that take long."""
BACKENDS = _both(OF_EACH_KIND, OF_EACH_KIND[:3])
"""The same under both back ends: in `make test` one of each kind under SDPA, and three under eager attention."""
FEW = some_long(ZOO, OF_EACH_KIND[:3])
"""Every family, for what other tests ask of one of each kind too: `make test` takes three."""
FEW_AND_EAGER = _both(OF_EACH_KIND[:3], OF_EACH_KIND[:1])
"""The same under both back ends: in `make test` three under SDPA, and one under eager attention."""
ALL_AND_EAGER = _both(ZOO, OF_EACH_KIND[:3])
"""Every family under both back ends: in `make test` all under SDPA, and three under eager attention."""
