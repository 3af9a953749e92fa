"""Images that a contrastive model finds nearly the same: who tells them apart? The rows of the table."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from vlm_mech.behaviour.erroneous_agreement.data import Case
from vlm_mech.behaviour.erroneous_agreement.similarity import (
    alignment_with_floor,
    answer_scores,
    contrastive_view,
    cosines,
    patch_cosine,
    picks,
    rank_correlations,
    tower_patches,
)
from vlm_mech.results.result import N_RESAMPLES, Metric, Result
from vlm_mech.results.statistics import corrected, mcnemar, point_biserial

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

AXES = ("view", "data")
POOLED, RANKS = "pooled embedding", "ranks of the embedding"
PATCHES, READ = "patches, contrastive", "patches the VLM reads"
SIMILARITIES = (POOLED, RANKS, PATCHES, READ)
TO_TEXT, TO_IMAGE = "contrastive, image to text", "contrastive, text to image"
AMONG, OPEN, BOTH = "VLM, among answers", "VLM, whole vocabulary", "VLM, both questions"
READERS = (TO_TEXT, TO_IMAGE, AMONG, OPEN, BOTH)
PAIR = Metric("pair", "share", "share of pairs with both images correct; a tie is wrong")
INDIVIDUAL = Metric("individual", "share", "share of correct images; a tie is wrong")
SET = Metric("set", "share", "share of sets of four with all images correct")
SIMILARITY = Metric(
    "similarity", "cosine",
    "of the two images of a pair: cosine, its mean over patches, or Spearman's rho of the entries; baseline: that of "
    "images of different pairs",
)  # fmt: skip
ABOVE = Metric("above_tau", "share", "share of pairs whose similarity is above tau; baseline: unpaired images")
PLACE = Metric("place", "share", "share of unpaired similarities of the data set that are below the pair's own")
METRICS = (PAIR, INDIVIDUAL, SET, SIMILARITY, ABOVE, PLACE)
BY_CATEGORY = {"metrics": [INDIVIDUAL.name, PAIR.name], "cells": {"view": list(READERS)}}
"""What is told by category."""
SHUFFLED = 0.5
"""Place of a pair that is no more alike than any two images."""


# One batch


def looked_at(encoder: "DualEncoder", vlm: "VLM", cases: Sequence[Case], after: Case) -> pd.DataFrame:
    """One row per image of some cases of one data set: embedding, scores of captions and answers, likeness of patches.

    Args:
        after: the case that follows the last; each pair's first image is also held against an image of the next case
            (where that is of another group), the floor of patch-wise similarities without keeping all patches.
    """
    images = [image for case in cases for image in case.images]
    captions = [caption for case in cases for caption in case.captions]
    more = [*images, after.images[1]]
    view = contrastive_view(encoder, more, captions)
    columns = _answers(vlm, cases) | _patches(cases, after, view.patches, tower_patches(vlm, more))
    columns["embedding"] = list(view.images[: len(images)])
    for name, states in view.states.items():
        columns[f"states of {name}"] = list(states[: len(images)].reshape(len(images), -1))
    scores, start = [], 0
    for case in cases:
        rows = slice(start, start := start + len(case.images))
        scores += list(cosines(view.images[rows], view.captions[rows]))
    named = {"case": [case.id for case in cases for _ in case.images]}
    named["group"] = [case.group for case in cases for _ in case.images]
    if any(case.categories for case in cases):
        named["category"] = [
            case.categories[place // 2] if case.categories else ""
            for case in cases
            for place in range(len(case.images))
        ]
    return pd.DataFrame(named | {"captions": scores} | columns)


def _answers(vlm: "VLM", cases: Sequence[Case]) -> dict[str, list[Any]]:
    """Log-probabilities of the answers to each question, and whether the first is answered correctly unprompted."""
    columns: dict[str, list[Any]] = {}
    for number, first in enumerate(cases[0].asked):
        prompts = [case.asked[number].about(image) for case in cases for image in case.images]
        answers = [case.asked[number].answers for case in cases for _ in case.images]
        right = [case.asked[0].answers[place] for case in cases for place in range(len(case.images))]
        # A question about one of two axes has no right answer for images of the other.
        known = right if len(first.answers) == len(cases[0].images) else [each[0] for each in answers]
        scores, said = answer_scores(vlm, prompts, answers, known)
        columns[f"answers {number}"] = list(scores)
        if number == 0:
            columns["said"] = list(said)
    return columns


def _patches(cases: Sequence[Case], after: Case, *towers: Sequence[Any]) -> dict[str, list[float]]:
    """For each pair's first image, mean cosine of its patches with those of its pair and of a stranger.

    Args:
        towers: patches of all images of the cases, and of the second image of the one after them.
    """
    columns: dict[str, list[float]] = {}
    starts = np.cumsum([0, *(len(case.images) for case in cases)]).tolist()
    strange = [one.group != other.group for one, other in itertools.pairwise([*cases, after])]
    for name, seen in zip((PATCHES, READ), towers, strict=True):
        own, floor = [], []
        for (start, stop), known in zip(itertools.pairwise(starts), strange, strict=True):
            stranger = seen[stop + 1] if stop + 1 < len(seen) else seen[-1]
            for image in range(start, stop):
                first = (image - start) % 2 == 0
                own.append(patch_cosine(seen[image], seen[image + 1]) if first else np.nan)
                floor.append(patch_cosine(seen[image], stranger) if first and known else np.nan)
        columns |= {name: own, f"{name}, floor": floor}
    return columns


# The table


def pair_table(images: pd.DataFrame, *, tau: float) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """One row per pair and cell of `AXES` from the rows of all images, and the floor of each similarity in each set."""
    tables, floors = [], []
    for data, some in images.groupby("data", sort=False):
        table, floor = _of_data(some.reset_index(drop=True), tau)
        tables.append(table.assign(data=data))
        floors += [{"data": str(data)} | each for each in floor]
    table = pd.concat(tables, ignore_index=True)
    known = ["example", "group", *(["category"] if "category" in table else [])]
    pairs = table[known].drop_duplicates()
    every = pairs.merge(table[list(AXES)].drop_duplicates(), how="cross")
    # A pair belongs to one data set; its cells in the others are empty.
    return every.merge(table, how="left", on=[*known, *AXES]), floors


def _of_data(images: pd.DataFrame, tau: float) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    cases = [case.reset_index(drop=True) for _, case in images.groupby("case", sort=False)]
    data = images["data"].iloc[0]
    names = [f"{data}/{case['case'][0]}/{pair}" for case in cases for pair in range(len(case) // 2)]
    groups = np.array([f"{data}/{case['group'][0]}" for case in cases for _ in range(len(case) // 2)])
    known = pd.DataFrame({"example": names, "group": groups})
    if "category" in images:
        known["category"] = images["category"].fillna("").to_numpy()[::2]
    tables = [known.assign(view=view, **columns) for view, columns in _readers(cases).items()]
    floors = []
    for view, (own, others) in _similar(images, pd.factorize(groups)[0]).items():
        columns, floor = _beside(own, others, tau)
        tables.append(known.assign(view=view, **columns))
        floors.append({"view": view} | floor)
    return pd.concat(tables, ignore_index=True), floors


def _readers(cases: Sequence[pd.DataFrame]) -> dict[str, dict[str, np.ndarray]]:
    """Accuracies of every reader; those that a data set does not have are missing."""
    found: dict[str, list[np.ndarray]] = {view: [] for view in READERS}
    for case in cases:
        captions, answers = np.stack(list(case["captions"])), np.stack(list(case["answers 0"]))
        found[TO_TEXT].append(picks(captions))
        found[TO_IMAGE].append(picks(captions.T))
        found[AMONG].append(picks(answers))
        found[OPEN].append(case["said"].to_numpy(bool))
        if "answers 2" in case and bool(case["answers 2"].notna().all()):
            found[BOTH].append(picks(np.hstack([np.stack(list(case[f"answers {number}"])) for number in (1, 2)])))
    return {view: accuracies(right) for view, right in found.items() if right}


def accuracies(right: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Individual, pair and set accuracy of each pair, with chance, from which images of each case are right.

    The accuracy of a set of four is given next to its first pair, so that it counts once.
    """
    names = [name for each in (INDIVIDUAL, PAIR, SET) for name in (each.name, f"{each.name}_baseline")]
    columns: dict[str, list[float]] = {name: [] for name in names}
    for case in right:
        n = len(case)
        for number, pair in enumerate(case.reshape(-1, 2)):
            whole = n > 2 and number == 0
            columns["individual"].append(pair.mean())
            columns["pair"].append(float(pair.all()))
            columns["set"].append(float(case.all()) if whole else np.nan)
            columns["individual_baseline"].append(1 / n)
            columns["pair_baseline"].append(1 / n**2)
            columns["set_baseline"].append(1 / n**n if whole else np.nan)
    return {name: np.array(values) for name, values in columns.items()}


def _similar(
    images: pd.DataFrame, groups: Int[np.ndarray, "pair"]
) -> dict[str, tuple[np.ndarray, list[Float[np.ndarray, "other"]]]]:
    """By kind of similarity: that of each pair, and for each pair those of its first image and images of others."""
    states = np.stack(list(images["embedding"]))
    different = groups[:, None] != groups[None]
    found = {}
    for view, measure in ((POOLED, cosines), (RANKS, rank_correlations)):
        matrix = measure(states[::2], states[1::2])
        found[view] = np.diag(matrix), [row[held] for row, held in zip(matrix, different, strict=True)]
    first = images.iloc[::2]
    for view in (PATCHES, READ):
        found[view] = first[view].to_numpy(), list(first[f"{view}, floor"].to_numpy()[:, None])
    return found


def _beside(own: np.ndarray, others: list[np.ndarray], tau: float) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns of a similarity, and what unpaired images have."""
    every = np.concatenate(others)
    held = ~np.isnan(own)
    every = every[~np.isnan(every)]
    columns = {
        "similarity": own,
        "similarity_baseline": np.array([values.mean() for values in others]),
        "above_tau": np.where(held, own > tau, np.nan),
        "above_tau_baseline": np.array([np.where(np.isnan(values), np.nan, values > tau).mean() for values in others]),
        "place": np.where(held, [(every < value).mean() if len(every) else np.nan for value in own], np.nan),
        "place_baseline": np.full(len(own), SHUFFLED),
    }
    if not len(every):
        return columns, {"n": 0}
    low, middle, high = np.percentile(every, [5, 50, 95])
    floor = {"n": len(every), "low": low, "median": middle, "high": high}
    return columns, floor | {"above_tau": float((every > tau).mean())}


def alignments(images: pd.DataFrame, *, seed: int = 0) -> list[dict[str, Any]]:
    """Debiased CKA between first and second images at every layer of the contrastive tower, by data set and pooling."""
    found = []
    for data, some in images.groupby("data", sort=False):
        groups = pd.factorize(some["group"].to_numpy()[::2])[0]
        n_layers = int(some["n_layers"].iloc[0])
        for column in [name for name in some if str(name).startswith("states of ")]:
            states = np.stack(list(some[column])).reshape(len(some), n_layers, -1)
            for layer in range(n_layers):
                made = alignment_with_floor(states[::2, layer], states[1::2, layer], groups, seed=seed)
                values = {name: None if np.isnan(value) else value for name, value in dataclasses.asdict(made).items()}
                where = {"data": data, "pooled": str(column).removeprefix("states of "), "layer": layer}
                found.append(where | {"n": len(groups)} | values)
    return found


# The tests

FEW = 5
"""Right or wrong pairs below which a correlation with being right is not given."""


def paired_test(result: Result, data: str) -> dict[str, Any]:
    """Pairs that the VLM or the contrastive model alone gets right, and p of their being as many.

    McNemar's exact test; where pairs share a set it is a sign-flip test of whole sets.
    """
    chosen = right_by_pair(result, data)
    found = mcnemar(*(chosen[view].eq(1).to_numpy() for view in (AMONG, TO_TEXT)), (AMONG, TO_TEXT))
    table = {"n": found.n, "groups": chosen["group"].nunique(), "vlm": found.only_one, "contrastive": found.only_other}
    if chosen["group"].is_unique:
        return table | {"p": found.p, "test": "McNemar's exact test"}
    difference = result.contrast({"data": data, "view": AMONG}, {"data": data, "view": TO_TEXT}, "pair")
    return table | {"p": float(difference["p"]), "test": "sign-flip test of whole groups"}


def paired_tests(result: Result) -> dict[str, dict[str, Any]]:
    """`paired_test` of every data set, with `p_corrected` by Holm's method over all of them."""
    tests = {str(name): paired_test(result, str(name)) for name in result.table["data"].drop_duplicates()}
    adjusted = corrected(np.array([each["p"] for each in tests.values()]), "holm").tolist()
    return {name: test | {"p_corrected": p} for (name, test), p in zip(tests.items(), adjusted, strict=True)}


def likeness_with_right(result: Result, data: str, view: str) -> dict[str, float]:
    """How a pair's pooled cosine correlates with its being right in a view: `value`, its 95 % interval, `n`, `n_right`.

    Value and interval are NaN where fewer than `FEW` pairs are right, or wrong.
    """
    joint = right_by_pair(result, data)
    right, groups = joint[view].to_numpy(), pd.factorize(joint["group"])[0]
    n, n_right = len(right), int(right.sum())
    found = (np.nan,) * 3
    if min(n_right, n - n_right) >= FEW:
        found = point_biserial(joint[POOLED].to_numpy(), right, groups, n_resamples=N_RESAMPLES)
    return dict(zip(("value", "low", "high"), found, strict=True)) | {"n": n, "n_right": n_right}


def right_by_pair(result: Result, data: str) -> pd.DataFrame:
    """A row per pair of a data set: right by `TO_TEXT` and `AMONG` or not, its similarities and its `group`."""
    table = result.table[(result.table["data"] == data)]
    right = table.pivot(index="example", columns="view", values="pair")
    likeness = table.pivot(index="example", columns="view", values="similarity")
    joint = pd.concat([right[[TO_TEXT, AMONG]], likeness[list(SIMILARITIES)]], axis=1).dropna(subset=[AMONG])
    return joint.assign(group=table.drop_duplicates("example").set_index("example")["group"])
