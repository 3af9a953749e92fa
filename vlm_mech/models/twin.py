"""A model's random twin: the same architecture, its weights shuffled, in which there is nothing to be found."""

import copy
from typing import TYPE_CHECKING

import torch

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


def twin_of(vlm: "VLM", seed: int) -> "VLM":
    """A copy of the model with the numbers of each weight tensor in a random order.

    Each tensor keeps its distribution, so that states and logits keep their scale, which a fresh initialisation with
    small weights would not. After the full re-initialisation of arXiv 2512.18792.

    Args:
        seed: draws the orders.

    Raises:
        UsageError: quantised weights, weights that lie on several devices, or no room for a second model.
    """
    weights = list(vlm.model.parameters())
    devices = {weight.device for weight in weights}
    if len(devices) > 1 or any(weight.is_meta for weight in weights):
        raise UsageError("a model that is spread over several devices has no random twin")
    if getattr(vlm.config, "quantization_config", None) is not None:
        raise UsageError("a quantised model has no random twin")
    device, needed = devices.pop(), sum(weight.numel() * weight.element_size() for weight in weights)
    if needed > (free := _free(device)):
        sizes = f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} free"
        raise UsageError(f"there is no room for a random twin: {sizes}")
    twin = copy.deepcopy(vlm)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.model.parameters():
            order = torch.randperm(weight.numel(), generator=drawn).to(device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return twin


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
