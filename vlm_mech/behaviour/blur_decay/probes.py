"""What probes that were fitted on clear pictures still read while other pictures decay, layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from vlm_mech.behaviour.blur_decay.blur import AS_USUAL, KERNELS, Scale
from vlm_mech.behaviour.blur_decay.data import asked_at, with_images
from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.probing.crossfit import crossfit, is_first
from vlm_mech.methods.probing.data import OBJECT, changed_patches, read_states
from vlm_mech.methods.probing.descent import LINEAR
from vlm_mech.methods.probing.splits import make_splits
from vlm_mech.methods.visual_flow.data import Cases
from vlm_mech.methods.visual_flow.probes import N_FOLDS, N_SEEDS, control_labels, probe_examples
from vlm_mech.results.result import Metric

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

PROBES = {OBJECT: "probe of object", "last": "probe of last"}
CONTROLS = {OBJECT: "shuffled labels, object", "last": "shuffled labels, last"}
DECODED = Metric(
    "decoded",
    "share",
    "share of examples whose answer a linear probe, fitted on other clear images, finds most probable; a "
    "tie is wrong; baseline: 1 / answers",
    against="chance",
)


def probed(
    vlm: "VLM",
    pairs: Pairs,
    others: Pairs,
    levels: Sequence[str],
    *,
    folder: Path,
    scale: Scale = AS_USUAL,
    seed: int = 0,
    batch: int = 32,
) -> pd.DataFrame:
    """Rows of the decay's result: probes after every decoder block, and probes of shuffled labels, at some levels.

    Args:
        pairs: their first pictures are read, at every level in the patches where the clear ones differ.
        others: pairs of other scenes, on both pictures of which probes are fitted as they are.
        folder: where states are kept, so that an interrupted run need not read them again.

    Raises:
        UsageError: an answer that too few of the others have, or image tokens that are learned queries.
    """
    clear, first = (with_images(each, str(KERNELS[0]), scale) for each in (pairs, others))
    cases = Cases(clear, tuple(pairs.counterfactual_answer), "the other answer")
    fitted = probe_examples(vlm, cases, first, folder=folder, seed=seed, batch=batch)
    features = {spot: held for spot, held in fitted.features.items() if spot.site.name == "llm.resid_post"}
    objects = tuple(changed_patches(vlm, pair) for pair in clear)
    read = [
        read_states(
            vlm, asked_at(pairs, level, scale), objects, tuple(features), folder=folder / f"at {level}", batch=batch
        )
        for level in levels
    ]
    elsewhere = {spot: torch.cat([states[spot] for states in read]) for spot in features}
    splits = make_splits(fitted.labels, fitted.groups, n_folds=N_FOLDS, n_seeds=N_SEEDS, seed=seed)
    labels = np.stack([fitted.labels, control_labels(fitted, splits)])
    found = crossfit(
        features, labels, splits, LINEAR, groups=fitted.groups.tolist(), elsewhere=elsewhere, device=str(vlm.device)
    )
    true = np.array([fitted.classes.index(answer) for answer in pairs.answer] * len(levels))
    named = {
        "example": [pair.id for pair in pairs] * len(levels),
        "group": [pair.group or pair.id for pair in pairs] * len(levels),
        "level": np.repeat(levels, len(pairs)),
    }
    tables = []
    for spot, said in zip(found.spots, found.elsewhere, strict=True):
        for views, each in zip((PROBES, CONTROLS), said, strict=True):
            decoded = {"decoded": is_first(each, true).astype(float), "decoded_baseline": 1 / len(fitted.classes)}
            tables.append(pd.DataFrame(named | decoded).assign(view=views[spot.span], layer=spot.site.layer))
    return pd.concat(tables, ignore_index=True).assign(skipped="")
