"""Probes as a method to be graded: after how many blocks the picture's answer can be read at the last position, and in
the image.

A probe standardises its features, so that it reads a trace of a thousandth as well as what is written on purpose. What
can be read therefore depends on how closely one looks: states are probed as they are, and seen through noise.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.interventions.trace import read
from vlm_mech.methods.probing.crossfit import crossfit
from vlm_mech.methods.probing.data import Features, Spot
from vlm_mech.methods.probing.descent import ProbeRecipe
from vlm_mech.methods.probing.splits import make_splits, numbered
from vlm_mech.methods.probing.training import Split
from vlm_mech.organism.planted import Planted
from vlm_mech.results.result import Metric, Result
from vlm_mech.validate.statements import LEVEL, Claims, cells_of

SPANS = ("last", "image")
RECIPE = ProbeRecipe(l2=(1e-2,), learning_rate=3e-2, max_epochs=20)
"""A linear probe, cheap: one penalty, large steps."""
N_FOLDS = 5
DRAWS = 20
"""Divisions into folds that are tried."""
NOISE = 0.01
"""Noise through which states are seen, relative to their norm."""
HALF = 0.5
"""A label can be read where the probe is right in more than this share of what the commonest label leaves."""
ACCURACY = Metric("accuracy", "share", "share of test examples whose label the probe finds most probable")


def probes(planted: Planted, pairs: Pairs, *, noise: float = 0.0) -> Claims:
    """Linear probes for the answer on every block's input and on the last one's output.

    The layer in the cells counts the blocks before the state. Both pictures of every pair are examples, held out
    together.

    Args:
        noise: standard deviation of what is added to the states, relative to their norm.
    """
    pairs, numbers, groups, splits = dealt(pairs)
    features = mean_states(planted, [*pairs.base, *pairs.counterfactual])
    if noise:
        features = blurred(features, noise)
    readings = crossfit(features, numbers[None], splits, RECIPE, groups=groups.tolist())
    told = readings.hits[:, 0, 0].astype(float)
    baseline = (readings.majority[0, 0] == numbers).astype(float)
    tables = []
    for number, spot in enumerate(readings.spots):
        about = {"example": [str(each) for each in range(len(numbers))], "group": groups, "place": spot.span}
        # Within each span, spots come in the order of the blocks.
        depth = number % (len(readings.spots) // len(SPANS))
        values = {"layer": depth, "accuracy": told[number], "accuracy_baseline": baseline}
        tables.append(pd.DataFrame(about | values))
    cells = cells_of(Result("probes", pd.concat(tables, ignore_index=True), ("place", "layer"), (ACCURACY,)))
    return Claims(cells, readable=_readable(cells, baseline.mean()))


def dealt(
    pairs: Pairs,
) -> tuple[Pairs, Int[np.ndarray, "example"], Int[np.ndarray, "example"], list[Split]]:
    """The pairs, with the label and the group of each of their pictures, in folds that all train on every label.

    Few examples may leave a fold without a label: then others are drawn, and if none will do, the pairs with the
    rarest label are left out.
    """
    while True:
        labels = [*pairs.answer, *pairs.counterfactual_answer]
        numbers, groups = numbered(labels)[1], np.tile(np.arange(len(pairs)), 2)
        for seed in range(DRAWS):
            splits = make_splits(numbers, groups, n_folds=N_FOLDS, n_seeds=1, seed=seed)
            if all(len(set(numbers[split.train])) == len(set(labels)) for split in splits):
                return pairs, numbers, groups, splits
        rarest = min(sorted(set(labels)), key=labels.count)
        kept = tuple(pair for pair in pairs if rarest not in (pair.answer, pair.counterfactual_answer))
        pairs = replace(pairs, pairs=kept)


def _readable(cells: pd.DataFrame, baseline: float) -> dict[str, tuple[int, ...]]:
    """The numbers of blocks after which the label can be read at each span."""
    enough = cells[(cells["p"] < LEVEL) & (cells["effect"] > HALF * (1 - baseline))]
    return {span: tuple(sorted(int(each) for each in enough[enough["place"] == span]["layer"])) for span in SPANS}


def mean_states(planted: Planted, prompts: list) -> Features:
    """Mean states of the spans before and after every block.

    `last` is where answers part: where all of them begin alike, the token they begin with.
    """
    vlm, found, answers = planted.vlm, {}, planted.recipe.answers
    sites = [Site("llm.resid_pre", 0), *(Site("llm.resid_post", layer) for layer in vlm.llm_layers)]
    alike = len({answer.split()[0] for answer in answers}) == 1
    encoded = vlm.encode(prompts, [answers[0]] * len(prompts) if alike else None)
    held = read(vlm, encoded, sites)
    for span in SPANS:
        cells = encoded.cells("answer" if alike and span == "last" else span)
        for site in sites:
            parts = held[site][cells.rows, cells.positions].split(list(cells.counts))
            found[Spot(site, span)] = torch.stack([part.mean(0) for part in parts])
    return found


def blurred(features: Features, noise: float) -> Features:
    """The states with normal noise of that size relative to their norm; the same noise every time."""
    return {spot: _blurred(states, noise, number) for number, (spot, states) in enumerate(features.items())}


def _blurred(states: Float[Tensor, "example width"], noise: float, seed: int) -> Float[Tensor, "example width"]:
    drawn = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))
    return states + noise * states.norm(dim=1, keepdim=True) / states.shape[1] ** 0.5 * drawn


noisy_probes = partial(probes, noise=NOISE)
