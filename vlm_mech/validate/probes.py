"""Probes as a method to be graded: after how many blocks the picture's answer can be read at the last position, and in
the image.

A probe standardises its features, so that it reads a trace of a thousandth as well as what is written on purpose. What
can be read therefore depends on how closely one looks: states are probed as they are, and seen through noise.
"""

from collections.abc import Sequence
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
from vlm_mech.methods.probing.claims import READS, about_place, does_of, pool
from vlm_mech.methods.probing.controls import NONE, SHUFFLED, shuffled
from vlm_mech.methods.probing.crossfit import ACCURACY, crossfit
from vlm_mech.methods.probing.data import Features, Spot
from vlm_mech.methods.probing.descent import ProbeRecipe
from vlm_mech.methods.probing.splits import make_splits, numbered
from vlm_mech.methods.probing.study import AXES, TEST
from vlm_mech.methods.probing.training import Split
from vlm_mech.organism.planted import Planted
from vlm_mech.results.claim import Claim
from vlm_mech.results.claiming import claimed
from vlm_mech.results.result import Result
from vlm_mech.validate.statements import Claims, cells_of
from vlm_mech.validate.true_claims import depth_of

SPANS = ("last", "image")
RECIPE = ProbeRecipe(l2=(1e-2,), learning_rate=3e-2, max_epochs=20)
"""A linear probe, cheap: one penalty, large steps."""
N_FOLDS = 5
DRAWS = 20
"""Divisions into folds that are tried."""
NOISE = 0.01
"""Noise through which states are seen, relative to their norm."""


def probes(planted: Planted, pairs: Pairs, *, noise: float = 0.0) -> Claims:
    """Linear probes for the answer on every block's input and on the last one's output.

    Where it can be read is what the command claims; shuffled labels are the control. The layer in the cells counts the
    blocks before the state. Both pictures of every pair are examples, held out together.

    Args:
        noise: standard deviation of what is added to the states, relative to their norm.
    """
    pairs, numbers, groups, splits = dealt(pairs)
    features = mean_states(planted, [*pairs.base, *pairs.counterfactual])
    if noise:
        features = blurred(features, noise)
    labels = np.stack([numbers, shuffled(numbers, seed=0, splits=splits)])
    readings = crossfit(features, labels, splits, RECIPE, groups=groups.tolist())
    tables = []
    for variant, control in enumerate((NONE, SHUFFLED)):
        majority = (readings.majority[variant, 0] == labels[variant]).astype(float)
        for number, spot in enumerate(readings.spots):
            about = {"example": [str(each) for each in range(len(numbers))], "group": groups}
            about |= {"model": planted.vlm.name, "probe": RECIPE.name, "control": control, "read_on": TEST}
            values = {"accuracy": readings.hits[number, variant, 0].astype(float), "accuracy_baseline": majority}
            tables.append(pd.DataFrame(about | {"span": spot.span, "place": str(spot.site)} | values))
    result = Result("probes", pd.concat(tables, ignore_index=True), AXES, (ACCURACY,))
    possible = pool(result)
    told = claimed(possible, result)
    return Claims(_cells(result), readable=readable(told), told=told, possible=possible)


def _cells(result: Result) -> pd.DataFrame:
    """The cells of the probe itself, by span and the number of blocks before."""
    table = result.table[result.table["control"] == NONE]
    table = table.assign(layer=table["place"].map(lambda place: depth_of(about_place(place))))
    table = table.drop(columns="place").rename(columns={"span": "place"}).reset_index(drop=True)
    return cells_of(Result("probes", table, ("place", "layer"), (ACCURACY,)))


def readable(told: Sequence[Claim]) -> dict[str, tuple[int, ...]]:
    """The numbers of blocks after which the label is claimed to be readable at each span."""
    some = [claim for claim in told if claim.made and does_of(claim) == READS]
    return {
        span: tuple(sorted(depth_of(claim.about) for claim in some if claim.about["span"] == span)) for span in SPANS
    }


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


def mean_states(planted: Planted, prompts: list) -> Features:
    """Mean states of the spans before and after every block.

    `last` is where answers part: where all of them begin with the same tokens, the token they begin with.
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
