"""Which options a pair has, in which order, and how a question is asked with them."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_mech.data.pair import Pair
from vlm_mech.data.reading import ALPHABET
from vlm_mech.errors import UsageError

QUESTION, FIRST, SECOND = "{question}", "{first}", "{second}"


def options_of(pair: Pair) -> tuple[str, ...]:
    """The options of a pair in the order in which they are listed: its own, or both answers."""
    return tuple(pair.options) or (pair.answer, pair.counterfactual_answer)


def answers_first(pair: Pair) -> tuple[str, ...]:
    """The options of a pair, the right one of each picture first: the order of scores."""
    right = (pair.answer, pair.counterfactual_answer)
    return (*right, *(each for each in options_of(pair) if each not in right))


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
        first, second, *more = options
        between = self.text[self.text.find(FIRST) + len(FIRST) : self.text.find(SECOND)] if self.listed else ""
        letters = ALPHABET.lower()[2:]
        rest = [f"{between.replace('(b)', f'({each})')}{option}" for each, option in zip(letters, more, strict=False)]
        told = self.text.replace(FIRST, first).replace(SECOND, second + "".join(rest))
        return told.replace(QUESTION, question)

    def strings(self, options: Sequence[str]) -> tuple[str, ...]:
        """The full option strings: with their letters where the prompt has them."""
        letters = ALPHABET.lower()
        return tuple(f"({letters[place]}) {each}" if self.lettered else each for place, each in enumerate(options))
