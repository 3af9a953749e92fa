"""Where does an image lose to a language prior, and what would each published protocol conclude?

One page about images in conflict with a prior: probes, logit lens, activation patching by span, heads, steering and the
information horizon, all on the same pairs. A table says what each protocol would conclude, and why two disagree (after
arXiv 2604.09364 and 2606.28273).
"""

from dataclasses import dataclass
from typing import Any, Literal

from vlm_mech.errors import UsageError
from vlm_mech.runs.configuration import ClaimConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace


@dataclass(frozen=True)
class Config(ClaimConfig):
    """Options of the page."""

    data: str = "scenes/colour-conflict"
    """Pairs that mark which image is in conflict; the other image shows what is usual."""
    parts: tuple[str, ...] = ()
    """Parts of the page: encoding crossover patching heads arbiter steering horizon, all by default, and context (the
    contextual lens)."""
    prior_question: str | None = None
    """Question about what is usual, with {question} for the pair's own; by default the data set's."""
    context_bank: str = "auto"
    """Bank for the contextual lens: text about generated scenes, the folder of one, or text to build one from."""
    n_random: int = 20
    """Number of random heads and directions, as controls."""
    gates: Literal["none", "quick", "all"] = "quick"
    """As in other commands; quick by default, since all repeats every part in models with shuffled weights."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    batch: int = 32
    """Pairs per forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """fast computes only what an edit can change; trace runs a full forward pass per cell."""


def _loaded(config: Config) -> tuple[Any, ...]:
    """The model, the pairs in conflict with their questions, whose states are put into the runs, and the parts."""
    from vlm_mech.data.fitting import fitting
    from vlm_mech.data.pairs import load_pairs
    from vlm_mech.methods.arbitration_page.data import cases_of, check_parts, conflicts_of, scan_of

    if config.n_random < 1:
        raise UsageError(f"n_random is {config.n_random}; it must be 1 or more")
    if config.measure != "logit_diff":
        raise UsageError(f"measure is {config.measure}; the page compares answers by logit_diff only")
    parts = check_parts(config.parts)
    pairs = load_pairs(config.data, n=config.n, split=config.split, **config.drawn)
    vlm = config.load()
    cases = cases_of(conflicts_of(fitting(vlm, pairs, **config.fits)), config.prior_question)
    return vlm, cases, scan_of(vlm, cases.pairs, seed=config.seed), parts


def plan(config: Config) -> Any:
    """What patching will need, which needs most."""
    from vlm_mech.methods.arbitration_page.patching import plan_patches

    vlm, cases, scan, _ = _loaded(config)
    return plan_patches(vlm, cases, scan, batch=config.batch, memory=config.memory)


def run(config: Config, work: Workspace) -> Outcome:
    """The result with a figure a part, the table of protocols, and example images."""
    from vlm_mech.data.pairs import pictures
    from vlm_mech.methods.arbitration_page import figures, page
    from vlm_mech.methods.arbitration_page.parts import How

    vlm, cases, scan, parts = _loaded(config)
    how = How(config, config.engine, config.memory, n_random=config.n_random, bank=config.context_bank)
    for key, step in work.batches(page.steps_of(len(cases), parts, batch=config.batch), "parts"):
        work.keep(key, *page.done(vlm, cases, scan, step, parts, how))
    table, notes = work.collect()
    result, tables = page.told(vlm, cases, scan, table, notes, how)
    first = {"protocols": "What each protocol would conclude of these pairs (protocols.csv)"}
    return Outcome(result, figures.drawn(result), pictures(cases.pairs), tables=tables, first=first)


if __name__ == "__main__":
    main(Config, run, name="arbitration", plan=plan, fewest=2)
