"""Untrained models, tokenizers and processors of the embedded lineage, all of them real Hugging Face classes."""

from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlm_mech.data.scene_questions import NUMBERS
from vlm_mech.data.scenes import BEETLE, CLASSES, COLOURS, PARTS, PRIORS, SHAPES, SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATCH = 16
WIDTH = 128
N_PATCHES = (SIZE // PATCH) ** 2
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TEMPLATE_WORDS = (
    "user assistant system : ? . , what which where how many is are there any the a an of in on to with and or name "
    "colour kind shape part object objects picture left right above below front behind half top bottom large small "
    "yes no live does it this you see answer one word"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} "
    "{% elif message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary(*, closing: bool = False) -> dict[str, int]:
    """Every word of the questions, answers and captions as one token; special tokens first.

    In the contrastive model (`closing`) `</s>` and `<unk>` change places: where a CLIP model's `eos_token_id` is 2,
    transformers pools the text at the token with the highest id instead of at the end.
    """
    words = set(TEMPLATE_WORDS.split()) | set(COLOURS) | set(SHAPES) | set(PRIORS) | set(NUMBERS) | {BEETLE}
    words |= set(PARTS) | {part for parts in PARTS.values() for part in parts} | set(CLASSES) | set(CLASSES.values())
    specials = ("<pad>", "<s>", "<unk>", "</s>", "<image>") if closing else SPECIALS
    return {word: number for number, word in enumerate((*specials, *sorted(words)))}


def tokenizer(*, closing: bool = False) -> "PreTrainedTokenizerBase":
    """The embedded models' tokenizer; `closing` appends `</s>`, as CLIP needs, and pads right."""
    return word_tokenizer(vocabulary(closing=closing), closing=closing)


def word_tokenizer(words: dict[str, int], *, closing: bool = False) -> "PreTrainedTokenizerBase":
    """A word-level tokenizer, lower-casing, punctuation apart, over words that include the special ones.

    Args:
        closing: append `</s>` and pad right; otherwise left.
    """
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[:.,?]"), "isolated")]
    )
    template = "<s> $A </s>" if closing else "<s> $A"
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(each, words[each]) for each in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="right" if closing else "left",
        model_max_length=128,
    )


def image_processor(size: int = SIZE) -> CLIPImageProcessorPil:
    """Shortest edge to `size` pixels, centre crop, values from -1 to 1."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def clip_processor() -> CLIPProcessor:
    """Processor of the contrastive model."""
    return CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer(closing=True))


def llava_processor() -> LlavaProcessor:
    """Processor of the vision-language models, with a chat template in the manner of LLaVA-1.5."""
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )


def _grid_positions() -> Float[Tensor, "patch width"]:
    """2-D sine-cosine position embeddings whose first entries are the coordinates themselves."""
    side, quarter = SIZE // PATCH, WIDTH // 4
    frequencies = 0.5 ** torch.linspace(0, 4, quarter)
    angles = torch.linspace(-1, 1, side)[:, None] * frequencies * torch.pi
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    down = repeat(waves, "row width -> row column width", column=side)
    across = repeat(waves, "column width -> row column width", row=side)
    return rearrange(torch.cat([down, across], -1), "row column width -> (row column) width")


def new_clip(*, seed: int = 0) -> CLIPModel:
    """An untrained contrastive model: image tower of 4 blocks, text tower of 3, width 128."""
    torch.manual_seed(seed)
    words = vocabulary(closing=True)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=40,
        projection_dim=WIDTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=words["</s>"],
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=_vision_config().to_dict(), projection_dim=WIDTH)
    model = CLIPModel(config)
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight[1:] = 0.5 * _grid_positions()
    return model


def new_llava(clip: CLIPModel, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained projector and decoder (6 Llama blocks, width 128) on the image tower of a contrastive model.

    Weights are drawn with a standard deviation of one over the square root of their inputs: with the customary 0.02
    models of this width learn nothing in thousands of steps.
    """
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=_vision_config().to_dict(),
        text_config=text.to_dict(),
        image_token_index=vocabulary()["<image>"],
        image_seq_length=N_PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    trained = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    with torch.no_grad():
        for module in trained:
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        model.model.language_model.embed_tokens.weight.normal_(0, 1)
    tower: CLIPVisionModel = model.model.vision_tower
    tower.load_state_dict(_tower_weights(clip))
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = 1
    return model.eval()


def _tower_weights(clip: CLIPModel) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in clip.vision_model.state_dict().items()}
