"""Models of real shape with random weights: layers, positions and image tokens of LLaVA-1.5, LLaVA-NeXT, Qwen2.5-VL.

Everything comes from the real configuration classes and processors, built in code. How long a pass takes does not
depend on what the weights are, so nothing needs to be downloaded.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
import torch
from PIL import Image

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.models.vlm import VLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

QUESTION = (
    "is the red star left of the blue circle ? and what colour is the shape on the right of the green triangle ? "
    "answer with one word"
)
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
PATCH = 14
MANY, POOL = 10**9, 2**22 + 12_345
"""Above how many weights they are not all drawn, and how many numbers are drawn then."""


@dataclass(frozen=True)
class Tower:
    """Sizes of the vision tower."""

    n_layers: int
    width: int
    n_heads: int
    intermediate: int


SMALL_TOWER = Tower(4, 64, 4, 128)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model and of its pictures, in pixels.

    `tile` is the side of the square that the tower of LLaVA takes. `vocabulary` is None for just the words needed.
    """

    family: Literal["llava", "llava_next", "qwen2_5_vl"]
    n_layers: int
    width: int
    n_heads: int
    n_groups: int
    intermediate: int
    tower: Tower
    tile: int
    picture: tuple[int, int]
    vocabulary: int | None = None


LLAVA15 = Geometry("llava", 32, 256, 4, 4, 688, SMALL_TOWER, 336, (336, 336))
NEXT = dataclasses.replace(LLAVA15, family="llava_next", width=128, n_heads=2, n_groups=2, intermediate=344,
                           picture=(672, 644))  # fmt: skip
QWEN = Geometry("qwen2_5_vl", 28, 256, 4, 2, 1352, SMALL_TOWER, 336, (924, 840))
GEOMETRIES = {"llava15": LLAVA15, "next": NEXT, "qwen": QWEN}
FULL = {
    "llava15": {"width": 4096, "n_heads": 32, "n_groups": 32, "intermediate": 11008, "vocabulary": 32064,
                "tower": Tower(24, 1024, 16, 4096)},
    "next": {"width": 4096, "n_heads": 32, "n_groups": 32, "intermediate": 11008, "vocabulary": 32064,
             "tower": Tower(24, 1024, 16, 4096)},
    "qwen": {"width": 3584, "n_heads": 28, "n_groups": 4, "intermediate": 18944, "vocabulary": 152064,
             "tower": Tower(32, 1280, 16, 3420)},
}  # fmt: skip


def geometry(name: str, *, width: int | None = None, full: bool = False) -> Geometry:
    """The preset of that name: at its own small width, at another one, or at the size of the published 7B model.

    Raises:
        UsageError: there is no such preset, or the width cannot be divided into heads of 64.
    """
    if name not in GEOMETRIES:
        raise UsageError(f"geometry {name!r} is not known; use one of {', '.join(GEOMETRIES)}")
    if full and width is not None:
        raise UsageError(f"--full has a width of its own; --width {width} cannot be given beside it")
    small = GEOMETRIES[name]
    if full:
        return dataclasses.replace(small, **FULL[name])
    if width is None:
        return small
    if width < 128 or width % 128:
        raise UsageError(f"width is {width}; a multiple of 128 is needed, for heads of 64 in groups of two")
    n_heads = width // 64
    n_groups = n_heads * small.n_groups // small.n_heads
    intermediate = small.intermediate * width // small.width
    return dataclasses.replace(small, width=width, n_heads=n_heads, n_groups=n_groups, intermediate=intermediate)


def build(shape: Geometry, *, attn: str = "sdpa", device: str = "cpu", dtype: str = "float32", seed: int = 0) -> VLM:
    """A model of that shape with random weights, and its processor.

    Of more than `MANY` weights, whose drawing takes minutes, the matrices repeat `POOL` drawn numbers.

    Raises:
        UsageError: the weights do not fit into the memory of the device, or there is no such device or data type.
    """
    from transformers.initialization import no_init_weights

    processor = _processor(shape)
    model_class, config = _config(shape, processor)
    if not hasattr(torch, dtype) or (device.startswith("cuda") and not torch.cuda.is_available()):
        raise UsageError(f"there is no device {device!r} or data type {dtype!r} here")
    with torch.device("meta"):
        n_weights = sum(each.numel() for each in model_class._from_config(config).parameters())
    if device != "meta":
        _check_memory(n_weights, dtype, device)
    many = n_weights > MANY
    torch.manual_seed(seed)
    with torch.device(device), no_init_weights() if many else contextlib.nullcontext():
        model = model_class._from_config(config, attn_implementation=attn, dtype=getattr(torch, dtype))
    _repeat(model) if many else _draw(model)
    return VLM(model, processor, name=f"{shape.family} of width {shape.width}", check=False)


def prompts(shape: Geometry, n: int, *, seed: int = 0) -> list[Prompt]:
    """The same question about `n` pictures of random blocks."""
    return [Prompt(QUESTION, noise(seed + number, *shape.picture)) for number in range(n)]


def noise(seed: int, width: int, height: int) -> Image.Image:
    """A picture of random 14-pixel blocks."""
    shape = (-(-height // PATCH), -(-width // PATCH), 3)
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def _draw(model: "PreTrainedModel") -> None:
    """Weights of variance 1 / inputs, so that the logits depend visibly on everything."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5)


def _repeat(model: "PreTrainedModel") -> None:
    """As `_draw`, from one pool of numbers whose length divides no width, so that no two rows of a matrix are equal."""
    first = next(model.parameters())
    pool = torch.randn(POOL, device=first.device).to(first.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), POOL):
                flat[start : start + POOL] = pool[: len(flat) - start]
            if "embed_tokens" not in name:
                flat *= parameter[0].numel() ** -0.5


def _check_memory(n_weights: int, dtype: str, device: str) -> None:
    """Before anything is made: the weights, and a tenth on top for states."""
    needed = 1.1 * n_weights * getattr(torch, dtype).itemsize
    cuda = device.startswith("cuda")
    free = torch.cuda.mem_get_info(torch.device(device))[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        smaller = "" if dtype != "float32" else "; --dtype bfloat16 needs half"
        raise UsageError(
            f"{n_weights / 1e9:.1f} billion weights in {dtype} need {needed / 2**30:.1f} GiB with their states, and "
            f"{free / 2**30:.1f} GiB are free on {device}{smaller}"
        )


def _tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({*QUESTION.split(), "user", "assistant", ":"})
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"image_token": "<image>", "video_token": "<|video_pad|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|vision_start|>", "<|vision_end|>"],
        model_specific_special_tokens=named,
        padding_side="left",
    )


def _pinpoints(tile: int) -> list[list[int]]:
    return [[rows * tile, columns * tile] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def _processor(shape: Geometry) -> "ProcessorMixin":
    import transformers as hf

    tokenizer = _tokenizer()
    if shape.family == "qwen2_5_vl":
        template = TEMPLATE.replace("IMAGE", "<|vision_start|><image><|vision_end|>")
        images = hf.Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2)
        return hf.Qwen2_5_VLProcessor(images, tokenizer, _no_videos(), chat_template=template)
    sizes = {"size": {"shortest_edge": shape.tile}, "crop_size": {"height": shape.tile, "width": shape.tile}}
    options = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATE.replace("IMAGE", "<image>"),
    }
    if shape.family == "llava":
        return hf.LlavaProcessor(hf.CLIPImageProcessorPil(**sizes), tokenizer, **options)
    images = hf.LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=_pinpoints(shape.tile))
    return hf.LlavaNextProcessor(images, tokenizer, **options)


def _no_videos() -> Any:
    """The Qwen processor demands a video processor, which needs torchvision; one that does nothing will do."""
    import transformers as hf
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.video_processing_utils import VideoProcessorMixin

    class NoVideoProcessor(VideoProcessorMixin):
        pass

    AutoVideoProcessor.register(hf.PreTrainedConfig, NoVideoProcessor, exist_ok=True)
    hf.VideoProcessorMixin = VideoProcessorMixin
    return NoVideoProcessor()


def _config(shape: Geometry, processor: "ProcessorMixin") -> tuple[Any, Any]:
    """The model class and the configuration."""
    import transformers as hf

    tokenizer, tower = processor.tokenizer, shape.tower
    text: dict[str, Any] = {
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_groups,
        "vocab_size": shape.vocabulary or len(tokenizer),
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    image = tokenizer.convert_tokens_to_ids("<image>")
    if shape.family == "qwen2_5_vl":
        pairs = shape.width // shape.n_heads // 2
        section = [pairs // 4, 3 * pairs // 8, pairs - pairs // 4 - 3 * pairs // 8]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
        vision = {
            "depth": tower.n_layers, "hidden_size": tower.width, "num_heads": tower.n_heads, "patch_size": PATCH,
            "intermediate_size": tower.intermediate, "out_hidden_size": shape.width, "window_size": 8 * PATCH,
            "fullatt_block_indexes": [*range(7, tower.n_layers, 8)] or [tower.n_layers - 1],
        }  # fmt: skip
        ids = {"image_token_id": image, "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>")}
        for end in ("start", "end"):
            ids[f"vision_{end}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>")
        return hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    vision = hf.CLIPVisionConfig(
        hidden_size=tower.width,
        intermediate_size=tower.intermediate,
        num_hidden_layers=tower.n_layers,
        num_attention_heads=tower.n_heads,
        image_size=shape.tile,
        patch_size=PATCH,
    )
    parts: dict[str, Any] = {"vision_config": vision, "text_config": hf.LlamaConfig(**text), "image_token_index": image}
    parts["image_seq_length"] = (shape.tile // PATCH) ** 2
    if shape.family == "llava":
        return hf.LlavaForConditionalGeneration, hf.LlavaConfig(**parts)
    points = _pinpoints(shape.tile)
    return hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig(**parts, image_grid_pinpoints=points)


def identity(vlm: VLM, model: str) -> dict[str, Any]:
    """What was timed: a shape with random weights, or a model by its own name."""
    if model not in GEOMETRIES:
        return dict(vlm.identity())
    return {"name": vlm.name, "weights": "random", "parameters": sum(each.numel() for each in vlm.model.parameters())}
