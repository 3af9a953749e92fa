"""Layer-wise probes: what can be read off the hidden states at every layer, and what that is worth.

After arXiv 2606.06890 (three-layer MLP a layer) and 2405.18415 (linear layer on the last token or a mean), with what
these lack: standardisation and early stopping that see no test example, splits by scene and question, several seeds,
controls. All probes are trained at once by `training.train`; scikit-learn is the reference for a single probe.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from vlm_mech.errors import UsageError
from vlm_mech.methods.probing.data import Features, Spot
from vlm_mech.methods.probing.descent import ProbeRecipe
from vlm_mech.methods.probing.splits import check_leaks
from vlm_mech.methods.probing.standardisation import broken_example
from vlm_mech.methods.probing.training import Split, own_probabilities, probabilities, train
from vlm_mech.results.result import Metric

ACCURACY = Metric(
    "accuracy",
    "share",
    "share of test examples whose label the probe finds most probable, mean over seeds; a tie is wrong; the baseline "
    "answers with the commonest label of the training part",
)
P_TRUE = Metric("p_true", "probability", "the probe's probability of what the image shows; baseline: 1 / classes")
P_PRIOR = Metric(
    "p_prior",
    "probability",
    "the probe's probability of the usual answer, where images show another; baseline: 1 / classes",
)
P_OTHER = Metric(
    "p_other", "probability", "its mean probability of each other answer, in the same images; baseline: 1 / classes"
)
METRICS = (ACCURACY, P_TRUE, P_PRIOR, P_OTHER)


def metrics_of(table: pd.DataFrame) -> tuple[Metric, ...]:
    """The metrics that have a value: without pictures in conflict there is no usual answer to read."""
    return tuple(each for each in METRICS if table[each.name].notna().to_numpy().any())


@dataclass(frozen=True, eq=False)
class Readings:
    """What probes say of examples that they were not fitted on.

    `tested` is what each seed's probes say of every example, by the fold in which it is a test example; `majority` the
    commonest class of that fold's training part; `elsewhere` what all probes say, on average, of examples of another
    data set (None without one); `fits` has a row a probe with its chosen penalty, best epoch and validation loss.
    """

    spots: tuple[Spot, ...]
    labels: Int[np.ndarray, "variant example"]
    tested: Float[np.ndarray, "spot variant repeat example n_classes"]
    majority: Int[np.ndarray, "variant repeat example"]
    elsewhere: Float[np.ndarray, "spot variant other n_classes"] | None
    fits: pd.DataFrame

    @property
    def hits(self) -> Bool[np.ndarray, "spot variant repeat example"]:
        """Whether the true class is more probable than every other one; a tie is a miss."""
        return is_first(self.tested, self.labels[None, :, None])

    def of(self, variant: int) -> "Readings":
        """The readings of one label set alone, without those of another data set; `fits` are still those of all."""
        one = [variant]
        return replace(
            self, labels=self.labels[one], tested=self.tested[:, one], majority=self.majority[one], elsewhere=None
        )


def is_first(
    given: Float[np.ndarray, "*more n_classes"], classes: Int[np.ndarray, "*some"]
) -> Bool[np.ndarray, "*more"]:
    """Whether a class is more probable than every other one; a tie is a miss."""
    numbers = np.broadcast_to(classes, given.shape[:-1])[..., None]
    own = np.take_along_axis(given, numbers, -1)[..., 0]
    others = given.copy()
    np.put_along_axis(others, numbers, -np.inf, -1)
    return own > others.max(-1)


def crossfit(
    features: Features,
    labels: Int[np.ndarray, "variant example"],
    splits: Sequence[Split],
    recipe: ProbeRecipe,
    *,
    groups: Sequence[Any],
    classes: Sequence[str] = (),
    elsewhere: Features | None = None,
    memory: int = 2**28,
    device: str = "cpu",
) -> Readings:
    """Probes for every spot, split and label set, and what they say of the examples that they did not see.

    Args:
        labels: class numbers from 0; several label sets (answers, shuffled answers) may share the splits.
        splits: partitions of the examples (`splits.make_splits`); each repeat tests every example once.
        groups: what must not be torn apart, checked in every split.
        classes: names of the classes, for errors.
        elsewhere: states of other examples at the same spots, read by all probes.
        memory: bytes that training may take at a time beyond the states.

    Raises:
        UsageError: a group in two parts of a split, a class without training example, states that are not finite, or
            an example that no split or several of one repeat test.
    """
    check_leaks(splits, groups)
    _check_tested(splits, labels.shape[1])
    n_classes, spots = int(labels.max()) + 1, tuple(features)
    for variant in labels:
        _check_classes(variant, splits, n_classes, classes)
    n_repeats = max(split.repeat for split in splits) + 1
    tested = np.full((len(spots), len(labels), n_repeats, labels.shape[1], n_classes), np.nan, np.float32)
    n_others = 0 if elsewhere is None else len(next(iter(elsewhere.values())))
    others, fits = np.zeros((len(spots), len(labels), n_others, n_classes)), []
    for numbers in by_width(features):
        stacked = stacked_states(features, spots, numbers, device)
        extra = None if elsewhere is None else stacked_states(elsewhere, spots, numbers, device)
        options = {"n_classes": n_classes, "memory": memory}
        for entries, stack in train(stacked, torch.from_numpy(labels).to(device), splits, recipe, **options):
            for entry, found in said(entries, stack, splits):
                split = splits[entries.splits[entry]]
                tested[numbers[entries.features[entry]], :, split.repeat, split.test] = found.transpose(1, 0, 2)
            if extra is not None:
                everywhere = probabilities(stack, extra[list(entries.features)]).double().cpu().numpy()
                np.add.at(others, [numbers[feature] for feature in entries.features], everywhere / len(splits))
            fits.append(_fits(entries, stack, [spots[number] for number in numbers], splits))
    majority = _majorities(labels, splits, n_repeats, n_classes)
    read = others.astype(np.float32) if elsewhere is not None else None
    return Readings(spots, labels, tested, majority, read, pd.concat(fits, ignore_index=True))


def said(entries: Any, stack: Any, splits: Sequence[Split]) -> Iterator[tuple[int, np.ndarray]]:
    """What the probes of each entry say of its split's test examples, label set x example x class."""
    most = max(len(splits[split].test) for split in entries.splits)
    padded = np.stack([np.resize(splits[split].test, most) for split in entries.splits])
    found = own_probabilities(stack, torch.as_tensor(padded, device=stack.own[0].device)).cpu().numpy()
    for entry, split in enumerate(entries.splits):
        yield entry, found[entry, :, : len(splits[split].test)]


def by_width(features: Features) -> list[list[int]]:
    """Numbers of the spots whose states have the same width, and so can be stacked."""
    widths: dict[int, list[int]] = {}
    for number, states in enumerate(features.values()):
        widths.setdefault(states.shape[1], []).append(number)
    return list(widths.values())


def stacked_states(features: Features, spots: Sequence[Spot], numbers: Sequence[int], device: str) -> Tensor:
    """The states of some spots in one tensor; raises `UsageError` where they are not finite."""
    for number in numbers:
        example = broken_example(features[spots[number]])
        if example is not None:
            raise UsageError(f"states of {spots[number]} are not finite in example {example}; finite ones are needed")
    return torch.stack([features[spots[number]].float() for number in numbers]).to(device)


def _check_tested(splits: Sequence[Split], n_examples: int) -> None:
    for repeat in {split.repeat for split in splits}:
        counts = np.bincount(
            np.concatenate([split.test for split in splits if split.repeat == repeat]), minlength=n_examples
        )
        if (counts != 1).any():
            example = int((counts != 1).argmax())
            raise UsageError(f"example {example} is tested {counts[example]} times in repeat {repeat}; once is needed")


def _check_classes(
    labels: Int[np.ndarray, "example"], splits: Sequence[Split], n_classes: int, names: Sequence[str]
) -> None:
    if n_classes < 2:
        raise UsageError("every example has the same label; a probe needs at least two classes")
    for number, split in enumerate(splits):
        missing = np.setdiff1d(np.arange(n_classes), labels[split.train])
        if len(missing):
            lacking = f"class {names[missing[0]]!r}" if names else f"class number {missing[0]}"
            raise UsageError(
                f"{lacking} is in no training example of split {number}; give more examples, fewer folds (at least 3), "
                'or, if it is another, the grouping "scene", which may separate those with the same question'
            )


def _majorities(labels: np.ndarray, splits: Sequence[Split], n_repeats: int, n_classes: int) -> np.ndarray:
    found = np.zeros((len(labels), n_repeats, labels.shape[1]), int)
    for split in splits:
        for variant, row in enumerate(labels):
            found[variant, split.repeat, split.test] = np.bincount(row[split.train], minlength=n_classes).argmax()
    return found


def _fits(entries: Any, stack: Any, spots: Sequence[Spot], splits: Sequence[Split]) -> pd.DataFrame:
    rows = []
    for entry, (feature, split) in enumerate(zip(entries.features, entries.splits, strict=True)):
        for variant in range(stack.loss.shape[1]):
            numbers = {name: getattr(stack, name)[entry, variant].item() for name in ("l2", "epoch", "loss")}
            rows.append({"spot": str(spots[feature]), "split": split, "variant": variant, **numbers})
    return pd.DataFrame(rows)


def reference(recipe: ProbeRecipe, n_train: int, *, seed: int = 0) -> Any:
    """scikit-learn's counterpart of one probe: standardisation and LogisticRegression or MLPClassifier.

    The first penalty of the recipe is taken; `n_train` turns it into scikit-learn's C.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    penalty = recipe.l2[0]
    if not recipe.hidden:
        strength = 1 / (penalty * n_train) if penalty else math.inf
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    batch = min(recipe.batch_size, n_train)
    options = {"alpha": penalty * batch, "learning_rate_init": recipe.learning_rate, "early_stopping": True}
    options |= {"batch_size": batch, "random_state": seed, "max_iter": max(200, recipe.max_epochs)}
    return make_pipeline(StandardScaler(), MLPClassifier(recipe.hidden, **options))


def over_seeds(readings: Readings, *, level: float = 0.95) -> pd.DataFrame:
    """Test accuracy by spot and label set: mean over seeds, deviation between them, and a t interval of the mean.

    That interval is about the draw of folds, weights and minibatches, on these examples; the one in a `Result` is about
    the draw of scenes.
    """
    accuracies = readings.hits.mean(3)
    n_seeds, rows = accuracies.shape[2], []
    for number, spot in enumerate(readings.spots):
        for variant, values in enumerate(accuracies[number]):
            spread = float(values.std(ddof=1)) if n_seeds > 1 else math.nan
            reach = stats.t.ppf((1 + level) / 2, max(1, n_seeds - 1)) * spread / math.sqrt(n_seeds)
            row = {"spot": str(spot), "variant": variant, "n_seeds": n_seeds, "mean": float(values.mean())}
            rows.append(row | {"deviation": spread, "low": values.mean() - reach, "high": values.mean() + reach})
    return pd.DataFrame(rows)
