"""Controls of a swap: states of other pairs, whose answer is the run's own, or the other picture's to another question.

A swap changes more than the answer: a state from another run is foreign in all that it holds. A donor with the *same
answer* brings all of that but no new answer. A donor of another *object*, whose right answer is the counterfactual's,
brings the answer with another question's state around it. Donors are chosen before any batch is made, so that they
depend on no batch, shard or worker; both answers of a pair are known, so no single item can have one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import DIRECTIONS, Pairs, linked
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.sweeps.asked import check_once

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Control = Literal["same-answer", "other-object"]
CONTROLS: tuple[Control, ...] = get_args(Control)
COUNTERFACTUAL, SAME, OTHER = "counterfactual", "same answer", "other object"
"""Whose states a swap takes, as the axis `donor` has it."""
NAMES: dict[Control, str] = {"same-answer": SAME, "other-object": OTHER}
DONOR = "donor"
NO_DONOR = "no other example with such an answer has the same token layout"
WRONG_DONOR = "the control's donor is not answered correctly"
WANTED = {SAME: "the run's own answer", OTHER: "the other image's answer to another question"}


@dataclass(frozen=True, eq=False)
class Donor:
    """One picture of another pair with its question: whose states a control takes."""

    pair: Pair
    side: int
    asks_the_same: bool

    @property
    def prompt(self) -> Prompt:
        """Its question about its picture."""
        return (self.pair.base, self.pair.counterfactual)[self.side]

    @property
    def answer(self) -> str:
        """The right answer to it."""
        return _answers(self.pair)[self.side]


@dataclass(frozen=True, eq=False)
class Donors:
    """The donors of a run: `chosen` by control (as the axis has it), direction and id of the pair that is patched."""

    names: tuple[str, ...]
    chosen: dict[tuple[str, str, str], Donor]
    told: dict[str, dict[str, dict[str, int]]]
    """By control and direction: pairs, those with a donor, and those whose donor is asked the same question."""
    directions: tuple[str, ...]
    seed: int

    def afresh(self, vlm: "VLM", pairs: Pairs) -> "Donors | None":
        """Donors drawn in the same way among other pairs.

        Raises:
            UsageError: fewer than two of these have one.
        """
        asked = [control for control, name in NAMES.items() if name in self.names]
        return donors_of(vlm, pairs, asked, directions=self.directions, seed=self.seed)

    def of(self, name: str, direction: str, pairs: Pairs) -> list[Donor | None]:
        """The donor of each pair, or None where it has none."""
        return [self.chosen.get((name, direction, pair.id)) for pair in pairs]


def donors_of(
    vlm: "VLM",
    pairs: Pairs,
    controls: Sequence[str],
    *,
    directions: Sequence[str] = DIRECTIONS,
    seed: int = 0,
) -> Donors | None:
    """For each pair another one, of another group, that lends the states of a control; None where none is asked for.

    Donors are drawn among both pictures of all pairs. That of `same-answer` has the answer of the run that is patched,
    to the same question where there is one, else to another; that of `other-object` is asked another question, to which
    the other picture's answer is the right one. Tokens of question and images stand where the pair's own do, in images
    cut alike. Donors that were taken less often go first.

    Args:
        pairs: all pairs of the run, in its order.
        controls: of `CONTROLS`, each once.
        directions: `noising` patches the run on the image, `denoising` that on the counterfactual.
        seed: draws them.

    Raises:
        UsageError: a control that is not known or named twice, single items, or fewer than two pairs with a donor.
    """
    if not controls:
        return None
    for control in controls:
        if control not in CONTROLS:
            raise UsageError(f"control {control!r} of a layer swap is not known; use {' or '.join(CONTROLS)}")
    check_once(controls, "the control")
    if pairs.made is not None:
        raise UsageError("controls of a swap need pairs: of the image made for a single item no answer is known")
    search, names = _Search(vlm, pairs, seed), tuple(NAMES[control] for control in CONTROLS if control in controls)
    chosen: dict[tuple[str, str, str], Donor] = {}
    told: dict[str, dict[str, dict[str, int]]] = {name: {} for name in names}
    for name in names:
        for direction in directions:
            found = dict(search.each(name, DIRECTIONS.index(direction)))
            if len(found) < 2:
                what = f"have another pair, of another group, with {WANTED[name]} and the same token layout"
                raise UsageError(
                    f"--control {name.replace(' ', '-')}: {len(found)} of {len(pairs)} pairs of {pairs.name} {what}; "
                    f"at least two are needed ({direction})"
                )
            chosen |= {(name, direction, pair): donor for pair, donor in found.items()}
            same = sum(donor.asks_the_same for donor in found.values())
            told[name][direction] = {"pairs": len(pairs), "with donor": len(found), "same question": same}
    return Donors(names, chosen, told, tuple(directions), seed)


def _answers(pair: Pair) -> tuple[str, str]:
    return pair.answer.strip(), pair.counterfactual_answer.strip()


class _Search:
    """Looks for donors among the pictures of pairs; each prompt is laid out once, if at all."""

    def __init__(self, vlm: "VLM", pairs: Pairs, seed: int) -> None:
        self._vlm, self._pairs, self._seed = vlm, pairs, seed
        self._groups = [pair.group or pair.id for pair in linked(pairs)]
        self._by_answer: dict[str, list[tuple[int, int]]] = {}
        for number, pair in enumerate(pairs):
            for side, answer in enumerate(_answers(pair)):
                self._by_answer.setdefault(answer, []).append((number, side))
        self._layouts: dict[tuple[int, int], tuple[Any, ...]] = {}

    def each(self, name: str, side: int) -> Iterator[tuple[str, Donor]]:
        """Ids of the pairs that have a donor, with it.

        Args:
            side: which picture is patched: 0 the first.
        """
        # A generator of its own, so that one control's donors do not depend on the others asked for.
        random = np.random.default_rng([self._seed, list(NAMES.values()).index(name), side])
        taken: dict[tuple[int, int], int] = {}
        for number, pair in enumerate(self._pairs):
            wanted = _answers(pair)[side if name == SAME else 1 - side]
            ranks = random.random(2 * len(self._pairs))
            found = [
                (not asks_the_same, taken.get(place, 0), ranks[2 * place[0] + place[1]], place)
                for place in self._by_answer[wanted]
                if self._groups[place[0]] != self._groups[number]
                for asks_the_same in [self._pairs[place[0]].question == pair.question]
                if name == SAME or not asks_the_same
            ]
            for other, _, _, place in sorted(found):
                if self._layout(place) == self._layout((number, side)):
                    taken[place] = taken.get(place, 0) + 1
                    yield pair.id, Donor(self._pairs[place[0]], place[1], not other)
                    break

    def _layout(self, place: tuple[int, int]) -> tuple[Any, ...]:
        """Where the tokens of a prompt stand: its length, those of its images and question, and how images are cut."""
        if place not in self._layouts:
            pair = self._pairs[place[0]]
            encoded = self._vlm.encode((pair.base, pair.counterfactual)[place[1]])
            row = encoded.rows[0]
            where = (row.image, encoded.positions("question"))
            self._layouts[place] = (len(row.tokens), *where, encoded.grids())
        return self._layouts[place]
