"""Find out where a vision-language model reads what it sees, and where it stops listening.

Names are imported when first used, so that `import vlm_mech` is light.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_mech.architectures.site import Site as Site
    from vlm_mech.architectures.site import sites as sites
    from vlm_mech.behaviour.decoding.processors import M3ID as M3ID
    from vlm_mech.behaviour.decoding.processors import VCD as VCD
    from vlm_mech.behaviour.decoding.processors import Drawn as Drawn
    from vlm_mech.data.examples import as_pairs as as_pairs
    from vlm_mech.data.examples import load_examples as load_examples
    from vlm_mech.data.image_classes import Classes as Classes
    from vlm_mech.data.image_classes import load_classes as load_classes
    from vlm_mech.data.items import Item as Item
    from vlm_mech.data.items import Items as Items
    from vlm_mech.data.items import load_items as load_items
    from vlm_mech.data.pairs import Pair as Pair
    from vlm_mech.data.pairs import Pairs as Pairs
    from vlm_mech.data.pairs import load_pairs as load_pairs
    from vlm_mech.errors import TooLargeError as TooLargeError
    from vlm_mech.errors import UsageError as UsageError
    from vlm_mech.errors import WorkError as WorkError
    from vlm_mech.explorer.exploration import Exploration as Exploration
    from vlm_mech.explorer.exploration import Explorations as Explorations
    from vlm_mech.explorer.explore import explore as explore
    from vlm_mech.extraction.extract import extract as extract
    from vlm_mech.extraction.saved_states import Extracted as Extracted
    from vlm_mech.inputs.contrastive_batch import DualEncoded as DualEncoded
    from vlm_mech.inputs.image import Box as Box
    from vlm_mech.inputs.prompt import Encoded as Encoded
    from vlm_mech.inputs.prompt import Prompt as Prompt
    from vlm_mech.inputs.span import Each as Each
    from vlm_mech.inputs.span import OneImage as OneImage
    from vlm_mech.inputs.span import Patches as Patches
    from vlm_mech.inputs.span import Positions as Positions
    from vlm_mech.inputs.span import Span as Span
    from vlm_mech.inputs.span import Tokens as Tokens
    from vlm_mech.inputs.span import Words as Words
    from vlm_mech.inputs.wording import Wording as Wording
    from vlm_mech.interventions.attended import Attention as Attention
    from vlm_mech.interventions.attended import attention as attention
    from vlm_mech.interventions.attention_edits import Remove as Remove
    from vlm_mech.interventions.attention_edits import Reweight as Reweight
    from vlm_mech.interventions.attention_weights import attention_from as attention_from
    from vlm_mech.interventions.directions import random_directions as random_directions
    from vlm_mech.interventions.head_inputs import HeadInput as HeadInput
    from vlm_mech.interventions.receipt import KnockoutReceipt as KnockoutReceipt
    from vlm_mech.interventions.receipt import Receipt as Receipt
    from vlm_mech.interventions.receipt import ReceiptError as ReceiptError
    from vlm_mech.interventions.receipt import ReweightReceipt as ReweightReceipt
    from vlm_mech.interventions.receipt import WriteReceipt as WriteReceipt
    from vlm_mech.interventions.receipt import receipts_table as receipts_table
    from vlm_mech.interventions.specification import Ablate as Ablate
    from vlm_mech.interventions.specification import Activations as Activations
    from vlm_mech.interventions.specification import Intervention as Intervention
    from vlm_mech.interventions.specification import Knockout as Knockout
    from vlm_mech.interventions.specification import Replace as Replace
    from vlm_mech.interventions.specification import Steer as Steer
    from vlm_mech.interventions.specification import window as window
    from vlm_mech.interventions.state_edits import Frozen as Frozen
    from vlm_mech.interventions.state_edits import Project as Project
    from vlm_mech.interventions.state_edits import frozen as frozen
    from vlm_mech.interventions.trace import Generation as Generation
    from vlm_mech.interventions.trace import Run as Run
    from vlm_mech.interventions.trace import generate as generate
    from vlm_mech.interventions.trace import read as read
    from vlm_mech.interventions.trace import run as run
    from vlm_mech.methods.arbitration import figures as arbitration_figures  # noqa: F401
    from vlm_mech.methods.arbitration.find import Arbitration as Arbitration
    from vlm_mech.methods.arbitration.find import find_arbiter as find_arbiter
    from vlm_mech.methods.attribution import figures as attribution_figures  # noqa: F401
    from vlm_mech.methods.attribution.study import Attribution as Attribution
    from vlm_mech.methods.attribution.study import attribute as attribute
    from vlm_mech.methods.das import figures as das_figures  # noqa: F401
    from vlm_mech.methods.das.das import SubspaceTraining as SubspaceTraining
    from vlm_mech.methods.das.das import train_das as train_das
    from vlm_mech.methods.das.training import DasRecipe as DasRecipe
    from vlm_mech.methods.head_roles import figures as head_role_figures  # noqa: F401
    from vlm_mech.methods.head_roles.head_roles import HeadRoles as HeadRoles
    from vlm_mech.methods.head_roles.head_roles import head_roles as head_roles
    from vlm_mech.methods.horizon import figures as horizon_figures  # noqa: F401
    from vlm_mech.methods.horizon.horizon import horizon as horizon
    from vlm_mech.methods.layer_swap.layer_swap import layer_swap as layer_swap
    from vlm_mech.methods.lens import figures as lens_figures  # noqa: F401
    from vlm_mech.methods.lens.build_bank import build_bank as build_bank
    from vlm_mech.methods.lens.context_bank import ContextBank as ContextBank
    from vlm_mech.methods.lens.context_bank import Neighbour as Neighbour
    from vlm_mech.methods.lens.context_lens import ContextWords as ContextWords
    from vlm_mech.methods.lens.context_lens import context_words as context_words
    from vlm_mech.methods.lens.identifiability import MaskedPart as MaskedPart
    from vlm_mech.methods.lens.identifiability import identifiability as identifiability
    from vlm_mech.methods.lens.identifiability import patches_of_mask as patches_of_mask
    from vlm_mech.methods.lens.logit_lens import Lens as Lens
    from vlm_mech.methods.lens.logit_lens import lens as lens
    from vlm_mech.methods.lens.named_patches import named_patches as named_patches
    from vlm_mech.methods.lens.patch_words import patch_words as patch_words
    from vlm_mech.methods.lens.study import lens_lead as lens_lead
    from vlm_mech.methods.lens.tuned_lens import LensTraining as LensTraining
    from vlm_mech.methods.lens.tuned_lens import TunedLens as TunedLens
    from vlm_mech.methods.lens.tuned_lens import compare_lenses as compare_lenses
    from vlm_mech.methods.lens.tuned_lens import train_tuned_lens as train_tuned_lens
    from vlm_mech.methods.path_patching.data import Sender as Sender
    from vlm_mech.methods.path_patching.study import PathRun as PathRun
    from vlm_mech.methods.path_patching.study import path_patch as path_patch
    from vlm_mech.methods.path_patching.study import path_patching as path_patching
    from vlm_mech.methods.probing import figures as probe_figures  # noqa: F401
    from vlm_mech.methods.probing.data import changed_patches as changed_patches
    from vlm_mech.methods.probing.descent import ProbeRecipe as ProbeRecipe
    from vlm_mech.methods.probing.probe import probe as probe
    from vlm_mech.methods.sinks import figures as sink_figures  # noqa: F401
    from vlm_mech.methods.sinks.data import Sinks as Sinks
    from vlm_mech.methods.sinks.data import matched_tokens as matched_tokens
    from vlm_mech.methods.sinks.study import find_sinks as find_sinks
    from vlm_mech.methods.steering.direction import Direction as Direction
    from vlm_mech.methods.steering.find import dose_response as dose_response
    from vlm_mech.methods.steering.find import find_direction as find_direction
    from vlm_mech.models.dual_encoder import DualEncoder as DualEncoder
    from vlm_mech.models.embedded import weights_folder as weights_folder
    from vlm_mech.models.vlm import VLM as VLM
    from vlm_mech.results import figures as figures
    from vlm_mech.results import metrics as metrics
    from vlm_mech.results.metrics import AnswerLogits as AnswerLogits
    from vlm_mech.results.overlays import laid_over as laid_over
    from vlm_mech.results.result import Metric as Metric
    from vlm_mech.results.result import Result as Result
    from vlm_mech.results.saved_figures import redraw as redraw
    from vlm_mech.results.together import together as together
    from vlm_mech.sweeps import measures as measures
    from vlm_mech.sweeps.measures import Measure as Measure
    from vlm_mech.sweeps.measures import logit_diff as logit_diff
    from vlm_mech.sweeps.measures import logprob_diff as logprob_diff
    from vlm_mech.sweeps.measures import prob as prob
    from vlm_mech.sweeps.schedule import SweepPlan as SweepPlan
    from vlm_mech.sweeps.sweep import Point as Point
    from vlm_mech.sweeps.sweep import grid as grid
    from vlm_mech.sweeps.sweep import plan_sweep as plan_sweep
    from vlm_mech.sweeps.sweep import sweep as sweep

__version__ = "0.2.0"

_HOMES = {
    "architectures.site": ("Site", "sites"),
    "behaviour.decoding.processors": ("M3ID", "VCD", "Drawn"),
    "data.examples": ("as_pairs", "load_examples"),
    "data.image_classes": ("Classes", "load_classes"),
    "data.items": ("Item", "Items", "load_items"),
    "data.pairs": ("Pair", "Pairs", "load_pairs"),
    "errors": ("TooLargeError", "UsageError", "WorkError"),
    "explorer.exploration": ("Exploration", "Explorations"),
    "explorer.explore": ("explore",),
    "extraction.extract": ("extract",),
    "extraction.saved_states": ("Extracted",),
    "inputs.contrastive_batch": ("DualEncoded",),
    "inputs.image": ("Box",),
    "inputs.prompt": ("Encoded", "Prompt"),
    "inputs.span": ("Each", "OneImage", "Patches", "Positions", "Span", "Tokens", "Words"),
    "inputs.wording": ("Wording",),
    "interventions.attended": ("Attention", "attention"),
    "interventions.attention_edits": ("Remove", "Reweight"),
    "interventions.attention_weights": ("attention_from",),
    "interventions.directions": ("random_directions",),
    "interventions.head_inputs": ("HeadInput",),
    "interventions.receipt": (
        "KnockoutReceipt",
        "Receipt",
        "ReceiptError",
        "ReweightReceipt",
        "WriteReceipt",
        "receipts_table",
    ),
    "interventions.specification": ("Ablate", "Activations", "Intervention", "Knockout", "Replace", "Steer", "window"),
    "interventions.state_edits": ("Frozen", "Project", "frozen"),
    "interventions.trace": ("Generation", "Run", "generate", "read", "run"),
    "methods.arbitration.find": ("Arbitration", "find_arbiter"),
    "methods.attribution.study": ("Attribution", "attribute"),
    "methods.das.das": ("SubspaceTraining", "train_das"),
    "methods.das.training": ("DasRecipe",),
    "methods.head_roles.head_roles": ("HeadRoles", "head_roles"),
    "methods.horizon.horizon": ("horizon",),
    "methods.layer_swap.layer_swap": ("layer_swap",),
    "methods.lens.build_bank": ("build_bank",),
    "methods.lens.context_bank": ("ContextBank", "Neighbour"),
    "methods.lens.context_lens": ("ContextWords", "context_words"),
    "methods.lens.named_patches": ("named_patches",),
    "methods.lens.patch_words": ("patch_words",),
    "methods.lens.identifiability": ("MaskedPart", "identifiability", "patches_of_mask"),
    "methods.lens.logit_lens": ("Lens", "lens"),
    "methods.lens.study": ("lens_lead",),
    "methods.lens.tuned_lens": ("LensTraining", "TunedLens", "compare_lenses", "train_tuned_lens"),
    "methods.path_patching.data": ("Sender",),
    "methods.path_patching.study": ("PathRun", "path_patch", "path_patching"),
    "methods.probing.data": ("changed_patches",),
    "methods.probing.descent": ("ProbeRecipe",),
    "methods.probing.probe": ("probe",),
    "methods.sinks.data": ("Sinks", "matched_tokens"),
    "methods.sinks.study": ("find_sinks",),
    "methods.steering.direction": ("Direction",),
    "methods.steering.find": ("dose_response", "find_direction"),
    "models.dual_encoder": ("DualEncoder",),
    "models.embedded": ("weights_folder",),
    "models.vlm": ("VLM",),
    "results.metrics": ("AnswerLogits",),
    "results.overlays": ("laid_over",),
    "results.result": ("Metric", "Result"),
    "results.saved_figures": ("redraw",),
    "results.together": ("together",),
    "sweeps.schedule": ("SweepPlan",),
    "sweeps.measures": ("Measure", "logit_diff", "logprob_diff", "prob"),
    "sweeps.sweep": ("Point", "grid", "plan_sweep", "sweep"),
}
_MODULES = {
    "arbitration_figures": "methods.arbitration.figures",
    "attribution_figures": "methods.attribution.figures",
    "das_figures": "methods.das.figures",
    "figures": "results.figures",
    "head_role_figures": "methods.head_roles.figures",
    "horizon_figures": "methods.horizon.figures",
    "lens_figures": "methods.lens.figures",
    "measures": "sweeps.measures",
    "metrics": "results.metrics",
    "probe_figures": "methods.probing.figures",
    "sink_figures": "methods.sinks.figures",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_MODULES, *_HOME_OF])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vlm_mech.{_MODULES[name]}")
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"vlm_mech.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'vlm_mech' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Offered(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets `import vlm_mech.measures`, and the other modules here, do what `from vlm_mech import measures` does."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, offered = name.rpartition(".")
        return importlib.util.spec_from_loader(name, self) if package == __name__ and offered in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        # Python takes what stands there afterwards.
        sys.modules[module.__name__] = __getattr__(module.__name__.rpartition(".")[2])


sys.meta_path.append(_Offered())
