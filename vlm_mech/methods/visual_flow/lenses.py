"""Lenses beside the logit lens on the pages of single examples: a tuned and a contextual one, and what they name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.methods.lens.build_bank import build_bank
from vlm_mech.methods.lens.context_bank import RECORD, ContextBank
from vlm_mech.methods.lens.context_lens import context_words
from vlm_mech.methods.lens.leads import INPUT, depth_sites
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.lens.named_patches import CONTEXTUAL, FLOORS, PATCHES, TUNED, named_patches, tuned_on_scenes
from vlm_mech.methods.lens.patch_words import Reading
from vlm_mech.methods.lens.tuned_lens import TunedLens
from vlm_mech.results.claiming import halves
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from vlm_mech.models.vlm import VLM

AUTO = "auto"
N_NAMED = 48
"""Scenes on which it is counted what lenses name."""


@dataclass(frozen=True, eq=False)
class Lenses:
    """What is read beside the logit lens."""

    bank: ContextBank | None
    tuned: TunedLens | None

    def beside(self, vlm: "VLM", prompts: Sequence[Prompt], sites: Sequence[Site]) -> dict[str, Reading]:
        """The best word of every image token at every site, by the name of the lens."""
        found: dict[str, Reading] = {}
        if self.tuned is not None:
            found[TUNED] = lens(vlm, prompts, sites, "image", top=1, tuned=self.tuned)
        if self.bank is not None:
            layers = [INPUT if site.name == "llm.resid_pre" else site.layer for site in sites]
            found[CONTEXTUAL] = context_words(vlm, prompts, self.bank, layers=layers, top=1)
        return found


def lenses_asked(vlm: "VLM", bank: str | None, tuned: str | None, *, folder: Path, seed: int = 0) -> Lenses | None:
    """The lenses that a run asks for; None where it asks for none.

    Args:
        bank: `auto` for a bank of text about generated scenes, the folder of a finished one, or text to build one from
            (a file with a text a line, a folder of such, `llava:FILE`).
        tuned: `auto` for one trained on the pictures of generated scenes, or the folder of a saved one.
        folder: where a bank is built.
        seed: draws contexts and scenes.

    Raises:
        UsageError: a bank or a tuned lens of another model, or nothing that is one or could be built.
    """
    if bank is None and tuned is None:
        return None
    made = translators = None
    if bank is not None:
        given = Path(bank)
        finished = bank != AUTO and (given / RECORD).is_file()
        made = ContextBank.open(given) if finished else build_bank(vlm, bank, out=folder / "context_bank", seed=seed)
        made.check(vlm)
    if tuned is not None:
        translators = tuned_on_scenes(vlm, seed=seed) if tuned == AUTO else TunedLens.load(tuned)
        translators.check(vlm, (), depth_sites(vlm), normed=True)
    return Lenses(made, translators)


def named_by(vlm: "VLM", lenses: Lenses, *, seed: int = 0) -> "tuple[dict[str, Any], dict[str, pd.DataFrame]]":
    """How often each lens names what patches of generated scenes show: as JSON values, and as a table of a run.

    Half of the scenes choose the layer at which a lens is furthest above words of other patches; `told` is of the rest.

    Args:
        seed: draws the scenes, and parts them.
    """
    import pandas as pd

    found = named_patches(vlm, bank=lenses.bank, tuned=lenses.tuned, n=N_NAMED, seed=seed)
    table = pd.concat([_summary(found, metric.name) for metric in found.metrics], ignore_index=True)
    chooses, rest = (_summary(part, "named") for part in halves(found, seed=seed) or (found, found))
    told = []
    for name in dict.fromkeys(chooses["lens"]):
        own = chooses[(chooses["lens"] == name) & (chooses["floor"] == PATCHES)]
        layer = int(own.loc[own["effect"].idxmax(), "layer"])
        rows = rest[(rest["lens"] == name) & (rest["layer"] == layer)].set_index("floor")
        told.append({"lens": name, "layer": layer, **{floor: rows.loc[floor].to_dict() for floor in FLOORS}})
    return {"rows": table.to_dict("records"), "told": told}, {"named_patches": table}


def _summary(found: Result, metric: str) -> "pd.DataFrame":
    columns = [*found.axes, "n", "mean", "ci_low", "ci_high", "baseline", "effect", "effect_low", "effect_high"]
    return found.summary(metric)[columns].assign(metric=metric)
