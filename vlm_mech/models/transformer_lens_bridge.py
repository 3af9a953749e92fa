"""The same weights as a TransformerLens bridge, for what TransformerLens does best: attribution to heads, OV and QK.

A bridge rewrites the modules that it is given and forces eager attention. It therefore gets modules of its own, whose
parameters and buffers are the memory of the user's model: nothing is copied, and the user's model stays as it was.
"""

import copy
import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformers import PreTrainedModel, ProcessorMixin


def to_transformer_lens(vlm: TracedModel) -> "TransformerBridge":
    """A TransformerLens bridge around the weights of `vlm`, with its tokenizer and processor.

    The bridge runs the decoder and the vision tower with eager attention, whatever `vlm` uses. Call it with a copy of
    an encoded batch's inputs, `inputs = dict(encoded.inputs)`: `bridge(inputs.pop("input_ids"), **inputs)`. Weights are
    shared: what changes a weight in place changes it in both.

    Raises:
        UsageError: TransformerLens is not installed, has no adapter for the architecture, or the model is quantised or
            spread over devices.
    """
    return bridge_around(vlm.model, vlm.processor, vlm.name)


def bridge_around(model: "PreTrainedModel", processor: "ProcessorMixin", name: str) -> "TransformerBridge":
    """A TransformerLens bridge around a Hugging Face model that stays as it was (see `to_transformer_lens`)."""
    make_adapter = _adapter_class(type(model).__name__)
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import (
        build_bridge_config_from_hf,
        detect_tokenizer_bos_eos,
    )

    second = _second_tree(model)
    adapter = make_adapter(build_bridge_config_from_hf(second.config, type(model).__name__, name, model.dtype))
    adapter.cfg.device = str(model.device)
    adapter.prepare_model(second)
    # TransformerLens' own loaders read the tokenizer anew by its name, with another rule for the first token.
    tokenizer = copy.deepcopy(processor.tokenizer)
    adapter.cfg.tokenizer_prepends_bos, adapter.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    bridge = TransformerBridge(second, adapter, tokenizer)
    bridge.processor = processor
    return bridge


def _adapter_class(architecture: str) -> type["ArchitectureAdapter"]:
    """What TransformerLens knows of the architecture, without the libraries that only its own loading needs.

    Raises:
        UsageError: TransformerLens is absent, or does not know the architecture.
    """
    level = logging.getLogger("transformers").level
    try:
        from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
        from transformer_lens.utilities.architectures import MULTIMODAL_ARCHITECTURES
    except ImportError as error:
        raise UsageError(f"a bridge needs transformer_lens 4.3 or later: {str(error).splitlines()[0]}") from error
    finally:
        # Importing TransformerLens silences the warnings of transformers for the whole process.
        logging.getLogger("transformers").setLevel(level)
    if architecture not in SUPPORTED_ARCHITECTURES or architecture not in MULTIMODAL_ARCHITECTURES:
        known = sorted(set(SUPPORTED_ARCHITECTURES) & set(MULTIMODAL_ARCHITECTURES))
        raise UsageError(f"TransformerLens has no bridge for {architecture}; it has one for {', '.join(known)}")
    known_class = SUPPORTED_ARCHITECTURES[architecture]
    # Some ask for torchvision, which the processors that TransformerLens would load need and the forward pass does not.
    return type(known_class.__name__, (known_class,), {"required_libraries": []})


def _second_tree(model: "PreTrainedModel") -> "PreTrainedModel":
    """A second tree of modules over the parameters and buffers of the model, with eager attention."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        second = type(model)._from_config(config, attn_implementation="eager", dtype=model.dtype)
    _refuse_other_modules(model, second)
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        copied = second.get_submodule(path)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in shared:
                # A parameter of its own, on the same memory: replacing its data does not reach the user's model.
                shared[parameter] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            copied._parameters[name] = None if parameter is None else shared[parameter]
        copied._buffers.update(module._buffers)
    second.generation_config = copy.deepcopy(model.generation_config)
    return second.eval()


def _refuse_other_modules(model: "PreTrainedModel", second: "PreTrainedModel") -> None:
    """Raises `UsageError` when the configuration alone does not give the modules of the model."""
    expected = {path: type(module) for path, module in second.named_modules(remove_duplicate=False)}
    found = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
    if expected != found:
        path = min(path for path in expected | found if expected.get(path) != found.get(path))
        raise UsageError(
            f"a bridge needs the modules that the configuration describes, but {path!r} is {found.get(path)} "
            f"instead of {expected.get(path)}; quantised or altered models cannot be bridged"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UsageError(f"a bridge needs the model on one device, but it is on {', '.join(map(str, devices))}")
