"""What contrastive decoding changes in answers where a prior competes with the picture: rows, and chosen doses."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.behaviour.decoding.data import GREEDY, PAPER, PLAIN, TEST, VALIDATION, Options, Setting, label
from vlm_mech.behaviour.decoding.first_pass import FirstPass
from vlm_mech.behaviour.decoding.processors import (
    ALPHA,
    M3ID,
    VCD,
    Branch,
    Dependency,
    Drawn,
    decode,
    noised_branch,
    seeds_of,
    unseen_branch,
)
from vlm_mech.data.derived_pairs import about_others, turned
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.reading import letters_of, read_answer, says
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.statistics import Paired, holm, mcnemar

if TYPE_CHECKING:
    from vlm_mech.inputs.prompt import Encoded
    from vlm_mech.interventions.trace import Generation
    from vlm_mech.models.vlm import VLM

AXES = ("split", "picture", "step", "method", "dose")
OWN, STRANGER, USUAL = "own picture", "another's picture", "usual picture"
TRUE = {OWN: 0, STRANGER: 0, USUAL: 1}
"""Which of a pair's answers is the true one in each view."""
WHOLE = -1
"""Step of what is asked of whole answers."""
TRUTH = Metric("truth", "share", "share of answers that name what the image shows, and not the other answer")
PRIOR = Metric("prior", "share", "share of answers that name only the other answer, here the usual one")
DEPENDENCY = Metric("dependency", "fraction", "PDM: Hellinger distance of the next token with and without the image")
METRICS = (TRUTH, PRIOR, DEPENDENCY)


@dataclasses.dataclass(eq=False)
class Asked:
    """A batch of prompts, and the passes over them that all settings share: as they are, unseen, and diffused."""

    vlm: "VLM"
    encoded: "Encoded"
    names: Sequence[str]
    options: Options
    first: FirstPass = dataclasses.field(default_factory=FirstPass)

    @functools.cached_property
    def unseen(self) -> Branch:
        """The prompts without their pictures."""
        return unseen_branch(self.vlm, self.encoded)

    @functools.cached_property
    def diffused(self) -> Branch:
        """The prompts with diffused pictures."""
        seeds = seeds_of(self.names, self.options.seed)
        return noised_branch(self.vlm, self.encoded, step=self.options.noise_step, seeds=seeds)


def answered(asked: Asked, setting: Setting, more: Sequence[Any] = ()) -> "Generation":
    """Answers by one setting; noise and draws depend on the seed of the run and the examples' names alone.

    Args:
        more: processors that look at the plain scores, before all others.
    """
    vlm, encoded, options, processors = asked.vlm, asked.encoded, asked.options, list(more)
    if setting.kind == "M3ID":
        given = {"alpha": setting.alpha, "rate": setting.dose, "start": options.start}
        processors.append(M3ID(vlm, encoded, **given, branch=asked.unseen))
    elif setting.kind == "VCD":
        given = {"seeds": seeds_of(asked.names, options.seed), "cutoff": options.cutoff, "step": options.noise_step}
        processors.append(VCD(vlm, encoded, strength=setting.dose, **given, branch=asked.diffused))
    if setting.sampled:
        # The same draws for every setting, so that settings are compared under the same luck.
        processors.append(Drawn(encoded, seeds=seeds_of(asked.names, options.seed + 1)))
    return decode(vlm, encoded, processors, max_new_tokens=options.max_new_tokens, first=asked.first)


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
        views |= {STRANGER: about_others(pairs, others)}
        # Of a single item there is no picture of what is usual.
        views |= {} if pairs.made else {USUAL: turned(pairs)}
    names, tables = [pair.id for pair in pairs], []
    for picture, shown in views.items():
        asked = Asked(vlm, encoded := vlm.encode(shown.base), names, options)
        baseline: dict[str, Any] = {}
        for setting in settings:
            # A branch of its own: what watches the plain answer follows it beside another that corrects it.
            watch = [Dependency(vlm, encoded)] if dependency and setting == Setting() else []
            told = answered(asked, setting, watch)
            named = _named(told, pairs, options)
            rates = {"truth": (named == TRUE[picture]).astype(float), "prior": (named == 1).astype(float)}
            baseline = baseline or {f"{name}_baseline": values for name, values in rates.items()}
            place = {"picture": picture, "method": setting.method, "dose": setting.dose, "step": WHOLE}
            exact = [float(says(text, right)) for text, right in zip(told.texts, shown.answer, strict=True)]
            columns = {**place, **rates, **baseline, "exact": exact, "answer": told.texts}
            tables.append(pd.DataFrame({"example": names, **columns}))
            if watch:
                tables += _steps(names, watch[0], alive(vlm, told), place)
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat(tables, ignore_index=True)
    table["answer"] = table["answer"].fillna("")
    return table.assign(split=split, group=table["example"].map(groups))


def _named(told: "Generation", pairs: Pairs, options: Options) -> np.ndarray:
    """Which of a pair's two answers each text names, 0 or 1; -1 for neither, or both."""
    found = []
    for text, pair in zip(told.texts, pairs, strict=True):
        both = (pair.answer, pair.counterfactual_answer)
        only = read_answer(text, both, letters=letters_of(both) if options.letters else ()).only
        found.append(-1 if only is None else only)
    return np.array(found)


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
    """For each kind and draw the setting best on validation; among equals, the one that changes least.

    Best is what says the truth and nothing else most often (a large dose derails answers: `orange bottom bottom`), and
    then what names it most often, which decides where a model answers in sentences.
    """
    own = table[(table["split"] == VALIDATION) & (table["picture"] == OWN)]
    means = own.groupby(["method", "dose"])[["exact", "truth"]].mean()
    shares: dict[Any, tuple[float, ...]] = dict(zip(means.index, map(tuple, means.to_numpy().tolist()), strict=True))
    found: dict[tuple[str, bool], Setting] = {}
    for setting in sorted(settings, key=lambda each: (each.dose, each.alpha)):
        key = (setting.kind, setting.sampled)
        if setting.kind != PLAIN and setting.dose > 0:
            held = found.setdefault(key, setting)
            better = shares[setting.method, setting.dose] > shares[held.method, held.dose]
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


# The tests

Answers = dict[tuple[str, str, float], pd.DataFrame]
"""By picture, method and dose: truth, prior, the answer itself and the group of each test example."""


def answers_on_test(result: Result) -> Answers:
    """Whole answers to the test examples, those of other splits left out."""
    answers = result.table[(result.table["step"] == WHOLE) & (result.table["split"] == TEST)]
    cells = answers.groupby(["picture", "method", "dose"], sort=False)
    return {key: rows.set_index("example")[["truth", "prior", "answer", "group"]].dropna() for key, rows in cells}  # type: ignore


def against_greedy(answers: Answers, settings: Sequence[Setting]) -> list[Paired]:
    """McNemar's test of each setting's correct answers about the own pictures against greedy ones, Holm over all."""
    plain = answers[OWN, GREEDY, 0.0]["truth"]
    tests = []
    for setting in settings:
        truth = answers[OWN, setting.method, setting.dose]["truth"]
        right = [each.eq(1).to_numpy() for each in (truth, plain.loc[truth.index])]
        tests.append(mcnemar(*right, (label(setting.method, setting.dose), GREEDY)))
    return holm(tests)
