"""From which layer on can the image tokens be removed, frozen, or replaced by those of another layer?

From each decoder layer on, image tokens are cut off, frozen, or given the states of another layer of the same run.
Measures what happens to the answer (information horizon).
"""

from dataclasses import dataclass
from typing import Any, Literal

from vlm_mech.runs.configuration import SpokenConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace, in_batches

N_SCENES = 192


@dataclass(frozen=True)
class Config(SpokenConfig):
    """Options of the horizon."""

    n: int | None = None
    """Number of examples; 192 scenes by default, all of a folder. Claims that nothing is lost need 180 usable ones."""
    exchange: Literal["few", "all", "none"] = "few"
    """Source layers of replaced image states: the first, middle and last, all, or none."""
    kl: float = 0.1
    """Tolerance: mean KL divergence of the next token from the unedited run, in nats."""
    lost: float = 0.05
    """Tolerance: share of answers lost."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    all: bool = False
    """Keep examples that the model answers wrongly."""
    batch: int = 32
    """Examples per forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """fast computes only what an edit can change; trace runs a full forward pass per cell."""


def _loaded(config: Config) -> tuple[Any, ...]:
    """The model, the pairs, what is done, and what may be lost."""
    from vlm_mech.data.examples import load_examples
    from vlm_mech.data.fitting import fitting
    from vlm_mech.methods.horizon.data import scan_of
    from vlm_mech.methods.horizon.horizons import Tolerance

    tolerance = Tolerance(config.kl, config.lost)
    n = N_SCENES if config.n is None and config.data.startswith("scenes/") else config.n
    pairs = load_examples(config.data, n=n, split=config.split, **config.drawn)
    vlm = config.load()
    pairs = fitting(vlm, pairs, **config.fits, alone=True)
    return vlm, pairs, scan_of(vlm, pairs, config.exchange), tolerance


def plan(config: Config) -> Any:
    """What the run will need."""
    from vlm_mech.methods.horizon.study import plan_horizon
    from vlm_mech.sweeps.generated_answers import part_of

    *what, _ = _loaded(config)
    how = {"measure": config.measure, "batch": config.batch, "seed": config.seed, "memory": config.memory}
    return plan_horizon(*what, part=part_of(config), **how)


def run(config: Config, work: Workspace) -> Outcome:
    """The result, three curves for each arm, and the horizons."""
    from vlm_mech.methods.horizon.figures import drawn
    from vlm_mech.methods.horizon.horizon import told
    from vlm_mech.methods.horizon.study import horizon_rows
    from vlm_mech.results.generated_answers import examples
    from vlm_mech.sweeps.generated_answers import part_of

    vlm, pairs, scan, tolerance = _loaded(config)
    how = {"only_correct": not config.all, "measure": config.measure, "part": part_of(config), "seed": config.seed}
    how |= {"engine": config.engine, "memory": config.memory}
    for key, rows in work.batches(in_batches(len(pairs), config.batch), "edits"):
        work.keep(key, *horizon_rows(vlm, pairs[rows], scan, **how))
    table, receipts = work.collect()
    result, tables = told(config, vlm, pairs, table, receipts, scan, tolerance, how)
    said = examples(result.table, result.axes, {pair.id: pair.question for pair in pairs})
    return Outcome(result, drawn(result), tables=tables, said=said)


if __name__ == "__main__":
    main(Config, run, name="horizon", plan=plan, fewest=2)
