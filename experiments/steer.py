"""Does a steering direction change the answers, by how much per dose, and what else does it change?

The difference of mean states between images with one answer and images with another is added to the states, at doses of
both signs. Controls are random directions of equal norm, directions from shuffled labels, and orthogonal ones
(steering, after arXiv 2407.12404).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vlm_mech.errors import UsageError
from vlm_mech.runs.configuration import ClaimConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace, in_batches

SCENES = ("scenes/kind", "scenes/count")


@dataclass(frozen=True)
class Config(ClaimConfig):
    """Options of steering."""

    data: str = "scenes/left-right"
    """Pairs; if they mark the image in conflict, the direction is for what is shown, over the usual answer."""
    n: int | None = None
    """Number of pairs; 48 scenes by default, all of a folder."""
    contrast: str = "auto"
    """Answers that define the direction: shown, A/B, or A over all others; auto: shown, or the only two, or one."""
    spans: tuple[str, ...] = ("last", "image")
    """Token spans to steer; several joined by + are steered together."""
    layers: tuple[int, ...] = ()
    """Layers to steer after; by default all but the last."""
    point: Literal["resid_post", "resid_pre", "attn_out", "mlp_out"] = "resid_post"
    """Which activation of each block."""
    doses: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
    """Doses, as fractions of the mean norm of the steered states; include 0 and both signs."""
    shares: tuple[float, float] = (0.4, 0.2)
    """Shares of the groups for training (the direction) and validation (layer, span and dose)."""
    n_random: int = 20
    """Number of random directions of equal norm, which a claim must exceed; below 20 no claim is made."""
    n_others: int = 5
    """Number of directions from shuffled labels, and of orthogonal directions."""
    others: tuple[str, ...] = SCENES
    """Pairs about other things, to measure side effects."""
    n_side: int = 32
    """Number of pairs per side-effect set; 0 for none."""
    generate: int = 8
    """Number of test pairs with generated answers, to measure repetition; 0 for none."""
    new_tokens: int = 8
    """Maximum tokens per generated answer."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    batch: int = 32
    """Pairs per forward pass."""
    engine: Literal["fast", "trace"] = "fast"
    """fast computes only what an edit can change; trace runs a full forward pass per cell."""


def _loaded(config: Config) -> tuple[Any, ...]:
    """The model, the pairs in three parts, other questions, and what is steered, as the validation pairs choose it."""
    from vlm_mech.data.fitting import fitting
    from vlm_mech.data.pairs import load_pairs
    from vlm_mech.methods.steering.find import parts_of, steering_of
    from vlm_mech.methods.steering.side_effects import other_questions

    if min(config.n_side, config.generate) < 0 or config.new_tokens < 1:
        raise UsageError("n_side and generate must be 0 or more, new_tokens 1 or more")
    n = 48 if config.n is None and config.data.startswith("scenes/") else config.n
    pairs = load_pairs(config.data, n=n, split=config.split, **config.drawn)
    vlm = config.load()
    parts = parts_of(fitting(vlm, pairs, **config.fits), config.contrast, config.shares, seed=config.seed)
    names = [each for each in config.others if each != config.data or config.others != SCENES] if config.n_side else []
    others = other_questions(vlm, names, parts.every, config.fits, n=config.n_side, split=config.split, **config.drawn)
    how = {name: getattr(config, name) for name in ("spans", "point", "doses", "n_random", "n_others", "batch", "seed")}
    how |= {name: getattr(config, name) for name in ("measure", "engine", "memory")}
    return vlm, parts, others, steering_of(vlm, parts, layers=config.layers or None, **how)


def plan(config: Config) -> Any:
    """What the test part will need; the direction is found for it, and its place chosen."""
    from vlm_mech.methods.steering.study import plan_steering

    vlm, parts, _, steering = _loaded(config)
    how = {"measure": config.measure, "batch": config.batch, "memory": config.memory}
    return plan_steering(vlm, parts.test, steering, **how)


def run(config: Config, work: Workspace) -> Outcome:
    """The result with its curves, slopes by direction, side effects, and the direction itself in a file."""
    from vlm_mech.data.pairs import pictures
    from vlm_mech.interventions.receipt import add_up
    from vlm_mech.methods.gates.gated import gated
    from vlm_mech.methods.steering import claims, figures, find, findings, side_effects, study

    vlm, parts, others, steering = _loaded(config)
    how = {"measure": config.measure, "engine": config.engine, "memory": config.memory}
    for key, rows in work.batches(in_batches(len(parts.test), config.batch), "steered"):
        work.keep(key, *study.steered(vlm, parts.test[rows], steering, steering.points(), **how))
    table, receipts = work.collect()
    told = about(find.QUESTION, vlm, parts.test, add_up(receipts))
    told |= {"direction": find.told_of(steering, parts.contrast, parts.counts)}
    result, options = study.result_of(table, config.measure, told), {"batch": config.batch, "seed": config.seed}
    again = claims.again(vlm, parts.train, parts.test, steering, how, **options)
    asked = (claims.pool_of(steering, vlm.n_layers("llm")), again, claims.edit_of(steering))
    result = dataclasses.replace(result, claims=gated(config, vlm, parts.test, result, *asked, at_once=True))
    found = find.direction_of(vlm, steering, parts, result)
    besides = {"n_written": config.generate, "max_new_tokens": config.new_tokens, "batch": config.batch}
    besides |= {"engine": config.engine, "memory": config.memory, "seed": config.seed}
    tables = side_effects.tables_of(vlm, result, steering, parts.test, others, **besides)
    result = dataclasses.replace(result, findings=findings.findings(result, tables["slopes"], tables["side_effects"]))
    found.save(work.folder / "direction.safetensors")
    return Outcome(result, figures.drawn(result), pictures(parts.test), tables=tables)


if __name__ == "__main__":
    main(Config, run, name="steer", plan=plan, fewest=10)
