"""The verdict of a check, remembered for the same weights, processor, versions, data type and attention back end.

Only a verdict that all holds is remembered, and only for models from folders and of known revisions: of others no
one can tell whether they are the same the next time.
"""

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.architectures.weight_files import files_hash, remember, remembered
from vlm_mech.checks.finding import Finding, refuse_unless_all_hold

PACKAGES = ("torch", "transformers", "nnsight", "tokenizers", "peft", "bitsandbytes", "accelerate", "vlm_mech")
"""Those whose versions a verdict depends on."""
ROOMS = ("architectures", "checks", "inputs", "interventions", "models")
"""Rooms of this package whose code it depends on."""
NOT_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Files beside the weights that decide what a model does: configurations, templates, tokenizers, its own code."""


def checked(
    model: TracedModel,
    find: Callable[[Any], Iterable[Finding]],
    *,
    again: bool = False,
    also: Callable[[], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """What provenance says of the check of a model: how many findings hold, and whether that is remembered.

    Args:
        find: makes the findings.
        again: ask again, whatever is remembered.
        also: finds what else is told and remembered, as JSON has it, once all holds.

    Raises:
        WorkError: something does not hold; the message names it.
    """
    key = _key(model, find.__name__)
    told = None if again or key is None else remembered("checks", key)
    if told is not None and isinstance(told.get("n_findings"), int) and told["n_findings"] > 0:
        return told | {"remembered": True}
    found = {"n_findings": len(refuse_unless_all_hold(model.name, find(model)))} | dict(also())
    if key is not None:
        remember("checks", key, found)
    return found | {"remembered": False}


def _key(model: TracedModel, question: str) -> str | None:
    identity = model.identity()
    folder, known = model.folder, identity["revision"] is not None and "weights" not in identity
    if folder is None and not known:
        return None
    about = {name: value for name, value in identity.items() if name != "name"}
    beside = [] if folder is None else [files_hash(folder, pattern) for pattern in NOT_WEIGHTS]
    back_end = getattr(model.config, "_attn_implementation", None)
    devices = sorted({str(each.device) for each in model.model.parameters()})
    made = [platform.machine(), *_versions()]
    return json.dumps([question, about, type(model.processor).__name__, beside, back_end, devices, made, _code()])


def _versions() -> list[str | None]:
    found: list[str | None] = []
    for package in PACKAGES:
        try:
            found.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            found.append(None)
    return found


@functools.cache
def _code() -> str:
    package, found = Path(__file__).parent.parent, hashlib.sha256()
    for room in ROOMS:
        for path in sorted((package / room).glob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
