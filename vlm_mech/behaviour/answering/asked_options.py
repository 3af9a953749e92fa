"""Which options a pair has, in which order, and how a question is asked with them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_mech.data.derived_pairs import lenders
from vlm_mech.data.examples import with_note
from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import Pairs
from vlm_mech.data.reading import ALPHABET
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike
from vlm_mech.inputs.special_tokens import unknown_word
from vlm_mech.results.result import Metric

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

INDIVIDUAL = Metric("individual", "share", "correct answers over both images of a pair", against="chance")
PAIR = Metric("pair", "share", "pairs with both images correct", against="chance")
OF_ITEMS = dataclasses.replace(INDIVIDUAL, description="items answered correctly")
"""`INDIVIDUAL` of single items, which have one picture."""
QUESTION, FIRST, SECOND = "{question}", "{first}", "{second}"


def options_of(pair: Pair) -> tuple[str, ...]:
    """The options of a pair in the order in which they are listed: its own, or both answers.

    A single item without options has its answer alone.
    """
    if not pair.options and pair.made is not None:
        return (pair.answer,)
    return tuple(pair.options) or (pair.answer, pair.counterfactual_answer)


def asked_sides(pair: Pair) -> list[tuple[ImageLike | Sequence[ImageLike], str]]:
    """The pictures that are asked about, with the right answer of each: both of a pair, the one of a single item."""
    sides = [(pair.image, pair.answer), (pair.counterfactual_image, pair.counterfactual_answer)]
    return sides if pair.made is None else sides[:1]


def answers_first(pair: Pair) -> tuple[str, ...]:
    """The options of a pair, the right one of each picture first: the order of scores."""
    right = [answer for _, answer in asked_sides(pair)]
    return (*right, *(each for each in options_of(pair) if each not in right))


def others_of(pairs: Pairs, *, seed: int) -> list[Pair]:
    """Another example for each, whose pictures take the place of its own as the floor.

    Items often share a picture, and pairs of a file may: the other one is of another group (see `lenders`).

    Args:
        seed: draws them.

    Raises:
        UsageError: fewer than two examples, or all share a picture.
    """
    return [pairs.pairs[other] for other in lenders(pairs, seed=seed)]


def of_all_options(pairs: Pairs) -> Pairs:
    """The pairs; single items say that all their options are read, and no wrong answer drawn from them."""
    return with_note(pairs, "all their options count" if any(pair.options for pair in pairs) else "without options")


@dataclass(frozen=True)
class Template:
    """A way of asking: a text with `{question}` and, where the options are listed, `{first}` and `{second}`.

    What stands between the two is repeated before each further option, letters going on: `(a) ... (b) ... (c) ...`.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if QUESTION not in self.text:
            raise UsageError(
                f"prompt {self.text!r} has no {QUESTION}; it is needed, as in '{QUESTION} answer briefly.'"
            )
        if (FIRST in self.text) != (SECOND in self.text):
            raise UsageError(f"prompt {self.text!r} lists one option; it needs both {FIRST} and {SECOND}, or neither")

    @property
    def listed(self) -> bool:
        """Whether the options stand in the prompt, so that they have an order."""
        return FIRST in self.text

    @property
    def lettered(self) -> bool:
        """Whether the options have letters, so that an answer may be one."""
        return f"(a) {FIRST}" in self.text and f"(b) {SECOND}" in self.text

    def asked(self, question: str, options: Sequence[str]) -> str:
        """What is asked, the options in their order."""
        if not self.listed:
            return self._filled({QUESTION: question})
        if len(options) < 2:
            raise UsageError(f"prompt {self.text!r} lists options, and there are none")
        first, second, *more = options
        between = self.text[self.text.find(FIRST) + len(FIRST) : self.text.find(SECOND)]
        letters = ALPHABET.lower()[2:]
        rest = [f"{between.replace('(b)', f'({each})')}{option}" for each, option in zip(letters, more, strict=False)]
        return self._filled({QUESTION: question, FIRST: first, SECOND: second + "".join(rest)})

    def _filled(self, values: Mapping[str, str]) -> str:
        """The text with its own places filled, once: what is put there may hold braces of its own."""
        return re.sub("|".join(map(re.escape, values)), lambda place: values[place.group()], self.text)

    def strings(self, options: Sequence[str]) -> tuple[str, ...]:
        """The full option strings: with their letters where the prompt has them."""
        letters = ALPHABET.lower()
        return tuple(f"({letters[place]}) {each}" if self.lettered else each for place, each in enumerate(options))

    def check_known(self, vlm: "VLM", n: int = 2, what: str = "prompt") -> None:
        """Raises `UsageError` where the model has no token for a word around questions and options.

        Args:
            n: number of options.
            what: it is called in the error.
        """
        word = unknown_word(vlm.tokenizer, self.asked("", ("",) * n))
        if word is not None:
            raise UsageError(f"{what} {self.text!r} holds {word!r}, which {vlm.name} has no token for")


def unknown_words(vlms: "Sequence[VLM]", pairs: Pairs) -> tuple[str, ...]:
    """A sentence for each model that lacks tokens for words of the data's questions, which are asked all the same."""
    found = []
    for vlm in vlms:
        words = [unknown_word(vlm.tokenizer, pair.question) for pair in pairs]
        some = list(dict.fromkeys(word for word in words if word is not None))
        if some:
            n = sum(word is not None for word in words)
            found.append(
                f"{n} of {len(words)} questions hold words that {vlm.name} has no token for, such as {some[0]!r}; they "
                "are used unchanged, and each such word is the same unknown token."
            )
    return tuple(found)
