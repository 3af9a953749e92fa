"""What tuning a contrastive model buys on pairs that differ in a relation, as the rows of a table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from vlm_mech.behaviour.contrastive_tuning.batches import Recipe, Source, Variant
from vlm_mech.behaviour.contrastive_tuning.captions import Captions
from vlm_mech.behaviour.contrastive_tuning.data import NONE, READER, REPEATED, Parts
from vlm_mech.behaviour.contrastive_tuning.training import (
    Material,
    Tuned,
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
ELSEWHERE = "a pair of another data set"
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
        trials = _of_captions(encoder, reader, parts) if parts.read else _of_pairs(encoder, reader, parts)
        test = [material(encoder, cases.cases, reader) for cases in parts.test]
        if "00" not in work:
            scores = [pair_scores(Tuned(encoder.model), some) for some in test]
            work.keep("00", scored(parts.test, scores, NONE), {})
        for key, variant in keys.items():
            if key not in work:
                some = rates_for(variant, rates, work.collect()[1])
                tuned, notes = tried(encoder, variant, recipe, some, trials, work.progress)
                scores = [pair_scores(tuned, each) for each in test]
                work.keep(key, scored(parts.test, scores, variant.name), notes)
    if "99" not in work:
        work.keep("99", read_by_vlm(vlm, parts.test), {})
    return [note for note in work.collect()[1] if note]


def counted(parts: Parts) -> dict[str, Any]:
    """How many examples each part has; `captions` says which entries were used, where it was tuned on such."""
    if parts.read is not None:
        n_train = len(parts.read.used) - parts.n_held
        about = {"used": parts.read.told, "n_entries": parts.read.n_entries, "left_out": parts.read.left_out}
        return {"n_train": n_train, "n_fitted": min(SOME, n_train), "n_validation": parts.n_held, "captions": about}
    n_validation = sum(len(cases.cases) for cases in parts.validation)
    n_train = len(parts.train)
    return {"n_train": n_train, "n_fitted": min(SOME, n_train), "n_validation": n_validation}


def rates_for(variant: Variant, rates: Sequence[float], notes: Sequence[dict[str, Any]]) -> Sequence[float]:
    """The rates to choose among; a control takes the one chosen for what it repeats, if that was tuned."""
    chosen = {note["tuning"]: note["rate"] for note in notes if note}
    repeated = REPEATED.get(variant.objective)
    return (chosen[repeated],) if variant.shuffled != "no" and repeated in chosen else rates


@dataclass(frozen=True, eq=False)
class Trials:
    """What is tuned on, the untuned embeddings of its pictures, and two measures of what was tuned.

    `validated` is what a rate is chosen by, the greater the better, and of how many examples; `fitted` the share that
    is right of some that were tuned on.
    """

    source: Source
    known: Float[Tensor, "..."]
    validated: Callable[[Tuned], tuple[float, int]]
    fitted: Callable[[Tuned], float]


def _of_pairs(encoder: "DualEncoder", reader: "VLM | None", parts: Parts) -> Trials:
    train = material(encoder, parts.train, reader)
    validation = [material(encoder, cases.cases, reader) for cases in parts.validation]

    def validated(tuned: Tuned) -> tuple[float, int]:
        if not validation:
            return 0.0, 0
        right = np.concatenate([_right(tuned, some) for some in validation])
        return float(right.mean()), len(right)

    known = embedded_images(Tuned(encoder.model), train)
    return Trials(train, known, validated, lambda tuned: float(_right(tuned, part(train, SOME)).mean()))


def _of_captions(encoder: "DualEncoder", reader: "VLM | None", parts: Parts) -> Trials:
    """Pictures with captions: a rate is chosen by the loss on those held out, all of them as one batch."""
    assert parts.read is not None
    used, n = parts.read.used, parts.n_held
    held, train = (Captions(encoder, some) for some in (used[:n], used[n:]))
    if reader is not None:
        held, train = (held.with_decoder(reader) if n else held), train.with_decoder(reader)
    return Trials(
        train,
        train.embedded(Tuned(encoder.model)),
        lambda tuned: (-held.asked(tuned)[0] if n else 0.0, n),
        lambda tuned: train.first(SOME).asked(tuned)[1],
    )


def tried(
    encoder: "DualEncoder",
    variant: Variant,
    recipe: Recipe,
    rates: Sequence[float],
    trials: Trials,
    progress: Callable[[Sequence[int], str], Iterator[int]],
) -> tuple[Tuned, dict[str, Any]]:
    """A variant tuned at every rate: the model that validates best, among equals the slower.

    Returns:
        The model; notes with its rate, what it learned of what it saw, and validation and losses of every rate.
    """
    found, notes = [], []
    for rate in sorted(rates):
        steps = progress(range(recipe.steps(len(trials.source), variant)), f"{variant.name}, {rate:g}")
        how = {"rate": rate, "known": trials.known, "progress": steps}
        tuned, losses = tuned_by(encoder.model, trials.source, variant, recipe, **how)
        ends = [float(np.mean(part)) for part in (losses[:5], losses[-5:])]
        validation, n = trials.validated(tuned)
        sizes = recipe.sizes(len(trials.source), variant)
        length = {"n_steps": len(losses), "batches": sizes} if recipe.epochs else {"n_steps": len(losses)}
        notes.append({"rate": rate, "validation": validation, "n": n, **length, "losses": ends})
        found.append(tuned)
    best = int(np.argmax([note["validation"] for note in notes]))
    fitted = trials.fitted(found[best])
    return found[best], {"tuning": variant.name, "rate": notes[best]["rate"], "fitted": fitted, "trials": notes}


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
    skipped = other.map({True: ELSEWHERE, False: ""})
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
