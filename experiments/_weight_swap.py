"""The wiring of `python -m experiments.layer_swap --swap weights`: blocks patched between a checkpoint and its
fine-tuned version."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments._swap_config import Config
from vlm_mech.errors import UsageError
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace, in_batches

QUESTION = (
    "Which decoder blocks bring the true answer, and which bring back the prior? Decoder blocks are patched between a "
    "model that answers from its prior and its fine-tuned checkpoint. Both are tested on images whose true answer is "
    "not the usual one."
)
ALONE = "two checkpoints have no random twin; random changes of equal size are part of each claim"
"""Why there are no models with shuffled weights to compare with."""


def swap_weights(config: Config, work: Workspace) -> Outcome:
    """The result, its figures by schedule and donor, and example images."""
    from vlm_mech.data.derived_pairs import conflict_first, with_conflict
    from vlm_mech.data.examples import load_examples
    from vlm_mech.data.fitting import fitting
    from vlm_mech.inputs.image import load_image
    from vlm_mech.methods.gates.gated import gated
    from vlm_mech.methods.weight_swap import figures, findings, study
    from vlm_mech.methods.weight_swap.claims import pool
    from vlm_mech.methods.weight_swap.data import exchanges
    from vlm_mech.results.result import Result

    if config.outcome != "logits":
        raise UsageError(f"--outcome {config.outcome} is for --swap state; patching weights reads logits only")
    if config.counterfactual is not None:
        raise UsageError("--counterfactual is for --swap state; patching weights uses one image only")
    if config.control:
        raise UsageError("--control is for --swap state; patching weights has random changes (--n-random)")
    if config.n_random < 1:
        raise UsageError(f"--n-random is {config.n_random}; at least 1 random change is needed")
    pairs = load_examples(config.data or "scenes/colour-conflict", n=config.n, split=config.split, **config.drawn)
    pairs = conflict_first(with_conflict(pairs))
    base = config.load()
    pairs = fitting(base, pairs, **config.fits, alone=True)
    how = {"part": config.part, "n_random": config.n_random, "seed": config.seed}
    sides = study.two_sides(base, _tuned(config), second=_second(config), **how)
    chosen = [each for schedule in config.schedules for each in exchanges(schedule, sides.n_layers, size=config.window)]
    for key, rows in work.batches(in_batches(len(pairs), config.batch), "exchanges"):
        work.keep(key, study.swap_blocks(sides, pairs[rows], chosen, measure=config.measure), {})
    table, _ = work.collect()
    moved = {f"{direction}: {donor}": each for (direction, donor), each in sides.moved.items()}
    provenance = about(QUESTION, base, pairs, {}) | {"tuned": config.tuned, "part": config.part, "moved": moved}
    result = Result(f"block swap ({config.part})", table, study.AXES, study.metrics_of(config.measure), {}, provenance)
    result = dataclasses.replace(result, claims=gated(config, base, pairs, result, pool, ALONE))
    result = dataclasses.replace(result, findings=findings.findings(result))
    pictures = tuple((f"{pair.question} {pair.answer}", load_image(pair.image)) for pair in list(pairs)[:4])
    return Outcome(result, figures.drawn(result), pictures)


def _tuned(config: Config) -> Any:
    """The tuned model, or the folder of its adapter."""
    return config.tuned if _is_adapter(config.tuned) else _model(config, config.tuned)


def _second(config: Config) -> Any:
    """Another tuned model, or the blocks of the base with another adapter."""
    from vlm_mech.methods.weight_swap.blocks import adapted

    if config.second is None or not _is_adapter(config.second):
        return _model(config, config.second)
    return dataclasses.replace(adapted(_model(config, config.model), config.second)[1], name="second")


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _model(config: Config, name: str | None) -> Any:

    return None if name is None else config.load(name)
