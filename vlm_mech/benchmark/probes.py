"""The probes case: MLP probes at every layer, trained together, against a loop over scikit-learn's MLPClassifier.

States are made, not read: labels sit in a few of many directions, partly as a product of two signs, and the size of the
directions falls as it does in hidden states, so that accuracy is below 1 and an MLP has something to learn.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.benchmark.compare import OURS
from vlm_mech.benchmark.timing import subset
from vlm_mech.errors import UsageError
from vlm_mech.probe_descent import Recipe
from vlm_mech.probe_train import Split, probabilities, train

PROBES = "probes"
LOOP = "scikit-learn loop"
HIDDEN = (512, 128)
RECIPE = Recipe(hidden=HIDDEN, l2=(1e-4,), learning_rate=3e-3, batch_size=200, patience=2, tolerance=5e-3)
NAN = float("nan")


@dataclass(frozen=True)
class Size:
    """How much is probed; `n_seeds` probes a layer differ in their initial weights."""

    n_layers: int = 9
    width: int = 512
    n_examples: int = 1000
    n_seeds: int = 5
    n_classes: int = 8


SMALL = Size()
FULL = Size(n_layers=33, width=4096, n_examples=2000)


@dataclass(frozen=True, eq=False)
class Task:
    """States of all layers, labels, and who is trained on, validated and tested."""

    states: Float[Tensor, "layer example width"]
    labels: Int[np.ndarray, "example"]
    split: Split
    size: Size


def make_task(size: Size, *, seed: int = 0) -> Task:
    """States whose label's first two bits stand along directions of their own, the third in the product of two."""
    if size.n_classes != 8:
        raise UsageError(f"n_classes is {size.n_classes}; the labels are made of three bits, so 8 it must be")
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, size.n_classes, size.n_examples)
    bits = ((labels[:, None] >> np.arange(3)) & 1) * 2 - 1
    # As in hidden states, no coordinate is a direction of its own.
    turn = torch.linalg.qr(torch.randn(size.width, size.width, generator=torch.Generator().manual_seed(seed)))[0]
    layers = [_layer(size, bits, np.random.default_rng((seed, layer))) @ turn for layer in range(size.n_layers)]
    order = rng.permutation(size.n_examples)
    ends = [round(0.6 * size.n_examples), round(0.8 * size.n_examples)]
    train_part, validation, test = np.split(order, ends)
    return Task(torch.stack(layers), labels, Split(train_part, validation, test, seed=seed), size)


def _layer(size: Size, bits: Int[np.ndarray, "example three"], rng: np.random.Generator) -> Tensor:
    latent = rng.normal(size=(size.n_examples, size.width)).astype(np.float32)
    sign = rng.choice([-1, 1], size.n_examples)
    latent[:, 10] += 2.2 * bits[:, 0]
    latent[:, 20] += 2.2 * bits[:, 1]
    latent[:, 6] = 0.5 * latent[:, 6] + 2 * sign
    latent[:, 7] = 0.5 * latent[:, 7] + 2 * sign * bits[:, 2]
    latent *= (np.arange(1, size.width + 1) ** -0.5).astype(np.float32)
    return torch.from_numpy(latent)


def ours(task: Task) -> Float[np.ndarray, "layer seed"]:
    """Test accuracy of every layer's probes, one a seed, all trained together."""
    size = task.size
    splits = [
        Split(task.split.train, task.split.validation, task.split.test, seed=seed, repeat=seed)
        for seed in range(size.n_seeds)
    ]
    labels = torch.from_numpy(task.labels)[None]
    test = torch.from_numpy(task.split.test)
    found = np.zeros((size.n_layers, size.n_seeds))
    for entries, stack in train(task.states, labels, splits, RECIPE, n_classes=size.n_classes):
        said = probabilities(stack, task.states[list(entries.features)][:, test])[:, 0]
        hits = (said.argmax(-1).numpy() == task.labels[task.split.test]).mean(1)
        found[list(entries.features), list(entries.splits)] = hits
    return found


def loop(task: Task, layer: int, seed: int) -> float:
    """Test accuracy of one scikit-learn probe: same hidden layers, its own defaults with early stopping."""
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    split = task.split
    states = task.states[layer].numpy()
    scaler = StandardScaler().fit(states[split.train])
    # It sets its own validation part aside, so it gets ours to draw it from.
    known = np.concatenate([split.train, split.validation])
    estimator = MLPClassifier(HIDDEN, early_stopping=True, random_state=seed)
    estimator.fit(scaler.transform(states[known]), task.labels[known])
    return float(estimator.score(scaler.transform(states[split.test]), task.labels[split.test]))


def probes_case(
    size: Size = SMALL, *, rival_cells: int = 3, repeats: int = 1, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The probes case; cells are probes.

    Args:
        rival_cells: how many probes scikit-learn fits, drawn with `seed`; its time is scaled by count.

    Returns:
        The table as of the other cases (`difference` is that of mean test accuracy, on the probes that both fitted),
        and notes with accuracies and the seconds of the processor.
    """
    load, task = os.getloadavg()[0], make_task(size, seed=seed)
    n_cells = size.n_layers * size.n_seeds
    chosen = subset(n_cells, rival_cells, seed)
    if repeats < 1:
        raise UsageError(f"at least one repeat is needed, not {repeats}")
    rows, processor, accuracy = [], {OURS: [], LOOP: []}, {}
    for repeat in range(repeats):
        started, busy = time.perf_counter(), time.process_time()
        found = ours(task)
        seconds = {OURS: time.perf_counter() - started}
        processor[OURS].append(time.process_time() - busy)
        started, busy = time.perf_counter(), time.process_time()
        theirs = [loop(task, *divmod(cell, size.n_seeds)) for cell in chosen]
        scale = n_cells / len(chosen)
        seconds[LOOP] = (time.perf_counter() - started) * scale
        processor[LOOP].append((time.process_time() - busy) * scale)
        same = [float(found[divmod(cell, size.n_seeds)]) for cell in chosen]
        accuracy = {OURS: float(np.mean(same)), LOOP: float(np.mean(theirs)), "ours, all probes": float(found.mean())}
        rows += [_row(name, repeat, seconds, accuracy[LOOP] - accuracy[OURS]) for name in (OURS, LOOP)]
    notes = {"case": PROBES, "n_cells": n_cells, "rival_cells": len(chosen), "load_before": load, "bound": 1.0}
    return pd.DataFrame(rows), notes | {"accuracy": accuracy, "processor_seconds": processor, "size": vars(size)}


def _row(name: str, repeat: int, seconds: dict[str, float], difference: float) -> dict[str, Any]:
    row = {"example": f"repeat {repeat + 1}", "case": PROBES, "contender": name, "skipped": ""}
    row |= {"seconds": seconds[name], "ratio": seconds[name] / seconds[OURS]}
    row |= {"forwards": NAN, "of_bound": NAN, "memory": NAN, "difference": 0.0 if name == OURS else difference}
    baselines = {
        "seconds": seconds[OURS],
        "ratio": 1.0,
        "forwards": NAN,
        "of_bound": NAN,
        "memory": NAN,
        "difference": 0.0,
    }
    return row | {f"{metric}_baseline": value for metric, value in baselines.items()}
