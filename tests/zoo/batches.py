"""Batches and pairs that are cut alike in every family, and its wrapper unchecked."""

import functools

from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.models.vlm import VLM

SHAPES = {"square": (56, 56), "wide": (120, 64), "tall": (64, 120), "tiny": (24, 16)}
QUESTIONS = ("what colour is the circle?", "is the red star left of the blue circle?")


def batch(seed: int = 1) -> list[Prompt]:
    """Two prompts of unequal length on pictures of unequal shape."""
    return [Prompt(QUESTIONS[0], picture(seed, *SHAPES["wide"])), Prompt(QUESTIONS[1], picture(seed + 1, 56, 56))]


@functools.cache
def wrapped(family: str, attn: str = "sdpa") -> VLM:
    return VLM(*ZOO[family](attn, 0), name=family, check=False)


def pairs_of(n: int) -> Pairs:
    size = SHAPES["wide"]
    pictures = [(picture(number, *size), picture(number + 50, *size)) for number in range(n)]
    return Pairs(
        "pictures",
        tuple(Pair(str(number), *both, QUESTIONS[number % 2], "red", "blue") for number, both in enumerate(pictures)),
    )
