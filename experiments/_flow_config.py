"""The options of `python -m experiments.visual_flow`."""

import dataclasses
from typing import Literal

from vlm_mech.runs.configuration import ClaimConfig

CONFLICT = "scenes/colour-conflict"


@dataclasses.dataclass(frozen=True)
class Config(ClaimConfig):
    """Options of the map."""

    data: str = CONFLICT
    """Pairs; where one says which picture is in conflict, it is asked about, and its rival is the usual answer."""
    probe: bool = True
    """Fit probes (--no-probe leaves them out); never in the models and shuffles that --gates all compares with."""
    probe_data: str | None = None
    """Pairs to fit probes on; scenes/colour for scenes/colour-conflict, otherwise other folds of the data itself."""
    n_probe: int | None = None
    """Number of these; 96 scenes by default, all of a folder."""
    every: int = 1
    """Probe every so-many-th block."""
    window: int | None = None
    """Layers cut around each; by default 9, in models of fewer than 27 layers 1."""
    pages: int = 8
    """Examples to look at patch by patch."""
    context_bank: str | None = None
    """Read patches with the contextual lens too: auto (text about generated scenes), the folder of a bank
    (build_bank), or text to build one from (a file with a text a line, a folder of such, llava:FILE)."""
    tuned_lens: str | None = None
    """Read patches with a tuned lens too: auto (trained on pictures of generated scenes), or the folder of one."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    batch: int = 32
    """Examples a forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """The fast one computes only what can change; trace runs a whole pass for every cell."""
