"""Weights and inputs of a model, wherever accelerate keeps them."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

WHOLE, N_SAMPLED = 2**18, 2**9
"""Numbers of a tensor up to which `weights_sample` takes all, and how many it takes of a larger one."""


def kept_in_place(model: Any) -> Any:
    """The model with a device map, because a pipeline (nnsight makes one) moves a model that has none to the first
    accelerator. A pipeline takes the map's first device for its own, so parts on the disk come last."""
    devices = getattr(model, "hf_device_map", None) or {"": str(model.device)}
    model.hf_device_map = dict(sorted(devices.items(), key=lambda item: item[1] == "disk"))
    return model


def device_of(module: Any) -> torch.device:
    """Where a part of a model computes: with its weights, or where accelerate brings these when they are offloaded.

    A model without weights takes its inputs on the CPU, from where they are sent to the machine that has the weights.
    """
    weight = next(module.parameters(), None)
    if weight is not None and not weight.is_meta:
        return weight.device
    hooks = [getattr(each, "_hf_hook", None) for each in module.modules()]
    hooks = [each for hook in hooks for each in getattr(hook, "hooks", (hook,))]
    devices = [getattr(each, "execution_device", None) for each in hooks]
    found = torch.device(next((device for device in devices if device is not None), "cpu"))
    # A hook may say "cuda", which is the same device as the "cuda:0" of weights.
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


@contextlib.contextmanager
def untrained(model: Any) -> Iterator[None]:
    """Within the block no parameter takes part in gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def weight_of(model: Any, path: str) -> torch.Tensor:
    """A weight by its path, fetched from where accelerate keeps it when it is offloaded."""
    weight = model.get_parameter(path)
    if not weight.is_meta:
        return weight.detach()
    module, _, name = path.rpartition(".")
    hook = model.get_submodule(module)._hf_hook
    hooks = getattr(hook, "hooks", (hook,))
    held = next(each for each in hooks if getattr(each, "weights_map", None) is not None)
    return held.weights_map[name].to(held.execution_device)


def has_adapter(model: Any) -> bool:
    """Whether a layer of the model is wrapped by one of peft's, which holds it as its `base_layer`."""
    return any("base_layer" in each._modules for each in model.modules())


NOT_OF_CONFIG = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_commit_hash")
"""Fields of a configuration that do not change what a model computes, or are distinguished from it."""


def config_hash(config: Any) -> str:
    """A hash of what a configuration says of the computation, wherever it was saved."""
    told = json.dumps(_without(config.to_dict(), NOT_OF_CONFIG), sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _without(given: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(given, dict):
        return given
    return {str(name): _without(value, names) for name, value in given.items() if name not in names}


def weights_hash(model: Any) -> str:
    """A hash of all weights, read one at a time; where some are not in memory, a text that says how many."""
    weights = sorted(_tensors(model))
    away = sum(tensor.is_meta for _, tensor in weights)
    if away:
        return f"not hashed: {away} of {len(weights)} tensors are not in memory"
    found = hashlib.sha256()
    for name, tensor in weights:
        found.update(name.encode())
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def weights_sample(model: Any) -> str:
    """A hash of some of the weights, which tells in no time whether they were changed: tensors of up to `WHOLE` numbers
    whole, of larger ones `N_SAMPLED` numbers spread over them.

    Tuning, merged adapters, exchanged layers and emptied heads change so many that some are among these; a change of a
    few numbers of a large matrix may pass unnoticed.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(_tensors(model)):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta:
            continue
        flat = tensor.detach().flatten()
        if len(flat) > WHOLE:
            flat = flat[torch.linspace(0, len(flat) - 1, N_SAMPLED, dtype=torch.float64).long().to(flat.device)]
        found.update(flat.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor))
