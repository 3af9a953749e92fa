"""What contrastive decoding changes in answers where a prior competes with the picture: rows, choice, findings."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from vlm_mech.behaviour.decay import said
from vlm_mech.behaviour.decoding import (
    ALPHA,
    CUTOFF,
    M3ID,
    NOISE_STEP,
    RATE,
    START,
    STRENGTH,
    VCD,
    Dependency,
    Drawn,
    decode,
    seeds_of,
)
from vlm_mech.data.pairs import Pair, Pairs, about_others, turned
from vlm_mech.result import Metric, Result
from vlm_mech.statistics import corrected, share_interval

if TYPE_CHECKING:
    from vlm_mech.model import VLM
    from vlm_mech.prompt import Encoded
    from vlm_mech.trace import Generation

AXES = ("split", "picture", "step", "method", "dose")
VALIDATION, TEST = "validation", "test"
OWN, STRANGER, USUAL = "own picture", "another's picture", "usual picture"
PLAIN, GREEDY, SAMPLED = "plain", "greedy", "sampled"
WHOLE = -1
"""Step of what is asked of whole answers."""
PAPER = {"M3ID": RATE, "VCD": STRENGTH}
DOSES = {"M3ID": "lambda", "VCD": "a"}
TRUTH = Metric("truth", "share", "share of answers that are what the picture shows")
PRIOR = Metric("prior", "share", "share of answers that are the other answer of the pair: here what is usual")
DEPENDENCY = Metric("dependency", "fraction", "PDM: Hellinger distance of the next token with and without the picture")
METRICS = (TRUTH, PRIOR, DEPENDENCY)


@dataclass(frozen=True)
class Setting:
    """A way to decode: `plain`, `M3ID` or `VCD`, its dose (lambda or a), M3ID's alpha, and whether it is sampled."""

    kind: str = PLAIN
    dose: float = 0.0
    alpha: float = 0.0
    sampled: bool = False

    @property
    def method(self) -> str:
        """Its name without the dose."""
        draw = SAMPLED if self.sampled else GREEDY
        if self.kind == PLAIN:
            return draw
        return f"{self.kind}{f' alpha {self.alpha:g}' if self.kind == 'M3ID' else ''} {draw}"


@dataclass(frozen=True)
class Options:
    """What all settings of a run share."""

    start: int = START
    cutoff: float = CUTOFF
    noise_step: int = NOISE_STEP
    max_new_tokens: int = 8
    letters: bool = False
    seed: int = 0


def grid(kinds: Sequence[str], alphas: Sequence[float], rates: Sequence[float], strengths: Sequence[float]) -> list[
    Setting
]:  # fmt: skip
    """Every setting to choose among, the plain ones first."""
    found = [Setting(sampled=sampled) for sampled in (False, True)]
    for sampled in (False, True):
        if "M3ID" in kinds:
            found += [Setting("M3ID", rate, alpha, sampled) for alpha in alphas for rate in rates]
        if "VCD" in kinds:
            found += [Setting("VCD", strength, 0.0, sampled) for strength in strengths]
    return found


def answered(
    vlm: "VLM", encoded: "Encoded", names: Sequence[str], setting: Setting, options: Options, more: Sequence[Any] = ()
) -> "Generation":
    """Answers by one setting; noise and draws depend on the seed of the run and the examples' names alone.

    Args:
        more: processors that look at the plain scores, before all others.
    """
    processors = list(more)
    if setting.kind == "M3ID":
        processors.append(M3ID(vlm, encoded, alpha=setting.alpha, rate=setting.dose, start=options.start))
    elif setting.kind == "VCD":
        seeds, cutoff = seeds_of(names, options.seed), options.cutoff
        shared = {"seeds": seeds, "cutoff": cutoff, "step": options.noise_step}
        processors.append(VCD(vlm, encoded, strength=setting.dose, **shared))
    if setting.sampled:
        # The same draws for every setting, so that settings are compared under the same luck.
        processors.append(Drawn(encoded, seeds=seeds_of(names, options.seed + 1)))
    return decode(vlm, encoded, processors, max_new_tokens=options.max_new_tokens)


def alive(vlm: "VLM", generation: "Generation") -> np.ndarray:
    """Whether each answer was not over before each of its tokens, rows x steps."""
    ends = vlm.model.generation_config.eos_token_id
    ended = np.isin(generation.ids.cpu().numpy(), np.atleast_1d(ends if ends is not None else -1))
    return np.cumsum(ended, 1) - ended == 0


def contrast(
    vlm: "VLM",
    pairs: Pairs,
    others: Sequence[Pair],
    settings: Sequence[Setting],
    *,
    split: str,
    options: Options,
    dependency: bool = False,
) -> pd.DataFrame:
    """Rows of one batch: answers by every setting about its pictures and, on test, about two controls.

    Those are the pictures of `others`, the floor, and the usual pictures of the same pairs, about which a method that
    merely turns away from what is usual would be wrong.

    Args:
        settings: the first is plain and greedy, which all are compared with.
        dependency: also the dependency on the picture along the plain greedy answer.
    """
    views = {OWN: pairs}
    if split == TEST:
        views |= {STRANGER: about_others(pairs, others), USUAL: turned(pairs)}
    names, tables = [pair.id for pair in pairs], []
    for picture, shown in views.items():
        encoded = vlm.encode(shown.base)
        baseline: dict[str, Any] = {}
        for setting in settings:
            watch = [Dependency(vlm, encoded)] if dependency and setting == Setting() else []
            told = answered(vlm, encoded, names, setting, options, watch)
            rates = {
                "truth": _are(told, shown.answer, options),
                "prior": _are(told, pairs.counterfactual_answer, options),
            }
            baseline = baseline or {f"{name}_baseline": values for name, values in rates.items()}
            place = {"picture": picture, "method": setting.method, "dose": setting.dose, "step": WHOLE}
            tables.append(pd.DataFrame({"example": names, **place, **rates, **baseline, "answer": told.texts}))
            if watch:
                tables += _steps(names, watch[0], alive(vlm, told), place)
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat(tables, ignore_index=True)
    table["answer"] = table["answer"].fillna("")
    return table.assign(split=split, group=table["example"].map(groups))


def _are(told: "Generation", wanted: Sequence[str], options: Options) -> np.ndarray:
    pairs = zip(told.texts, wanted, strict=True)
    same = [said(one, letters=options.letters).same(said(other, letters=options.letters)) for one, other in pairs]
    return np.array(same, float)


def _steps(names: Sequence[str], watch: Dependency, going: np.ndarray, place: dict[str, Any]) -> list[pd.DataFrame]:
    """Dependency at each token of the answers that were not over before it; its baseline is no dependency."""
    rows = []
    for step, distances in enumerate(watch.steps):
        values = np.where(going[:, step], distances.double().cpu().numpy(), np.nan)
        columns = {**place, "step": step, "dependency": values, "dependency_baseline": 0.0}
        rows.append(pd.DataFrame({"example": names, **columns}))
    return rows


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row for every example and cell; what was not measured (the other split) is missing."""
    examples = table[["example", "group"]].drop_duplicates()
    cells = table[list(AXES)].drop_duplicates()
    every = examples.merge(cells, how="cross")
    found = every.merge(table.drop(columns="group"), how="left", on=["example", *AXES])
    found["answer"] = found["answer"].fillna("")
    return found


# The choice


def chosen(table: pd.DataFrame, settings: Sequence[Setting]) -> list[Setting]:
    """For each kind and draw the setting most often right on validation; of equals, the one that changes least."""
    own = table[(table["split"] == VALIDATION) & (table["picture"] == OWN)]
    means: dict[Any, float] = own.groupby(["method", "dose"])["truth"].mean().to_dict()
    found: dict[tuple[str, bool], Setting] = {}
    for setting in sorted(settings, key=lambda each: (each.dose, each.alpha)):
        key = (setting.kind, setting.sampled)
        if setting.kind != PLAIN and setting.dose > 0:
            held = found.setdefault(key, setting)
            better = means[setting.method, setting.dose] > means[held.method, held.dose]
            found[key] = setting if better else held
    return list(found.values())


def tested(choice: Sequence[Setting]) -> list[Setting]:
    """What is asked on test: plain, the papers' values, those chosen, and both methods without any dose."""
    kinds = list(dict.fromkeys(each.kind for each in choice))
    found = [Setting(sampled=sampled) for sampled in (False, True)]
    for kind in kinds:
        alpha = ALPHA if kind == "M3ID" else 0.0
        found += [Setting(kind, PAPER[kind], alpha, sampled) for sampled in (False, True)]
    found += choice
    found += [dataclasses.replace(each, dose=0.0) for each in choice if not each.sampled]
    return list(dict.fromkeys(found))


# What follows


def label(method: str, dose: float) -> str:
    """A setting in words."""
    if method in (GREEDY, SAMPLED):
        return method
    kind, _, draw = method.partition(" ")
    alpha, _, draw = draw.rpartition(" ")
    return f"{kind} {draw}, {f'{alpha}, ' if alpha else ''}{DOSES[kind]} {dose:g}"


def findings(result: Result, settings: Sequence[Setting], choice: Sequence[Setting]) -> tuple[str, ...]:
    """Rates of every setting on test with their intervals, its paired test against greedy, the floor and identity."""
    answers = result.table[(result.table["step"] == WHOLE) & (result.table["split"] == TEST)]
    values = {
        key: rows.set_index("example")[["truth", "prior", "answer"]].dropna()
        for key, rows in answers.groupby(["picture", "method", "dose"], sort=False)
    }
    plain = values[OWN, GREEDY, 0.0]
    told = [each for each in settings[1:] if each.dose > 0 or each.kind == PLAIN]
    tests = [mcnemar(values[OWN, each.method, each.dose]["truth"], plain["truth"]) for each in told]
    adjusted = corrected(np.array([each[2] for each in tests]), "holm")
    found = [
        f"{len(plain)} test examples. greedy is right in {_share(plain['truth'])}, says what is usual in "
        f"{_share(plain['prior'])}; right about another's picture: {_share(values[STRANGER, GREEDY, 0.0]['truth'])}, "
        f"about the usual one: {_share(values[USUAL, GREEDY, 0.0]['truth'])}."
    ]
    for setting, (gained, lost, p), p_holm in zip(told, tests, adjusted, strict=True):
        own, floor, usual = (values[each, setting.method, setting.dose] for each in (OWN, STRANGER, USUAL))
        origin = " (chosen on validation)" if setting in choice else ""
        found.append(
            f"{label(setting.method, setting.dose)}{origin}: right {_share(own['truth'])}, usual "
            f"{_share(own['prior'])}; against greedy {gained} gained, {lost} lost (McNemar exact p = {p:.2g}, Holm "
            f"{p_holm:.2g}); right about another's picture: {_share(floor['truth'])}, about the usual one: "
            f"{_share(usual['truth'])}."
        )
    for setting in settings:
        if setting.kind == "M3ID" and setting.dose == 0:
            same = int((values[OWN, setting.method, 0.0]["answer"] == plain["answer"]).sum())
            found.append(f"control: with lambda 0, {same} of {len(plain)} answers are those of greedy.")
    return (*found, *(_dependence(result) if DEPENDENCY in result.metrics else ()))


def mcnemar(values: pd.Series, reference: pd.Series) -> tuple[int, int, float]:
    """Examples gained and lost against a reference, and the exact two-sided p of McNemar's test (1 without any)."""
    gained = int(((values == 1) & (reference == 0)).sum())
    lost = int(((values == 0) & (reference == 1)).sum())
    return gained, lost, float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _dependence(result: Result) -> tuple[str, ...]:
    summary = result.summary("dependency")
    found = []
    for picture in (OWN, STRANGER, USUAL):
        rows = summary[(summary["picture"] == picture) & (summary["step"] != WHOLE) & (summary["n"] > 0)]
        steps = [
            f"token {row['step'] + 1} {row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"
            for row in rows.sort_values("step").to_dict("records")
        ]
        if steps:
            found.append(f"dependency on the picture (PDM), {picture}: {'; '.join(steps[:6])}.")
    return tuple(found)


def _share(values: pd.Series) -> str:
    hits, n = int(values.sum()), len(values)
    low, high = share_interval(hits, n)
    return f"{hits / n:.3f} ({low:.3f} to {high:.3f})"
