"""Which tokens must attend to which, at which layers, to produce the answer?

Attention knockout: cuts edges such as last<-image, by layer or by head, and measures the effect on the answer.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from vlm_mech.runs.configuration import ExploredConfig, SpokenConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace, in_batches

QUESTION = (
    "Which tokens must attend to which, at which layers, to produce the answer? Attention edges are cut: query tokens "
    "cannot attend to key tokens at some layers; their other attention is renormalised. If the answer's probability "
    "falls, the edge was needed; if not, other paths may carry the information. Random edges are the control."
)


@dataclass(frozen=True)
class Config(ExploredConfig, SpokenConfig):
    """Options of the knockout."""

    takes_texts: ClassVar[bool] = True
    edges: tuple[str, ...] = ()
    """Edges to cut as QUERY<-KEY, such as "last<-image" "question<-object" "last<-image+system" "last<-subject"."""
    during: Literal["prompt", "answer"] = "prompt"
    """How long cuts from the last token last: over the prompt only, or over the answer's tokens too."""
    layers: str | None = None
    """Windows around each layer, or every:K (default from 27 layers on: every:3); groups:K (a partition); all."""
    window: int | None = None
    """Window: layers cut around each layer; by default 9, or 1 in models of fewer than 27 layers."""
    heads: bool = False
    """Cut one head at a time, at single layers, for one edge (last<-image), and show where the strongest attend."""
    joint: bool = False
    """Also cut several heads (or layers) of each edge together, since one may back up another."""
    joint_size: int = 3
    """Maximum number of heads, or layers, that --joint cuts together."""
    control: tuple[Literal["size", "mass", "distance"], ...] = ("size",)
    """Control edges: random, of equal number, equal attention mass, or equal distance; one or several."""
    sinks: Literal["include", "exclude", "match"] = "include"
    """Controls may cut attention to sinks (the first token, and others with similar states), none, or as many."""
    generate: int = 0
    """Number of examples whose answers are generated without each edge, cut at all layers."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    all: bool = False
    """Keep examples that the model answers wrongly."""
    batch: int = 32
    """Examples per forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """fast computes only what an edit can change; trace runs a full forward pass per cell."""


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
    """The result, its heatmaps and line figure, and images of examples or of what heads attend to."""
    from vlm_mech.explorer.embedding import explorer_of
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
    result, joint = joint_of(config, vlm, pairs, replace(result, claims=claims), scan, masks)
    more = follow_up(vlm, result, pairs, scan, masks, n_generated=config.generate, seed=config.seed)
    provenance = about(QUESTION, vlm, pairs, add_up([*receipts, *joint.receipts])) | {"generated": more.generated}
    result = replace(result, provenance=provenance, findings=findings.findings(result, pairs, scan, more))
    said = examples(result.table, result.axes, {pair.id: pair.question for pair in pairs})
    shown = {"tables": joint.tables, "said": said, "embedded": explorer_of(config, vlm, pairs)}
    return Outcome(result, figures.drawn(result), figures.pictures(pairs, scan, more), **shown)


if __name__ == "__main__":
    main(Config, run, name="knockout", plan=plan, fewest=2)
