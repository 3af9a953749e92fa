"""Many probes trained at once: every feature set, split, label set and strength of the penalty in a few tensors.

scikit-learn's estimators are the reference for a single probe (`probe.reference`); here the weights of all probes are
stacked and one minibatch step moves all of them. A feature set is standardised with the mean and deviation of each
split's training part alone; every probe stops by itself, at its own best validation loss, and the penalty is chosen
there too. Nothing here sees the test part.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from vlm_mech.errors import UsageError
from vlm_mech.probe_descent import Part, Recipe, descend, scores

COPIES = 7
"""Tensors as large as the weights that training holds: the weights, their gradient, Adam's two, the best, two spare."""
STILL = 1e-6
"""A feature whose deviation is below this part of its mean is constant, up to rounding."""


@dataclass(frozen=True, eq=False)
class Split:
    """Numbers of the examples of each part; `seed` draws initial weights and the order of the minibatches.

    `repeat` counts the partitions of the data: the folds of one partition share it.
    """

    train: Int[np.ndarray, "n_train"]
    validation: Int[np.ndarray, "n_validation"]
    test: Int[np.ndarray, "n_test"]
    seed: int = 0
    repeat: int = 0


@dataclass(frozen=True, eq=False)
class Stack:
    """Trained probes: for each entry (a feature set under a split) one probe a label set.

    The first weights are entry x width x label set x hidden, the others entry x label set x in x out. `loss` is the
    best validation loss and `epoch` when it was reached, `l2` the chosen penalty.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    scaling: "Scaling"
    loss: Float[Tensor, "entry variant"]
    epoch: Int[Tensor, "entry variant"]
    l2: Float[Tensor, "entry variant"]


@dataclass(frozen=True, eq=False)
class Scaling:
    """What a feature set goes through before the probe: centred and divided, then (wide ones) turned.

    `basis` gives coordinates in what the training examples span, where they are fewer than the features: a probe cannot
    learn anything about other directions, and training is that much cheaper. Entries that differ in their seed alone
    share one; `entry` says which is whose.
    """

    mean: Float[Tensor, "fitted width"]
    deviation: Float[Tensor, "fitted width"]
    basis: Float[Tensor, "fitted width rank"] | None
    entry: Int[Tensor, "entry"]

    def __call__(self, features: Float[Tensor, "entry example width"]) -> Float[Tensor, "entry example rank"]:
        """The features as the probes take them."""
        scaled = (features - self.mean[self.entry, None]) / self.deviation[self.entry, None]
        if self.basis is None:
            return scaled
        # One at a time: a basis is large, and several entries share it.
        return torch.stack([one @ self.basis[fitted] for one, fitted in zip(scaled, self.entry.tolist(), strict=True)])


@dataclass(frozen=True)
class Entries:
    """Which feature set and which split each entry of a stack is about."""

    features: tuple[int, ...]
    splits: tuple[int, ...]


def train(
    features: Float[Tensor, "feature example width"],
    labels: Int[Tensor, "variant labelled"],
    splits: Sequence[Split],
    recipe: Recipe,
    *,
    n_classes: int,
    memory: int = 2**28,
) -> Iterator[tuple[Entries, Stack]]:
    """Trains a probe for every feature set, split and label set, as many at once as the memory allows.

    Args:
        labels: class numbers; several label sets (the answers, and shuffled ones, say) share splits and minibatches.
        memory: bytes that training may take beyond the features. Results do not depend on it.

    Yields:
        Which feature sets and splits a stack is about, splits in the inner order, and the stack.

    Raises:
        UsageError: features that are not finite, fewer than two classes, or a split with an empty part.
    """
    _check(features, labels, splits, n_classes)
    pairs = [(split, feature) for feature in range(len(features)) for split in range(len(splits))]
    n_most, width = max(len(split.train) for split in splits), features.shape[-1]
    n_steps = math.ceil(n_most / recipe.batch_size)
    n_chunk = max(1, memory // _bytes_per_entry(features, labels, splits, recipe, n_classes))
    for start in range(0, len(pairs), n_chunk):
        chunk = pairs[start : start + n_chunk]
        entries = Entries(tuple(feature for _, feature in chunk), tuple(split for split, _ in chunk))
        yield entries, _trained(features, labels, splits, recipe, entries, n_classes, n_steps, turned=width > n_most)


def _check(
    features: Float[Tensor, "feature example width"],
    labels: Int[Tensor, "variant labelled"],
    splits: Sequence[Split],
    n_classes: int,
) -> None:
    """Raises `UsageError` for what no probe can be trained on."""
    if not bool(torch.isfinite(features).all()):
        number, example = torch.nonzero(~torch.isfinite(features))[0, :2].tolist()
        raise UsageError(f"features of set {number} are not finite at example {example}; finite numbers are needed")
    if labels.shape[1] != features.shape[1]:
        raise UsageError(f"there are {labels.shape[1]} labels for {features.shape[1]} examples; one each is needed")
    if n_classes < 2:
        raise UsageError(f"the labels have {n_classes} class; a probe needs at least two")
    for split in splits:
        if not (len(split.train) and len(split.validation)):
            sizes = f"{len(split.train)} training and {len(split.validation)} validation examples"
            raise UsageError(f"a split has {sizes}; both are needed")


def probabilities(
    stack: Stack, features: Float[Tensor, "entry example width"]
) -> Float[Tensor, "entry variant example n_classes"]:
    """What the probes of each entry say of the examples of its feature set."""
    with torch.no_grad():
        return scores(stack.weights, stack.biases, stack.scaling(features)).softmax(-1)


def _bytes_per_entry(features: Tensor, labels: Tensor, splits: Sequence[Split], recipe: Recipe, n_classes: int) -> int:
    n_held = max(len(split.train) + len(split.validation) for split in splits)
    widths = [features.shape[-1], *recipe.hidden, n_classes]
    n_probes = len(labels) * len(recipe.l2)
    n_weights = n_probes * sum(one * other for one, other in itertools.pairwise(widths))
    n_active = n_probes * sum(widths[1:]) * max(recipe.batch_size, n_held)
    return 4 * (COPIES * n_weights + 3 * n_held * features.shape[-1] + 3 * n_active)


def _trained(
    features: Tensor,
    labels: Tensor,
    splits: Sequence[Split],
    recipe: Recipe,
    entries: Entries,
    n_classes: int,
    n_steps: int,
    *,
    turned: bool,
) -> Stack:
    """One stack, trained; of the penalties the one with the best validation loss is kept for each probe."""
    scaling = _scaling(features, splits, entries, turned=turned)
    parts = [_part(features, labels, entries, scaling, [split.train for split in splits])]
    parts += [_part(features, labels, entries, scaling, [split.validation for split in splits])]
    n_penalties, n_sets = len(recipe.l2), len(labels)
    penalties = torch.tensor(recipe.l2, device=features.device).repeat(n_sets)
    parts = [Part(part.given, part.classes.repeat_interleave(n_penalties, 1), part.real) for part in parts]
    seeds = [splits[split].seed for split in entries.splits]
    weights, biases = _initial(seeds, recipe, parts[0].given.shape[-1], n_sets * n_penalties, n_classes)
    biases[-1] = _shares(parts[0], n_classes).log().cpu()
    start = [each.to(features.device) for each in (*weights, *biases)]
    best, loss, epoch = descend(start, parts[0], parts[1], penalties, seeds, recipe, n_steps)
    chosen = loss.unflatten(1, (n_sets, n_penalties)).argmin(2) + n_penalties * torch.arange(n_sets, device=loss.device)
    n_layers, rows = len(weights), torch.arange(len(chosen), device=loss.device)[:, None]
    kept = [best[0].transpose(1, 2)[rows, chosen].transpose(1, 2), *(each[rows, chosen] for each in best[1:])]
    return Stack(
        tuple(kept[:n_layers]),
        tuple(kept[n_layers:]),
        scaling,
        loss.gather(1, chosen),
        epoch.gather(1, chosen),
        penalties[chosen],
    )


def _scaling(features: Tensor, splits: Sequence[Split], entries: Entries, *, turned: bool) -> Scaling:
    """Fitted on the training part of each entry's split, and on nothing else."""
    means, deviations, bases = [], [], []
    turn = _turn(max(len(split.train) for split in splits)).to(features.device) if turned else None
    fitted: dict[tuple[int, bytes], int] = {}
    pairs = list(zip(entries.features, entries.splits, strict=True))
    keys = [(feature, splits[split].train.tobytes()) for feature, split in pairs]
    for key, (feature, split) in zip(keys, pairs, strict=True):
        if key in fitted:
            continue
        fitted[key] = len(fitted)
        known = features[feature, torch.as_tensor(splits[split].train, device=features.device)].float()
        deviation, mean = torch.std_mean(known, dim=0, correction=0)
        # A constant feature has nothing to tell; dividing by its rounding errors would blow them up.
        deviation = torch.where(deviation <= STILL * mean.abs(), torch.ones_like(deviation), deviation)
        means.append(mean)
        deviations.append(deviation)
        if turn is not None:
            bases.append(_basis((known - mean) / deviation, turn))
    entry = torch.tensor([fitted[key] for key in keys], device=features.device)
    return Scaling(torch.stack(means), torch.stack(deviations), torch.stack(bases) if turned else None, entry)


def _basis(known: Float[Tensor, "example width"], turn: Float[Tensor, "rank rank"]) -> Float[Tensor, "width rank"]:
    """Turned directions that span the examples, by the eigenvectors of their products; lengths are kept."""
    values, vectors = torch.linalg.eigh(known @ known.T)
    held = values > STILL * values[-1]
    inverse = torch.where(held, values.clamp(min=values[-1] * STILL).rsqrt(), torch.zeros_like(values))
    return known.T @ ((vectors * inverse) @ turn[: len(known)])


def _turn(rank: int) -> Float[Tensor, "rank rank"]:
    """A rotation drawn once and for all.

    Adam moves every coordinate alike. Along principal components it would chase those of little variance; after a
    random turn the coordinates are as alike as those of a residual stream.
    """
    drawn = torch.randn(rank, rank, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn)[0]


def _part(features: Tensor, labels: Tensor, entries: Entries, scaling: Scaling, numbers: list[np.ndarray]) -> Part:
    """The examples with the given numbers, one list of numbers a split."""
    most, device = max(len(each) for each in numbers), features.device
    padded = np.stack([np.pad(each, (0, most - len(each)), mode="edge") for each in numbers])
    real = np.stack([np.arange(most) < len(each) for each in numbers])
    split = torch.tensor(entries.splits, device=device)
    rows = torch.as_tensor(padded, device=device)[split]
    sets = torch.tensor(entries.features, device=device)
    given = scaling(features[sets[:, None], rows].float())
    return Part(given, labels.to(device)[:, rows].transpose(0, 1), torch.as_tensor(real, device=device)[split])


def _shares(part: Part, n_classes: int) -> Float[Tensor, "entry variant n_classes"]:
    """The share of each class in the training part, one example of each added: where every probe begins."""
    there = functional.one_hot(part.classes, n_classes) * part.real[:, None, :, None]
    counts = there.sum(2) + 1.0
    return counts / counts.sum(-1, keepdim=True)


def _initial(
    seeds: Sequence[int], recipe: Recipe, width: int, n_variants: int, n_classes: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases; those of one seed start alike, and the weights of the last layer at zero."""
    widths, made = (width, *recipe.hidden, n_classes), {}
    for seed in dict.fromkeys(seeds):
        generator = torch.Generator().manual_seed(seed)
        made[seed] = [
            torch.randn(one, other, generator=generator) * (2 / one) ** 0.5 if number < len(recipe.hidden)
            else torch.zeros(one, other)
            for number, (one, other) in enumerate(itertools.pairwise(widths))
        ]  # fmt: skip
    weights = [torch.stack([made[seed][number] for seed in seeds]) for number in range(len(widths) - 1)]
    weights = [weight[:, None].expand(-1, n_variants, -1, -1) for weight in weights]
    weights[0] = weights[0].transpose(1, 2)
    return [each.contiguous() for each in weights], [torch.zeros(len(seeds), n_variants, out) for out in widths[1:]]
