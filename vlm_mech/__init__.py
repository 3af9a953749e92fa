"""Find out where a vision-language model reads what it sees, and where it stops listening.

Names are imported when first used, so that `import vlm_mech` is light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_mech import figures as figures
    from vlm_mech import metrics as metrics
    from vlm_mech.contrastive import DualEncoder as DualEncoder
    from vlm_mech.data.pairs import Pairs as Pairs
    from vlm_mech.data.pairs import load_pairs as load_pairs
    from vlm_mech.errors import UsageError as UsageError
    from vlm_mech.errors import WorkError as WorkError
    from vlm_mech.extracted import Extracted as Extracted
    from vlm_mech.intervene import Ablate as Ablate
    from vlm_mech.intervene import Knockout as Knockout
    from vlm_mech.intervene import Replace as Replace
    from vlm_mech.intervene import Steer as Steer
    from vlm_mech.intervene import window as window
    from vlm_mech.model import VLM as VLM
    from vlm_mech.prompt import Prompt as Prompt
    from vlm_mech.receipt import ReceiptError as ReceiptError
    from vlm_mech.result import Result as Result
    from vlm_mech.site import Site as Site
    from vlm_mech.site import sites as sites
    from vlm_mech.span import Each as Each
    from vlm_mech.span import OneImage as OneImage
    from vlm_mech.span import Patches as Patches
    from vlm_mech.span import Positions as Positions
    from vlm_mech.span import Tokens as Tokens
    from vlm_mech.span import Words as Words
    from vlm_mech.trace import generate as generate
    from vlm_mech.trace import read as read
    from vlm_mech.trace import run as run

__version__ = "0.1.0"

_HOMES = {
    "contrastive": ("DualEncoder",),
    "data.pairs": ("Pairs", "load_pairs"),
    "errors": ("UsageError", "WorkError"),
    "extracted": ("Extracted",),
    "intervene": ("Ablate", "Knockout", "Replace", "Steer", "window"),
    "model": ("VLM",),
    "prompt": ("Prompt",),
    "receipt": ("ReceiptError",),
    "result": ("Result",),
    "site": ("Site", "sites"),
    "span": ("Each", "OneImage", "Patches", "Positions", "Tokens", "Words"),
    "trace": ("generate", "read", "run"),
}
_MODULES = ("figures", "metrics")

__all__ = sorted([*_MODULES, *(name for names in _HOMES.values() for name in names)])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vlm_mech.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"vlm_mech.{home}"), name)
    raise AttributeError(f"module 'vlm_mech' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
