"""Which tokens must attend to which, at which layers, for the answer to come out?

Cuts attention edges such as last<-image, layer by layer or head by head, and measures what happens to the answer
(attention knockout).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlm_mech.runs.configuration import SpokenConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace, in_batches

QUESTION = (
    "Which tokens must attend to which, at which layers, for the answer to come out? Attention edges are cut: query "
    "tokens cannot attend to key tokens at some layers, and the rest of their attention sums to one. If the answer's "
    "probability falls, the model needed this way there; if not, it may have others. Random edges are the control."
)


@dataclass(frozen=True)
class Config(SpokenConfig):
    """Options of the knockout."""

    takes_texts: ClassVar[bool] = True
    edges: tuple[str, ...] = ()
    """Edges to cut as QUERY<-KEY, such as "last<-image" "question<-object" "last<-image+system" "last<-subject"."""
    during: Literal["prompt", "answer"] = "prompt"
    """How long cuts from the last token stay: in the prompt alone, or for the answer's tokens after it too."""
    layers: str = "each"
    """each (a window around every layer), groups:K (K runs of layers that partition the model), or all."""
    window: int | None = None
    """Layers cut around each; by default 9, in models of fewer than 27 layers 1."""
    heads: bool = False
    """Cut one head at a time, at single layers, for one edge (last<-image), and show where the strongest look."""
    joint: bool = False
    """Also cut several heads (or layers) of each edge at once, since one may stand in for another."""
    joint_size: int = 3
    """Heads, or layers, that --joint cuts at once at most."""
    control: tuple[Literal["size", "mass", "distance"], ...] = ("size",)
    """Random edges to compare with: as many, of equal attention mass, or of equal distance; one or several."""
    sinks: Literal["include", "exclude", "match"] = "include"
    """Controls may cut attention to sinks (the first token, and others with states like its own), none, or as many."""
    generate: int = 0
    """Number of examples whose answers are written out without each edge, cut at all layers."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    all: bool = False
    """Keep examples that the model answers wrongly."""
    batch: int = 32
    """Examples a forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """The fast one computes only what can change; trace runs a whole pass for every cell."""


def _loaded(config: Config) -> tuple[Any, ...]:
    """The model, the pairs, what is cut, and which pixels show what is asked about."""
    from vlm_mech.data.examples import load_examples
    from vlm_mech.data.fitting import fitting
    from vlm_mech.methods.knockout.data import scan_of
    from vlm_mech.methods.knockout.edges import object_masks

    pairs = load_examples(config.data, n=config.n, split=config.split, **config.drawn)
    masks = object_masks(pairs, seed=config.seed, split=config.split)
    pairs = fitting(vlm := config.load(), pairs, **config.fits, alone=True)
    options = {"layers": config.layers, "size": config.window, "heads": config.heads, "during": config.during}
    options |= {"controls": config.control, "sinks": config.sinks}
    return vlm, pairs, scan_of(vlm, pairs, masks, config.edges, **options), masks


def plan(config: Config) -> Any:
    """What the run will need."""
    from vlm_mech.methods.knockout.joint import on_top
    from vlm_mech.methods.knockout.study import plan_knockout
    from vlm_mech.sweeps.generated_answers import part_of

    *what, masks = _loaded(config)
    how = {"measure": config.measure, "batch": config.batch, "seed": config.seed, "memory": config.memory}
    found = plan_knockout(*what, masks=masks, part=part_of(config), **how)
    return on_top(found, what[-1], config.joint_size) if config.joint else found


def run(config: Config, work: Workspace) -> Outcome:
    """The result, its heatmaps and line figure, and pictures of examples or of what heads attend to."""
    from vlm_mech.interventions.receipt import add_up
    from vlm_mech.methods.gates.gated import gated
    from vlm_mech.methods.knockout import figures, findings, study
    from vlm_mech.methods.knockout.claims import pool_of, ways_of
    from vlm_mech.methods.knockout.follow_up import follow_up
    from vlm_mech.methods.knockout.joint import joint_of
    from vlm_mech.results.generated_answers import examples
    from vlm_mech.results.result import Result
    from vlm_mech.sweeps.generated_answers import part_of

    vlm, pairs, scan, masks = _loaded(config)
    how = {"only_correct": not config.all, "measure": config.measure, "seed": config.seed}
    how |= {"part": part_of(config), "engine": config.engine, "memory": config.memory}
    for key, rows in work.batches(in_batches(len(pairs), config.batch), "knockouts"):
        work.keep(key, *study.knock_out(vlm, pairs[rows], scan, masks=masks, **how))
    table, receipts = work.collect()
    result = Result("attention knockout", table, scan.axes, study.metrics_of(config.measure))

    def again(vlm: Any, pairs: Any) -> Any:
        return study.knock_out(vlm, pairs, scan, masks=masks, **how | {"only_correct": False, "part": None})[0]

    claims = gated(config, vlm, pairs, result, pool_of(scan), again, *ways_of(scan, vlm, masks))
    result, joint = joint_of(config, vlm, pairs, dataclasses.replace(result, claims=claims), scan, masks)
    more = follow_up(vlm, result, pairs, scan, masks, n_generated=config.generate, seed=config.seed)
    provenance = about(QUESTION, vlm, pairs, add_up([*receipts, *joint.receipts])) | {"generated": more.generated}
    result = dataclasses.replace(result, provenance=provenance, findings=findings.findings(result, pairs, scan, more))
    said = examples(result.table, result.axes, {pair.id: pair.question for pair in pairs})
    return Outcome(result, figures.drawn(result), figures.pictures(pairs, scan, more), tables=joint.tables, said=said)


if __name__ == "__main__":
    main(Config, run, name="knockout", plan=plan, fewest=2)
