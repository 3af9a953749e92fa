"""What visual decay asks: the same questions on pictures of one level, and what is made of the answers.

After arXiv 2606.06890, which names eight Gaussian kernels from 1 x 1 to 61 x 61; the sizes between, the size of
the image before the blur, and how answers are compared were not found and are ours.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from vlm_mech.behaviour.answering.reading import Reading, letters_of, read_answer
from vlm_mech.behaviour.blur_decay.blur import decayed, resized
from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import generate

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


# One batch


def with_images(pairs: Pairs, level: str) -> Pairs:
    """The pairs with both pictures resized and brought to a level."""
    changed = [
        dataclasses.replace(
            pair,
            image=decayed(resized(load_image(pair.image)), level),
            counterfactual_image=decayed(resized(load_image(pair.counterfactual_image)), level),
        )
        for pair in pairs
    ]
    return dataclasses.replace(pairs, pairs=tuple(changed))


def asked_at(pairs: Pairs, level: str) -> list[Prompt]:
    """The questions about the first pictures at a level."""
    return [Prompt(pair.question, decayed(resized(load_image(pair.image)), level)) for pair in pairs]


def answers_at(vlm: "VLM", pairs: Pairs, pictures: Sequence[Image.Image | None], *, max_new_tokens: int) -> list[str]:
    """Greedy answers to the questions of the pairs about these pictures, or about none."""
    prompts = [Prompt(pair.question, image) for pair, image in zip(pairs, pictures, strict=True)]
    return list(generate(vlm, prompts, max_new_tokens=max_new_tokens).texts)


def compared(
    answers: dict[str, list[str]], clean: Sequence[str], options: Sequence[tuple[str, str]], *, letters: bool
) -> pd.DataFrame:
    """One row per example and level: whether the answer is the clean one, has been so all along, and is right.

    Args:
        answers: by level, in order of decay; the first is the clean one for the images themselves.
        clean: answers to the clean images, what all are compared with.
        options: of each example the right answer and the other one.
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


def _read(texts: Sequence[str], options: Sequence[tuple[str, str]], *, letters: bool) -> list[Reading]:
    return [
        read_answer(text, both, letters=letters_of(both) if letters else ())
        for text, both in zip(texts, options, strict=True)
    ]
