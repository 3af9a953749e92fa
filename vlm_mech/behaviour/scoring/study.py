"""The same answers scored in every way: the rows of a batch, and the table of a run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.behaviour.classify.baselines import contrastive_scores
from vlm_mech.behaviour.scoring.measures import (
    GENERATION,
    LETTER_NAMES,
    LETTERS,
    OPTIONS,
    RANDOM,
    SIMILARITY,
    STARTS,
    SUBSTRING,
    Kind,
    Template,
    hits,
    judged,
    mean_nll,
    parsed,
    relaxed,
)
from vlm_mech.data.image_classes import Labelled
from vlm_mech.data.pairs import Pair, Pairs, about_others
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import generate
from vlm_mech.results.result import Metric

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

AXES = ("model", "view", "scoring", "order", "prompt")
OWN, STRANGER = "own pictures", "another pair's pictures"
AS_GIVEN, SWAPPED, BOTH = "as given", "swapped", "both"
MEAN, BEST = "mean of prompts", "best on validation"
CAPTION = "caption"
INDIVIDUAL = Metric("individual", "share", "right answers over both pictures of a pair", against="chance")
PAIR = Metric("pair", "share", "pairs with both pictures right", against="chance")
RELAXED = Metric("relaxed", "share", "pairs matched in one decision, sum form", against="chance")
RATIO = Metric("relaxed_ratio", "share", "pairs matched in one decision, ratio form", against="chance")
UNREAD = Metric("unread", "share", "answers that name no option, or several")
BIAS = Metric(
    "position_bias", "share", "how much oftener an option is chosen when listed first than second", signed=True
)
METRICS = (INDIVIDUAL, PAIR, RELAXED, RATIO, UNREAD, BIAS)
CHANCE = {"individual": 0.5, "pair": 0.25, "relaxed": 0.5, "relaxed_ratio": 0.5, "unread": 0.0, "position_bias": 0.0}
SCORES = ("score_1_1", "score_1_2", "score_2_1", "score_2_2")
VALUES = (*CHANCE, "chose_first_answer", "right_1", "right_2", *SCORES)


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
    views = {OWN: pairs} | ({STRANGER: about_others(pairs, others)} if others else {})
    tables = []
    for view, some in views.items():
        for template in templates:
            cell = {"model": vlm.name, "view": view, "prompt": template.name}
            if GENERATION in forms:
                tables += _generated(vlm, some, template, cell, max_new_tokens)
            if OPTIONS in forms:
                tables += _by_perplexity(vlm, some, template, cell, OPTIONS)
            if LETTERS in forms and template.lettered:
                tables += _by_perplexity(vlm, some, template, cell, LETTERS)
    return pd.concat(tables, ignore_index=True)


def similarity_rows(
    encoder: "DualEncoder", pairs: Pairs, others: Sequence[Pair], captions: Sequence[tuple[str, str]], *, batch: int
) -> pd.DataFrame:
    """The rows of a contrastive model: cosines of both pictures with the captions of both answers."""
    views = {OWN: pairs} | ({STRANGER: about_others(pairs, others)} if others else {})
    texts = list(dict.fromkeys(text for each in captions for text in each))
    places = np.array([[texts.index(text) for text in each] for each in captions])
    tables = []
    for view, some in views.items():
        images = [image for pair in some for image in pair.pictures]
        examples = [Labelled(str(number), image, texts[0]) for number, image in enumerate(images)]
        cosines = contrastive_scores(encoder, examples, texts, "{class}", batch=batch).reshape(len(some), 2, -1)
        scores = np.take_along_axis(cosines, places[:, None, :].repeat(2, axis=1), axis=2)
        cell = {"model": encoder.name, "view": view, "prompt": CAPTION, "scoring": SIMILARITY, "order": BOTH}
        tables.append(_scored_rows(some, cell, scores, "similarity"))
    return pd.concat(tables, ignore_index=True)


def _orders(template: Template) -> tuple[str, ...]:
    return (AS_GIVEN, SWAPPED) if template.listed else (BOTH,)


def _prompts(pairs: Pairs, template: Template, order: str) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    """First pictures' prompts, then second pictures', and each one's options as they are listed."""
    listed = [(pair.answer, pair.counterfactual_answer)[:: -1 if order == SWAPPED else 1] for pair in pairs]
    asked = [template.asked(pair.question, options) for pair, options in zip(pairs, listed, strict=True)]
    images = [pair.image for pair in pairs], [pair.counterfactual_image for pair in pairs]
    prompts = [
        pair.wording.prompt(text, image)
        for some in images
        for pair, text, image in zip(pairs, asked, some, strict=True)
    ]
    return prompts, listed * 2


def _generated(
    vlm: "VLM", pairs: Pairs, template: Template, cell: Mapping[str, str], max_new_tokens: int
) -> list[pd.DataFrame]:
    """Rows of what is generated, read by each rule; over both orders their mean."""
    by_order = []
    for order in _orders(template):
        prompts, listed = _prompts(pairs, template, order)
        texts = generate(vlm, prompts, max_new_tokens=max_new_tokens).texts
        own = [int(number >= len(pairs)) ^ (order == SWAPPED) for number in range(len(texts))]
        letters = {"letters": template.lettered}
        read = [judged(text, one, some, **letters) for text, one, some in zip(texts, own, listed, strict=True)]
        named = [parsed(text, some, **letters) for text, some in zip(texts, listed, strict=True)]
        first = [np.nan if each is None else each == (order == SWAPPED) for each in named]
        tables = []
        for scoring in read[0]:
            right = np.array([each[scoring] for each in read]).reshape(2, -1).T
            table = _rows(pairs, {**cell, "scoring": scoring, "order": order}, right)
            table["unread"] = np.array([each is None for each in named], float).reshape(2, -1).mean(0)
            # An answer that names neither speaks for no order.
            chose = np.array(first, float).reshape(2, -1)
            table["chose_first_answer"] = np.where(np.isnan(chose), 0.5, chose).mean(0)
            tables.append(table.assign(answer_1=texts[: len(pairs)], answer_2=texts[len(pairs) :]))
        by_order.append(tables)
    if len(by_order) == 1:
        return by_order[0]
    means = [_mean_rows([one, other]).assign(order=BOTH) for one, other in zip(*by_order, strict=True)]
    return [*by_order[0], *by_order[1], *_biased(means, by_order)]


def _by_perplexity(
    vlm: "VLM", pairs: Pairs, template: Template, cell: Mapping[str, str], form: str
) -> list[pd.DataFrame]:
    """Rows of the options' or letters' perplexity; over both orders each option's mean is what is compared."""
    found = []
    for order in _orders(template):
        prompts, listed = _prompts(pairs, template, order)
        strings = [LETTER_NAMES if form == LETTERS else template.strings(options) for options in listed]
        # Columns in the order of the answers, whatever the order in the prompt.
        nll = mean_nll(vlm, prompts, strings)[:, :: -1 if order == SWAPPED else 1]
        found.append(nll.reshape(2, len(pairs), 2).swapaxes(0, 1))
    cell = {**cell, "scoring": form}
    tables = [
        _scored_rows(pairs, {**cell, "order": order}, scores, "perplexity")
        for order, scores in zip(_orders(template), found, strict=True)
    ]
    if len(tables) == 1:
        return tables
    means = _scored_rows(pairs, {**cell, "order": BOTH}, np.mean(found, axis=0), "perplexity")
    return [*tables, *_biased([means], [[tables[0]], [tables[1]]])]


def _scored_rows(
    pairs: Pairs, cell: Mapping[str, str], scores: Float[np.ndarray, "pair image option"], kind: Kind
) -> pd.DataFrame:
    table = _rows(pairs, cell, hits(scores, kind=kind).astype(float))
    positive = (scores > 0).all((1, 2)) if kind == "similarity" else np.ones(len(scores), bool)
    table["relaxed"] = relaxed(scores, kind=kind).astype(float)
    table.loc[positive, "relaxed_ratio"] = relaxed(scores[positive], kind=kind, form="ratio").astype(float)
    table["unread"] = 0.0
    # Where both options score alike neither is chosen.
    sign = np.sign(scores[..., 0] - scores[..., 1]) * (1 if kind == "similarity" else -1)
    table["chose_first_answer"] = (0.5 + 0.5 * sign).mean(1)
    table[list(SCORES)] = scores.reshape(-1, 4)
    return table


def _rows(pairs: Pairs, cell: Mapping[str, str], right: Float[np.ndarray, "pair image"]) -> pd.DataFrame:
    """Rows of one cell; what a scoring does not give is missing."""
    table = pd.DataFrame({"example": [pair.id for pair in pairs], "group": [pair.group or pair.id for pair in pairs]})
    table = table.assign(**{axis: cell[axis] for axis in AXES}, **dict.fromkeys(VALUES, np.nan))
    table = table.assign(individual=right.mean(1), pair=right.prod(1), right_1=right[:, 0], right_2=right[:, 1])
    return table.assign(**{f"{name}_baseline": chance for name, chance in CHANCE.items()}, answer_1="", answer_2="")


def _mean_rows(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The first table with the mean of the numbers of all, missing ones left out; its texts are taken away."""
    stacked = pd.concat([table[["example", *VALUES]] for table in tables])
    means = stacked.groupby("example", sort=False).mean().loc[tables[0]["example"]].reset_index()
    return tables[0].assign(**{name: means[name].to_numpy() for name in VALUES}, answer_1="", answer_2="")


def _biased(means: list[pd.DataFrame], by_order: Sequence[Sequence[pd.DataFrame]]) -> list[pd.DataFrame]:
    chose = "chose_first_answer"
    return [
        mean.assign(position_bias=one[chose].to_numpy() - other[chose].to_numpy())
        for mean, one, other in zip(means, *by_order, strict=True)
    ]


# The whole table


def finished(test: pd.DataFrame, validation: pd.DataFrame | None) -> tuple[pd.DataFrame, dict[tuple[str, str], str]]:
    """The test table with the mean over prompts and the prompt best on validation; and which that is.

    Best: most single pictures right (`individual`) among validation pairs; of equals the prompt that was given first.
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
    ranks = {name: list(dict.fromkeys(table[name])) for name in ("model", "view", "scoring", "prompt")}
    ranks["scoring"] = [each for each in SCORINGS if each in ranks["scoring"]]
    ranks["order"] = [BOTH, AS_GIVEN, SWAPPED]
    keys = [table[name].map({each: number for number, each in enumerate(ranks[name])}) for name in AXES]
    return table.iloc[np.lexsort(keys[::-1])].reset_index(drop=True), best


SCORINGS = (GENERATION, SUBSTRING, STARTS, RANDOM, OPTIONS, LETTERS, SIMILARITY)


def _best(validation: pd.DataFrame, model: str, scoring: str, prompts: Sequence[str]) -> str:
    if len(prompts) == 1:
        return prompts[0]
    chosen = (validation["model"] == model) & (validation["scoring"] == scoring) & (validation["order"] == BOTH)
    rows = validation[chosen]
    means = [rows[rows["prompt"] == prompt]["individual"].mean() for prompt in prompts]
    return prompts[int(np.argmax(means))]
