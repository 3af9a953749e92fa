"""Contrastive decoding on both pictures of every pair, with fixed settings (arXiv 2411.05195, table 6, on MMVP)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.behaviour.answering.asked_options import (
    INDIVIDUAL,
    OF_ITEMS,
    PAIR,
    Template,
    asked_sides,
    options_of,
    others_of,
    unknown_words,
)
from vlm_mech.behaviour.answering.by_category import by_category, has_categories, told_by_category, with_categories
from vlm_mech.behaviour.decoding.data import Options, Setting, every_pair, fixed, label
from vlm_mech.behaviour.decoding.study import OWN, STRANGER, Asked, answered
from vlm_mech.data.derived_pairs import about_others
from vlm_mech.data.nouns import PAIRS, Nouns, nouns_of
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.reading import ALPHABET, letters_of, read_answer
from vlm_mech.errors import UsageError
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.statistics import holm, mcnemar
from vlm_mech.runs.workspace import Workspace, in_batches

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "Does contrastive decoding answer more questions correctly than greedy decoding? Each question is asked about "
    "{shown}, in conflict with a prior or not. Contrastive decoding uses the papers' values."
)
AXES = ("picture", "method")
UNREAD = Metric("unread", "share", "answers that name no option, or several, and count as wrong")
METRICS = (INDIVIDUAL, PAIR, UNREAD)
BY_CATEGORY = {"metrics": [INDIVIDUAL.name, PAIR.name], "cells": {"picture": [OWN]}}


def check_fixed(given: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Raises `UsageError` where values to choose among are given, none of which would be taken."""
    other = next((name for name in given if given[name] != usual[name]), None)
    if other is not None:
        raise UsageError(f"--{other} are values to choose among; with --both they are the papers', nothing is chosen")


def measured(
    vlm: "VLM", data: str, work: "Workspace", prompt: str, kinds: Sequence[str], options: Options, *, n: int | None,
    batch: int, seed: int, **drawn: Any,
) -> tuple[Result, Pairs]:  # fmt: skip
    """The result over all pairs, batch by batch, each kept when it is done; and the pairs.

    Args:
        prompt: a way of asking, as a `Template`.
        kinds: methods beside plain greedy decoding.
        drawn: further options of `every_pair`.

    Raises:
        UsageError: a template, methods or data that cannot be.
    """
    template, settings = Template(prompt, prompt), fixed(kinds)
    pairs = every_pair(vlm, data, template, n=n, seed=seed, n_new=options.max_new_tokens, **drawn)
    others = others_of(pairs, seed=seed)
    for key, rows in work.batches(in_batches(len(pairs), batch), "both pictures"):
        work.keep(key, both_pictures(vlm, pairs[rows], others[rows], template, settings, options), {})
    told = {"settings": [asdict(each) for each in settings], "prompt": prompt}
    table = work.collect()[0]
    metrics, nouns = (OF_ITEMS, UNREAD) if pairs.made else METRICS, nouns_of(pairs)
    name = f"contrastive decoding, {nouns.shown}"
    result = with_categories(Result(name, table, AXES, metrics, {}, told), BY_CATEGORY)
    unknown = unknown_words([vlm], pairs)
    return replace(result, findings=(*said_of_both(result, nouns), *unknown)), pairs


def both_pictures(
    vlm: "VLM", pairs: Pairs, others: Sequence[Pair], template: Template, settings: Sequence[Setting], options: Options
) -> pd.DataFrame:
    """Rows of one batch: what each setting answers about both pictures, and about those of another pair, the floor.

    Args:
        template: how the questions were asked; letters are read where it has them.
    """
    tables = []
    for picture, shown in {OWN: pairs, STRANGER: about_others(pairs, others)}.items():
        texts: dict[str, list[tuple[str, ...]]] = {}
        for side, prompts in enumerate((shown.base,) if pairs.made else (shown.base, shown.counterfactual)):
            asked = Asked(vlm, vlm.encode(prompts), [f"{pair.id}/{side}" for pair in pairs], options)
            for setting in settings:
                told = answered(asked, setting).texts
                texts.setdefault(label(setting.method, setting.dose), []).append(told)
        for method, both in texts.items():
            tables.append(_rows(pairs, both, template.lettered).assign(picture=picture, method=method))
    return pd.concat(tables, ignore_index=True)


def _rows(pairs: Pairs, texts: Sequence[Sequence[str]], lettered: bool) -> pd.DataFrame:
    """A row per pair, from the answers about its first and about its second picture."""
    named = np.array([[_named(text, pair, lettered) for text, pair in zip(one, pairs, strict=True)] for one in texts])
    own = [[options_of(pair).index(answer) for _, answer in asked_sides(pair)] for pair in pairs]
    right: Float[np.ndarray, "image pair"] = (named == np.array(own).T).astype(float)
    sizes = np.array([len(options_of(pair)) for pair in pairs])
    # Where the answer alone is known there is nothing to guess among.
    guess = np.where(sizes > 1, 1 / sizes, 0.0)
    table = pd.DataFrame({"example": [pair.id for pair in pairs], "group": [pair.group or pair.id for pair in pairs]})
    if any(pair.category for pair in pairs):
        table["category"] = [pair.category or "" for pair in pairs]
    table = table.assign(individual=right.mean(0), individual_baseline=guess)
    table = table.assign(unread=(named < 0).mean(0), unread_baseline=0.0)
    if len(texts) == 2:
        table = table.assign(pair=right.prod(0), pair_baseline=guess**2)
    for side, said in enumerate(texts):
        table[f"right_{side + 1}"], table[f"answer_{side + 1}"] = right[side], list(said)
    return table


def _named(text: str, pair: Pair, lettered: bool) -> int:
    """Number of the one option that an answer names; -1 for none, or several."""
    options = options_of(pair)
    only = read_answer(text, options, letters=ALPHABET[: len(options)] if lettered else letters_of(options)).only
    return -1 if only is None else only


def said_of_both(result: Result, nouns: Nouns = PAIRS) -> tuple[str, ...]:
    """Individual and pair accuracy of each setting, each held against greedy on the same pairs, and the floor.

    Args:
        nouns: what the examples are called.
    """
    summary = result.summary().set_index(["picture", "method", "metric"])
    kinds = [each.name for each in result.metrics if each.name != "unread"]
    table = result.table[result.table["picture"] == OWN].set_index(["method", "example"])[kinds[-1]]
    methods = list(dict.fromkeys(result.table["method"]))
    greedy = table.loc[methods[0]]
    right = [(table.loc[each].loc[greedy.index].eq(1).to_numpy(), greedy.eq(1).to_numpy()) for each in methods[1:]]
    tests = holm([mcnemar(*both, (each, methods[0])) for each, both in zip(methods[1:], right, strict=True)])
    chances = [summary.loc[(OWN, methods[0], metric), "baseline"] for metric in kinds]
    both, of_pairs = (", both images of each", " and {:.3g} for both of a pair") if "pair" in kinds else ("", "")
    found = [
        f"{len(greedy)} {nouns.many}{both}; settings are the papers'. Chance is {chances[0]:.3g} per "
        f"image{of_pairs.format(chances[-1])}; answers that name no option, or several, are wrong."
    ]
    for number, method in enumerate(methods):
        told = [_told(summary, OWN, method, metric) for metric in (*kinds, "unread")]
        floor = [_told(summary, STRANGER, method, metric) for metric in kinds]
        of = [f"{value} of {what}" for value, what in zip(told, ("images", "pairs")[: len(kinds)], strict=False)]
        text = f"{method}: {' and '.join(of)} correct, {told[-1]} unreadable; given {nouns.others} "
        text += " and ".join(floor)
        if number:
            test = tests[number - 1]
            by = result.contrast(
                {"picture": OWN, "method": method}, {"picture": OWN, "method": methods[0]}, "individual"
            )
            text += (
                f"; compared with greedy {test.only_one} {nouns.many} gained, {test.only_other} lost (McNemar exact p "
                f"= {test.p:.2g}, Holm {test.p_corrected:.2g}), images {by['mean']:+.3f} ({by['ci_low']:+.3f} to "
                f"{by['ci_high']:+.3f})"
            )
        found.append(f"{text}.")
    if has_categories(result):
        by_kind = by_category(result, **BY_CATEGORY)
        found += [each for metric in BY_CATEGORY["metrics"] for each in told_by_category(by_kind, ["method"], metric)]
    return tuple(found)


def _told(summary: pd.DataFrame, picture: str, method: str, metric: str) -> str:
    row = summary.loc[(picture, method, metric)]
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})"
