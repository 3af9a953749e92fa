"""Does the decoder compensate when patches cannot attend to each other in the vision encoder?

Knocks out self-attention of the patches of an object part in the vision encoder, in the decoder, or in both. Measures
whether the part is still named at its patches (logit lens) and whether questions about it are still answered (after
Takishita et al.).
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlm_mech.runs.configuration import SweepConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.methods.compensation.data import Examples
    from vlm_mech.methods.compensation.study import Cell

QUESTION = (
    "Does the decoder compensate when patches cannot attend to each other in the vision encoder? Patches of a part "
    "cannot attend outside the part (part), the object (obj) or themselves (self), or to the class token (cls): in the "
    "vision encoder (V), the decoder (L), or both. Is the part still named there (logit lens), the question answered? "
    "If a knockout in the vision encoder does less damage with a free decoder, the decoder compensates."
)


@dataclass(frozen=True)
class Config(SweepConfig):
    """Options of the compensation experiment."""

    data: str = "scenes/part"
    """scenes/part (32 by default), paco:FOLDER, pascal-part:FOLDER, or a folder of your own with masks."""
    cuts: tuple[str, ...] = ()
    """Knockouts, such as V-part L-part V+L-part; by default all that the model supports."""
    layers: tuple[str, ...] = ("all", "first", "middle", "last")
    """Layers to knock out together: all of a stack, or its first, middle or last third."""
    site: str | None = None
    """Site for reading parts, such as "llm.resid_post[3]"; by default the best on validation scenes, or on a quarter of
    a folder's images, which are then used for nothing else."""
    min_share: float = 0.25
    """Share of a patch's pixels that the part or object must cover."""
    split: Literal["test", "train"] = "test"
    """Split of the generated scenes."""
    batch: int = 16
    """Examples per forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """Engine for the answers; fast computes only what an edit can change."""


def _loaded(config: Config) -> "tuple[Any, Examples | None, Examples, tuple[Cell, ...]]":
    """The model, examples on which the site is chosen where a folder's have to be, the others, and cells."""
    from vlm_mech.methods.compensation.data import held_out
    from vlm_mech.methods.compensation.study import cells_of
    from vlm_mech.methods.compensation.variants import layer_ranges, variants_of

    vlm = config.load()
    choosing, examples = None, _examples(config, vlm, config.split)
    if config.site is None and not config.data.startswith("scenes/"):
        choosing, examples = held_out(vlm, examples, seed=config.seed)
    variants = variants_of(vlm, vlm.encode([examples.examples[0].prompt]), config.cuts)
    return vlm, choosing, examples, cells_of(variants, layer_ranges(vlm, config.layers))


def _examples(config: Config, vlm: Any, split: str) -> "Examples":
    from vlm_mech.methods.compensation.data import load_examples

    options = {"n": config.n, "min_share": config.min_share, "split": split, **config.drawn}
    return load_examples(vlm, config.data, **config.fits, **options)


def plan(config: Config) -> Any:
    """What the sweep behind the answers will need."""
    from vlm_mech.methods.compensation.study import plan_answers

    vlm, _, examples, cells = _loaded(config)
    how = {"compared": config.measure, "batch": config.batch, "memory": config.memory}
    return plan_answers(vlm, examples, cells, **how)


def run(config: Config, work: Workspace) -> Outcome:
    """The result, its figures, and images of examples."""
    from vlm_mech.interventions.receipt import add_up
    from vlm_mech.methods.compensation import figures, findings, study
    from vlm_mech.methods.compensation.compensated_share import every_compensation
    from vlm_mech.methods.compensation.data import part_maps
    from vlm_mech.results.result import Result

    vlm, choosing, examples, cells = _loaded(config)
    readout = vlm.readout
    site, chosen_on = _site(config, vlm, choosing, examples, readout)
    options = {"compared": config.measure, "seed": config.seed, "engine": config.engine, "memory": config.memory}
    steps = {f"{number:08d}": some for number, some in enumerate(examples.batches(config.batch))}
    for key, some in work.batches(steps, "batches"):
        work.keep(key, *study.measure(vlm, some, cells, readout, **options))
    table, receipts = work.collect()
    told = {"question": QUESTION, "model": vlm.identity(), "receipts": add_up(receipts), "site": site} | examples.told
    result = Result("compensation", table, study.AXES, study.metrics_of(config.measure), provenance=told)
    shares = every_compensation(result, site)
    told["compensated"] = [dataclasses.asdict(each) for each in shares]
    said = findings.findings(result, examples, site, chosen_on, shares)
    result = dataclasses.replace(result, provenance=told, findings=said)
    return Outcome(result, figures.drawn(result), figures.pictures(part_maps(vlm, examples)))


def _site(config: Config, vlm: Any, choosing: "Examples | None", examples: Any, readout: Any) -> tuple[str, str]:
    """Where parts are read for the findings, and how that was chosen."""
    from vlm_mech.methods.compensation import study

    if config.site is not None:
        return study.check_site(vlm, examples, config.site), "as asked for"
    others = choosing or _examples(config, vlm, "validation")
    site = study.best_site(vlm, others, readout, batch=config.batch, seed=config.seed)
    return site, f"the best site on {len(others.examples)} {'examples held out' if choosing else 'validation scenes'}"


if __name__ == "__main__":
    main(Config, run, name="compensation", plan=plan, fewest=2)
