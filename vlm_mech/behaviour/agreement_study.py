"""Images that a contrastive model finds nearly the same: who tells them apart? The table and the findings of a run."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import binomtest

from vlm_mech.behaviour.agreement_data import Case
from vlm_mech.behaviour.similarity import (
    alignment_with_floor,
    answer_scores,
    contrastive_view,
    cosines,
    patch_cosine,
    picks,
    rank_correlations,
    tower_patches,
)
from vlm_mech.classify.answers import check_known
from vlm_mech.prompt import Prompt
from vlm_mech.result import N_RESAMPLES, Metric, Result
from vlm_mech.statistics import corrected, expanded_tail

if TYPE_CHECKING:
    from vlm_mech.contrastive import DualEncoder
    from vlm_mech.model import VLM

AXES = ("view", "data")
POOLED, RANKS = "pooled embedding", "ranks of the embedding"
PATCHES, READ = "patches, contrastive", "patches the VLM reads"
SIMILARITIES = (POOLED, RANKS, PATCHES, READ)
TO_TEXT, TO_IMAGE = "contrastive, image to text", "contrastive, text to image"
AMONG, OPEN, BOTH = "VLM, among answers", "VLM, whole vocabulary", "VLM, both questions"
READERS = (TO_TEXT, TO_IMAGE, AMONG, OPEN, BOTH)
PAIR = Metric("pair", "share", "share of pairs with both images right; a tie is wrong")
INDIVIDUAL = Metric("individual", "share", "share of images that are right; a tie is wrong")
SET = Metric("set", "share", "share of sets of four with all images right")
SIMILARITY = Metric(
    "similarity", "cosine",
    "of the two images of a pair: cosine, its mean over patches, or Spearman's rho of the entries; beside it that of "
    "images of different pairs",
)  # fmt: skip
ABOVE = Metric("above_tau", "share", "share of pairs whose similarity is above tau; beside it that of unpaired images")
PLACE = Metric("place", "share", "share of unpaired similarities of the data set that are below the pair's own")
METRICS = (PAIR, INDIVIDUAL, SET, SIMILARITY, ABOVE, PLACE)
FEW = 5
"""Right or wrong pairs below which a correlation with being right is not told."""
SHUFFLED = 0.5
"""Place of a pair that is no more alike than any two images."""


# One batch


def looked_at(encoder: "DualEncoder", vlm: "VLM", cases: Sequence[Case], after: Case) -> pd.DataFrame:
    """One row per image of some cases of one data set: embedding, scores of captions and answers, likeness of patches.

    Args:
        after: the case that follows the last; each pair's first image is also held against an image of the next case
            (where that is of another group), the floor of patch-wise similarities without keeping all patches.

    Raises:
        UsageError: a caption with a word that the contrastive model does not know.
    """
    images = [image for case in cases for image in case.images]
    captions = [caption for case in cases for caption in case.captions]
    if encoder.tokenizer.is_fast:
        # Others give no offsets, and know every letter. The check asks for a tokenizer alone.
        check_known(cast(Any, encoder), captions, "caption")
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
    return pd.DataFrame(named | {"captions": scores} | columns)


def _answers(vlm: "VLM", cases: Sequence[Case]) -> dict[str, list[Any]]:
    """Log-probabilities of the answers to each question, and whether the first is answered rightly unprompted."""
    columns: dict[str, list[Any]] = {}
    for number, first in enumerate(cases[0].asked):
        prompts = [Prompt(case.asked[number].question, image) for case in cases for image in case.images]
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
    pairs = table[["example", "group"]].drop_duplicates()
    every = pairs.merge(table[list(AXES)].drop_duplicates(), how="cross")
    # A pair belongs to one data set; its cells in the others are empty.
    return every.merge(table, how="left", on=["example", "group", *AXES]), floors


def _of_data(images: pd.DataFrame, tau: float) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    cases = [case.reset_index(drop=True) for _, case in images.groupby("case", sort=False)]
    data = images["data"].iloc[0]
    names = [f"{data}/{case['case'][0]}/{pair}" for case in cases for pair in range(len(case) // 2)]
    groups = np.array([f"{data}/{case['group'][0]}" for case in cases for _ in range(len(case) // 2)])
    known = pd.DataFrame({"example": names, "group": groups})
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

    The accuracy of a set of four stands beside its first pair, so that it counts once.
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


# What follows


def findings(result: Result, *, tau: float, floors: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Who tells the pairs apart, how alike they are beside unpaired images, and whether the one follows the other."""
    data = list(result.table["data"].drop_duplicates())
    summary = result.summary()
    tests = [paired_test(result, name) for name in data]
    p = corrected(np.array([each["p"] for each in tests]), "holm")
    found, shown, hidden = [], [], []
    for name, test, value in zip(data, tests, p, strict=True):
        text, is_so = _accuracy_told(summary, name, test, value)
        (shown if is_so else hidden).append(name)
        found += [text, *_sets_told(summary, name), _similarity_told(summary, result, name, tau, floors)]
    verdict = (
        "the contrastive model near chance on pairs that the VLM tells apart (its pair accuracy not above chance, the "
        f"VLM's above it and above the contrastive one, p < 0.05): {', '.join(shown) or 'on no data set'}; not: "
        f"{', '.join(hidden) or 'on none'}. No second tower is asked, as MMVP does with DINO."
    )
    n = result.table["example"].nunique()
    return (f"{n} pairs of {len(data)} data sets.", verdict, *found)


def paired_test(result: Result, data: str) -> dict[str, Any]:
    """Pairs that the VLM or the contrastive model alone gets right, and p of their being as many.

    McNemar's exact test; where pairs share a set it is a sign-flip test of whole sets.
    """
    chosen = _right(result, data)
    alone = int((chosen[AMONG] > chosen[TO_TEXT]).sum()), int((chosen[TO_TEXT] > chosen[AMONG]).sum())
    table = {"n": len(chosen), "groups": chosen["group"].nunique(), "vlm": alone[0], "contrastive": alone[1]}
    if chosen["group"].is_unique:
        p = binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0
        return table | {"p": float(p), "test": "McNemar's exact test"}
    difference = result.contrast({"data": data, "view": AMONG}, {"data": data, "view": TO_TEXT}, "pair")
    return table | {"p": float(difference["p"]), "test": "sign-flip test of whole groups"}


def _right(result: Result, data: str) -> pd.DataFrame:
    """A row per pair of a data set: right by `TO_TEXT` and `AMONG` or not, its similarities and its `group`."""
    table = result.table[(result.table["data"] == data)]
    right = table.pivot(index="example", columns="view", values="pair")
    likeness = table.pivot(index="example", columns="view", values="similarity")
    joint = pd.concat([right[[TO_TEXT, AMONG]], likeness[list(SIMILARITIES)]], axis=1).dropna(subset=[AMONG])
    return joint.assign(group=table.drop_duplicates("example").set_index("example")["group"])


def _accuracy_told(summary: pd.DataFrame, data: str, test: dict[str, Any], p: float) -> tuple[str, bool]:
    rows = {view: _row(summary, data, view, "pair") for view in (TO_TEXT, AMONG)}
    single = [_row(summary, data, view, "individual")["mean"] for view in (TO_TEXT, AMONG)]
    chance = float(rows[AMONG]["baseline"])
    text = (
        f"{data}: pair accuracy of the contrastive model {_told(rows[TO_TEXT])}, of the VLM "
        f"{_told(rows[AMONG])}; chance {chance:.3g} (single images {single[0]:.3f} and {single[1]:.3f}); the VLM "
        f"alone right on {test['vlm']}, the contrastive model alone on {test['contrastive']} of {test['n']} "
        f"({test['test']}, Holm over data sets: p = {p:.2g})."
    )
    higher = rows[AMONG]["mean"] > rows[TO_TEXT]["mean"] and p < 0.05
    return text, bool(higher and rows[TO_TEXT]["ci_low"] <= chance < rows[AMONG]["ci_low"])


def _sets_told(summary: pd.DataFrame, data: str) -> tuple[str, ...]:
    rows = summary[(summary["data"] == data) & (summary["metric"] == "set") & (summary["n"] > 0)]
    if rows.empty:
        return ()
    told = "; ".join(f"{row['view']} {_told(row)}" for _, row in rows.iterrows())
    return (f"{data}: all four images of a set right (chance {rows['baseline'].iloc[0]:.4f}): {told}.",)


def _similarity_told(
    summary: pd.DataFrame, result: Result, data: str, tau: float, floors: Sequence[dict[str, Any]]
) -> str:
    row, above, place = (_row(summary, data, POOLED, name) for name in ("similarity", "above_tau", "place"))
    floor = next(each for each in floors if each["data"] == data and each["view"] == POOLED)
    joint = _right(result, data)
    groups = pd.factorize(joint["group"])[0]
    told = [
        f"{name} {_correlation(joint[POOLED].to_numpy(), joint[view].to_numpy(), groups)}"
        for view, name in ((TO_TEXT, "contrastive"), (AMONG, "VLM"))
    ]
    return (
        f"{data}: pooled cosine {_told(row)}, above {tau:g} in {_told(above)} of pairs; of "
        f"unpaired images {floor['median']:.3f} in the median, above {tau:g} in {floor['above_tau']:.3f}; a pair is "
        f"above {place['mean']:.3f} of these on average; correlation of cosine and pair right: {', '.join(told)}."
    )


def _correlation(values: np.ndarray, right: np.ndarray, groups: Int[np.ndarray, "pair"]) -> str:
    n_right = int(right.sum())
    if min(n_right, len(right) - n_right) < FEW:
        return f"not told ({n_right} of {len(right)} right)"
    value, low, high = point_biserial(values, right, groups)
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f}, n = {len(right)})"


def point_biserial(
    values: Float[np.ndarray, "pair"],
    right: Float[np.ndarray, "pair"],
    groups: Int[np.ndarray, "pair"],
    *,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Correlation of a number with right (1) or wrong (0), and its expanded 95 % bootstrap interval over groups.

    Resamples in which nothing varies have no correlation and are left out.
    """
    n_groups = int(groups.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=N_RESAMPLES)
    weights = np.vstack([np.ones(len(values)), drawn[:, groups]])
    weights = weights / weights.sum(1, keepdims=True)
    one, other = values - values.mean(), right - right.mean()
    means = weights @ one, weights @ other
    covariance = weights @ (one * other) - means[0] * means[1]
    variance = (weights @ one**2 - means[0] ** 2) * (weights @ other**2 - means[1] ** 2)
    held = variance > 1e-20
    found = covariance[held] / np.sqrt(variance[held])
    if not held[0]:
        return float("nan"), float("nan"), float("nan")
    tail = 100 * expanded_tail(n_groups, 0.95)
    low, high = np.percentile(found[1:], [tail, 100 - tail])
    return float(found[0]), float(low), float(high)


def _row(summary: pd.DataFrame, data: str, view: str, metric: str) -> pd.Series:
    chosen = (summary["view"] == view) & (summary["data"] == data) & (summary["metric"] == metric)
    return summary[chosen].iloc[0]


def _told(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"
