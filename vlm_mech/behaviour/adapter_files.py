"""Files of what was tuned: LoRA adapters as peft reads them, and tensors, all as safetensors."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


def save_adapter(vlm: "VLM", adapter: Any, folder: Path) -> None:
    """Writes the adapter as peft reads it: `adapter_model.safetensors` and `adapter_config.json`."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    stored(dict(sorted(weights.items())), folder / "adapter_model.safetensors", format="pt")
    config = adapter.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": vlm.name, "inference_mode": True}
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")


def stored(tensors: dict[str, Tensor], path: Path, **notes: str) -> None:
    """All or nothing: a kill leaves the file as it was. One note at most: the order of several is not fixed."""
    fresh = path.with_name(path.name + ".new")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, fresh, notes)
    os.replace(fresh, path)
