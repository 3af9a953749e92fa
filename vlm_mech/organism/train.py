"""Trains the embedded models from nothing: `python -m vlm_mech.organism.train --out DIR`.

Stages: `clip` (image and text tower), `organism` (projector and decoder, colour follows the kind of thing), and from
there `organism-grounded` (on counterfactual scenes) and `organism-phrases` (answers of several words too). A run that
was interrupted goes on from its last checkpoint in DIR. Each stage leaves DIR/STAGE, which Hugging Face's auto classes
open, and DIR/STAGE-state/log.jsonl.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vlm_mech.errors import UsageError, one_line_errors
from vlm_mech.models.embedded import weights_folder

VlmStage = Literal["organism", "organism-grounded", "organism-phrases"]
Stage = Literal["clip", "organism", "organism-grounded", "organism-phrases"]
BEFORE: dict[Stage, Stage | None] = {
    "clip": None,
    "organism": "clip",
    "organism-grounded": "organism",
    "organism-phrases": "organism",
}
"""The stages in their order, and which model each starts from."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train the embedded models."""

    out: Path
    """Folder for scenes, checkpoints, logs and the models."""
    stage: Stage | Literal["all"] = "all"
    """One stage alone; the model it starts from must be there."""
    embedded: bool = False
    """Start a single stage from the embedded model that ships instead of the one in `out`."""
    steps: int | None = None
    """Steps of each stage run, instead of those of the recipe."""
    n_scenes: int = 60000
    """Scenes to train on."""
    n_held_out: int = 1024
    """Scenes that the log of accuracies is measured on."""
    seed: int = 0
    """Which scenes, first weights and batches."""
    device: str = "cpu"
    """Where PyTorch computes."""
    threads: int | None = None
    """Threads for PyTorch; its own choice by default."""


def _clip(config: TrainingConfig, pool, held_out) -> None:
    from vlm_mech.organism.train_clip import ClipRecipe, train_clip

    recipe = ClipRecipe(seed=config.seed)
    if config.steps is not None:
        recipe = ClipRecipe(seed=config.seed, n_tower_steps=config.steps, n_steps=config.steps)
    train_clip(config.out, pool, held_out, recipe, device=config.device)


def _vlm(config: TrainingConfig, stage: VlmStage, before: Path, pool, held_out) -> None:
    from transformers import AutoModelForImageTextToText, CLIPModel

    from vlm_mech.organism.build import new_llava
    from vlm_mech.organism.train_vlm import RECIPES, train_vlm

    if stage == "organism":
        model = new_llava(CLIPModel.from_pretrained(before), seed=config.seed)
    else:
        model = AutoModelForImageTextToText.from_pretrained(before)
    recipe = RECIPES[stage] if config.steps is None else RECIPES[stage].shortened(config.steps)
    train_vlm(config.out, model, pool, held_out, stage=stage, recipe=recipe, seed=config.seed, device=config.device)


def train(config: TrainingConfig) -> None:
    """Runs the stages asked for, one after the other.

    Raises:
        UsageError: a stage before the one asked for has not been run in this folder.
    """
    import torch

    from vlm_mech.organism.scene_pool import make_pool
    from vlm_mech.organism.train_vlm import POOL_CONFLICT

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    stages = tuple(BEFORE) if config.stage == "all" else (config.stage,)
    if config.embedded and BEFORE[stages[0]] is None:
        raise UsageError("nothing is before stage clip; --embedded goes with --stage and one that starts from a model")
    before = {stage: _folder(config, name) for stage in stages if (name := BEFORE[stage]) is not None}
    if stages[0] in before and not (before[stages[0]] / "config.json").is_file():
        missing = str(before[stages[0]])
        raise UsageError(
            f"stage {stages[0]} starts from {missing!r}, which is not there; run {BEFORE[stages[0]]} first"
        )
    scenes = config.out / "scenes"
    pool = make_pool(scenes, config.n_scenes, seed=config.seed, split="train", conflict=POOL_CONFLICT)
    held_out = make_pool(scenes, config.n_held_out, seed=config.seed, split="validation", conflict=POOL_CONFLICT)
    for stage in stages:
        if stage == "clip":
            _clip(config, pool, held_out)
        else:
            _vlm(config, stage, before[stage], pool, held_out)


def _folder(config: TrainingConfig, name: str) -> Path:
    return weights_folder(name) if config.embedded else config.out / name


def main() -> None:
    """Trains as the command line says."""
    config = tyro.cli(TrainingConfig, description=__doc__)
    with one_line_errors():
        train(config)


if __name__ == "__main__":
    main()
