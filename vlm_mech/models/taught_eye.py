"""`organism-smol`: the real language model `smollm2`, taught to see. What was trained is a small file that ships.

The file holds a projector and LoRA matrices (arXiv 2106.09685), which are added to the decoder's weights when the model
is asked for the first time: `W + scale * B @ A`. What comes out is kept in the cache folder, as any LLaVA is.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from vlm_mech.architectures.weight_files import cache_folder, file_hash
from vlm_mech.errors import UsageError
from vlm_mech.models.embedded import weights_file
from vlm_mech.models.language_models import kept, smollm2_folder

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

ORGANISM_SMOL = "organism-smol"
ADAPTER, SCALE = "adapter.safetensors", "scale"
A, B = ".lora_A", ".lora_B"
"""Endings of the two factors of a matrix: rank x inputs, and outputs x rank."""
VERSION = 1
"""Of what is made of the file: counted up when that changes."""


def organism_smol_folder(adapter: Path | None = None) -> Path:
    """The folder of `organism-smol`, made when it is asked for the first time.

    Args:
        adapter: what was trained; by default the file that ships.

    Raises:
        UsageError: as for `smollm2_folder`, or the adapter does not fit the decoder.
    """
    adapter, decoder = adapter or weights_file(ORGANISM_SMOL, ADAPTER), smollm2_folder()
    if not adapter.is_file():
        raise UsageError(f"{str(adapter)!r} is not a file; an adapter that train_smol wrote is needed")
    key = "-".join([*decoder.name.rsplit("-", 2)[1:], file_hash(adapter)[:12]])
    folder = cache_folder() / "models" / f"{ORGANISM_SMOL}-{key}-{VERSION}"

    def taught() -> "tuple[PreTrainedModel, ProcessorMixin]":
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(decoder, dtype=torch.float32)
        add_adapter(model, adapter)
        return model, AutoProcessor.from_pretrained(decoder)

    return kept(folder, taught)


def add_adapter(model: "nn.Module", adapter: Path) -> None:
    """Adds what was trained to a model's weights, in place.

    Raises:
        UsageError: the file has no scale, or names weights that the model has not, or of another shape.
    """
    with safe_open(adapter, "pt") as opened:
        told = opened.metadata() or {}
        given = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    if SCALE not in told:
        raise UsageError(f"{str(adapter)!r} says no scale; an adapter that train_smol wrote is needed")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in _changes(given, float(told[SCALE])).items():
            if name not in weights or weights[name].shape != change.shape:
                raise UsageError(f"{str(adapter)!r} is of another model: {name} does not fit")
            # Factors are added; what was trained whole takes the place of what was there.
            weights[name].copy_(weights[name] + change if name not in given else change)


def _changes(given: "dict[str, Tensor]", scale: float) -> "dict[str, Tensor]":
    """Every weight's product of factors, or the weight itself where it was trained whole."""
    found = {name: tensor for name, tensor in given.items() if not name.endswith((A, B))}
    for name, low in given.items():
        if name.endswith(A):
            of = name.removesuffix(A)
            if f"{of}{B}" not in given:
                raise UsageError(f"the adapter has {name} without its {B.lstrip('.')}")
            found[f"{of}.weight"] = scale * given[f"{of}{B}"] @ low
    return found
