"""Tiny random-weight LLaVA models with real processors, built from the real configuration classes."""

import functools

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlm_mech.organism.build import word_tokenizer

COMBINATIONS = [(decoder, tower) for decoder in ("llama", "mistral", "qwen2") for tower in ("clip", "siglip")]
IMAGE_SIZE, PATCH_SIZE = 56, 14
N_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
WORDS = (
    "user assistant system : . , ? what which where is are there the a an of in on to left right above below "
    "colour color shape circle square star triangle red green blue yellow black white answer with one word "
    "you look at picture yes no and or cat dog"
).split()
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}SYSTEM: {{ message['content'][0]['text'] }} "
    "{% elif message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    vocabulary = {word: index for index, word in enumerate(SPECIALS + sorted(set(WORDS)))}
    return word_tokenizer(vocabulary)


@functools.cache
def tiny_processor(tower: str = "clip") -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        num_additional_image_tokens=1 if tower == "clip" else 0,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(decoder: str = "llama", tower: str = "clip", n_layers: int = 4, vision_layers: int = 4) -> LlavaConfig:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tiny_tokenizer()),
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    decoders = {
        "llama": lambda: LlamaConfig(**text),
        "mistral": lambda: MistralConfig(**text, sliding_window=12),
        "qwen2": lambda: Qwen2Config(**text),
    }
    towers = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    vision = towers[tower](
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=decoders[decoder](),
        image_token_index=tiny_tokenizer().convert_tokens_to_ids("<image>"),
        image_seq_length=N_PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )


def tiny_model(
    decoder: str = "llama", tower: str = "clip", *, attn: str = "sdpa", seed: int = 0, n_layers: int = 4
) -> LlavaForConditionalGeneration:
    """Random weights large enough that every intervention moves the logits visibly."""
    torch.manual_seed(seed)
    config = tiny_config(decoder, tower, n_layers)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def picture(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    """A picture of random 8-pixel blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
