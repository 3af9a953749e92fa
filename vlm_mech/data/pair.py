"""One counterfactual pair: two images, one question, two answers."""

import dataclasses
from collections.abc import Sequence
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
