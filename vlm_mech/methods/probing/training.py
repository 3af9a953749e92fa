"""Many probes trained at once: every feature set, split, label set and strength of the penalty in a few tensors.

scikit-learn's estimators are the reference for a single probe (`crossfit.reference`); here the weights of all probes
are stacked and one minibatch step moves all of them. A feature set is standardised with the mean and deviation of each
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
from vlm_mech.methods.probing.descent import Part, ProbeRecipe, descend, scores
from vlm_mech.methods.probing.standardisation import Scaling, broken_example, fit, rotation

COPIES = 8
"""Tensors as large as the weights that are held: the weights, their gradient, Adam's two, the best, two spare, and the
stack handed out before."""
KEPT_BACK = 0.15
"""Part of the memory that is left for what the allocator wastes."""


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

    The first weights are entry x rank x label set x hidden, the others entry x label set x in x out. `loss` is the best
    validation loss and `epoch` when it was reached, `l2` the chosen penalty. `scaling` is what each entry's features go
    through, and `own` what it makes of those trained with; entries that differ in their seed alone share both.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    scaling: tuple[Scaling, ...]
    own: tuple[Tensor, ...]
    loss: Float[Tensor, "entry variant"]
    epoch: Int[Tensor, "entry variant"]
    l2: Float[Tensor, "entry variant"]


@dataclass(frozen=True)
class Entries:
    """Which feature set and which split each entry of a stack is about."""

    features: tuple[int, ...]
    splits: tuple[int, ...]


def train(
    features: Float[Tensor, "feature example width"],
    labels: Int[Tensor, "variant labelled"],
    splits: Sequence[Split],
    recipe: ProbeRecipe,
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
    n_most = max(len(split.train) for split in splits)
    n_steps = math.ceil(n_most / recipe.batch_size)
    turn = rotation(n_most).to(features.device) if features.shape[-1] > n_most else None
    left = round((1 - KEPT_BACK) * memory) - _bytes_of_fit(features, n_most)
    n_chunk = max(1, left // _bytes_per_entry(features, labels, splits, recipe, n_classes))
    fitted: dict[tuple[int, bytes], tuple[Scaling, Tensor]] = {}
    for start in range(0, len(pairs), n_chunk):
        chunk = pairs[start : start + n_chunk]
        entries = Entries(tuple(feature for _, feature in chunk), tuple(split for split, _ in chunk))
        fitted = _fitted(features, splits, entries, turn, fitted)
        found = [fitted[feature, splits[split].train.tobytes()] for split, feature in chunk]
        yield entries, _trained(found, labels, splits, recipe, entries, n_classes, n_steps)


def _check(
    features: Float[Tensor, "feature example width"],
    labels: Int[Tensor, "variant labelled"],
    splits: Sequence[Split],
    n_classes: int,
) -> None:
    """Raises `UsageError` for what no probe can be trained on."""
    for number, states in enumerate(features):
        example = broken_example(states)
        if example is not None:
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
    """What the probes of each entry say of examples of its feature set, whether trained with or not."""
    given = torch.stack([scaling(states) for scaling, states in zip(stack.scaling, features, strict=True)])
    with torch.no_grad():
        return scores(stack.weights, stack.biases, given).softmax(-1)


def own_probabilities(stack: Stack, rows: Int[Tensor, "entry row"]) -> Float[Tensor, "entry variant row n_classes"]:
    """The same of examples that stand in the features trained with, by their numbers; nothing is scaled again."""
    given = torch.stack([own[numbers] for own, numbers in zip(stack.own, rows, strict=True)])
    with torch.no_grad():
        return scores(stack.weights, stack.biases, given).softmax(-1)


def _bytes_of_fit(features: Tensor, n_most: int) -> int:
    """What `fit` holds at a time besides what it returns, and what is kept of the fits before."""
    n_examples, width = features.shape[1:]
    scaled = (2 * n_examples + n_most) * width
    if width <= n_most:
        return 4 * scaled
    # Products, three squares of them and two that the eigenvectors are found in, the rotation; two fits from before.
    turned = n_most * (n_examples + 6 * n_most) + 2 * n_most * (n_examples + n_most)
    return 4 * (scaled + turned)


def _bytes_per_entry(
    features: Tensor, labels: Tensor, splits: Sequence[Split], recipe: ProbeRecipe, n_classes: int
) -> int:
    n_train = max(len(split.train) for split in splits)
    n_held = max(len(split.validation) for split in splits)
    widths = [min(features.shape[-1], n_train), *recipe.hidden, n_classes]
    n_probes = len(labels) * len(recipe.l2)
    n_weights = n_probes * sum(one * other for one, other in itertools.pairwise(widths))
    n_active = n_probes * sum(widths[1:]) * max(recipe.batch_size, n_held)
    n_given = (features.shape[1] + n_train + n_held) * widths[0]
    return 4 * (COPIES * n_weights + n_given + 3 * n_active)


def _fitted(
    features: Tensor,
    splits: Sequence[Split],
    entries: Entries,
    turn: Tensor | None,
    known: dict[tuple[int, bytes], tuple[Scaling, Tensor]],
) -> dict[tuple[int, bytes], tuple[Scaling, Tensor]]:
    """The scaling of every feature set and training part of a chunk; those of the chunk before need no second fit."""
    found = {}
    for feature, number in zip(entries.features, entries.splits, strict=True):
        part = splits[number].train
        key = (feature, part.tobytes())
        if key not in found:
            rows = torch.as_tensor(part, device=features.device)
            found[key] = known[key] if key in known else fit(features[feature], rows, turn)
    return found


def _trained(
    fitted: Sequence[tuple[Scaling, Tensor]],
    labels: Tensor,
    splits: Sequence[Split],
    recipe: ProbeRecipe,
    entries: Entries,
    n_classes: int,
    n_steps: int,
) -> Stack:
    """One stack, trained; of the penalties the one with the best validation loss is kept for each probe."""
    scaling, own = zip(*fitted, strict=True)
    device = own[0].device
    chosen_splits = [splits[split] for split in entries.splits]
    parts = [_part(own, labels, [split.train for split in chosen_splits])]
    parts += [_part(own, labels, [split.validation for split in chosen_splits])]
    n_penalties, n_sets = len(recipe.l2), len(labels)
    penalties = torch.tensor(recipe.l2, device=device).repeat(n_sets)
    parts = [Part(part.given, part.classes.repeat_interleave(n_penalties, 1), part.real) for part in parts]
    seeds = [split.seed for split in chosen_splits]
    width, n_rank = scaling[0].source.shape[1], own[0].shape[1]
    weights, biases = _initial(seeds, recipe, width, n_rank, n_sets * n_penalties, n_classes)
    biases[-1] = _shares(parts[0], n_classes).log().cpu()
    start = [each.to(device) for each in (*weights, *biases)]
    best, loss, epoch = descend(start, parts[0], parts[1], penalties, seeds, recipe, n_steps)
    chosen = loss.unflatten(1, (n_sets, n_penalties)).argmin(2) + n_penalties * torch.arange(n_sets, device=device)
    n_layers, rows = len(weights), torch.arange(len(chosen), device=device)[:, None]
    kept = [best[0].transpose(1, 2)[rows, chosen].transpose(1, 2), *(each[rows, chosen] for each in best[1:])]
    numbers = (loss.gather(1, chosen), epoch.gather(1, chosen), penalties[chosen])
    return Stack(tuple(kept[:n_layers]), tuple(kept[n_layers:]), tuple(scaling), tuple(own), *numbers)


def _part(own: Sequence[Tensor], labels: Tensor, numbers: Sequence[np.ndarray]) -> Part:
    """The examples with the given numbers, one list of numbers an entry."""
    most, device = max(len(each) for each in numbers), own[0].device
    padded = np.stack([np.pad(each, (0, most - len(each)), mode="edge") for each in numbers])
    real = np.stack([np.arange(most) < len(each) for each in numbers])
    rows = torch.as_tensor(padded, device=device)
    given = torch.stack([each[some] for each, some in zip(own, rows, strict=True)])
    return Part(given, labels.to(device)[:, rows].transpose(0, 1), torch.as_tensor(real, device=device))


def _shares(part: Part, n_classes: int) -> Float[Tensor, "entry variant n_classes"]:
    """The share of each class in the training part, one example of each added: where every probe begins."""
    there = functional.one_hot(part.classes, n_classes) * part.real[:, None, :, None]
    counts = there.sum(2) + 1.0
    return counts / counts.sum(-1, keepdim=True)


def _initial(
    seeds: Sequence[int], recipe: ProbeRecipe, width: int, n_rank: int, n_variants: int, n_classes: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases; those of one seed start alike, and the weights of the last layer at zero.

    A turn keeps lengths, so the first weights have the deviation that they would have for all `width` features.
    """
    widths, made = (n_rank, *recipe.hidden, n_classes), {}
    for seed in dict.fromkeys(seeds):
        generator = torch.Generator().manual_seed(seed)
        made[seed] = [
            torch.randn(one, other, generator=generator) * (2 / (one if number else width)) ** 0.5
            if number < len(recipe.hidden) else torch.zeros(one, other)
            for number, (one, other) in enumerate(itertools.pairwise(widths))
        ]  # fmt: skip
    weights = [torch.stack([made[seed][number] for seed in seeds]) for number in range(len(widths) - 1)]
    weights = [weight[:, None].expand(-1, n_variants, -1, -1) for weight in weights]
    weights[0] = weights[0].transpose(1, 2)
    return [each.contiguous() for each in weights], [torch.zeros(len(seeds), n_variants, out) for out in widths[1:]]
