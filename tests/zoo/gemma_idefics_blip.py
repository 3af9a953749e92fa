"""Tiny random-weight models of eight families with real processors: PaliGemma, Gemma 3, Idefics3, SmolVLM, InternVL,
Mistral 3, InstructBLIP and BLIP-2. `FAMILIES[name](attn, seed)` returns a model and its processor."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import transformers as hf
import transformers.models.smolvlm.processing_smolvlm as smolvlm_processing
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from tests.zoo.tiny import IMAGE_SIZE, PATCH_SIZE, WORDS

Family = tuple[hf.PreTrainedModel, hf.ProcessorMixin]
N_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
TILE_SIZE, TILE_PATCH_SIZE = 32, 4
N_TILE_TOKENS = (TILE_SIZE // TILE_PATCH_SIZE // 2) ** 2
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
TILE_VISION = {**VISION, "image_size": TILE_SIZE, "patch_size": TILE_PATCH_SIZE}
TILE_IMAGES = {"size": {"longest_edge": 2 * TILE_SIZE}, "max_image_size": {"longest_edge": TILE_SIZE}}
TILE_ROW_COLUMN = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


class NoVideoProcessor(VideoProcessorMixin):
    """Stands where InternVL and SmolVLM processors demand a video processor, which exists for torchvision only."""

    num_frames = fps = None


AutoVideoProcessor.register(hf.PreTrainedConfig, NoVideoProcessor, exist_ok=True)
# Processors look their parts' base classes up here; without torchvision this one is not exported.
hf.VideoProcessorMixin = VideoProcessorMixin
if smolvlm_processing.num2words is None:
    # The processor refuses to start without the package, which it uses to spell the frame count of a video.
    smolvlm_processing.num2words = str


def pixtral_processor_class() -> type[hf.ProcessorMixin]:
    """Return the real PixtralProcessor, also where torchvision is missing.

    Its module imports one size formula from the torchvision image processor; the PIL image processor has the same one.
    """
    if is_torchvision_available():
        return hf.PixtralProcessor
    from transformers.models import pixtral
    from transformers.models.pixtral import image_processing_pil_pixtral

    name = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules[name] = image_processing_pil_pixtral
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    del sys.modules[name]
    # AutoProcessor looks the class up here and would find a placeholder that raises.
    pixtral.PixtralProcessor = hf.PixtralProcessor = PixtralProcessor
    return PixtralProcessor


def words_tokenizer(
    *,
    pad: str,
    eos: str,
    bos: str | None = None,
    unknown: str = "<unk>",
    others: Iterable[str] = (),
    named: dict[str, str] | None = None,
    wrap: str = "$A",
    padding_side: str = "left",
) -> hf.PreTrainedTokenizerFast:
    """Return a word-level tokenizer with a family's special tokens; newlines are tokens, as in real vocabularies.

    `named` become attributes (`image_token`, `image_token_id`); `wrap` is the template put around every text.
    """
    named = named or {}
    specials = [token for token in dict.fromkeys([pad, bos, eos, unknown, *others, *named.values()]) if token]
    words = sorted({*WORDS, "model", "question", "\n", "\n\n"})
    vocabulary = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    splits = ((r"\n\n|\n", "isolated"), (r"[^\S\n]+", "removed"), (r"[:.,?]", "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior) for pattern, behavior in splits]
    )
    wrapped = [(token, vocabulary[token]) for token in wrap.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=wrap, special_tokens=wrapped)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        unk_token=unknown,
        extra_special_tokens=list(others),
        model_specific_special_tokens=named,
        padding_side=padding_side,
    )


def text_sizes(tokenizer: hf.PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """Return the keyword arguments that every tiny decoder configuration takes."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return {**sizes, **changes}


def build(
    model_class: type[hf.PreTrainedModel], config: hf.PreTrainedConfig, attn: str, seed: int
) -> hf.PreTrainedModel:
    """Return a model in fp32 whose weights are all drawn from `seed`, large enough that every part moves the logits."""
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation=attn)
    # Gemma multiplies its embeddings by sqrt(d_model): what enters the first layer is of size 1 there too.
    tables = {
        id(module.weight): 1.0 / getattr(module, "scalar_embed_scale", 1.0)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in tables:
                parameter.normal_(0, tables[id(parameter)])
            elif parameter.ndim == 3:  # queries, class tokens and position tables that are bare parameters
                parameter.normal_(0, 1.0)
            elif parameter.ndim > 1:
                parameter.normal_(0, 1.0 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:  # norm weights and layer scales: near their initial value, which is 0 for Gemma
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def content(image: str) -> str:
    """Return the template of one message's parts, with `image` (escaped for Jinja) for every picture."""
    return (
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + image + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    )


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = messages[0]['content'][0]['text'] + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{{ '<start_of_turn>' }}"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}{{ '\\n' }}{{ prefix if loop.first else '' }}"
    + content("<start_of_image>")
    + "{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
IDEFICS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    + content("<image>")
    + "{{ '<end_of_utterance>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    + content(r"<IMG_CONTEXT>\n")
    + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST]' }}"
    + content("[IMG]")
    + "{{ '[/INST]' }}{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)


def siglip(patch_size: int) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**VISION, image_size=IMAGE_SIZE, patch_size=patch_size, vision_use_head=False)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def paligemma(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(pad="<pad>", eos="<eos>", bos="<bos>", named={"image_token": "<image>"})
    image_processor = hf.SiglipImageProcessorPil(size=square(IMAGE_SIZE), image_seq_length=N_IMAGE_TOKENS)
    processor = hf.PaliGemmaProcessor(image_processor, tokenizer)  # adds the location and segment tokens
    config = hf.PaliGemmaConfig(
        vision_config=siglip(PATCH_SIZE),
        text_config=hf.GemmaConfig(**text_sizes(tokenizer, head_dim=8)),
        image_token_index=processor.image_token_id,
        vocab_size=len(tokenizer),
        projection_dim=32,
        hidden_size=32,
    )
    return build(hf.PaliGemmaForConditionalGeneration, config, attn, seed), processor


def gemma3(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(
        pad="<pad>",
        eos="<eos>",
        bos="<bos>",
        others=("<start_of_turn>", "<end_of_turn>"),
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        wrap="<bos> $A",
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size=square(IMAGE_SIZE)),
        tokenizer,
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=N_IMAGE_TOKENS,
    )
    text = text_sizes(
        tokenizer,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    config = hf.Gemma3Config(
        vision_config=siglip(PATCH_SIZE // 2),  # two by two patches are averaged into one token
        text_config=hf.Gemma3TextConfig(**text),
        mm_tokens_per_image=N_IMAGE_TOKENS,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return build(hf.Gemma3ForConditionalGeneration, config, attn, seed), processor


def tiling_config(
    config_class: type[hf.PreTrainedConfig], vision_class: type[hf.PreTrainedConfig], processor: hf.ProcessorMixin
) -> hf.PreTrainedConfig:
    """Return the configuration of Idefics3 or of SmolVLM, which took its model over."""
    return config_class(
        vision_config=vision_class(**TILE_VISION),
        text_config=hf.LlamaConfig(**text_sizes(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        scale_factor=2,
    )


def idefics3(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(
        pad="<|reserved_special_token_0|>",
        eos="<end_of_utterance>",
        bos="<|begin_of_text|>",
        others=("<fake_token_around_image>", "<image>", "<global-img>", *TILE_ROW_COLUMN),
        wrap="<|begin_of_text|> $A",
    )
    image_processor = hf.Idefics3ImageProcessorPil(**TILE_IMAGES)
    processor = hf.Idefics3Processor(
        image_processor, tokenizer, image_seq_len=N_TILE_TOKENS, chat_template=IDEFICS_TEMPLATE
    )
    config = tiling_config(hf.Idefics3Config, hf.Idefics3VisionConfig, processor)
    return build(hf.Idefics3ForConditionalGeneration, config, attn, seed), processor


def smolvlm(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(
        pad="<|im_end|>",
        eos="<end_of_utterance>",
        bos="<|im_start|>",
        unknown="<|endoftext|>",
        others=TILE_ROW_COLUMN,
        named={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "video_token": "<video>",
        },
    )
    image_processor = hf.SmolVLMImageProcessorPil(**TILE_IMAGES)
    processor = hf.SmolVLMProcessor(
        image_processor, tokenizer, NoVideoProcessor(), image_seq_len=N_TILE_TOKENS, chat_template=IDEFICS_TEMPLATE
    )
    config = tiling_config(hf.SmolVLMConfig, hf.SmolVLMVisionConfig, processor)
    return build(hf.SmolVLMForConditionalGeneration, config, attn, seed), processor


def internvl(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(
        pad="<|endoftext|>",
        eos="<|im_end|>",
        others=("<|im_start|>",),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    image_processor = hf.GotOcr2ImageProcessorPil(size=square(TILE_SIZE), crop_to_patches=True, max_patches=4)
    processor = hf.InternVLProcessor(
        image_processor, tokenizer, NoVideoProcessor(), image_seq_length=N_TILE_TOKENS, chat_template=INTERNVL_TEMPLATE
    )
    vision = hf.InternVLVisionConfig(**TILE_VISION, attention_bias=True, layer_scale_init_value=0.5)
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=hf.Qwen2Config(**text_sizes(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=N_TILE_TOKENS,
        tie_word_embeddings=False,
    )
    return build(hf.InternVLForConditionalGeneration, config, attn, seed), processor


def mistral3(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(
        pad="<pad>",
        eos="</s>",
        bos="<s>",
        others=("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        wrap="<s> $A",
    )
    patch_size = PATCH_SIZE // 2
    processor = pixtral_processor_class()(
        hf.PixtralImageProcessorPil(size={"longest_edge": 2 * IMAGE_SIZE}, patch_size=patch_size),
        tokenizer,
        patch_size=patch_size,
        spatial_merge_size=2,
        chat_template=MISTRAL_TEMPLATE,
    )
    # Rows and columns share the rotary pairs of a head, so the head size must be a multiple of 4.
    vision = {**VISION, "hidden_size": 32, "image_size": 2 * IMAGE_SIZE, "patch_size": patch_size}
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**vision),
        text_config=hf.MistralConfig(**text_sizes(tokenizer, sliding_window=None, head_dim=8)),
        image_token_index=processor.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return build(hf.Mistral3ForConditionalGeneration, config, attn, seed), processor


def question_former(vocab_size: int) -> dict[str, Any]:
    """Return the keyword arguments of a Q-Former, BERT with queries and cross-attention in every other layer."""
    return {**VISION, "vocab_size": vocab_size, "max_position_embeddings": 64, "cross_attention_frequency": 2}


def blip_vision(config_class: type[hf.PreTrainedConfig]) -> hf.PreTrainedConfig:
    return config_class(**VISION, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)


def blip_image_processor() -> hf.BlipImageProcessorPil:
    return hf.BlipImageProcessorPil(size=square(IMAGE_SIZE))


def instructblip(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(pad="<pad>", eos="</s>", bos="<s>", others=("<image>",), wrap="<s> $A")
    question_tokenizer = words_tokenizer(
        pad="[PAD]", eos="[SEP]", bos="[CLS]", unknown="[UNK]", wrap="[CLS] $A [SEP]", padding_side="right"
    )
    processor = hf.InstructBlipProcessor(
        blip_image_processor(), tokenizer, question_tokenizer, num_query_tokens=N_IMAGE_TOKENS
    )
    config = hf.InstructBlipConfig(
        vision_config=blip_vision(hf.InstructBlipVisionConfig),
        qformer_config=hf.InstructBlipQFormerConfig(**question_former(len(question_tokenizer))),
        text_config=hf.LlamaConfig(**text_sizes(tokenizer)),
        num_query_tokens=N_IMAGE_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return build(hf.InstructBlipForConditionalGeneration, config, attn, seed), processor


def blip2(attn: str, seed: int) -> Family:
    tokenizer = words_tokenizer(pad="<pad>", eos="</s>", bos="</s>", others=("<image>",), wrap="</s> $A")
    processor = hf.Blip2Processor(blip_image_processor(), tokenizer, num_query_tokens=N_IMAGE_TOKENS)
    text = text_sizes(tokenizer, ffn_dim=48, word_embed_proj_dim=32)
    for absent in ("intermediate_size", "num_key_value_heads"):
        del text[absent]
    config = hf.Blip2Config(
        vision_config=blip_vision(hf.Blip2VisionConfig),
        qformer_config=hf.Blip2QFormerConfig(**question_former(len(tokenizer))),
        text_config=hf.OPTConfig(**text),
        num_query_tokens=N_IMAGE_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return build(hf.Blip2ForConditionalGeneration, config, attn, seed), processor


FAMILIES = {
    family.__name__: family
    for family in (paligemma, gemma3, idefics3, smolvlm, internvl, mistral3, instructblip, blip2)
}
