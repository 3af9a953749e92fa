"""An experiment without a model, for the tests of runs, figures and reports: fast, and every number known."""

import fcntl
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image

from vlm_mech.errors import UsageError, WorkError
from vlm_mech.results import figures
from vlm_mech.results.result import Metric, Result
from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace, in_batches

SPANS = {"image": [1, 1, 0.8, 0.1, 0, 0], "question": [0, 0, 0.1, 0.2, 0, 0], "last": [0, 0, 0, 0.3, 0.9, 1]}
METRICS = (
    Metric("recovered", "fraction", "how far the answer moves"),
    Metric("logit_diff", "logits", "difference of two logits", signed=True),
)


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the fake experiment."""

    n: int | None = 12
    """Number of examples."""
    kind: Literal["plain", "curly"] = "plain"
    """A choice."""
    spans: tuple[str, ...] = ()
    """Some names."""
    wrong: Literal["no", "use", "work", "bug"] = "no"
    """Ends with this kind of error."""
    keep: bool = False
    """A switch."""
    hold: bool = False
    """Locks each batch while it is made."""
    slow: float = 0.0
    """Seconds a batch takes."""
    die: Path | None = None
    """A file whose maker is killed by the system in the midst of a batch; whoever finds it goes on."""


def swapped(examples: range) -> pd.DataFrame:
    """Rows of a layer swap; each example's numbers depend on its own number alone."""
    rows = []
    for example in examples:
        rng = np.random.default_rng(example)
        for direction in ("noising", "denoising"):
            for span, curve in SPANS.items():
                for layer, mean in enumerate(curve):
                    value = mean + rng.normal(0, 0.05)
                    rows.append(
                        {
                            "example": f"e{example}", "direction": direction, "span": span, "layer": layer,
                            "recovered": value, "recovered_baseline": 0.0,
                            "logit_diff": 10 - 20 * value, "logit_diff_baseline": 10.0,
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def swap_result(n: int = 30, **changes) -> Result:
    """A swap of `n` examples whose image span stops mattering at layer 3 and whose last token takes over at layer 4."""
    options = {
        "name": "swap",
        "table": swapped(range(n)),
        "axes": ("direction", "span", "layer"),
        "metrics": METRICS,
        "findings": ("the image is read before layer 3",),
    }
    return Result(**(options | changes))


def run(config: Config, work: Workspace) -> Outcome:
    """Four examples a batch, each batch kept."""
    if config.wrong == "use":
        raise UsageError("kind 'curly' is no good;\n  'plain' would be")
    for key, rows in work.batches(in_batches(config.n, 4), "batches"):
        if config.slow:
            time.sleep(config.slow)
        if config.die is not None and not config.die.exists():
            config.die.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config.hold:
            # As `extraction` does: who makes the same states waits. A process that ended holds nothing.
            held = (work.partial / f"held-{key}.new").open("w")
            fcntl.flock(held, fcntl.LOCK_EX)
            time.sleep(config.slow)
        work.keep(key, swapped(range(rows.start, rows.stop)), {"from": rows.start})
        if config.wrong == "work":
            raise WorkError("the second batch failed")
        if config.wrong == "bug":
            raise KeyError("banana")
    table, notes = work.collect()
    provenance = {"question": "does <b>it</b> work?", "receipts": {"batches": len(notes)}}
    result = swap_result(table=table, provenance=provenance)
    drawn = {
        "heat": figures.heatmap(result, x="layer", y="span", metric="recovered", facet="direction"),
        "curves": figures.lines(result, x="layer", colour="span", metric="logit_diff", facet="direction"),
    }
    return Outcome(result, drawn, (("what is the <script>?", Image.new("RGB", (8, 8))),))


if __name__ == "__main__":
    main(Config, run, name="fake")
