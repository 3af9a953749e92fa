"""Tiny random-weight models of seven families whose image tokens form a grid of varying shape, with real processors:
LLaVA-NeXT (Mistral, Vicuna), LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4V.
`FAMILIES[name](attn, seed)` returns a model and its processor."""

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from tests.zoo.gemma_idefics_blip import (
    N_IMAGE_TOKENS,
    VISION,
    Family,
    NoVideoProcessor,
    build,
    content,
    siglip,
    square,
    text_sizes,
    words_tokenizer,
)
from tests.zoo.tiny import IMAGE_SIZE, PATCH_SIZE

# Grid choices are (height, width), as in the real configurations.
NEXT_GRIDS = [[tile * IMAGE_SIZE for tile in grid] for grid in ([1, 2], [2, 1], [2, 2], [3, 1], [1, 3])]
ONEVISION_GRIDS = [[row * IMAGE_SIZE, column * IMAGE_SIZE] for row in (1, 2, 3) for column in (1, 2, 3)]
# Two by two patches become one token: a token covers 14 by 14 pixels, a picture has 16 to 64 tokens.
MERGED_PATCH_SIZE, MERGE_SIZE = PATCH_SIZE // 2, 2
MIN_PIXELS, MAX_PIXELS = IMAGE_SIZE**2, (2 * IMAGE_SIZE) ** 2
# Rows and columns share the rotary pairs of a vision head, so the head size must be a multiple of 4.
MERGED_VISION = {
    "depth": 4,
    "num_heads": 4,
    "hidden_size": 32,
    "patch_size": MERGED_PATCH_SIZE,
    "spatial_merge_size": MERGE_SIZE,
}
QWEN_SPECIALS = (
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
GLM_SPECIALS = (
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)


def pictures_first(image: str, text: str) -> str:
    """Return the template of one message's parts with every picture before every text, whatever their order."""
    return (
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '" + image + "' }}{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ " + text + " }}{% endfor %}"
    )


MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    + pictures_first("<image>\\n", "part['text']")
    + "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}"
    + pictures_first("<image>\\n", "part['text'] + ' '")
    + "{% else %}{{ 'ASSISTANT: ' + message['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + pictures_first("<image>", "'\\n' + part['text']")
    + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    + content("<|vision_start|><|image_pad|><|vision_end|>")
    + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The real template of Qwen2-VL and Qwen2.5-VL adds a system message of its own where there is none.
QWEN2_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nyou are an assistant.<|im_end|>\\n' }}{% endif %}"
    + QWEN3_TEMPLATE
)
GLM_TEMPLATE = (
    "{{ '[gMASK]<sop>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    + content("<|begin_of_image|><|image|><|end_of_image|>")
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def build_tiled(model_class: type[PreTrainedModel], config: PreTrainedConfig, attn: str, seed: int) -> PreTrainedModel:
    """Return a model as `build` does, with class token and newline, which are bare vectors, redrawn to size 1."""
    model = build(model_class, config, attn, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("class_embedding", "image_newline")):
                parameter.normal_(0, 1.0)
    return model


def llava_next(
    decoder: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, template: str, attn: str, seed: int
) -> Family:
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=square(IMAGE_SIZE), image_grid_pinpoints=NEXT_GRIDS
    )
    processor = LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        text_config=decoder,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=NEXT_GRIDS,
        image_seq_length=N_IMAGE_TOKENS,
    )
    return build_tiled(LlavaNextForConditionalGeneration, config, attn, seed), processor


def llava_next_mistral(attn: str, seed: int) -> Family:
    instruction_marks = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    tokenizer = words_tokenizer(
        pad="<pad>", eos="</s>", bos="<s>", others=("<image>", *instruction_marks), wrap="<s> $A"
    )
    decoder = MistralConfig(**text_sizes(tokenizer, sliding_window=12))
    return llava_next(decoder, tokenizer, MISTRAL_TEMPLATE, attn, seed)


def llava_next_vicuna(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(pad="<pad>", eos="</s>", bos="<s>", others=("<image>",), wrap="<s> $A")
    return llava_next(LlamaConfig(**text_sizes(tokenizer)), tokenizer, VICUNA_TEMPLATE, attn, seed)


def llava_onevision(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(pad="<|endoftext|>", eos="<|im_end|>", others=("<|im_start|>", "<image>", "<video>"))
    # Real models shrink the grid from 11 tiles on ("anyres_max_9"), this one from 3 on.
    aspect_ratio = "anyres_max_2"
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=square(IMAGE_SIZE), image_grid_pinpoints=ONEVISION_GRIDS),
        tokenizer,
        NoVideoProcessor(),
        num_image_tokens=N_IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect_ratio,
        chat_template=ONEVISION_TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        vision_config=siglip(PATCH_SIZE),
        text_config=Qwen2Config(**text_sizes(tokenizer)),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=ONEVISION_GRIDS,
        vision_aspect_ratio=aspect_ratio,
    )
    return build_tiled(LlavaOnevisionForConditionalGeneration, config, attn, seed), processor


def merged_sizes(pixel_factor: int = 1) -> dict[str, Any]:
    """Return the keyword arguments of an image processor that keeps each picture's shape and merges patches."""
    return {
        "size": {"shortest_edge": pixel_factor * MIN_PIXELS, "longest_edge": pixel_factor * MAX_PIXELS},
        "patch_size": MERGED_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
    }


def rotary(*section: int, **others: Any) -> dict[str, Any]:
    """Return rotary settings that give time, rows and columns `section` pairs of each head."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **others}


def special_ids(tokenizer: PreTrainedTokenizerFast, **tokens: str) -> dict[str, int]:
    """Return the configuration's `NAME_token_id` of every NAME and its special token."""
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return words_tokenizer(pad="<|endoftext|>", eos="<|im_end|>", others=QWEN_SPECIALS)


def qwen_config(
    config_class: type[PreTrainedConfig], tokenizer: PreTrainedTokenizerFast, vision: dict[str, Any], **text: Any
) -> PreTrainedConfig:
    token_ids = special_ids(
        tokenizer,
        image="<|image_pad|>",
        video="<|video_pad|>",
        vision_start="<|vision_start|>",
        vision_end="<|vision_end|>",
    )
    decoder = text_sizes(tokenizer, rope_parameters=rotary(2, 1, 1), **text)
    return config_class(vision_config={**MERGED_VISION, **vision}, text_config=decoder, **token_ids)


def qwen2_vl(attn: str, seed: int) -> Family:
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(**merged_sizes()), qwen_tokenizer(), NoVideoProcessor(), chat_template=QWEN2_TEMPLATE
    )
    # `hidden_size` is the decoder's width in this family, `embed_dim` the tower's.
    config = qwen_config(Qwen2VLConfig, processor.tokenizer, {"embed_dim": 32, "mlp_ratio": 2})
    return build(Qwen2VLForConditionalGeneration, config, attn, seed), processor


def qwen2_5_vl(attn: str, seed: int) -> Family:
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**merged_sizes()), qwen_tokenizer(), NoVideoProcessor(), chat_template=QWEN2_TEMPLATE
    )
    # A window holds two by two tokens, so even the smallest picture has four windows.
    window_size = 2 * MERGE_SIZE * MERGED_PATCH_SIZE
    vision = {
        "intermediate_size": 40,
        "out_hidden_size": 32,
        "window_size": window_size,
        "fullatt_block_indexes": [1, 3],
    }
    config = qwen_config(Qwen2_5_VLConfig, processor.tokenizer, vision)
    return build(Qwen2_5_VLForConditionalGeneration, config, attn, seed), processor


def qwen3_vl(attn: str, seed: int) -> Family:
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**merged_sizes()), qwen_tokenizer(), NoVideoProcessor(), chat_template=QWEN3_TEMPLATE
    )
    # A table of six by six positions fits no picture, so it is always interpolated.
    vision = {
        "intermediate_size": 40,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    }
    config = qwen_config(Qwen3VLConfig, processor.tokenizer, vision, head_dim=8)
    return build(Qwen3VLForConditionalGeneration, config, attn, seed), processor


def glm4v(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(pad="<|endoftext|>", eos="<|endoftext|>", others=GLM_SPECIALS)
    # This image processor counts pixels of two frames.
    image_processor = Glm4vImageProcessorPil(**merged_sizes(pixel_factor=2))
    processor = Glm4vProcessor(image_processor, tokenizer, NoVideoProcessor(), chat_template=GLM_TEMPLATE)
    # Real models rotate half of each head; time, rows and columns need one pair each, which is 6 of 8 dimensions.
    decoder = text_sizes(tokenizer, rope_parameters=rotary(1, 1, 1, partial_rotary_factor=0.75))
    vision = {**MERGED_VISION, "intermediate_size": 40, "out_hidden_size": 32, "image_size": IMAGE_SIZE}
    token_ids = special_ids(
        tokenizer,
        image="<|image|>",
        video="<|video|>",
        image_start="<|begin_of_image|>",
        image_end="<|end_of_image|>",
        video_start="<|begin_of_video|>",
        video_end="<|end_of_video|>",
    )
    config = Glm4vConfig(vision_config=vision, text_config=decoder, **token_ids)
    return build(Glm4vForConditionalGeneration, config, attn, seed), processor


FAMILIES = {
    "llava_next_mistral": llava_next_mistral,
    "llava_next_vicuna": llava_next_vicuna,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "glm4v": glm4v,
}
