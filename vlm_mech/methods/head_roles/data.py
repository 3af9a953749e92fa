"""Two runs an example, groups of heads, and random heads that match a group."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt

FIRST, SECOND = "first", "second"
"""The runs of an example: on its picture, and on the other picture (or with the question about what is usual)."""
INTO_FIRST, INTO_SECOND = "into the first run", "into the second run"
DIRECTIONS = (INTO_FIRST, INTO_SECOND)
"""Whose run gets the other one's states (P2V and V2P of arXiv 2606.28273, where the second run asks for the prior)."""
HEAD, OTHERS = "head", "other heads of its layer"
"""What a row of the patching is about: one head, or the mean over all others of the same layer, which is what a random
head of that layer does."""
PROMOTING, SUPPRESSING, VISUAL, ROUTING, WRITING = "promoting", "suppressing", "visual", "routing", "writing"
GROUPS = {
    PROMOTING: "more than two standard deviations up the first component of recovered fractions",
    SUPPRESSING: "more than two standard deviations down that component",
    VISUAL: "of the largest attention to the image, times its concentration",
    ROUTING: "of the largest difference between the runs in attention to the image",
    WRITING: "that write the answer's token most often",
}
WAYS = ("zero", "mean", "resample")

LayerHead = tuple[int, int]
Group = tuple[LayerHead, ...]


@dataclass(frozen=True, eq=False)
class Runs:
    """Examples with both of their runs: prompts of the second one, which end where the answer begins as the first do.

    The first run should say `pairs.answer`, the second `pairs.counterfactual_answer`. `asks_prior`: the second run has
    the same picture and another question.
    """

    pairs: Pairs
    second: tuple[Prompt, ...]
    asks_prior: bool = False

    def __getitem__(self, rows: slice) -> "Runs":
        """Some of the examples."""
        return dataclasses.replace(self, pairs=self.pairs[rows], second=self.second[rows])

    def of(self, run: str) -> list[Prompt]:
        """The prompts of a run."""
        return list(self.pairs.base) if run == FIRST else list(self.second)

    def said(self, run: str) -> tuple[str, ...]:
        """What should be said in a run."""
        return tuple(self.pairs.answer if run == FIRST else self.pairs.counterfactual_answer)


def with_prior(pairs: Pairs, answers: Sequence[str] | None) -> Pairs:
    """The pairs with the usual answer as the other one.

    Args:
        pairs: each shows something that is not usual.
        answers: the usual answer of each; by default the pairs' own `prior`.

    Raises:
        UsageError: a pair has no usual answer or one that is shown, or as many are not given as there are pairs.
    """
    given = [pair.prior for pair in pairs] if answers is None else list(answers)
    if len(given) != len(pairs):
        raise UsageError(f"prior_answers has {len(given)} answers for {len(pairs)} pairs")
    made = []
    for pair, usual in zip(pairs, given, strict=True):
        if not isinstance(usual, str) or usual.strip() == pair.answer.strip():
            raise UsageError(
                f"pair {pair.id}: the usual answer is {usual!r:.60}; one unlike {pair.answer!r:.60} is needed"
            )
        made.append(dataclasses.replace(pair, counterfactual_answer=usual))
    return dataclasses.replace(pairs, pairs=tuple(made))


def runs_of(pairs: Pairs, questions: Sequence[str] | None) -> Runs:
    """Both runs of pairs.

    Args:
        pairs: the examples.
        questions: about what is usual, one a pair; by default the second run is that of the other picture.
    """
    if questions is None:
        return Runs(pairs, tuple(pairs.counterfactual))
    asked = [dataclasses.replace(pair, question=text) for pair, text in zip(pairs, questions, strict=True)]
    return Runs(pairs, tuple(dataclasses.replace(pairs, pairs=tuple(asked)).base), asks_prior=True)


def matched_draws(group: Group, n_heads: int, n: int, *, seed: int = 0) -> tuple[Group, ...]:
    """Distinct random groups with as many heads in each layer as a group has, none of them its own.

    Args:
        group: layers and heads.
        n_heads: heads of each layer.
        n: how many are drawn; fewer are given where there are no more.
        seed: draws them.

    Returns:
        Nothing where a layer has too few other heads.
    """
    wanted = Counter(layer for layer, _ in group)
    free = {layer: [head for head in range(n_heads) if (layer, head) not in group] for layer in sorted(wanted)}
    if not group or any(len(free[layer]) < wanted[layer] for layer in wanted):
        return ()
    random, found = np.random.default_rng(seed), dict[Group, None]()
    for _ in range(20 * n):
        if len(found) == n:
            break
        drawn = [
            (layer, int(head))
            for layer, heads in free.items()
            for head in random.choice(heads, wanted[layer], replace=False)
        ]
        found[tuple(sorted(drawn))] = None
    return tuple(found)


def named(group: Group) -> str:
    """The heads of a group, in the words of claims."""
    return ", ".join(f"layer {layer} head {head}" for layer, head in group)
