"""The LoRA adapter of a tuning, and all that is needed to go on with one that was killed; safetensors alone."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from vlm_mech.behaviour.adapter_files import stored
from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

History = list[dict[str, Any]]
STATE = "state.safetensors"
"""Adapter, optimiser and history of the last checkpoint."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


def with_adapter(vlm: "VLM", *, rank: int, seed: int) -> Any:
    """The peft model of a LoRA adapter in every linear map of the decoder's blocks; all else is frozen.

    It is put into the model, begins as no change at all, and its draw depends on the seed alone. It is in float32
    whatever the model's data type.

    Raises:
        UsageError: peft is not installed, or the rank is above the width of a map.
    """
    if find_spec("peft") is None:
        raise UsageError("tuning needs peft, which is not installed: pip install peft (or vlm_mech[tune])")
    from peft import LoraConfig, get_peft_model

    path = vlm.family.llm.path
    blocks = vlm.model.get_submodule(path)
    maps = {f"{path}.{name}": each for name, each in blocks.named_modules() if isinstance(each, nn.Linear)}
    widest = min(min(each.weight.shape) for each in maps.values())
    if rank > widest:
        raise UsageError(f"rank is {rank}; the narrowest map of the decoder of {vlm.name} has {widest}")
    vlm.model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(maps))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            made = get_peft_model(vlm.model, config, autocast_adapter_dtype=True)
    vlm.model.eval()
    return made


def trained_of(adapter: Any) -> dict[str, nn.Parameter]:
    """The parameters of an adapter that is being trained, by name."""
    return {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}


def put_back(adapter: Any, path: Path) -> None:
    """Gives an adapter the weights of a checkpoint."""
    saved = load_file(path)
    with torch.no_grad():
        for name, parameter in trained_of(adapter).items():
            parameter.copy_(saved[name])


# Checkpoints


def checkpoint_at(folder: Path, step: int) -> Path:
    """The file of the adapter after that many steps."""
    return folder / f"adapter_{step:06d}.safetensors"


def keep_state(named: dict[str, nn.Parameter], adam: torch.optim.Optimizer, history: History, folder: Path) -> None:
    """Writes the adapter as it is after the last step of the history, and what is needed to go on from there."""
    weights = {name: parameter.detach() for name, parameter in named.items()}
    state = {f"weight/{name}": weight for name, weight in weights.items()}
    for name, parameter in named.items():
        state |= {f"{key}/{name}": adam.state[parameter][key] for key in MOMENTS}
    stored(weights, checkpoint_at(folder, history[-1]["step"]), format="pt")
    # The state comes last: what it tells of is there.
    stored(state, folder / STATE, history=json.dumps(history))


def taken_up(named: dict[str, nn.Parameter], adam: torch.optim.Optimizer, path: Path) -> History:
    """The history of a tuning begun before, whose weights and optimiser are put back; nothing if there is none."""
    if not path.is_file():
        return []
    with safe_open(path, "pt") as saved, torch.no_grad():
        history = json.loads(saved.metadata()["history"])
        for name, parameter in named.items():
            parameter.copy_(saved.get_tensor(f"weight/{name}"))
            state = {key: saved.get_tensor(f"{key}/{name}") for key in MOMENTS}
            # Adam counts its steps on the CPU wherever the weights are.
            adam.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
    return history
