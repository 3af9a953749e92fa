"""What goes with the answers of pairs, such as rivals given for them, where pairs have the answers of other ones."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pair, Pairs

Given = TypeVar("Given")


def following(pairs: "Pairs", given: Sequence[Given]) -> "Callable[[Pairs], list[Given]]":
    """Finds what belongs to the answers of some of the pairs, be they their own or those of others.

    A pair that has its own answers gets what was given for it; one with the answers of others
    (`data.derived_pairs.with_others_answers`) what was given for the first pair that has these.

    Args:
        given: something for each of the pairs, whose ids are distinct.
    """
    own = {pair.id: (_answers(pair), each) for pair, each in zip(pairs, given, strict=True)}
    by_answers: dict[tuple[str, str], Given] = {}
    for answers, each in own.values():
        by_answers.setdefault(answers, each)

    def found(some: "Pairs") -> list[Given]:
        return [own[pair.id][1] if own[pair.id][0] == _answers(pair) else by_answers[_answers(pair)] for pair in some]

    return found


def _answers(pair: "Pair") -> tuple[str, str]:
    return str(pair.answer), str(pair.counterfactual_answer)
