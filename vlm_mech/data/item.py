"""One item: an image (or several), a question and its answer, without a counterfactual."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_mech.data.options import checked_options, checked_text
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike, images_of
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.wording import BARE, Wording


@dataclass(frozen=True, eq=False)
class Item:
    """One question about an image, or about several that the prompt shows (`image=(first, second)`).

    `options` are the texts among which the answer is; `prior` is the usual answer, whatever is shown, and `conflict`
    whether the image contradicts it (None: not known). Items of one `group` are no independent examples. `wording` says
    how the question is put to a model. `captions` are a right and a wrong description of the image.

    Raises:
        UsageError: a text that is none, no image, or options without the answer.
    """

    id: str
    image: ImageLike | Sequence[ImageLike]
    question: str
    answer: str
    options: Sequence[str] = ()
    prior: str | None = None
    category: str | None = None
    group: str | None = None
    conflict: bool | None = None
    wording: Wording = BARE
    captions: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("id", "question", "answer"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} of an item is {getattr(self, name)!r:.60}; a text is needed")
        of = f"item {self.id}"
        if not self.images:
            raise UsageError(f"{of}: it shows no image; one at least is needed")
        if not isinstance(self.conflict, bool | None):
            raise UsageError(f"{of}: conflict is {self.conflict!r:.60}; true, false or null is needed")
        object.__setattr__(self, "options", checked_options(self.options, (self.answer,), of=of))
        for name in ("prior", "category", "group"):
            checked_text(getattr(self, name), name, of=of)
        if self.conflict and self.prior is not None and self.prior.strip() == self.answer.strip():
            raise UsageError(
                f"{of}: conflict is true, and its prior is the answer {self.answer!r:.60}; they must differ"
            )

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """The images in order; one in most data sets."""
        return images_of(self.image)

    @property
    def prompt(self) -> Prompt:
        """The question in its wording about the image."""
        return self.wording.prompt(self.question, self.image)
