"""Models and processors by embedded name, folder, GGUF file or Hugging Face id, wherever their weights are to live."""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_mech.architectures.families import CONTRASTIVE_TYPES, family_of
from vlm_mech.architectures.weights import kept_in_place
from vlm_mech.checks.finding import refuse_unless_all_hold
from vlm_mech.checks.structure import find_structure
from vlm_mech.errors import UsageError
from vlm_mech.models.embedded import NAMES, weights_folder
from vlm_mech.models.language_models import SMOLLM2, folder_of_gguf, smollm2_folder
from vlm_mech.models.taught_eye import ORGANISM_SMOL, organism_smol_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
QUANTIZATIONS = ("8bit", "4bit")
DeviceMap = str | Mapping[str, str | int | torch.device]


def load(
    name_or_folder: str | Path,
    *,
    device: str,
    device_map: DeviceMap | None,
    dtype: str,
    attn: str,
    quantization: Any,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """Model and processor; see `VLM.load` for the arguments and errors."""
    source = locate(name_or_folder)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    device_map = _checked_map(device, device_map)
    quantizer = _quantizer(quantization, DTYPES[dtype])
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if device == "meta":
        model = _skeleton(source, DTYPES[dtype], attn, options)
    else:
        how = {"dtype": DTYPES[dtype], "attn_implementation": attn, "quantization_config": quantizer}
        model = _load_model(source, device, device_map, how, options)
    return kept_in_place(model), load_processor(source, options)


def _checked_map(device: str, device_map: DeviceMap | None) -> DeviceMap | None:
    """The device map to load with; None puts the whole model on `device`."""
    if device_map is not None and device != "cpu":
        raise UsageError(f"device_map says where the parts of the model go; leave device={device!r} out")
    if device == "auto":
        device_map = "auto"
    if device_map is None:
        check_device(device)
        return None
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise UsageError(f"device_map {device_map!r} is not known; {', '.join(DEVICE_MAPS)} or a dict of parts is")
    _need("accelerate", "a device_map")
    if not isinstance(device_map, str):
        devices = {str(device) for device in device_map.values()} - {"disk"}
        if not devices:
            raise UsageError("the device_map puts every part on the disk; one part at least needs a device to run on")
        for each in devices:
            check_device(int(each) if each.isdigit() else each)
    return device_map


def _quantizer(quantization: Any, dtype: torch.dtype) -> Any:
    """The Hugging Face quantisation config that is meant, or None."""
    if quantization is None:
        return None
    from transformers import BitsAndBytesConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if quantization in QUANTIZATIONS or isinstance(quantization, BitsAndBytesConfig):
        _need("bitsandbytes", "8-bit and 4-bit quantization")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if not isinstance(quantization, QuantizationConfigMixin):
        raise UsageError(
            f"quantization {quantization!r} is not known; {', '.join(QUANTIZATIONS)} or a Hugging Face quantization "
            "config is"
        )
    return quantization


def _need(package: str, purpose: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{purpose} needs {package}, which is not installed: pip install {package}")


def check_device(device: str | int) -> None:
    """Raise `UsageError` when no tensor can be made on a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not usable here: {str(error).splitlines()[0]}") from error


def locate(name_or_folder: str | Path) -> str:
    """A path for embedded names, folders, and what is made of GGUF files; a hub id otherwise."""
    if str(name_or_folder) in NAMES:
        return str(weights_folder(str(name_or_folder)))
    if str(name_or_folder) == SMOLLM2:
        return str(smollm2_folder())
    if str(name_or_folder) == ORGANISM_SMOL:
        return str(organism_smol_folder())
    path = Path(name_or_folder)
    if path.suffix == ".gguf":
        return str(folder_of_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"folder {str(path)!r} holds no model: config.json is missing")
        return str(path)
    if path.is_absolute() or str(name_or_folder).startswith(".") or str(name_or_folder).count("/") != 1:
        raise UsageError(
            f"model {str(name_or_folder)!r} is neither an embedded model ({', '.join(NAMES)}), "
            f"nor {SMOLLM2} or {ORGANISM_SMOL}, nor a folder or GGUF file, nor a Hugging Face id (owner/name)"
        )
    return str(name_or_folder)


def folder_of(name_or_folder: str | Path) -> Path | None:
    """The folder that a model is loaded from, if it is not fetched from the hub."""
    source = Path(locate(name_or_folder))
    return source if source.is_dir() else None


def _load_model(
    source: str, device: str, device_map: DeviceMap | None, how: dict[str, Any], options: dict[str, Any]
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    if Path(source).is_dir():
        # Weights on disk load at once; a progress bar would only clutter the run.
        logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, **options)
        family_of(config)
        if device_map is None and (how["quantization_config"] or getattr(config, "quantization_config", None)):
            # Quantised weights cannot be moved later: they are made where they stay.
            device_map = {"": device}
        model = AutoModelForImageTextToText.from_pretrained(
            source, device_map=device_map, use_safetensors=True, **how, **options
        )
    except UsageError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UsageError(f"model {source!r} cannot be loaded: {first_line(error)}") from error
    finally:
        logging.enable_progress_bar()
    if next(model.parameters()).is_meta:
        first = next(name for name, _ in model.named_parameters())
        raise UsageError(
            f"the device_map offloads {first}, the model's first weight; nnsight sends the inputs to where that is, "
            "so give the first part a device"
        )
    return model.to(device) if device_map is None else model


def _skeleton(source: str, dtype: torch.dtype, attn: str, options: dict[str, Any]) -> Any:
    """The model without weights, its structure checked; running it here is refused."""
    config = load_config(source, **options)
    config._attn_implementation = attn
    model = skeleton(config).to(dtype)
    refuse_unless_all_hold(source, find_structure(model))

    def refuse(*arguments: Any, **named: Any) -> None:
        raise UsageError(f"{source} was loaded without weights (device='meta'); only traces with remote=True can run")

    model.register_forward_pre_hook(refuse)
    model.generate = refuse
    return model


def load_processor(source: str, options: dict[str, Any]) -> Any:
    """The processor of a model.

    Raises:
        UsageError: none can be loaded.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"no processor can be loaded from {source!r}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside a `PeftModel`, its adapters in their places as they are; any other model itself.

    Raises:
        UsageError: the adapter puts tokens before the prompt, which only the wrapper around the model can do.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        kind = model.active_peft_config.peft_type.value
        raise UsageError(f"a {kind} adapter adds tokens that no processor made; adapters of weights (LoRA) can be used")
    return model.base_model.model


def check_processor(model: Any, processor: Any) -> None:
    """Raise `UsageError` when a processor lacks a part, or does not belong to the model."""
    for part in ("tokenizer", "image_processor", "apply_chat_template"):
        if getattr(processor, part, None) is None:
            raise UsageError(
                f"the processor ({type(processor).__name__}) has no {part}; AutoProcessor gives one that has"
            )
    if not processor.tokenizer.is_fast:
        raise UsageError(f"spans need a fast tokenizer; {type(processor.tokenizer).__name__} gives no offsets")
    token = getattr(processor.tokenizer, "image_token", None) or str(processor.image_token)
    number = processor.tokenizer.convert_tokens_to_ids(token)
    if number != model.config.image_token_id:
        raise UsageError(
            f"the processor does not belong to the model: its image token {token!r} has id {number}, "
            f"the model expects {model.config.image_token_id}"
        )


def load_config(name_or_folder: str, **hub: Any) -> Any:
    """The configuration of a model, without its weights.

    Raises:
        UsageError: there is none under that name.
    """
    from transformers import AutoConfig

    source = locate(name_or_folder)
    try:
        return AutoConfig.from_pretrained(source, **hub)
    except (OSError, ValueError) as error:
        raise UsageError(f"no configuration of {name_or_folder!r}: {str(error).strip().splitlines()[0]}") from error


def is_contrastive(config: Any) -> bool:
    """Whether a configuration is of a model with two towers and no decoder, which `DualEncoder` loads."""
    return config.model_type in CONTRASTIVE_TYPES


def skeleton(config: Any) -> "PreTrainedModel":
    """The model of a configuration on the meta device: its modules without weights.

    Raises:
        UsageError: the configuration is of no image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText

    family_of(config)
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except ValueError as error:
        raise UsageError(f"no model can be made of this configuration: {str(error).splitlines()[0]}") from error
