"""The options of `python -m experiments.visual_flow`."""

import dataclasses
from typing import Literal

from vlm_mech.runs.configuration import ExploredConfig

CONFLICT = "scenes/colour-conflict"


@dataclasses.dataclass(frozen=True)
class Config(ExploredConfig):
    """Options of the map."""

    data: str = CONFLICT
    """Pairs; if they mark the image in conflict, that image is used, and the rival is the usual answer."""
    probe: bool = True
    """Fit probes (--no-probe skips them); never in the models and shuffles that --gates all adds."""
    probe_data: str | None = None
    """Pairs for fitting probes; scenes/colour for scenes/colour-conflict, otherwise other folds of the data."""
    n_probe: int | None = None
    """Number of probe pairs; by default 96 scenes, or all of a folder."""
    every: int = 1
    """Probe every Nth block."""
    window: int | None = None
    """Knockout window: layers cut around each layer; by default 9, or 1 in models of fewer than 27 layers."""
    pages: int = 8
    """Number of examples to show patch by patch."""
    context_bank: str | None = None
    """Also read patches with the contextual lens: auto (text about generated scenes), the folder of a bank
    (build_bank), or text to build one from (a file with one text per line, a folder of such files, llava:FILE)."""
    tuned_lens: str | None = None
    """Also read patches with a tuned lens: auto (trained on images of generated scenes), or its folder."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    batch: int = 32
    """Examples per forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """fast computes only what an edit can change; trace runs a full forward pass per cell."""
