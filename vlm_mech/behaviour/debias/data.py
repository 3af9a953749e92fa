"""The pictures of a tuning towards looking: to tune on, to choose on, to test on."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_mech.data.derived_pairs import by_groups, conflict_first, turned, with_conflict
from vlm_mech.data.examples import load_examples
from vlm_mech.data.pairs import Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import BARE, Wording

IN_CONFLICT, USUAL = "in conflict", "usual"
SHARES = (0.6, 0.2)
"""Of the groups of a folder, to train and to validate; the rest is to test."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Pairs to tune on, to choose the checkpoint by, and to report; those in conflict come first in each."""

    train: Pairs
    validation: Pairs
    test: Pairs


def parts_of(
    data: str,
    *,
    n: int | None,
    n_train: int,
    n_validation: int,
    seed: int,
    wording: Wording = BARE,
    fix_labels: bool = False,
) -> Parts:
    """The pairs of a set in conflict, turned where needed so that the picture in conflict is asked about first.

    Generated scenes have splits of their own. The pairs of a folder are cut by groups: 60 % to train, 20 % to validate,
    the rest to test. Of single items those in conflict are taken, and no usual picture is known.

    Raises:
        UsageError: no pair says which picture is in conflict, or a folder with too few groups.
    """
    if not data.startswith("scenes/"):
        pairs = load_examples(data, n=n, seed=seed, wording=wording, fix_labels=fix_labels)
        return Parts(*by_groups(_faced(pairs), SHARES, seed=seed))
    wanted = {"train": n_train, "validation": n_validation, "test": n}
    drawn = {"seed": seed, "wording": wording}
    found = {split: load_pairs(data, n=count, split=split, **drawn) for split, count in wanted.items()}
    return Parts(**{split: _faced(pairs) for split, pairs in found.items()})


def _faced(pairs: Pairs) -> Pairs:
    return conflict_first(with_conflict(pairs))


def with_answers_of_others(pairs: Pairs, *, seed: int) -> Pairs:
    """The pairs with an answer, for the picture in conflict, that is true of another one: a control of the tuning.

    It is neither the own true answer nor the prior's, so that a tuning can only learn to leave the prior.

    Raises:
        UsageError: no other pair has such an answer.
    """
    rng, changed = random.Random(f"others/{seed}"), []
    for pair in pairs:
        free = [each.answer for each in pairs if each.answer not in (pair.answer, pair.counterfactual_answer)]
        if not free:
            raise UsageError(f"pair {pair.id}: no other pair of {pairs.name} has an answer that is neither of its own")
        changed.append(dataclasses.replace(pair, answer=rng.choice(free)))
    return dataclasses.replace(pairs, pairs=tuple(changed))


# Answers


def tasks_of(test: Pairs, untouched: Sequence[Pairs]) -> dict[str, Pairs]:
    """What is asked before and after: pictures in conflict, their usual counterfactuals, and what was not tuned on."""
    usual = {} if test.made else {USUAL: turned(test)}
    return {IN_CONFLICT: test, **usual, **{pairs.name: pairs for pairs in untouched}}
