"""How a question is put to a model: the words around it, a system message, and the beginning of the answer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.special_tokens import check_known

QUESTION = "{question}"


@dataclass(frozen=True)
class Wording:
    """How the questions of a data set are put: words around each, a system message, the beginning of the answer.

    `template` holds `{question}` once, as in "{question} Answer with one word."; what becomes of it is the question of
    the prompt, and all of it is the span `question`. `system` and `prefix` are those of `Prompt`.

    Raises:
        UsageError: a template without `{question}` or with several, an empty system message, a prefix that cannot be.
    """

    template: str = QUESTION
    system: str | None = None
    prefix: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.template, str):
            raise UsageError(f"a wording is a text with {QUESTION}, not a {type(self.template).__name__}")
        found = self.template.count(QUESTION)
        if found != 1:
            raise UsageError(
                f"wording {self.template!r} has {QUESTION} {found} times; once is needed, as in '{QUESTION} One word.'"
            )
        if self.system is not None and not self.system.strip():
            raise UsageError(f"the system message is {self.system!r}; a text is needed, or none")
        Prompt("?", prefix=self.prefix)

    def asked(self, question: str) -> str:
        """The question in its words."""
        return question if self.template == QUESTION else self.template.replace(QUESTION, question.strip())

    def prompt(
        self, question: str, image: ImageLike | Sequence[ImageLike] | None = None, *, subject: str | None = None
    ) -> Prompt:
        """The question about an image, several, or none.

        Args:
            subject: the words of the question that it is about.
        """
        return Prompt(self.asked(question), image, self.system, prefix=self.prefix, subject=subject)

    def text(self, begun: str, *, subject: str | None = None) -> Prompt:
        """A text that the model goes on with as it stands, without a chat template.

        Raises:
            UsageError: a system message or a prefix, which such a text has no place for.
        """
        for what, given in (("system message", self.system), ("prefix", self.prefix)):
            if given is not None:
                raise UsageError(f"{what} {given!r:.60} has no place in a text that the answer goes on with: {begun!r}")
        asked = self.asked(begun)
        return Prompt(asked, text=asked, subject=subject)

    @property
    def told(self) -> dict[str, str]:
        """What is other than a question as it stands, for the provenance of a run; nothing where nothing is."""
        usual = asdict(Wording())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}


BARE = Wording()
"""Questions as they stand."""


def check_words(model: Any, wording: Wording) -> None:
    """Raises `UsageError` where a wording holds a word that the model's tokenizer does not know."""
    parts = {
        "the wording": wording.template.replace(QUESTION, " ").strip(),
        "the system message": wording.system,
        "the prefix": wording.prefix,
    }
    for what, text in parts.items():
        check_known(model, [text] if text else [], what)
