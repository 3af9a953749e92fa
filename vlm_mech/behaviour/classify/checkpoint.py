"""What tuning on class names left, as safetensors: the projector, and the adapter of the decoder as peft reads it."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from vlm_mech.behaviour.adapter_files import save_adapter, stored
from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

PROJECTOR, ADAPTER = "projector.safetensors", "adapter_config.json"


def projector_of(vlm: "VLM") -> dict[str, nn.Parameter]:
    """The parameters of the projector, and of the Q-Former and its queries where the family has one, by name."""
    places = (vlm.family.projector, *vlm.family.resampler)
    found = {
        name: parameter
        for name, parameter in vlm.model.named_parameters()
        if any(name == place or name.startswith(f"{place}.") for place in places)
    }
    return found


def keep(vlm: "VLM", adapted: Any | None, projector: dict[str, nn.Parameter], folder: Path) -> None:
    """Writes the projector, and the adapter if there is one, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if adapted is not None:
        save_adapter(vlm, adapted, folder)
    # This file comes last: where it is, the rest is there.
    stored({name: parameter.detach() for name, parameter in sorted(projector.items())}, folder / PROJECTOR, format="pt")


def put_in(vlm: "VLM", folder: Path) -> None:
    """Gives a model the weights that tuning left in a folder; an adapter is merged into the decoder's.

    Raises:
        UsageError: no such files, another model's, or peft is not installed.
    """
    path = folder / PROJECTOR
    if not path.is_file():
        raise UsageError(f"{str(folder)!r} holds no {PROJECTOR}; the folder tuned/ of a run with --tune is needed")
    saved, own = load_file(path), projector_of(vlm)
    odd = {name for name in {*saved, *own} if name not in saved or name not in own}
    odd |= {name for name in {*saved} - odd if saved[name].shape != own[name].shape}
    if odd:
        raise UsageError(f"{str(path)!r} does not fit {vlm.name}: {min(odd)} is in one alone, or of another shape")
    if (folder / ADAPTER).is_file():
        _merge(vlm, folder)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _merge(vlm: "VLM", folder: Path) -> None:
    if find_spec("peft") is None:
        raise UsageError(f"{str(folder)!r} holds an adapter; `pip install peft` (or vlm_mech[tune]) reads it")
    from peft import PeftModel

    frozen = {name: parameter.requires_grad for name, parameter in vlm.model.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            PeftModel.from_pretrained(vlm.model, str(folder), use_safetensors=True).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, UserWarning, json.JSONDecodeError) as error:
        told = str(error).splitlines()[0]
        raise UsageError(f"the adapter in {str(folder)!r} does not fit {vlm.name}: {told:.120}") from error
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(frozen[name])
