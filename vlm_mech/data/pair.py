"""One counterfactual pair: two images (or two rows of images), one question, two answers."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vlm_mech.data.options import checked_options, checked_text
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike, images_of
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.wording import BARE, Wording

Side = Literal["first", "second"]
SIDES: tuple[Side, ...] = ("first", "second")
Made = Literal["other", "blur", "mean", "none"]
"""How the counterfactual picture of a single item was made: another item's picture, its own blurred or of its mean
colour, or none at all."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One question about an image and about its counterfactual, which has another answer.

    Several images may stand in the place of each (`image=(first, second)`), as many on both sides: the prompt then
    shows all of them. `wording` says how the question is put to a model. `conflict` says which of the two pictures,
    first or second, shows something that contradicts the usual answer; the answer to the other picture is the usual
    one. None: neither does, or it is not known. `options` are the texts among which both answers are; `prior` is the
    usual answer, whatever is shown, and `prior_question` asks for it; `captions` describe the two pictures.

    A single item stands as a pair too (`data.examples`): `made` then says how its counterfactual picture was made
    (`none`: there is no picture), what is true of that picture is not known, and `counterfactual_answer` is a wrong
    answer to the first, empty where none is known.

    Raises:
        UsageError: a text that is none, equal answers, no images, unlike numbers of them, or options without an answer.
    """

    id: str
    image: ImageLike | Sequence[ImageLike]
    counterfactual_image: ImageLike | Sequence[ImageLike]
    question: str
    answer: str
    counterfactual_answer: str
    group: str | None = None
    conflict: Side | None = None
    wording: Wording = BARE
    options: Sequence[str] = ()
    prior: str | None = None
    category: str | None = None
    captions: tuple[str, str] | None = None
    made: Made | None = None
    prior_question: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "question", "answer", "counterfactual_answer"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} of a pair is {getattr(self, name)!r:.60}; a text is needed")
        if self.made is not None and self.made not in get_args(Made):
            raise UsageError(f"pair {self.id}: made is {self.made!r:.60}; other, blur, mean, none or null is needed")
        if self.answer.strip() == self.counterfactual_answer.strip():
            raise UsageError(f"pair {self.id}: both answers are {self.answer!r:.60}; they must differ")
        if not isinstance(self.conflict, str | None) or self.conflict not in (None, *SIDES):
            raise UsageError(f'pair {self.id}: conflict is {self.conflict!r:.60}; "first", "second" or null is needed')
        counts = len(self.images), len(self.counterfactual_images)
        if (counts[0] != counts[1] and self.made != "none") or not counts[0]:
            raise UsageError(
                f"pair {self.id}: {counts[0]} images and {counts[1]} counterfactual images; as many of both are "
                "needed, one at least"
            )
        of, answers = f"pair {self.id}", [self.answer, *self.foils]
        object.__setattr__(self, "options", checked_options(self.options, answers, of=of))
        for name in ("prior", "category", "prior_question"):
            checked_text(getattr(self, name), name, of=of)

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """The images in order; one in most data sets."""
        return images_of(self.image)

    @property
    def counterfactual_images(self) -> tuple[ImageLike, ...]:
        """The counterfactual images, each in the place of the image that it stands for."""
        return images_of(self.counterfactual_image)

    @property
    def pictures(self) -> tuple[ImageLike, ...]:
        """All images of both sides."""
        return *self.images, *self.counterfactual_images

    @property
    def own_pictures(self) -> tuple[ImageLike, ...]:
        """The images of the data set that belong to this pair: of both sides, or those of a single item."""
        return self.pictures if self.made is None else self.images

    @property
    def foils(self) -> tuple[str, ...]:
        """Wrong answers to the first image: the counterfactual one; of a single item all options but the right one."""
        if self.made is not None and self.options:
            return tuple(each for each in self.options if each != self.answer)
        return (self.counterfactual_answer,) if self.counterfactual_answer else ()

    def asked(self, image: ImageLike | Sequence[ImageLike] | None) -> Prompt:
        """The question in its wording about an image, several, or none."""
        return self.wording.prompt(self.question, image)

    @property
    def base(self) -> Prompt:
        """The question about the image."""
        return self.asked(self.image)

    @property
    def counterfactual(self) -> Prompt:
        """The question about the counterfactual image."""
        return self.asked(self.counterfactual_image)

    def check_single(self, what: str) -> None:
        """Raises `UsageError` where a prompt of the pair shows several images.

        Args:
            what: what is made for one alone.
        """
        if len(self.images) > 1:
            raise UsageError(f"it shows {len(self.images)} images in one prompt; {what} one")


def with_own_groups(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """The pairs; one without a group, whose id is the group of others, gets a group of its own beside theirs."""
    groups = {pair.group for pair in pairs if pair.group}
    own: dict[str, str] = {}
    for name in (pair.id for pair in pairs if not pair.group and pair.id in groups):
        own[name] = f"pair {name}"
        while own[name] in groups or own[name] in {pair.id for pair in pairs}:
            own[name] = f"pair {own[name]}"
    return tuple(
        pair if pair.group or pair.id not in own else dataclasses.replace(pair, group=own[pair.id]) for pair in pairs
    )
