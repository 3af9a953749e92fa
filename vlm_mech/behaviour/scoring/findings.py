"""What a scoring run says, in sentences made from its numbers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from vlm_mech.behaviour.answering.asked_options import options_of
from vlm_mech.behaviour.answering.by_category import by_category, has_categories, told_by_category
from vlm_mech.behaviour.scoring.comparisons import YES_NO, comparisons, decided, matched, verdict, yes_no
from vlm_mech.behaviour.scoring.measures import (
    GENERATION,
    LETTERS,
    OPTIONS,
    RANDOM,
    SIMILARITY,
    STARTS,
    SUBSTRING,
    TO_IMAGE,
)
from vlm_mech.behaviour.scoring.study import AS_GIVEN, BEST, BOTH, BY_CATEGORY, CAPTION, MEAN, OWN, floor_in
from vlm_mech.data.nouns import nouns_in, nouns_of
from vlm_mech.data.pairs import Pairs
from vlm_mech.data.whole_sets import sets_in
from vlm_mech.results.result import Result


def findings(
    result: Result, pairs: Pairs, best: Mapping[tuple[str, str], str], n_validation: int, left_out: Sequence[str],
    n_partial_sets: int = 0,
) -> tuple[str, ...]:  # fmt: skip
    """Each scoring with its interval, chance and floor; the best prompt; matching; looser rules; order; comparisons."""
    summary, nouns = result.summary(), nouns_of(pairs)
    found = [
        f"{len(pairs)} {nouns.many} of {pairs.name}. {_chance(pairs)}; ties count against the model; intervals are "
        f"95 % bootstrap over {nouns.many}."
    ]
    found += [*_sets(pairs, n_partial_sets), *left_out]
    if len(pairs) < 2:
        return tuple(found)
    for model, scoring in _tested(result):
        found.append(f"{model}, {scoring}: {_accuracy(summary, model, scoring, best, n_validation)}")
    for model, scoring in _tested(result):
        found += _matching(result, summary, model, scoring)
    for model in dict.fromkeys(result.table["model"]):
        found += [*_looser(summary, str(model)), *_order(summary, str(model))]
    found += _yes_no(result, pairs)
    if has_categories(result):
        table = by_category(result, **BY_CATEGORY)
        for metric in BY_CATEGORY["metrics"]:
            found += told_by_category(table, ["model", "scoring"], metric)
    return (*found, *_comparisons(result))


def _chance(pairs: Pairs) -> str:
    """What guessing gives."""
    sizes = sorted({len(options_of(pair)) for pair in pairs})
    if pairs.made:
        chances = [1 / len(options_of(pair)) if len(options_of(pair)) > 1 else 0 for pair in pairs]
        among = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        none = "Without options chance is 0"
        return none if sizes == [1] else f"Chance among {among} options is {np.mean(chances):.3g}"
    if sizes == [2]:
        return "Chance between two options is 0.5 per image, 0.25 for both of a pair and 0.5 for matching a pair"
    among = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    single, both = (np.mean([len(options_of(pair)) ** -power for pair in pairs]) for power in (1, 2))
    told = f"{single:.3g} per image, {both:.3g} for both of a pair and 0.5 for matching a pair"
    return f"Chance among {among} options is {told}"


def _sets(pairs: Pairs, partial: int) -> list[str]:
    """How many sets there are, what guessing gives for all pictures of one, and how many are not whole."""
    whole, _ = sets_in(pairs)
    if not whole and not partial:
        return []
    chances = [math.prod(len(pair.options) ** -2 for pair in some) for some in whole]
    told = f"{len(whole)} complete sets ({2 * sum(map(len, whole))} images)"
    told += f", chance for a whole set {np.mean(chances):.2g}" if whole else ""
    return [f"{told}; {partial} lack a pair and are not counted as sets."]


def _tested(result: Result) -> list[tuple[str, str]]:
    cells = result.cells[["model", "scoring"]].drop_duplicates()
    wanted = (GENERATION, OPTIONS, LETTERS, SIMILARITY, TO_IMAGE)
    return [(str(model), str(scoring)) for model, scoring in cells.to_numpy() if scoring in wanted]


def _at(summary: pd.DataFrame, metric: str, model: str, scoring: str, **where: str) -> str:
    """Mean and interval of a cell; of the mean over prompts and both orders unless `where` says otherwise."""
    wanted = {"model": model, "view": OWN, "scoring": scoring, "order": BOTH, "prompt": MEAN, "metric": metric} | where
    rows = summary[(summary[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    if rows.empty or not rows["n"].iloc[0]:
        return "none"
    row = rows.iloc[0]
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"


def _accuracy(
    summary: pd.DataFrame, model: str, scoring: str, best: Mapping[tuple[str, str], str], n_validation: int
) -> str:
    one, two = (_at(summary, metric, model, scoring) for metric in ("individual", "pair"))
    if two == "none":
        return _single_accuracy(summary, model, scoring, best, n_validation)
    others = floor_in(summary)
    floors = [_at(summary, metric, model, scoring, view=others) for metric in ("individual", "pair")]
    text = f"{one} of images and {two} of pairs correct, {_over(summary, model, scoring)}; given another pair's images "
    text += f"{floors[0]} and {floors[1]}.{_as_given(summary, model, scoring)}"
    if (whole := _at(summary, "set", model, scoring)) != "none":
        text += (
            f" All images of a set: {whole}; given others' images {_at(summary, 'set', model, scoring, view=others)}."
        )
    if (model, scoring) in best and scoring not in (SIMILARITY, TO_IMAGE):
        chosen = [_at(summary, metric, model, scoring, prompt=BEST) for metric in ("individual", "pair")]
        text += f" With the best prompt on {n_validation} validation pairs, {best[model, scoring]!r}: "
        text += f"{chosen[0]} and {chosen[1]}."
    return text


def _asked(summary: pd.DataFrame, model: str, scoring: str) -> tuple[list[str], bool]:
    """The prompts of a scoring, and whether options are listed in any of them, so that they have two orders."""
    rows = summary[(summary["model"] == model) & (summary["scoring"] == scoring) & (summary["view"] == OWN)]
    names = [str(each) for each in rows["prompt"].unique() if each not in (MEAN, BEST)]
    return names, AS_GIVEN in set(rows["order"])


def _over(summary: pd.DataFrame, model: str, scoring: str) -> str:
    """What a number is the mean of."""
    names, listed = _asked(summary, model, scoring)
    if scoring in (SIMILARITY, TO_IMAGE):
        return "by the captions"
    if len(names) == 1:
        return "mean of both orders of the options" if listed else "with one prompt"
    return f"mean of {len(names)} prompts{' and of both orders of the options' if listed else ''}"


def _as_given(summary: pd.DataFrame, model: str, scoring: str) -> str:
    """What is right with the options in their own order, where they are listed, by the first prompt that does."""
    names, listed = _asked(summary, model, scoring)
    if not listed:
        return ""
    held = [{"prompt": name, "order": AS_GIVEN} for name in names]
    told = [(cell["prompt"], _at(summary, "individual", model, scoring, **cell)) for cell in held]
    prompt, one = next((name, text) for name, text in told if text != "none")
    two = _at(summary, "pair", model, scoring, prompt=prompt, order=AS_GIVEN)
    both = "" if two == "none" else f" of images and {two} of pairs"
    which = f" and prompt {prompt!r}" if len(names) > 1 else ""
    return f" With the options as given{which}: {one}{both}."


def _single_accuracy(
    summary: pd.DataFrame, model: str, scoring: str, best: Mapping[tuple[str, str], str], n_validation: int
) -> str:
    """Of single items."""
    told, floor = (_at(summary, "individual", model, scoring, view=view) for view in (OWN, floor_in(summary)))
    text = f"{told} of items correct, {_over(summary, model, scoring)}; given another item's image {floor}."
    text += _as_given(summary, model, scoring)
    if (model, scoring) in best and scoring != SIMILARITY:
        chosen = _at(summary, "individual", model, scoring, prompt=BEST)
        text += f" With the best prompt on {n_validation} validation items, {best[model, scoring]!r}: {chosen}."
    return text


def _matching(result: Result, summary: pd.DataFrame, model: str, scoring: str) -> list[str]:
    """Relaxed scoring beside strict, and what the sign as printed would have said."""
    told = _at(summary, "relaxed", model, scoring)
    if told == "none":
        return []
    floor = _at(summary, "relaxed", model, scoring, view=floor_in(summary))
    strict = _at(summary, "pair", model, scoring)
    text = f"{model}, {scoring}: {told} of pairs matched in one decision (chance 0.5; floor {floor}); {strict} "
    text += "with both images correct. "
    if scoring in (SIMILARITY, TO_IMAGE):
        missing = result.table[(result.table["scoring"] == scoring) & (result.table["view"] == OWN)]
        missing = int(missing[missing["prompt"] == MEAN]["relaxed_ratio"].isna().sum())
        ratio = _at(summary, "relaxed_ratio", model, scoring)
        refused = f"; undefined for {missing} pairs with a similarity of 0 or less" if missing else ""
        return [f"{text}Pairs are matched by the sum of cosines; by their ratio it is {ratio}{refused}."]
    cell = next(each for each in decided(result) if each["model"] == model and each["scoring"] == scoring)
    ours, printed = matched(result, cell)
    return [
        f"{text}With {_named(cell)} {ours:.3f}; the inequality as printed in the paper would "
        f"give {printed:.3f}, which counts the unmatched pairs."
    ]


def _looser(summary: pd.DataFrame, model: str) -> list[str]:
    told = _at(summary, "individual", model, GENERATION)
    if told == "none":
        return []
    names = {
        SUBSTRING: "as a plain substring", STARTS: "if the option begins with the answer's first word or it is empty",
        RANDOM: "if an unreadable answer counts as a random option",
    }  # fmt: skip
    each = [f"{_at(summary, 'individual', model, scoring)} {words}" for scoring, words in names.items()]
    shown = "; ".join(one for one in each if not one.startswith("none"))
    unread = _at(summary, "unread", model, GENERATION)
    named = "" if unread == "none" else f" {unread} of answers name no option, or several, and count as wrong."
    return [f"{model}: accuracy of the same generated answers by looser rules: {shown}; by whole words {told}.{named}"]


def _order(summary: pd.DataFrame, model: str) -> list[str]:
    each = [
        f"{scoring} {told}"
        for scoring in (GENERATION, OPTIONS, LETTERS)
        if (told := _at(summary, "position_bias", model, scoring)) != "none"
    ]
    if not each:
        return []
    return [f"{model}: position bias, how much more often an option is chosen when listed first: {'; '.join(each)}."]


def _yes_no(result: Result, pairs: Pairs) -> list[str]:
    """What POPE tells of questions answered yes or no."""
    found = []
    for cell in yes_no(result, pairs):
        told = ", ".join(f"{name} {'none' if cell[name] is None else cell[name]}" for name in YES_NO[:-1])
        of = f", {cell['category']}" if cell["category"] else ""
        found.append(
            f"{cell['model']}, {cell['scoring']} with {_named(cell)}{of}: {told} of yes; yes is {cell['yes']} of the "
            f"answers; n = {cell['n']}."
        )
    return found


def _comparisons(result: Result) -> list[str]:
    """Those that judge a pair unlike in a sentence each, the others in one."""
    made = comparisons(result)
    found, same = [], []
    right = "pairs with both images correct" if verdict(result) == "pair" else "items correct"
    for each in made:
        names = [f"{cell['scoring']} of {cell['model']} ({_named(cell)})" for cell in (each.one, each.other)]
        if not each.counts.only_one + each.counts.only_other:
            same.append(f"{names[0]} and {names[1]}")
            continue
        by = each.difference
        found.append(
            f"{right}: {each.counts.only_one} only by {names[0]}, {each.counts.only_other} only by {names[1]}; "
            f"difference {by['mean']:+.3f} ({by['ci_low']:+.3f} to {by['ci_high']:+.3f}, "
            f"n = {by['n']}), McNemar's exact p {_p(each.counts.p_corrected)} (Holm over {len(made)})."
        )
    one = nouns_in(result.provenance).one
    return [*found, f"Same verdict on every {one}: {'; '.join(same)}."] if same else found


def _named(cell: Mapping[str, str]) -> str:
    """The prompt of a cell, and the order of its options where they are listed."""
    given = ", options as given" if cell["order"] == AS_GIVEN else ""
    if cell["prompt"] == CAPTION:
        return CAPTION
    name = " ".join(cell["prompt"].split())
    return f"prompt {name if len(name) <= 40 else name[:37] + '...'!r}{given}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
