"""A pool of rendered scenes for training, with labels of what each patch shows."""

import contextlib
import json
import multiprocessing
import multiprocessing.pool
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import Int, UInt8
from tqdm.auto import tqdm

from vlm_mech.data.render import masks, render
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import (
    BEETLE,
    CLASSES,
    COLOURS,
    FAMILIES,
    PARTS,
    PRIORS,
    SHAPES,
    SIZE,
    Family,
    Scene,
    Split,
    overlapping,
)

PATCH = 16
FEW = 1000
"""Up to so many scenes are rendered in less time than processes take to start."""
NAMES = ("ground", *SHAPES, *PRIORS, BEETLE, *(part for parts in PARTS.values() for part in parts))
INKS = ("ground", *COLOURS)
DEPTHS = ("ground", "alone", "in front", "behind")
SPECIES = ("none", *CLASSES)
LABELS = {"name": NAMES, "colour": INKS, "depth": DEPTHS, "species": SPECIES}
"""What is told of each patch, and the values it can take."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Scenes with their pictures (scene x row x column x RGB), and what `patch_labels` says of each."""

    scenes: tuple[Scene, ...]
    images: UInt8[np.ndarray, "scene 96 96 3"]
    labels: Int[np.ndarray, "scene 36 4"]
    centres: Int[np.ndarray, "scene 36 2"]

    def __len__(self) -> int:
        return len(self.scenes)


def patch_labels(scene: Scene) -> tuple[Int[np.ndarray, "36 4"], Int[np.ndarray, "36 2"]]:
    """For each patch the part that covers most of it (at least 12 pixels), its colour, its depth and its species.

    With it the centre (x, y in pixels) of the thing that the part belongs to, or of a patch that shows only ground.
    """
    labels = np.zeros((36, len(LABELS)), np.int64)
    middles = np.arange(SIZE // PATCH) * PATCH + PATCH // 2
    centres = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(36, 2)
    most = np.full(36, 11)
    for (number, part), visible in masks(scene).items():
        thing = scene.things[number]
        tiles = rearrange(visible, "(row y) (column x) -> (row column) (y x)", y=PATCH, x=PATCH).sum(-1)
        others = [other for other in range(len(scene.things)) if other != number]
        touching = [other for other in others if overlapping(thing, scene.things[other])]
        depth = 1 if not touching else 2 if max(touching) < number else 3
        colour = INKS.index(thing.colours[thing.parts.index(part)])
        species = SPECIES.index(thing.species) if thing.species else 0
        here = tiles > most
        labels[here] = (NAMES.index(part), colour, depth, species)
        centres[here] = (thing.x, thing.y)
        most = np.maximum(most, tiles)
    return labels, centres


def _processes(n: int) -> multiprocessing.pool.Pool:
    return multiprocessing.get_context("spawn").Pool(n)


def _made(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.asarray(render(scene)), *patch_labels(scene)


def make_pool(
    folder: Path | None,
    n: int,
    *,
    seed: int,
    split: Split,
    families: Sequence[Family] = FAMILIES,
    conflict: float = 0.0,
    n_workers: int = 2,
) -> Pool:
    """Scenes of a split, kept in `folder` and taken from there when made before; many are rendered by processes."""
    scenes = tuple(sample_scenes(n, seed=seed, split=split, families=tuple(families), conflict=conflict))
    name = json.dumps({"n": n, "seed": seed, "split": split, "families": list(families), "conflict": conflict})
    path = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"pool-{split}-{n}-{seed}-{len(families)}-{conflict}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as kept:
                if str(kept["name"]) == name and str(kept["last"]) == scenes[-1].key:
                    return Pool(scenes, kept["images"], kept["labels"], kept["centres"])
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    labels = np.empty((n, (SIZE // PATCH) ** 2, len(LABELS)), np.int8)
    centres = np.empty((n, (SIZE // PATCH) ** 2, 2), np.int8)
    with contextlib.ExitStack() as stack:
        if n <= FEW:
            made = map(_made, scenes)
        else:
            made = stack.enter_context(_processes(n_workers)).imap(_made, scenes, chunksize=256)
        for number, each in enumerate(tqdm(made, total=n, desc=f"scenes ({split})", disable=None)):
            images[number], labels[number], centres[number] = each
    if path is not None:
        np.savez(path, images=images, labels=labels, centres=centres, name=name, last=scenes[-1].key)
    return Pool(scenes, images, labels, centres)
