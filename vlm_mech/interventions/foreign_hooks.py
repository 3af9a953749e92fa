"""Forward hooks of somebody else's at the modules whose states are read and written: they may change states unseen."""

from typing import Any

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.interventions.timeline import witness_of

KNOWN = ("nnsight", "transformers", "accelerate", "vlm_mech", "torch")
"""Packages whose hooks leave the states as they are."""


def hooks_at(vlm: TracedModel, site: Site) -> str:
    """Names of the hooks that may change the states between a site and the module that receives them; empty if none."""
    ends = [vlm.module_of(site)]
    witness = witness_of(vlm, site)
    if witness is not None and witness.path:
        ends.append((witness.path, witness.is_input))
    found = []
    for path, is_input in dict.fromkeys(ends):
        module = vlm.model.get_submodule(path)
        hooks = module._forward_pre_hooks if is_input else module._forward_hooks
        kind = "forward pre-hook" if is_input else "forward hook"
        found += [f"the {kind} {_name(hook)} of {path}" for hook in hooks.values() if _is_foreign(hook)]
    return ", ".join(found)


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _is_foreign(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] not in KNOWN
