"""The same answers scored in every way: the rows of a batch, and the table of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.behaviour.answering.asked_options import (
    INDIVIDUAL,
    OF_ITEMS,
    PAIR,
    Template,
    answers_first,
    asked_sides,
    options_of,
)
from vlm_mech.behaviour.classify.baselines import contrastive_scores
from vlm_mech.behaviour.scoring.measures import (
    GENERATION,
    LETTERS,
    OPTIONS,
    RANDOM,
    SIMILARITY,
    STARTS,
    SUBSTRING,
    TO_IMAGE,
    Kind,
    hits,
    judged,
    mean_nll,
    parsed,
    relaxed,
)
from vlm_mech.data.derived_pairs import about_others
from vlm_mech.data.image_classes import Labelled
from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.reading import ALPHABET
from vlm_mech.data.whole_sets import sets_in
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import generate
from vlm_mech.results.result import Metric

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

AXES = ("model", "view", "scoring", "order", "prompt")
OWN = "own pictures"
"""The view of what is asked about; the other one, the floor, is named by `Nouns.others`."""
AS_GIVEN, SWAPPED, BOTH = "as given", "swapped", "both"
MEAN, BEST = "mean of prompts", "best on validation"
CAPTION = "caption"
RELAXED = Metric("relaxed", "share", "pairs matched in one decision, sum form", against="chance")
RATIO = Metric("relaxed_ratio", "share", "pairs matched in one decision, ratio form", against="chance")
UNREAD = Metric("unread", "share", "answers that name no option, or several")
BIAS = Metric(
    "position_bias", "share", "how much more often an option is chosen when listed first than second", signed=True
)
SET = Metric("set", "share", "sets (of four in What'sUp) with all images correct", against="chance")
METRICS = (INDIVIDUAL, PAIR, RELAXED, RATIO, UNREAD, BIAS)
SCORES = ("score_1_1", "score_1_2", "score_2_1", "score_2_2")
"""Scores of both pictures' right options; those of further options follow."""
VALUES = (*(each.name for each in METRICS), "chose_first_answer", "right_1", "right_2", *SCORES)


def metrics_of(table: pd.DataFrame) -> tuple[Metric, ...]:
    """The metrics of a table: with whole sets that of sets too; of single items those of one picture that have a value.

    Of items without options there is none of which option an answer names.
    """
    if not table["pair"].notna().to_numpy().any():
        return tuple(each for each in (OF_ITEMS, UNREAD, BIAS) if table[each.name].notna().to_numpy().any())
    return (*METRICS[:2], SET, *METRICS[2:]) if "set" in table else METRICS


def _have_options(table: pd.DataFrame) -> bool:
    """Whether any example has options, among which an answer may name none."""
    return bool(table["unread"].notna().to_numpy().any())


def floor_in(table: pd.DataFrame) -> str:
    """The view of others' pictures in a table or its summary; empty where there is none."""
    return next((str(each) for each in table["view"].unique() if each != OWN), "")


SCORINGS = (GENERATION, SUBSTRING, STARTS, RANDOM, OPTIONS, LETTERS, SIMILARITY, TO_IMAGE)
BY_CATEGORY = {
    "metrics": [INDIVIDUAL.name, PAIR.name],
    "cells": {
        "view": [OWN], "order": [BOTH], "prompt": [MEAN],
        "scoring": [GENERATION, OPTIONS, LETTERS, SIMILARITY, TO_IMAGE],
    },
}  # fmt: skip
"""What is told by category: the mean of all prompts, and of both orders of the options where these are listed."""


# One batch


def score_pairs(
    vlm: "VLM",
    pairs: Pairs,
    others: Sequence[Pair],
    templates: Sequence[Template],
    forms: Sequence[str],
    *,
    max_new_tokens: int = 8,
) -> pd.DataFrame:
    """One batch, scored in every form, with every prompt, in both orders of the options.

    Args:
        others: a pair for each, whose pictures take the place of its own, as the floor; none leaves that out.
        forms: of `GENERATION`, `OPTIONS` and `LETTERS`; the last for prompts with letters only.

    Returns:
        One row per pair and cell of `AXES`, without those over prompts (see `finished`).
    """
    views = {OWN: pairs} | ({nouns_of(pairs).others: about_others(pairs, others)} if others else {})
    tables = []
    for view, some in ((view, part) for view, every in views.items() for part in _by_number_of_options(every)):
        for template in templates:
            cell = {"model": vlm.name, "view": view, "prompt": template.name}
            if GENERATION in forms:
                tables += _generated(vlm, some, template, cell, max_new_tokens)
            if OPTIONS in forms:
                tables += _by_perplexity(vlm, some, template, cell, OPTIONS)
            if LETTERS in forms and template.lettered:
                tables += _by_perplexity(vlm, some, template, cell, LETTERS)
    return pd.concat(tables, ignore_index=True)


def _by_number_of_options(pairs: Pairs) -> list[Pairs]:
    """The pairs with as many options each."""
    found: dict[int, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(len(options_of(pair)), []).append(pair)
    return [dataclasses.replace(pairs, pairs=tuple(some)) for some in found.values()]


def similarity_rows(
    encoder: "DualEncoder", pairs: Pairs, others: Sequence[Pair], captions: Sequence[tuple[str, ...]], *, batch: int
) -> pd.DataFrame:
    """The rows of a contrastive model: cosines of both pictures with the captions of all options.

    Where all captions are the pairs' own, each caption picks among the two pictures too (text to image, as MMVP-VLM is
    scored officially).

    Args:
        captions: of each pair, in the order of `answers_first`.
    """
    views = {OWN: pairs} | ({nouns_of(pairs).others: about_others(pairs, others)} if others else {})
    known = dict(zip((pair.id for pair in pairs), captions, strict=True))
    both_ways = all(pair.captions and pair.made is None and len(options_of(pair)) == 2 for pair in pairs)
    tables = []
    for view, some in ((view, part) for view, every in views.items() for part in _by_number_of_options(every)):
        cosines = _cosines(encoder, some, [known[pair.id] for pair in some], batch=batch)
        cell = {"model": encoder.name, "view": view, "prompt": CAPTION, "order": BOTH}
        tables.append(_scored_rows(some, cell | {"scoring": SIMILARITY}, cosines, "similarity"))
        if both_ways:
            turned = cosines.swapaxes(1, 2)
            tables.append(_scored_rows(some, cell | {"scoring": TO_IMAGE}, turned, "similarity"))
    return pd.concat(tables, ignore_index=True)


def _cosines(
    encoder: "DualEncoder", pairs: Pairs, captions: Sequence[tuple[str, ...]], *, batch: int
) -> Float[np.ndarray, "pair image option"]:
    texts = list(dict.fromkeys(text for each in captions for text in each))
    places = np.array([[texts.index(text) for text in each] for each in captions])
    images = [image for pair in pairs for image, _ in asked_sides(pair)]
    examples = [Labelled(str(number), image, texts[0]) for number, image in enumerate(images)]
    cosines = contrastive_scores(encoder, examples, texts, "{class}", batch=batch)
    cosines = cosines.reshape(len(pairs), len(images) // len(pairs), -1)
    return np.take_along_axis(cosines, places[:, None, :].repeat(cosines.shape[1], axis=1), axis=2)


def _orders(template: Template) -> tuple[str, ...]:
    return (AS_GIVEN, SWAPPED) if template.listed else (BOTH,)


def _prompts(pairs: Pairs, template: Template, order: str) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    """First pictures' prompts, then second pictures', and each one's options as they are listed."""
    listed = [options_of(pair)[:: -1 if order == SWAPPED else 1] for pair in pairs]
    asked = [template.asked(pair.question, options) for pair, options in zip(pairs, listed, strict=True)]
    sides = list(zip(*map(asked_sides, pairs), strict=True))
    prompts = [
        pair.wording.prompt(text, image)
        for some in sides
        for pair, text, (image, _) in zip(pairs, asked, some, strict=True)
    ]
    return prompts, listed * len(sides)


def _generated(
    vlm: "VLM", pairs: Pairs, template: Template, cell: Mapping[str, str], max_new_tokens: int
) -> list[pd.DataFrame]:
    """Rows of what is generated, read by each rule; over both orders their mean."""
    by_order = []
    for order in _orders(template):
        prompts, listed = _prompts(pairs, template, order)
        texts = generate(vlm, prompts, max_new_tokens=max_new_tokens).texts
        right = [answer for some in zip(*map(asked_sides, pairs), strict=True) for _, answer in some]
        own = [some.index(answer) for some, answer in zip(listed, right, strict=True)]
        letters = {"letters": template.lettered}
        read = [judged(text, one, some, **letters) for text, one, some in zip(texts, own, listed, strict=True)]
        named = [parsed(text, some, **letters) for text, some in zip(texts, listed, strict=True)]
        last = len(listed[0]) - 1
        first = [np.nan if each is None else each == (last if order == SWAPPED else 0) for each in named]
        tables = []
        for scoring in read[0]:
            right = np.array([each[scoring] for each in read]).reshape(-1, len(pairs)).T
            table = _rows(pairs, {**cell, "scoring": scoring, "order": order}, right)
            unread = np.array([each is None for each in named], float).reshape(-1, len(pairs)).mean(0)
            # Where the answer alone is known none is an option.
            table["unread"] = np.where([len(some) > 1 for some in listed[: len(pairs)]], unread, np.nan)
            # An answer that names none speaks for no order.
            chose = np.array(first, float).reshape(-1, len(pairs))
            table["chose_first_answer"] = np.where(np.isnan(chose), 0.5, chose).mean(0)
            tables.append(table.assign(answer_1=texts[: len(pairs)], answer_2=texts[len(pairs) :] or ""))
        by_order.append(tables)
    if len(by_order) == 1:
        return by_order[0]
    means = [_mean_rows([one, other]).assign(order=BOTH) for one, other in zip(*by_order, strict=True)]
    return [*by_order[0], *by_order[1], *_biased(means, by_order)]


def _by_perplexity(
    vlm: "VLM", pairs: Pairs, template: Template, cell: Mapping[str, str], form: str
) -> list[pd.DataFrame]:
    """Rows of the options' or letters' perplexity; over both orders the mean of their verdicts."""
    found = []
    for order in _orders(template):
        prompts, listed = _prompts(pairs, template, order)
        strings = [ALPHABET[: len(options)] if form == LETTERS else template.strings(options) for options in listed]
        nll = mean_nll(vlm, prompts, strings)
        # Columns in the order of `answers_first`, whatever the order in the prompt.
        places = [[some.index(each) for each in answers_first(pair)] for pair, some in zip(pairs, listed, strict=False)]
        n_sides = len(nll) // len(pairs)
        nll = np.take_along_axis(nll, np.array(places * n_sides), axis=1)
        found.append(nll.reshape(n_sides, len(pairs), -1).swapaxes(0, 1))
    cell = {**cell, "scoring": form}
    tables = [
        _scored_rows(pairs, {**cell, "order": order}, scores, "perplexity")
        for order, scores in zip(_orders(template), found, strict=True)
    ]
    if len(tables) == 1:
        return tables
    means = _mean_rows(tables).assign(order=BOTH)
    return [*tables, *_biased([means], [[tables[0]], [tables[1]]])]


def _scored_rows(
    pairs: Pairs, cell: Mapping[str, str], scores: Float[np.ndarray, "pair image option"], kind: Kind
) -> pd.DataFrame:
    table = _rows(pairs, cell, hits(scores, kind=kind).astype(float))
    if scores.shape[1] == 2:
        table = _matched(table, scores, kind)
    table["unread"] = 0.0
    table["chose_first_answer"] = _chose_first(pairs, scores if kind == "similarity" else -scores)
    for (image, option), values in _columns(scores):
        table[f"score_{image + 1}_{option + 1}"] = values
    return table


def _matched(table: pd.DataFrame, scores: Float[np.ndarray, "pair image option"], kind: Kind) -> pd.DataFrame:
    """The rows with what one decision a pair gives."""
    positive = (scores > 0).all((1, 2)) if kind == "similarity" else np.ones(len(scores), bool)
    table["relaxed"] = relaxed(scores, kind=kind).astype(float)
    table.loc[positive, "relaxed_ratio"] = relaxed(scores[positive], kind=kind, form="ratio").astype(float)
    return table


def _columns(scores: Float[np.ndarray, "pair image option"]) -> list[tuple[tuple[int, ...], np.ndarray]]:
    return [(place, scores[:, *place]) for place in np.ndindex(*scores.shape[1:])]


def _chose_first(pairs: Pairs, better: Float[np.ndarray, "pair image option"]) -> Float[np.ndarray, "pair"]:
    """How often the option that is listed first in the given order is chosen; half where it is best along with others.

    Args:
        better: scores, higher ones better, in the order of `answers_first`.
    """
    places = np.array([answers_first(pair).index(options_of(pair)[0]) for pair in pairs])[:, None, None]
    own = np.take_along_axis(better, places.repeat(better.shape[1], 1), 2)[..., 0]
    others = np.where(np.arange(better.shape[2]) == places, -np.inf, better).max(2)
    return (0.5 + 0.5 * np.sign(own - others)).mean(1)


def _rows(pairs: Pairs, cell: Mapping[str, str], right: Float[np.ndarray, "pair image"]) -> pd.DataFrame:
    """Rows of one cell; what a scoring does not give is missing."""
    table = pd.DataFrame({"example": [pair.id for pair in pairs], "group": [pair.group or pair.id for pair in pairs]})
    if any(pair.category for pair in pairs):
        table["category"] = [pair.category or "" for pair in pairs]
    table = table.assign(**{axis: cell[axis] for axis in AXES}, **dict.fromkeys(VALUES, np.nan))
    table = table.assign(individual=right.mean(1), right_1=right[:, 0])
    if right.shape[1] == 2:
        table = table.assign(pair=right.prod(1), right_2=right[:, 1])
    sizes = np.array([len(options_of(pair)) for pair in pairs])
    # Where the answer alone is known there is nothing to guess among.
    guess = np.where(sizes > 1, 1 / sizes, 0.0)
    chances = {"individual": guess, "pair": guess**2, "relaxed": 0.5, "relaxed_ratio": 0.5}
    chances |= {"unread": 0.0, "position_bias": 0.0}
    table = table.assign(**{f"{name}_baseline": chance for name, chance in chances.items()}, answer_1="", answer_2="")
    sets, _ = sets_in(pairs)
    return table.assign(**_of_sets(table, sets)) if sets else table


def _of_sets(table: pd.DataFrame, sets: Sequence[Sequence[Pair]]) -> dict[str, Float[np.ndarray, "pair"]]:
    """Whether all pictures of a set are right, beside its first pair, so that it counts once; and its chance."""
    values, chances = np.full((2, len(table)), np.nan)
    place = {name: number for number, name in enumerate(table["example"])}
    for some in sets:
        numbers = [place[pair.id] for pair in some]
        values[numbers[0]] = table["pair"].to_numpy()[numbers].prod()
        chances[numbers[0]] = table["pair_baseline"].to_numpy()[numbers].prod()
    return {"set": values, "set_baseline": chances}


def _values(table: pd.DataFrame) -> list[str]:
    """Columns of numbers that are averaged over prompts and orders."""
    more = [str(name) for name in table if str(name).startswith("score_") and name not in SCORES]
    return [*VALUES, *more, *(["set"] if "set" in table else [])]


def _mean_rows(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The first table with the mean of the numbers of all, missing ones left out; its texts are left out."""
    values = _values(tables[0])
    stacked = pd.concat([table[["example", *values]] for table in tables])
    means = stacked.groupby("example", sort=False).mean().loc[tables[0]["example"]].reset_index()
    return tables[0].assign(**{name: means[name].to_numpy() for name in values}, answer_1="", answer_2="")


def _biased(means: list[pd.DataFrame], by_order: Sequence[Sequence[pd.DataFrame]]) -> list[pd.DataFrame]:
    chose = "chose_first_answer"
    return [
        mean.assign(position_bias=one[chose].to_numpy() - other[chose].to_numpy())
        for mean, one, other in zip(means, *by_order, strict=True)
    ]


# The whole table


def finished(test: pd.DataFrame, validation: pd.DataFrame | None) -> tuple[pd.DataFrame, dict[tuple[str, str], str]]:
    """The test table with the mean over prompts and the prompt best on validation; and which that is.

    Best: most single pictures right (`individual`) among validation pairs; among equals the prompt that was given
        first.
    """
    names = ["model", "view", "scoring"]
    more, best = [], {}
    for key, rows in test[test["order"] == BOTH].groupby(names, sort=False):
        model, _, scoring = (str(each) for each in cast(tuple, key))
        by_prompt = {str(prompt): some.reset_index(drop=True) for prompt, some in rows.groupby("prompt", sort=False)}
        more.append(_mean_rows(list(by_prompt.values())).assign(prompt=MEAN))
        if validation is not None:
            best[model, scoring] = _best(validation, model, scoring, list(by_prompt))
            more.append(by_prompt[best[model, scoring]].assign(prompt=BEST))
    table = pd.concat([*more, test], ignore_index=True)
    if not _have_options(table):
        # There is nothing to draw at random.
        table = table[table["scoring"] != RANDOM]
    if "category" in table:
        table["category"] = table["category"].fillna("")
    ranks = {name: list(dict.fromkeys(table[name])) for name in ("model", "view", "scoring", "prompt")}
    ranks["scoring"] = [each for each in SCORINGS if each in ranks["scoring"]]
    ranks["order"] = [BOTH, AS_GIVEN, SWAPPED]
    keys = [table[name].map({each: number for number, each in enumerate(ranks[name])}) for name in AXES]
    return table.iloc[np.lexsort(keys[::-1])].reset_index(drop=True), best


def _best(validation: pd.DataFrame, model: str, scoring: str, prompts: Sequence[str]) -> str:
    if len(prompts) == 1:
        return prompts[0]
    chosen = (validation["model"] == model) & (validation["scoring"] == scoring) & (validation["order"] == BOTH)
    rows = validation[chosen]
    means = [rows[rows["prompt"] == prompt]["individual"].mean() for prompt in prompts]
    return prompts[int(np.argmax(means))]
