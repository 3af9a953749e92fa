"""Prompts that ask what is in an image, in the open or among candidates, and whether they fit the model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt

if TYPE_CHECKING:
    from vlm_mech.data.image_classes import Labelled
    from vlm_mech.models.vlm import VLM

SEED_OF_PAPER = 1234


@dataclass(frozen=True)
class Style:
    """What is asked: in the open, among candidates (`{question}`, `{options}`), and of a contrastive model (`{class}`).

    `stem` begins the model's answer when names are scored; `joined` stands between candidates.
    """

    questions: tuple[str, ...]
    closed: str
    caption: str
    stem: str = ""

    def among(self, question: str, options: Sequence[str]) -> str:
        """The question with its candidates, in their order."""
        return self.closed.replace("{question}", question).replace("{options}", ", ".join(options))


STYLES = {
    "plain": Style(
        ("what is this?", "what object is there?", "what is the name of the object?"),
        "{question} answer with one of: {options}.",
        "a {class}",
    ),
    "paper": Style(
        (
            "What type of object is in this photo?",
            "Identify the object in this image.",
            "What is the main object depicted in this photograph?",
        ),
        '{question} Choose one from "{options}".',
        "A photo of a {class}",
        "The photo features a",
    ),
}
"""`paper` is that of Zhang et al. 2024; `plain` keeps to the embedded models' vocabulary."""


def stemmed(prompt: Prompt, stem: str) -> Prompt:
    """The prompt with the beginning of the answer, after that which it has already."""
    begun = " ".join(part for part in (prompt.prefix, stem.strip()) if part)
    return replace(prompt, prefix=begun) if stem.strip() else prompt


def candidates(example: "Labelled", names: Sequence[str], k: int, *, seed: int, order: str) -> tuple[int, ...]:
    """Numbers of the example's class and of k-1 others, drawn for each example by the seed.

    Args:
        order: `random`, anew for each example, or `fixed`, that of the data set; the candidates are the same.
    """
    if not 2 <= k <= len(names):
        raise UsageError(f"{k} candidates were requested among {len(names)} classes; 2 to {len(names)} can be")
    rng, own = random.Random(f"{seed}/{k}/{example.id}"), names.index(example.label)
    found = [own, *rng.sample([number for number in range(len(names)) if number != own], k - 1)]
    mixed = rng.sample(found, k)
    return tuple(sorted(found) if order == "fixed" else mixed)


def too_long(vlm: "VLM", prompt: Prompt, asked: str, n_new: int) -> str:
    """Why a question, worded, does not fit the model's positions in the place of the prompt's; empty if it does."""
    most = vlm.n_positions
    listed, plain = (len(vlm.tokenizer(text, verbose=False)["input_ids"]) for text in (asked, prompt.question))
    n_tokens = vlm.encode(prompt).n_pos + listed - plain + n_new
    return "" if most is None or n_tokens <= most else f"{n_tokens} tokens with the answer, for {most} positions"


def longest(names: Sequence[str], tokens: Sequence[int], k: int) -> list[str]:
    """The k names with most tokens: no other candidates make a longer prompt."""
    order = sorted(range(len(names)), key=lambda number: -tokens[number])
    return [names[number] for number in order[:k]]
