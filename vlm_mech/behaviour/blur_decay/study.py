"""What blurring does to answers, and to where they are read, as the rows of a table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.blur_decay.blur import AS_USUAL, NONE, Scale
from vlm_mech.behaviour.blur_decay.data import floor_of, with_images
from vlm_mech.behaviour.blur_decay.probes import DECODED
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.reading import Reading, letters_of, read_answer
from vlm_mech.inputs.image import ImageLike
from vlm_mech.interventions.trace import generate
from vlm_mech.methods.layer_swap.study import LOGIT_DIFF, RECOVERED, swap_states
from vlm_mech.results.result import Metric

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("view", "level", "layer")
OWN, STRANGER = "picture", "another's picture"
COUNTERFACTUAL, STRANGE_COUNTERFACTUAL = "counterfactual", "another's counterfactual"
FLOORS = {OWN: STRANGER, COUNTERFACTUAL: STRANGE_COUNTERFACTUAL}
"""What is asked about: the pictures of the pairs, and beside them what shows how much never changes anyhow."""
OF_ITEMS = {OWN: STRANGER}
"""The same of single items: what is true of their counterfactual pictures is not known."""
SWAPS = {"image": "swap of image", "last": "swap of last"}
SWAP_METRICS = (RECOVERED.name, LOGIT_DIFF.name)
WHOLE = -1
"""Layer of what is asked of the whole model."""
SAME = Metric(
    "same",
    "share",
    "E: share of answers equal to the answer about the clear image; an unreadable answer never is",
    against="clear picture",
)
UNCHANGED = Metric(
    "unchanged", "share", "C: share of answers that were that answer at every level so far", against="clear picture"
)
CORRECT = Metric("correct", "share", "share of correct answers", against="clear picture")
CORRECT_UNCHANGED = Metric(
    "correct_unchanged", "share", "share of correct answers among those unchanged so far", against="clear picture"
)
METRICS = (UNCHANGED, SAME, CORRECT, CORRECT_UNCHANGED, RECOVERED, LOGIT_DIFF, DECODED)


def decay(
    vlm: "VLM",
    pairs: Pairs,
    levels: Sequence[str],
    *,
    others: Sequence[Pair] = (),
    seed: int = 0,
    mechanism: Sequence[str] = (),
    scale: Scale = AS_USUAL,
    letters: bool = False,
    max_new_tokens: int = 8,
    memory: int | str | None = None,
) -> pd.DataFrame:
    """One batch at every level: answers about both pictures of its pairs and about those of another pair, and swaps.

    Args:
        others: for each pair the one that lends its pictures for the floor of what is unchanged; by default another one
            of the batch (see `blur_decay.data.floor_of`).
        seed: draws these others.
        mechanism: levels at which the states of one picture of each pair are swapped into the run on the other, both at
            that level (see `layer_swap.study.swap_states`), whatever is answered.
        scale: how large pictures are when they are blurred.
        letters: whether answers are letters of options.

    Returns:
        One row per example and cell of `AXES`; what a view does not measure is missing.

    Raises:
        UsageError: no others are given, and there is one pair alone or all share a picture.
    """
    others = others or floor_of(pairs, slice(None), seed=seed)
    # Each picture is blurred once; those of other batches come last.
    every = dataclasses.replace(pairs, pairs=tuple({pair.id: pair for pair in (*pairs, *others)}.values()))
    place = {pair.id: number for number, pair in enumerate(every)}
    floors = FLOORS if pairs.made is None else OF_ITEMS
    answers: dict[str, dict[str, list[str]]] = {view: {} for two in floors.items() for view in two}
    swaps = []
    for level in levels:
        if level == NONE:
            texts = answers_at(vlm, pairs, [None] * len(pairs), max_new_tokens=max_new_tokens)
            answers = {view: held | {level: texts} for view, held in answers.items()}
            continue
        shown = with_images(every, level, scale)
        first, second = [pair.image for pair in shown], [pair.counterfactual_image for pair in shown]
        for (view, floor), pictures in zip(floors.items(), (first, second), strict=False):
            answers[view][level] = answers_at(vlm, pairs, pictures[: len(pairs)], max_new_tokens=max_new_tokens)
            strange = [pictures[place[other.id]] for other in others]
            answers[floor][level] = answers_at(vlm, pairs, strange, max_new_tokens=max_new_tokens)
        if level in mechanism:
            swaps.append(_swapped(vlm, shown[: len(pairs)], memory).assign(level=level))
    tables = []
    names = [pair.id for pair in pairs]
    options = [(pair.answer, *pair.foils) for pair in pairs]
    for (view, floor), both in zip(floors.items(), (options, [each[::-1] for each in options]), strict=False):
        for each in (view, floor):
            table = compared(answers[each], answers[view][levels[0]], both, letters=letters)
            tables.append(table.assign(view=each, layer=WHOLE, example=names * len(levels)))
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat([*tables, *swaps], ignore_index=True)
    table["level"] = pd.Categorical(table["level"], list(levels), ordered=True)
    return table.assign(group=table["example"].map(groups), skipped=table["skipped"].fillna("") if mechanism else "")


def _swapped(vlm: "VLM", pairs: Pairs, memory: int | str | None) -> pd.DataFrame:
    sites = [Site("llm.resid_post", layer) for layer in vlm.llm_layers]
    table, _ = swap_states(vlm, pairs, sites, tuple(SWAPS), directions=("noising",), only_correct=False, memory=memory)
    kept = ["example", "layer", *(f"{name}{end}" for name in SWAP_METRICS for end in ("", "_baseline")), "skipped"]
    return table[kept].assign(view=table["span"].map(SWAPS))


def swapped_at(
    vlm: "VLM",
    pairs: Pairs,
    levels: Sequence[str],
    shown: Callable[[Pairs, str], Pairs] = with_images,
    *,
    memory: int | str | None = None,
) -> pd.DataFrame:
    """The rows of `decay` that are about swaps, alone.

    Args:
        levels: those at which states of one picture of each pair are swapped into the run on the other.
        shown: brings pairs to a level.
        memory: bytes that it may take beyond the model, such as "2GiB".
    """
    each = [_swapped(vlm, shown(pairs, level), memory).assign(level=level) for level in levels]
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat(each, ignore_index=True)
    return table.assign(group=table["example"].map(groups))


def answers_at(
    vlm: "VLM", pairs: Pairs, pictures: "Sequence[ImageLike | Sequence[ImageLike] | None]", *, max_new_tokens: int
) -> list[str]:
    """Greedy answers to the questions of the pairs about these pictures, or about none."""
    prompts = [pair.asked(image) for pair, image in zip(pairs, pictures, strict=True)]
    return list(generate(vlm, prompts, max_new_tokens=max_new_tokens).texts)


def compared(
    answers: dict[str, list[str]], clean: Sequence[str], options: Sequence[tuple[str, ...]], *, letters: bool
) -> pd.DataFrame:
    """One row per example and level: whether the answer is the clean one, has been so all along, and is right.

    Args:
        answers: by level, in order of decay; the first is the clean one for the images themselves.
        clean: answers to the clean images, what all are compared with.
        options: of each example the right answer first, and the others.
        letters: whether options have letters.
    """
    first = _read(clean, options, letters=letters)
    clean_right = np.array([each.only == 0 for each in first])
    unchanged = np.ones(len(first), bool)
    tables = []
    for level, texts in answers.items():
        now = _read(texts, options, letters=letters)
        same = np.array([one.same(other) for one, other in zip(now, first, strict=True)])
        unchanged &= same
        correct = np.array([each.only == 0 for each in now])
        table = pd.DataFrame({"same": same, "unchanged": unchanged.copy(), "correct": correct}).astype(float)
        table["correct_unchanged"] = np.where(unchanged, correct, np.nan)
        baselines = {"same": 1.0, "unchanged": 1.0, "correct": clean_right.astype(float)}
        baselines["correct_unchanged"] = np.where(unchanged, clean_right, np.nan)
        table = table.assign(**{f"{name}_baseline": value for name, value in baselines.items()})
        unread = np.array([not each.words for each in now])
        tables.append(table.assign(level=level, answer=texts, clean_right=clean_right, unread=unread))
    return pd.concat(tables, ignore_index=True)


def guessing(pairs: Pairs, levels: Sequence[str]) -> dict[str, list[float]] | None:
    """E and C by level of answers drawn at random from the options at every level; None where some have no options.

    With `|Y|` options an answer is that to the clear picture in `1 / |Y|`, and at all of `k` levels in `|Y|^-k`.
    Answers about pictures that are alike are not independent, so that C of another picture is the stricter floor.
    """
    if pairs.made and not all(pair.options for pair in pairs):
        return None
    sizes = np.array([1 + len(pair.foils) for pair in pairs], dtype=float)
    if (sizes < 2).any():
        return None
    steps = np.arange(len(levels))
    same = [1.0, *[float((1 / sizes).mean())] * (len(levels) - 1)]
    return {"same": same, "unchanged": [float((sizes**-step).mean()) for step in steps]}


def _read(texts: Sequence[str], options: Sequence[tuple[str, ...]], *, letters: bool) -> list[Reading]:
    return [
        read_answer(text, both, letters=letters_of(both) if letters else ())
        for text, both in zip(texts, options, strict=True)
    ]
