"""Every family, tiny: name -> function(attn, seed) -> (model, processor)."""

from tests.tiny import tiny_model, tiny_processor
from tests.zoo_grids import FAMILIES as GRIDS
from tests.zoo_others import FAMILIES as OTHERS

ZOO = {
    "llava_clip": lambda attn, seed: (tiny_model("llama", "clip", attn=attn, seed=seed), tiny_processor("clip")),
    "llava_siglip_mistral": lambda attn, seed: (
        tiny_model("mistral", "siglip", attn=attn, seed=seed),
        tiny_processor("siglip"),
    ),
    **GRIDS,
    **OTHERS,
}
ONE_IMAGE = ("instructblip", "blip2")
"""Families that take one image a prompt."""
