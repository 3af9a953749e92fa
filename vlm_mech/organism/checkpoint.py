"""Training state on disk, without pickle: weights and optimiser as safetensors, the rest as JSON."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_state(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes the state after `step` steps; a kill in between leaves the state before."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight/{name}": tensor.contiguous().clone() for name, tensor in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    save_file(tensors, folder / "state.safetensors.new", metadata={"step": str(step)})
    (folder / "state.safetensors.new").replace(folder / "state.safetensors")


def load_state(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores what `save_state` wrote; the number of steps done, 0 when there is nothing."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    weights = {name.removeprefix("weight/"): value for name, value in tensors.items() if name.startswith("weight/")}
    module.load_state_dict(weights)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return int(opened.metadata()["step"])


def log(folder: Path, row: dict[str, object]) -> None:
    """Appends one JSON line to `log.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a") as lines:
        lines.write(json.dumps(row) + "\n")
