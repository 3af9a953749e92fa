"""What tuning a contrastive model buys on pairs that differ in a relation, as the rows of a table."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from vlm_mech.behaviour.contrastive_tuning.data import COUNTERFACTUALS, NONE, READER, Parts
from vlm_mech.behaviour.contrastive_tuning.training import (
    Material,
    Recipe,
    Tuned,
    Variant,
    embedded_images,
    material,
    pair_scores,
    part,
    tuned_by,
)
from vlm_mech.behaviour.erroneous_agreement.data import Cases
from vlm_mech.behaviour.erroneous_agreement.similarity import answer_scores, picks
from vlm_mech.behaviour.erroneous_agreement.study import INDIVIDUAL, PAIR
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import holm, mcnemar
from vlm_mech.runs.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

AXES = ("tuning", "data")
METRICS = (PAIR, INDIVIDUAL)
CHANCE = {"pair": 0.25, "individual": 0.5}
BATCH = 32
SOME = 96
"""Pairs tuned on that are asked again, to tell what was not learned from what did not carry over."""


# The table


def scored(data: Sequence[Cases], scores: Sequence[Float[np.ndarray, "_ 2 2"]], tuning: str) -> pd.DataFrame:
    """One row per pair: whether both, and what share of its pictures, prefer their own caption; a tie is wrong."""
    rows = []
    for cases, found in zip(data, scores, strict=True):
        for case, some in zip(cases.cases, found, strict=True):
            right = picks(some)
            row = {"example": f"{cases.name}/{case.id}", "group": f"{cases.name}/{case.group}", "data": cases.name}
            rows.append(row | {"pair": float(right.all()), "individual": float(right.mean())})
    return pd.DataFrame(rows).assign(tuning=tuning)


def read_by_vlm(vlm: "VLM", data: Sequence[Cases], *, batch: int = BATCH) -> pd.DataFrame:
    """The same pairs asked of a VLM: whether each picture makes its own answer likelier than its counterfactual's."""
    scores = []
    for cases in data:
        prompts = [case.asked[0].about(image) for case in cases.cases for image in case.images]
        answers = [case.asked[0].answers for case in cases.cases for _ in case.images]
        right = [answer for case in cases.cases for answer in case.asked[0].answers]
        found = []
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            found.append(answer_scores(vlm, prompts[rows], answers[rows], right[rows])[0])
        scores.append(np.concatenate(found).reshape(-1, 2, 2))
    return scored(data, scores, READER)


def kept(
    work: Workspace,
    encoder: "DualEncoder",
    vlm: "VLM",
    parts: Parts,
    variants: Sequence[Variant],
    recipe: Recipe,
    rates: Sequence[float],
) -> list[dict[str, Any]]:
    """No tuning, every variant and the VLM, each kept in the run's folder as it is done; notes of the variants."""
    keys = {f"{number:02d}": variant for number, variant in enumerate(variants, 1)}
    if any(key not in work for key in keys):
        reader = vlm if any(variant.decoder for variant in variants) else None
        train = material(encoder, parts.train, reader)
        known = embedded_images(Tuned(encoder.model), train)
        validation, test = (
            [material(encoder, cases.cases, reader) for cases in some] for some in (parts.validation, parts.test)
        )
        if "00" not in work:
            scores = [pair_scores(Tuned(encoder.model), some) for some in test]
            work.keep("00", scored(parts.test, scores, NONE), {})
        for key, variant in keys.items():
            if key not in work:
                some = rates_for(variant, rates, work.collect()[1])
                tuned, notes = tried(encoder, variant, recipe, some, (train, known), validation, work.progress)
                scores = [pair_scores(tuned, each) for each in test]
                work.keep(key, scored(parts.test, scores, variant.name), notes)
    if "99" not in work:
        work.keep("99", read_by_vlm(vlm, parts.test), {})
    return [note for note in work.collect()[1] if note]


def rates_for(variant: Variant, rates: Sequence[float], notes: Sequence[dict[str, Any]]) -> Sequence[float]:
    """The rates to choose among; a control takes the one chosen for what it repeats, if that was tuned."""
    chosen = {note["tuning"]: note["rate"] for note in notes if note}
    return (chosen[COUNTERFACTUALS],) if variant.shuffled != "no" and COUNTERFACTUALS in chosen else rates


def tried(
    encoder: "DualEncoder",
    variant: Variant,
    recipe: Recipe,
    rates: Sequence[float],
    train: tuple[Material, Float[Tensor, "_ 2 d_embed"]],
    validation: Sequence[Material],
    progress: Callable[[Sequence[int], str], Iterator[int]],
) -> tuple[Tuned, dict[str, Any]]:
    """A variant tuned at every rate: the model with the best pair accuracy on validation, among equals the slower.

    Args:
        train: pairs to tune on, and the untuned embeddings of their pictures.

    Returns:
        The model; notes with its rate, what it learned of the pairs tuned on, and validation and losses of every rate.
    """
    found, trials = [], []
    for rate in sorted(rates):
        steps = progress(range(recipe.n_steps), f"{variant.name}, {rate:g}")
        tuned, losses = tuned_by(encoder.model, train[0], variant, recipe, rate=rate, known=train[1], progress=steps)
        right = np.concatenate([_right(tuned, some) for some in validation])
        ends = [float(np.mean(part)) for part in (losses[:5], losses[-5:])]
        trials.append({"rate": rate, "validation": float(right.mean()), "n": len(right), "losses": ends})
        found.append(tuned)
    best = int(np.argmax([trial["validation"] for trial in trials]))
    fitted = float(_right(found[best], part(train[0], SOME)).mean())
    return found[best], {"tuning": variant.name, "rate": trials[best]["rate"], "fitted": fitted, "trials": trials}


def _right(tuned: Tuned, some: Material) -> np.ndarray:
    return np.array([picks(each).all() for each in pair_scores(tuned, some)])


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """All pairs in all cells, those of other data sets missing; the baselines are guessing."""
    cells = table[list(AXES)].drop_duplicates()
    pairs = table.drop_duplicates("example")[["example", "group", "data"]].rename(columns={"data": "own"})
    whole = pairs.merge(cells, how="cross").merge(table.drop(columns="group"), how="left", on=["example", *AXES])
    other = whole["own"] != whole["data"]
    for name, chance in CHANCE.items():
        whole[f"{name}_baseline"] = np.where(other, np.nan, chance)
    skipped = other.map({True: "a pair of another data set", False: ""})
    return whole.assign(skipped=skipped).drop(columns="own")


def tests(result: Result) -> pd.DataFrame:
    """McNemar's exact tests of every tuning on every data set, against no tuning and against the VLM.

    One row each: `n`, pairs that it alone (`won`) and the other alone (`lost`) gets right, `p`, and `p_corrected` by
    Holm's method over all tests against the same other.
    """
    held = result.table[result.table["skipped"] == ""]
    right = held.pivot(index=["data", "example"], columns="tuning", values="pair") == 1
    data, tunings = (held[name].drop_duplicates().tolist() for name in ("data", "tuning"))
    rows = []
    for other in (NONE, READER):
        places = [(name, tuning) for name in data for tuning in tunings if tuning not in (other, READER)]
        found = [
            mcnemar(*(right.loc[name, each].to_numpy(bool) for each in (tuning, other))) for name, tuning in places
        ]
        for (name, tuning), test in zip(places, holm(found), strict=True):
            row = {"data": name, "tuning": tuning, "other": other, "n": test.n, "won": test.only_one}
            rows.append(row | {"lost": test.only_other, "p": test.p, "p_corrected": test.p_corrected})
    return pd.DataFrame(rows)
