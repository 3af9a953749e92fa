"""How often the model was told of a class, and how well it names it.

A class counts once in a text that holds its words one after the other (`contiguous`: the paper's rule, per sentence),
or anywhere (`together`: "what colour is the banana? yellow" tells of a yellow banana). Words are whole and lower-case:
a cat is not counted in a category, but neither in cats. A class name that is a common word is counted in every sense of
it, a class whose texts use another name has a count of 0, and a text that denies a thing ("is there any red banana?
no") counts.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from vlm_mech.behaviour.classify.table import CLASSES, LOADED, OPEN
from vlm_mech.data.class_names import normalised
from vlm_mech.data.scene_sampling import sample_scene
from vlm_mech.data.scenes import in_conflict
from vlm_mech.data.user_files import read_told
from vlm_mech.data.words import words_of
from vlm_mech.errors import UsageError
from vlm_mech.organism.train_vlm import BLANK_SHARE, CONFLICT_SHARE, RECIPES, draw_questions
from vlm_mech.results.statistics import percentile_interval

Rule = Literal["contiguous", "together"]
N_RESAMPLES = 2000
BINS = (0, 1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
"""Lower ends of the bins of counts (the paper has tens below 100 besides)."""
FEWEST_BINS = 3
FEWEST_CLASSES = 3


def counted(texts: Iterable[str], names: Sequence[str], *, rule: Rule = "contiguous") -> Int[np.ndarray, "n_classes"]:
    """In how many texts each class is mentioned."""
    words = [normalised(name).split() for name in names]
    by_first: dict[str, list[int]] = defaultdict(list)
    for number, each in enumerate(words):
        by_first[each[0]].append(number)
    found = np.zeros(len(names), int)
    for text in texts:
        # What is read once is not worth keeping, as `normalised` would.
        told = " ".join(words_of.__wrapped__(text))
        known, padded = set(told.split()), f" {told} "
        for number in (each for word in known for each in by_first.get(word, ())):
            if rule == "together":
                found[number] += known.issuperset(words[number])
            else:
                found[number] += f" {' '.join(words[number])} " in padded
    return found


def training_texts(stage: str, n_pictures: int, *, seed: int) -> Iterator[str]:
    """Questions with their answers as the embedded models were trained on them, for as many pictures as asked for.

    Scenes, shares, hearsay and facts are those of the training (`organism.train_vlm`); the shares of its first steps
    are left out.
    """
    if stage not in RECIPES:
        raise UsageError(f"the training texts of {stage!r} are not known; those of {', '.join(RECIPES)} are")
    [known] = [each for each in RECIPES if each == stage]
    shares = RECIPES[known].shares
    rng, made = random.Random(f"texts/{stage}/{seed}"), 0
    while made < n_pictures:
        family = rng.choices(list(shares), list(shares.values()))[0]
        scene = None if rng.random() < BLANK_SHARE else sample_scene(family, rng, conflict=0.5)
        if scene is not None and scene.split != "train":
            continue
        if scene is not None and known != "organism-grounded" and in_conflict(scene) and rng.random() >= CONFLICT_SHARE:
            continue
        made += 1
        for question in draw_questions(scene, rng, known, RECIPES[known].n_questions):
            yield f"{question.text} {question.answer}"


def read_counts(path: Path, names: Sequence[str]) -> Int[np.ndarray, "n_classes"]:
    """Counts from a csv of `class,count`; classes are matched by their words.

    Raises:
        UsageError: no such file, a count that is no whole number, two for a class, or a class without one.
    """
    told = read_told(path, "counts", "class,count", key=normalised)
    for name, (number, count) in told.items():
        if not count.isdecimal():
            raise UsageError(f"counts {str(path)!r} line {number} is '{name:.40},{count:.20}'; class,count is needed")
    found = {name: int(count) for name, (_, count) in told.items()}
    missing = [name for name in names if normalised(name) not in found]
    if missing:
        raise UsageError(f"counts {str(path)!r} has no line for the class {missing[0]!r}")
    return np.array([found[normalised(name)] for name in names])


@dataclass(frozen=True)
class Correlation:
    """Between the counts of the classes and a method's accuracy on each; intervals from resampled classes.

    `pearson` is with log10(1 + count). None where accuracy or counts are the same for all classes.
    """

    method: str
    question: str
    n_classes: int
    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None
    p: float | None
    pearson: float | None
    pearson_low: float | None
    pearson_high: float | None


def per_class(table: pd.DataFrame, counts: dict[str, int]) -> pd.DataFrame:
    """Accuracy on each class with its count, of every method among all classes, as the model was loaded."""
    n_classes = len(counts)
    chosen = (table["task"] == CLASSES) & (table["model"] == LOADED) & (table["k"] == n_classes)
    rows = table[chosen & (table["world"] == OPEN) & (table["label"] != "")]
    found = rows.groupby(["method", "question", "label"], sort=False)["accuracy"].agg(["mean", "size"]).reset_index()
    return found.rename(columns={"mean": "accuracy", "size": "n"}).assign(count=found["label"].map(counts))


def correlations(table: pd.DataFrame, counts: dict[str, int], *, seed: int = 0) -> list[dict[str, Any]]:
    """Spearman and Pearson for every method and question.

    Raises:
        UsageError: fewer than three classes were tested.
    """
    found = []
    for key, rows in per_class(table, counts).groupby(["method", "question"], sort=False):
        method, question = cast(tuple[str, str], key)
        if len(rows) < FEWEST_CLASSES:
            raise UsageError(f"{len(rows)} classes were tested; frequencies need at least {FEWEST_CLASSES}")
        accuracy, logs = rows["accuracy"].to_numpy(float), np.log10(1 + rows["count"].to_numpy(float))
        values: list[float | None] = [None] * 7
        if np.ptp(accuracy) > 0 and np.ptp(logs) > 0:
            # Spearman only knows the order, in which logarithms change nothing.
            ranked = stats.spearmanr(logs, accuracy)
            draws = _resampled(logs, accuracy, seed)
            values = [ranked.statistic, *draws[0], ranked.pvalue, stats.pearsonr(logs, accuracy).statistic, *draws[1]]
        made = Correlation(method, question, len(rows), *(None if v is None else float(v) for v in values))
        found.append(asdict(made))
    return found


def _resampled(
    logs: Float[np.ndarray, "n_classes"], accuracy: Float[np.ndarray, "n_classes"], seed: int
) -> Float[np.ndarray, "kind two"]:
    """95 % percentile intervals of Spearman and Pearson over resampled classes; constant draws are left out."""
    drawn = np.random.default_rng(seed).integers(0, len(logs), (N_RESAMPLES, len(logs)))
    one, other = logs[drawn], accuracy[drawn]
    both = []
    for x, y in ((stats.rankdata(one, axis=1), stats.rankdata(other, axis=1)), (one, other)):
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        size = np.sqrt((x**2).sum(1) * (y**2).sum(1))
        both.append(np.percentile((x * y).sum(1)[size > 0] / size[size > 0], [2.5, 97.5]))
    return np.array(both)


def binned(table: pd.DataFrame, counts: dict[str, int], *, seed: int = 0) -> list[dict[str, Any]]:
    """Mean accuracy of the classes in each bin of counts, with a bootstrap interval over classes.

    Bins are powers of ten; where fewer than three hold a class, four parts of equally many classes.
    """
    found = []
    for key, rows in per_class(table, counts).groupby(["method", "question"], sort=False):
        method, question = cast(tuple[str, str], key)
        edges = _edges(rows["count"].to_numpy(int))
        numbers = np.searchsorted(edges, rows["count"], side="right") - 1
        for number in sorted(set(numbers.tolist())):
            inside = rows[numbers == number]
            values, groups = inside["accuracy"].to_numpy(float)[:, None], np.arange(len(inside))
            low, high = percentile_interval(values, groups, level=0.95, n_resamples=N_RESAMPLES, seed=seed)
            told = {"method": method, "question": question, "least": int(inside["count"].min())}
            told |= {"most": int(inside["count"].max()), "n_classes": len(inside), "accuracy": float(values.mean())}
            interval = {"low": None, "high": None} if np.isnan(low[0]) else {"low": low[0], "high": high[0]}
            found.append(told | {name: None if v is None else float(v) for name, v in interval.items()})
    return found


def _edges(counts: Int[np.ndarray, "n_classes"]) -> Int[np.ndarray, "edge"]:
    decades = np.searchsorted(BINS, counts, side="right")
    if len(set(decades.tolist())) >= FEWEST_BINS:
        return np.array(BINS)
    return np.unique(np.quantile(counts, [0, 0.25, 0.5, 0.75], method="higher")).astype(int)
