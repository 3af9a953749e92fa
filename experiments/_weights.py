"""The wiring of `python -m experiments.layer_swap --swap weights`: blocks of a checkpoint and its tune exchanged."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vlm_mech.runs.contract import SweepConfig, about
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

QUESTION = (
    "A model that answers from its prior and a tune of it that looks exchange decoder blocks. Asked about an image "
    "whose true answer is not the usual one, which blocks bring the true answer, and which bring the prior back?"
)


@dataclass(frozen=True)
class WeightSwapConfig(SweepConfig):
    """Options of an exchange of weights, some of which a swap of states has too."""

    data: str = ""
    """Generated pairs or a folder; by default scenes/colour, for weights (in conflict alone) scenes/colour-conflict."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    batch: int = 32
    """Pairs a forward pass."""
    tuned: str = "organism-grounded"
    """Weights: the tune of the model, or a folder with its adapter (needs peft)."""
    second: str | None = None
    """Weights: another tune, as a further control."""
    part: Literal["block", "attention", "mlp"] = "block"
    """Weights: whole blocks, or their attention or MLP only (each with the norm before it)."""
    schedules: tuple[Literal["suffix", "prefix", "single", "window"], ...] = ("suffix", "prefix", "single", "window")
    """Weights: layers from each on, up to each, each alone, or a window around it."""
    window: int = 3
    """Weights: layers of a window."""


def run_weights(config: WeightSwapConfig, work: Workspace) -> Outcome:
    """The result, its figures by schedule and donor, and example pictures."""
    from vlm_mech.data.pairs import conflict_first, fitting, load_pairs, with_conflict
    from vlm_mech.inputs.image import load_image
    from vlm_mech.methods.weight_swap import figures, findings, study
    from vlm_mech.methods.weight_swap.data import exchanges
    from vlm_mech.models.vlm import VLM
    from vlm_mech.results.result import Result

    pairs = load_pairs(config.data or "scenes/colour-conflict", n=config.n, seed=config.seed, split=config.split)
    pairs = conflict_first(with_conflict(pairs))
    base = VLM.load(config.model, **config.loading)
    pairs = fitting(base, pairs)
    sides = study.two_sides(base, _tuned(config), part=config.part, second=_second(config), seed=config.seed)
    chosen = [each for schedule in config.schedules for each in exchanges(schedule, sides.n_layers, size=config.window)]
    for start in work.progress(range(0, len(pairs), config.batch), "exchanges"):
        key = f"{start:08d}"
        if key not in work:
            work.keep(key, study.swap_blocks(sides, pairs[start : start + config.batch], chosen), {})
    table, _ = work.collect()
    moved = {f"{direction}: {donor}": each for (direction, donor), each in sides.moved.items()}
    provenance = about(QUESTION, base, pairs, {}) | {"tuned": config.tuned, "part": config.part, "moved": moved}
    result = Result(f"block swap ({config.part})", table, study.AXES, study.METRICS, {}, provenance)
    result = dataclasses.replace(result, findings=findings.findings(result))
    pictures = tuple((f"{pair.question} {pair.answer}", load_image(pair.image)) for pair in list(pairs)[:4])
    return Outcome(result, figures.drawn(result), pictures)


def _tuned(config: WeightSwapConfig) -> Any:
    """The tuned model, or the folder of its adapter."""
    return config.tuned if _is_adapter(config.tuned) else _loaded(config, config.tuned)


def _second(config: WeightSwapConfig) -> Any:
    """Another tuned model, or the blocks of the base with another adapter."""
    from vlm_mech.methods.weight_swap.blocks import adapted

    if config.second is None or not _is_adapter(config.second):
        return _loaded(config, config.second)
    return dataclasses.replace(adapted(_loaded(config, config.model), config.second)[1], name="second")


def _is_adapter(name: str) -> bool:
    from pathlib import Path

    return (Path(name) / "adapter_config.json").is_file()


def _loaded(config: WeightSwapConfig, name: str | None) -> Any:
    from vlm_mech.models.vlm import VLM

    return None if name is None else VLM.load(name, **config.loading)
