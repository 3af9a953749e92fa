"""The probes case: MLP probes at every layer, trained together, against a loop over scikit-learn's MLPClassifier.

States are made, not read: labels sit in a few of many directions, partly as a product of two signs, and the size of the
directions falls as it does in hidden states, so that accuracy is below 1 and an MLP has something to learn.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.benchmark.cases import PROBES
from vlm_mech.benchmark.compare import OURS
from vlm_mech.benchmark.timing import Entry, Timed, interleaved, subset
from vlm_mech.errors import UsageError
from vlm_mech.methods.probing.descent import LINEAR, ProbeRecipe, fast_mlp
from vlm_mech.methods.probing.training import Split, own_probabilities, train

LOOP = "scikit-learn loop"
MEMORY = 2**28
"""Bytes that our training may take beyond the states."""
NAN = float("nan")


@dataclass(frozen=True)
class Size:
    """How much is probed; the `n_seeds` probes of a layer differ in their initial weights and order of minibatches."""

    n_layers: int = 9
    width: int = 512
    n_examples: int = 1000
    n_seeds: int = 5
    n_classes: int = 8


SMALL = Size()
FULL = Size(n_layers=33, width=4096, n_examples=2000)


@dataclass(frozen=True, eq=False)
class ProbeTask:
    """States of all layers, labels, who is trained on, validated and tested, and our recipe; cells are probes."""

    states: Float[Tensor, "layer example width"]
    labels: Int[np.ndarray, "example"]
    split: Split
    size: Size
    recipe: ProbeRecipe

    @property
    def n_cells(self) -> int:
        """Probes in all: layers x seeds, seeds in the inner order."""
        return self.size.n_layers * self.size.n_seeds


def make_task(size: Size, *, seed: int = 0) -> ProbeTask:
    """States whose label's first two bits stand along directions of their own, the third in the product of two."""
    if size.n_classes != 8:
        raise UsageError(f"n_classes is {size.n_classes}; the labels are made of three bits, so 8 it must be")
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, size.n_classes, size.n_examples)
    bits = ((labels[:, None] >> np.arange(3)) & 1) * 2 - 1
    signs = rng.choice(np.array([-1, 1], np.float32), (2, size.width))
    states = torch.empty(size.n_layers, size.n_examples, size.width)
    for layer in range(size.n_layers):
        states[layer] = _layer(size, bits, signs, np.random.default_rng((seed, layer)))
    order = rng.permutation(size.n_examples)
    parts = np.split(order, [round(0.6 * size.n_examples), round(0.8 * size.n_examples)])
    return ProbeTask(states, labels, Split(*parts, seed=seed), size, fast_mlp(len(parts[0])))


def _layer(
    size: Size, bits: Int[np.ndarray, "example three"], signs: Float[np.ndarray, "two width"], rng: np.random.Generator
) -> Float[Tensor, "example width"]:
    from scipy.fft import dct

    latent = rng.standard_normal((size.n_examples, size.width), np.float32)
    sign = rng.choice([-1, 1], size.n_examples)
    latent[:, 10] += 2.2 * bits[:, 0]
    latent[:, 20] += 2.2 * bits[:, 1]
    latent[:, 6] = 0.5 * latent[:, 6] + 2 * sign
    latent[:, 7] = 0.5 * latent[:, 7] + 2 * sign * bits[:, 2]
    latent *= (np.arange(1, size.width + 1) ** -0.5).astype(np.float32)
    # As in hidden states, no coordinate is a direction of its own: signs and cosines, twice, are a rotation.
    for flips in signs:
        latent = dct(latent * flips, norm="ortho", axis=1)
    return torch.from_numpy(latent)


class Together:
    """Probes of all layers and seeds in a few tensors."""

    name = OURS

    def begin(self, task: ProbeTask) -> None:
        """Nothing is done once."""

    def answers(self, task: ProbeTask, begun: None, numbers: Sequence[int]) -> Float[np.ndarray, "cell"]:
        """Test accuracies of the cells; all seeds of a layer are trained, whichever are asked for."""
        n_seeds, split = task.size.n_seeds, task.split
        layers = sorted({number // n_seeds for number in numbers})
        states = task.states if len(layers) == task.size.n_layers else task.states[layers]
        splits = [replace(split, seed=split.seed + number, repeat=number) for number in range(n_seeds)]
        found = np.zeros((len(states), n_seeds))
        labels = torch.from_numpy(task.labels)[None]
        for entries, stack in train(states, labels, splits, task.recipe, n_classes=task.size.n_classes, memory=MEMORY):
            test = torch.from_numpy(split.test).expand(len(entries.splits), -1)
            said = own_probabilities(stack, test)[:, 0].argmax(-1).numpy()
            found[list(entries.features), list(entries.splits)] = (said == task.labels[split.test]).mean(1)
        return np.array([found[layers.index(number // n_seeds), number % n_seeds] for number in numbers])


class Loop:
    """One scikit-learn probe after the other: the same hidden layers, its own defaults with early stopping."""

    name = LOOP

    def begin(self, task: ProbeTask) -> None:
        """Nothing is done once."""

    def answers(self, task: ProbeTask, begun: None, numbers: Sequence[int]) -> Float[np.ndarray, "cell"]:
        """Test accuracies of the cells, with as many threads as torch has."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(torch.get_num_threads()):
            return np.array([self._one(task, *divmod(number, task.size.n_seeds)) for number in numbers])

    def _one(self, task: ProbeTask, layer: int, seed: int) -> float:
        from sklearn.neural_network import MLPClassifier
        from sklearn.preprocessing import StandardScaler

        split, states = task.split, task.states[layer].numpy()
        scaler = StandardScaler().fit(states[split.train])
        # It sets its own validation part aside, so it gets ours to draw it from.
        known = np.concatenate([split.train, split.validation])
        estimator = MLPClassifier(task.recipe.hidden, early_stopping=True, random_state=split.seed + seed)
        estimator.fit(scaler.transform(states[known]), task.labels[known])
        return float(estimator.score(scaler.transform(states[split.test]), task.labels[split.test]))


def probes_case(
    size: Size = SMALL, *, rival_cells: int = 3, repeats: int = 1, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The probes case; cells are probes.

    Args:
        rival_cells: how many probes scikit-learn fits, drawn with `seed`; its time is scaled by count.

    Returns:
        The table as of the other cases (`difference` is theirs minus ours in mean test accuracy, on the probes that
        both fitted), and notes with the accuracies, that of a linear probe, and what both were given.
    """
    load, task = os.getloadavg()[0], make_task(size, seed=seed)
    chosen = subset(task.n_cells, rival_cells, seed)
    entries = [Entry(Together(), tuple(range(task.n_cells)), task.n_cells), Entry(Loop(), chosen, task.n_cells)]
    # What either loads when it first runs is no part of the memory that it takes.
    little = make_task(Size(n_layers=1, width=64, n_examples=200, n_seeds=1), seed=seed)
    for entry in entries:
        entry.contender.answers(little, entry.contender.begin(little), (0,))
    timed = interleaved(entries, task, repeats=repeats, seed=seed, device=torch.device("cpu"))
    compared = _compared(task, timed[0], chosen)
    rows = [_row(number, name, each, compared["difference"]) for number, each in enumerate(timed) for name in each]
    notes = {"case": PROBES, "n_cells": task.n_cells, "rival_cells": len(chosen), "load_before": load, "bound": None}
    notes |= {"size": asdict(size), "recipe": asdict(task.recipe), "budget_mib": MEMORY / 2**20, "accuracy": compared}
    return pd.DataFrame(rows), notes


def _compared(task: ProbeTask, timed: dict[str, Timed], chosen: Sequence[int]) -> dict[str, Any]:
    """Mean test accuracies, and theirs minus ours with a 95 % t interval over the probes that both fitted."""
    from scipy import stats

    every, theirs = timed[OURS].answer, timed[LOOP].answer
    apart = theirs - every[list(chosen)]
    between = stats.t.interval(0.95, len(apart) - 1, apart.mean(), stats.sem(apart)) if np.ptp(apart) else None
    # What an MLP is needed for shows in a few probes.
    linear = Together().answers(replace(task, recipe=LINEAR), None, chosen[:3])
    commonest = np.bincount(task.labels[task.split.train]).argmax()
    return {
        OURS: float(every[list(chosen)].mean()),
        LOOP: float(theirs.mean()),
        "ours, all probes": float(every.mean()),
        "ours, a linear probe": float(linear.mean()),
        "commonest label": float((task.labels[task.split.test] == commonest).mean()),
        "difference": float(apart.mean()),
        "interval": None if between is None else [float(each) for each in between],
        "n_test": len(task.split.test),
    }


def _row(number: int, name: str, measured: dict[str, Timed], difference: float) -> dict[str, Any]:
    own = measured[name]
    values = {"seconds": own.seconds, "ratio": own.seconds / measured[OURS].seconds, "memory": own.memory}
    values |= {"forwards": NAN, "of_bound": NAN, "operations": NAN, "difference": 0.0 if name == OURS else difference}
    bases = {"seconds": measured[OURS].seconds, "ratio": 1.0, "memory": 0.0, "difference": 0.0}
    bases |= {"forwards": NAN, "of_bound": NAN, "operations": NAN}
    where = {"example": f"repeat {number + 1}", "case": PROBES, "contender": name, "skipped": ""}
    return where | values | {f"{metric}_baseline": value for metric, value in bases.items()}
