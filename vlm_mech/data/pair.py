"""One counterfactual pair: two images, one question, two answers."""

from dataclasses import dataclass
from typing import Literal

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike

Side = Literal["first", "second"]
SIDES: tuple[Side, ...] = ("first", "second")


@dataclass(frozen=True, eq=False)
class Pair:
    """One question about an image and about its counterfactual, which has another answer.

    `conflict` says which of the two pictures, first or second, shows something that contradicts the usual answer; the
    answer to the other picture is the usual one. None: neither does, or it is not known.
    """

    id: str
    image: ImageLike
    counterfactual_image: ImageLike
    question: str
    answer: str
    counterfactual_answer: str
    group: str | None = None
    conflict: Side | None = None

    def __post_init__(self) -> None:
        for name in ("id", "question", "answer", "counterfactual_answer"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} of a pair is {getattr(self, name)!r:.60}; a text is needed")
        if self.answer.strip() == self.counterfactual_answer.strip():
            raise UsageError(f"pair {self.id}: both answers are {self.answer!r:.60}; they must differ")
        if self.conflict not in (None, *SIDES):
            raise UsageError(f'pair {self.id}: conflict is {self.conflict!r:.60}; "first", "second" or null is needed')
