"""One counterfactual pair: two images (or two rows of images) and one question, or two questions; and two answers."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vlm_mech.data.options import checked_options, checked_text
from vlm_mech.data.shared_pictures import pixel_hash
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

    A pair of two texts has no images on either side (`()`), and a `counterfactual_question` in the place of a
    counterfactual image. `subjects` are the words that each question is about, by default those in which the two
    differ; their tokens are the span `subject`. `completion`: the texts are not put into a chat template, the answer
    goes on with them as they stand.

    Raises:
        UsageError: a text that is none, equal answers, no images, unlike numbers of them, options without an answer,
            images beside a counterfactual question, or questions whose subjects cannot be told.
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
    counterfactual_question: str | None = None
    subjects: tuple[str, str] | None = None
    completion: bool = False

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
        if self.counterfactual_question is not None:
            self._check_texts(sum(counts))
        elif (counts[0] != counts[1] and self.made != "none") or not counts[0]:
            raise UsageError(
                f"pair {self.id}: {counts[0]} images and {counts[1]} counterfactual images; as many of both are "
                "needed, one at least"
            )
        elif self.completion or self.subjects:
            raise UsageError(f"pair {self.id}: completion and subjects are of pairs with a counterfactual_question")
        of, answers = f"pair {self.id}", [self.answer, *self.foils]
        object.__setattr__(self, "options", checked_options(self.options, answers, of=of))
        for name in ("prior", "category", "prior_question"):
            checked_text(getattr(self, name), name, of=of)

    def _check_texts(self, n_images: int) -> None:
        """Raises `UsageError` unless the two questions make a pair; finds the subjects that are not given."""
        other = self.counterfactual_question
        if not isinstance(other, str) or n_images or self.made or self.question == other:
            raise UsageError(
                f"pair {self.id}: counterfactual_question is {other!r:.60}, with {n_images} images; a text other "
                "than the question is needed, and no image"
            )
        asked = self.question, other
        subjects = self.subjects or differing(asked[0], asked[1])
        held = isinstance(subjects, list | tuple) and len(subjects) == 2 and all(isinstance(x, str) for x in subjects)
        if not held or any(not one.strip() or text.count(one) != 1 for one, text in zip(subjects, asked, strict=True)):
            raise UsageError(
                f"pair {self.id}: subjects are {subjects!r:.100}; two texts are needed, each once in its question"
            )
        object.__setattr__(self, "subjects", tuple(subjects))

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
    def is_text(self) -> bool:
        """Whether it is a pair of two questions, without images."""
        return self.counterfactual_question is not None

    @property
    def shown(self) -> list[str]:
        """What pairs that are independent of each other do not share: hashes of own pictures, or both questions."""
        texts = [self.question, self.counterfactual_question or ""] if self.is_text else []
        return [*texts, *(pixel_hash(image) for image in self.own_pictures)]

    @property
    def foils(self) -> tuple[str, ...]:
        """Wrong answers to the first image: the counterfactual one; of a single item all options but the right one."""
        if self.made is not None and self.options:
            return tuple(each for each in self.options if each != self.answer)
        return (self.counterfactual_answer,) if self.counterfactual_answer else ()

    def asked(self, image: ImageLike | Sequence[ImageLike] | None) -> Prompt:
        """The question in its wording about an image, several, or none."""
        if self.completion:
            return self.wording.text(self.question, subject=self.subjects and self.subjects[0])
        return self.wording.prompt(self.question, image, subject=self.subjects and self.subjects[0])

    @property
    def base(self) -> Prompt:
        """The question about the image."""
        return self.asked(self.image)

    @property
    def counterfactual(self) -> Prompt:
        """The question about the counterfactual image, or the counterfactual question."""
        return self.exchanged.base if self.is_text else self.asked(self.counterfactual_image)

    @property
    def exchanged(self) -> "Pair":
        """The same pair with both prompts exchanged; answers stay."""
        if self.counterfactual_question is None:
            return dataclasses.replace(self, image=self.counterfactual_image, counterfactual_image=self.image)
        return dataclasses.replace(
            self,
            question=self.counterfactual_question,
            counterfactual_question=self.question,
            subjects=self.subjects and self.subjects[::-1],
        )

    def check_single(self, what: str) -> None:
        """Raises `UsageError` where a prompt of the pair shows several images.

        Args:
            what: what is made for one alone.
        """
        if len(self.images) > 1:
            raise UsageError(f"it shows {len(self.images)} images in one prompt; {what} one")


def differing(one: str, other: str) -> tuple[str, str]:
    """The words of each text that the other does not have in this place: all but what begins and ends both."""
    words = [re.findall(r"\w+|\W", text) for text in (one, other)]
    for _ in range(2):
        while all(words) and words[0][0] == words[1][0]:
            words = [each[1:] for each in words]
        words = [each[::-1] for each in words]
    first, second = ("".join(each).strip() for each in words)
    return first, second


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
