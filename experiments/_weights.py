"""The wiring of `python -m experiments.layer_swap --swap weights`: blocks of a checkpoint and its tune exchanged."""

import dataclasses
from typing import TYPE_CHECKING, Any

from vlm_mech.runs import Outcome, Workspace, about

if TYPE_CHECKING:
    from experiments.layer_swap import Config

QUESTION = (
    "A model that answers from its prior and a tune of it that looks exchange decoder blocks. Asked about an image "
    "whose true answer is not the usual one, which blocks bring the true answer, and which bring the prior back?"
)


def run_weights(config: "Config", work: Workspace) -> Outcome:
    """The result, its figures by schedule and donor, and example pictures."""
    from vlm_mech import block_swap
    from vlm_mech.blocks import exchanges
    from vlm_mech.data.pairs import fitting, load_pairs
    from vlm_mech.image import load_image
    from vlm_mech.model import VLM
    from vlm_mech.result import Result
    from vlm_mech.visual_flow import cases_of

    pairs = load_pairs(config.data or "scenes/colour-conflict", n=config.n, seed=config.seed, split=config.split)
    base = VLM.load(config.model, **config.loading)
    pairs = fitting(base, cases_of(pairs).pairs)
    sides = block_swap.two_sides(base, _tuned(config), part=config.part, second=_second(config), seed=config.seed)
    chosen = [each for schedule in config.schedules for each in exchanges(schedule, sides.n_layers, size=config.window)]
    for start in work.progress(range(0, len(pairs), config.batch), "exchanges"):
        key = f"{start:08d}"
        if key not in work:
            work.keep(key, block_swap.swap_blocks(sides, pairs[start : start + config.batch], chosen), {})
    table, _ = work.collect()
    moved = {f"{direction}: {donor}": each for (direction, donor), each in sides.moved.items()}
    provenance = about(QUESTION, base, pairs, {}) | {"tuned": config.tuned, "part": config.part, "moved": moved}
    result = Result(f"block swap ({config.part})", table, block_swap.AXES, block_swap.METRICS, {}, provenance)
    result = dataclasses.replace(result, findings=block_swap.findings(result))
    pictures = tuple((f"{pair.question} {pair.answer}", load_image(pair.image)) for pair in list(pairs)[:4])
    return Outcome(result, block_swap.figures_of(result), pictures)


def _tuned(config: "Config") -> Any:
    """The tuned model, or the folder of its adapter."""
    return config.tuned if _is_adapter(config.tuned) else _loaded(config, config.tuned)


def _second(config: "Config") -> Any:
    """Another tuned model, or the blocks of the base with another adapter."""
    from vlm_mech.blocks import adapted

    if config.second is None or not _is_adapter(config.second):
        return _loaded(config, config.second)
    return dataclasses.replace(adapted(_loaded(config, config.model), config.second)[1], name="second")


def _is_adapter(name: str) -> bool:
    from pathlib import Path

    return (Path(name) / "adapter_config.json").is_file()


def _loaded(config: "Config", name: str | None) -> Any:
    from vlm_mech.model import VLM

    return None if name is None else VLM.load(name, **config.loading)
