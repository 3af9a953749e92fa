"""What tuning a contrastive model buys on pairs that differ in a relation: variants, the table, tests and findings."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import binomtest
from torch import Tensor

from vlm_mech.behaviour.agreement_data import Case, Cases
from vlm_mech.behaviour.agreement_study import INDIVIDUAL, PAIR
from vlm_mech.behaviour.contrastive_tuning import (
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
from vlm_mech.behaviour.similarity import answer_scores, picks
from vlm_mech.classify.answers import check_known
from vlm_mech.errors import UsageError
from vlm_mech.prompt import Prompt
from vlm_mech.result import Result
from vlm_mech.statistics import corrected
from vlm_mech.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.contrastive import DualEncoder
    from vlm_mech.model import VLM

AXES = ("tuning", "data")
METRICS = (PAIR, INDIVIDUAL)
CHANCE = {"pair": 0.25, "individual": 0.5}
NONE, READER, TWINS = "none", "VLM", "unlocked: twins"
"""The controls repeat `TWINS`, at the rate chosen for it."""
VARIANTS = (
    Variant("locked: captions", "captions"),
    Variant("locked: negatives", "negatives"),
    Variant("locked: twins", "twins"),
    Variant("locked, decoder: twins", "twins", decoder=True),
    Variant("unlocked: captions", "captions", locked=False),
    Variant("unlocked: negatives", "negatives", locked=False),
    Variant(TWINS, "twins", locked=False),
    Variant("unlocked, decoder: twins", "twins", locked=False, decoder=True),
    Variant("control, unlocked: sides at random", "twins", locked=False, shuffled="sides"),
    Variant("control, unlocked: shuffled captions", "twins", locked=False, shuffled="captions"),
)
BATCH = 32
SURE = 0.05
LEARNED = 0.9
"""Share of the pairs tuned on from which on they count as learned."""
SOME = 96
"""Pairs tuned on that are asked again, to tell what was not learned from what did not carry over."""


def variants_of(names: Sequence[str]) -> list[Variant]:
    """The variants of these names, all where none is named.

    Raises:
        UsageError: an unknown name.
    """
    known = {variant.name: variant for variant in VARIANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"variant {unknown[0]!r} is not known; these are: {', '.join(map(repr, known))}")
    return [known[name] for name in names] or list(VARIANTS)


# Data


@dataclass(frozen=True, eq=False)
class Parts:
    """Pairs to tune on, data sets to choose the learning rate by, and data sets to report."""

    train: Sequence[Case]
    validation: Sequence[Cases]
    test: Sequence[Cases]


def without_repeats(data: Sequence[Cases], held: Sequence[Cases] = ()) -> list[Case]:
    """The pairs of several data sets, none with the captions of another one or with the pictures of `held`.

    Captions of the same words count as the same: `a left of b` says what `b right of a` does, and both in a batch
    would each be a wrong negative of the other.
    """
    held_pixels = {_pixels(case) for cases in held for case in cases.cases}
    kept: dict[tuple[str, ...], Case] = {}
    for cases in data:
        for case in cases.cases:
            if len(case.images) != 2:
                raise UsageError(f"{cases.name} has sets of {len(case.images)} pictures; pairs of twins are needed")
            words = tuple(sorted(" ".join(case.captions).split()))
            if _pixels(case) not in held_pixels:
                kept.setdefault(words, case)
    return list(kept.values())


def _pixels(case: Case) -> bytes:
    return b"".join(image.tobytes() for image in case.images)


def check_twins(data: Sequence[Cases]) -> None:
    """Raise `UsageError` where a data set is given twice or has no pairs."""
    twice = [name for name, count in Counter(cases.name for cases in data).items() if count > 1]
    if twice:
        raise UsageError(f"data {twice[0]!r} is given twice; once is needed")
    for cases in data:
        if not cases.cases or any(len(case.images) != 2 for case in cases.cases):
            raise UsageError(
                f"data {cases.name!r} has no twins: each case needs two pictures, one caption true of each"
            )


def check_words(encoder: "DualEncoder", data: Sequence[Cases]) -> None:
    """Raise `UsageError` where a caption has a word unknown to the contrastive model."""
    # Slow tokenizers give no offsets, and know every letter.
    if encoder.tokenizer.is_fast:
        captions = [each for cases in data for case in cases.cases for each in case.captions]
        check_known(_as_vlm(encoder), captions, "caption")


def _as_vlm(encoder: Any) -> Any:
    """An encoder, for a check that asks for a tokenizer alone."""
    return encoder


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
    """The same pairs asked of a VLM: whether each picture makes its own answer likelier than its twin's."""
    scores = []
    for cases in data:
        prompts = [Prompt(case.asked[0].question, image) for case in cases.cases for image in case.images]
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
    return (chosen[TWINS],) if variant.shuffled != "no" and TWINS in chosen else rates


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
    right = held.pivot(index=["data", "example"], columns="tuning", values="pair")
    tables = []
    for other in (NONE, READER):
        rows = []
        for data in held["data"].drop_duplicates():
            for tuning in held["tuning"].drop_duplicates():
                if tuning not in (other, READER):
                    one, two = right.loc[data, tuning], right.loc[data, other]
                    won, lost = int((one > two).sum()), int((two > one).sum())
                    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
                    row = {"data": data, "tuning": tuning, "other": other, "n": len(one)}
                    rows.append(row | {"won": won, "lost": lost, "p": p})
        table = pd.DataFrame(rows)
        tables.append(table.assign(p_corrected=corrected(table["p"].to_numpy(), "holm")))
    return pd.concat(tables, ignore_index=True)


# What follows


def findings(result: Result) -> tuple[str, ...]:
    """What tuning moved on which data set, beside no tuning, the VLM, chance and the controls."""
    told = result.provenance["tuning"]
    summary, tested = result.summary("pair"), tests(result)
    summary = summary[summary["n"] > 0]
    data = list(summary["data"].drop_duplicates())
    found = [
        f"tuned on {told['n_train']} pairs of {', '.join(told['train'])} (train split), {told['recipe']['n_steps']} "
        f"steps of {told['recipe']['batch']} pictures, one seed; rates chosen among "
        f"{', '.join(f'{rate:g}' for rate in told['rates'])} by pair accuracy on {told['n_validation']} validation "
        "pairs of these sets; below, test pairs, pair accuracy (chance 0.25), intervals over pairs.",
        _verdict(summary, tested, told),
    ]
    found += [_beside_vlm(summary, tested, name) for name in data]
    found.append("by tuning: pair accuracy, and in brackets pairs won and lost against no tuning, McNemar's p (Holm).")
    for note in told["variants"]:
        parts = [_moved(summary, tested, note["tuning"], name) for name in data]
        fitted = f"{note['fitted']:.2f} of the pairs tuned on"
        found.append(f"{note['tuning']} (rate {note['rate']:g}, {fitted}): {'; '.join(parts)}.")
    return tuple(found)


def _verdict(summary: pd.DataFrame, tested: pd.DataFrame, told: dict[str, Any]) -> str:
    """Which tunings tell a relation apart after all, and which lose what they were not tuned on."""
    lifted, lost = [], []
    rows: list[dict[str, Any]] = tested[tested["other"] == NONE].to_dict("records")
    for test in rows:
        where = f"{test['tuning']} on {test['data']}"
        if test["p_corrected"] >= SURE:
            continue
        low = float(_row(summary, test["tuning"], test["data"])["ci_low"])
        if test["won"] > test["lost"] and low > CHANCE["pair"]:
            lifted.append(where)
        if test["lost"] > test["won"] and test["data"] not in told["train"]:
            lost.append(where)
    best = max(told["variants"], key=lambda note: note["fitted"])
    carried = (
        "what it does not get right on test pairs is not for want of steps, though it may be of pairs"
        if best["fitted"] >= LEARNED
        else "where this is low too, the tuning was too short or the tower does not show it, which is not told apart"
    )
    return (
        f"above chance and above no tuning (McNemar, Holm over tunings and data sets, p < {SURE}): "
        f"{', '.join(lifted) or 'none'}; worse than before on what was not tuned on: {', '.join(lost) or 'none'}. "
        f"Most is learned of the pairs tuned on by {best['tuning']}: {best['fitted']:.2f} of {told['n_fitted']} asked "
        f"again; {carried}."
    )


def _beside_vlm(summary: pd.DataFrame, tested: pd.DataFrame, data: str) -> str:
    """What the model does untuned and the VLM, and which tunings do not stay behind the VLM."""
    own = tested[(tested["data"] == data) & (tested["other"] == READER) & (tested["tuning"] != NONE)]
    behind = (own["p_corrected"] < SURE) & (own["lost"] > own["won"])
    near = ", ".join(own["tuning"][~behind]) or "none"
    untuned, reader = (_told(_row(summary, tuning, data)) for tuning in (NONE, READER))
    return f"{data}: no tuning {untuned}; the VLM {reader}; not below it (McNemar, Holm, p < {SURE}): {near}."


def _moved(summary: pd.DataFrame, tested: pd.DataFrame, tuning: str, data: str) -> str:
    chosen = (tested["tuning"] == tuning) & (tested["data"] == data) & (tested["other"] == NONE)
    own = tested[chosen].iloc[0]
    counts = f"+{int(own['won'])} -{int(own['lost'])}, p = {own['p_corrected']:.2g}"
    return f"{data} {_told(_row(summary, tuning, data))} [{counts}]"


def _row(summary: pd.DataFrame, tuning: str, data: str) -> pd.Series:
    return summary[(summary["tuning"] == tuning) & (summary["data"] == data)].iloc[0]


def _told(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"
