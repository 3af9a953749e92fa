"""Facts as counterfactual pairs of two questions: "The capital of France is" beside "The capital of Spain is".

Texts are to be continued by the answer. Subjects and wordings are of one split each, so that what is chosen on
validation and trained on train is told of other subjects in other words.
"""

import hashlib
import itertools
from collections.abc import Collection, Sequence

from vlm_mech.data.fact_tables import N_OF_TEST, RELATIONS
from vlm_mech.data.pair import Pair
from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import BARE, Wording

NAME = "facts"
SHARES = {"train": 2, "validation": 2, "test": 6}
"""Of ten subjects, how many a split has (about)."""


def is_facts(name: str) -> bool:
    """Whether a name means facts: `facts`, or a relation such as `facts/capitals`."""
    return name == NAME or name.startswith(f"{NAME}/")


def relations_of(name: str) -> tuple[str, ...]:
    """The relations that a name means.

    Raises:
        UsageError: a relation that is not known.
    """
    if name == NAME:
        return tuple(RELATIONS)
    relation = name.removeprefix(f"{NAME}/")
    if relation not in RELATIONS:
        known = ", ".join(f"{NAME}/{each}" for each in RELATIONS)
        raise UsageError(f"data {name!r} is not known; use {NAME} (all relations) or one of {known}")
    return (relation,)


def split_of(subject: str) -> str:
    """The split that a subject belongs to, in every relation the same."""
    place = int(hashlib.sha256(subject.encode()).hexdigest(), 16) % sum(SHARES.values())
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("shares add up")


def wordings_of(relation: str, split: str) -> tuple[str, ...]:
    """The wordings of a relation that belong to a split."""
    every = RELATIONS[relation].wordings
    return {"test": every[:N_OF_TEST], "validation": every[-2:-1], "train": every[-1:]}[split]


def couples_of(known: dict[str, str], subjects: Sequence[str]) -> list[tuple[str, str]]:
    """Subjects two by two, each once, with unlike answers: each with the next that is left and has another one."""
    left, found = list(subjects), []
    while left:
        first = left.pop(0)
        other = next((each for each in left if known[each] != known[first]), None)
        if other is not None:
            left.remove(other)
            found.append((first, other))
    return found


def fact_pairs(
    name: str, n: int | None, seed: int, split: str, wording: Wording = BARE, *, known: Collection[str] | None = None
) -> tuple[Pair, ...]:
    """Pairs of facts, two subjects of one relation in one wording; those of the same two subjects are one group.

    Neighbours in the tables are paired, so that both are likely to be known, or neither. The first pairs ask for each
    two subjects once; further ones ask for the same in other wordings.

    Args:
        n: number of pairs; by default each two subjects once. Of several relations, as many of each as can be.
        seed: says which wording two subjects are asked in first, and which of them comes first.
        split: of subjects and wordings.
        known: questions that a model answers right, where others are to be left out; subjects known in equally many
            wordings are paired then.

    Raises:
        UsageError: a relation that is not known, or more pairs than there are.
    """
    each = [_rounds(relation, seed, split, wording, known) for relation in relations_of(name)]
    if n is None:
        return tuple(pair for rounds in each for pair in rounds[0])
    columns = [list(itertools.chain(*rounds)) for rounds in each]
    longest = max(map(len, columns))
    order = [column[at] for at in range(longest) for column in columns if at < len(column)]
    if n > len(order):
        what = "that are known on both sides " if known is not None else ""
        raise UsageError(f"{name} has {len(order)} pairs {what}in split {split}; {n} were requested")
    return tuple(order[:n])


def questions_of(name: str, split: str) -> dict[str, tuple[str, str, str]]:
    """Every question of a split with its relation, subject and answer.

    Raises:
        UsageError: a relation that is not known.
    """
    return {
        asked.format(subject=subject): (relation, subject, answer)
        for relation in relations_of(name)
        for subject, answer in RELATIONS[relation].known.items()
        if split_of(subject) == split
        for asked in wordings_of(relation, split)
    }


def _rounds(relation: str, seed: int, split: str, wording: Wording, known: Collection[str] | None) -> list[list[Pair]]:
    """All pairs of a relation: in each round each two subjects are asked in one more wording, if there is one."""
    answers, wordings = RELATIONS[relation].known, wordings_of(relation, split)
    subjects = [subject for subject in answers if split_of(subject) == split]
    held = {
        subject: [asked for asked in wordings if known is None or asked.format(subject=subject) in known]
        for subject in subjects
    }
    alike = sorted((subject for subject in subjects if held[subject]), key=lambda subject: -len(held[subject]))
    rounds: list[list[Pair]] = [[] for _ in wordings]
    for at, couple in enumerate(couples_of(answers, alike)):
        turn = [wordings[(at + seed + step) % len(wordings)] for step in range(len(wordings))]
        both = [asked for asked in turn if all(asked in held[subject] for subject in couple)]
        for step, asked in enumerate(both):
            rounds[step].append(_pair(relation, couple, asked, seed, wording))
    return rounds


def _pair(relation: str, couple: tuple[str, str], asked: str, seed: int, wording: Wording) -> Pair:
    known = RELATIONS[relation].known
    turned = int(hashlib.sha256(f"{seed}/{couple[0]}".encode()).hexdigest(), 16) % 2
    first, other = couple[::-1] if turned else couple
    number = RELATIONS[relation].wordings.index(asked)
    return Pair(
        f"{relation}-{first}-{other}-{number}".replace(" ", "_"),
        (),
        (),
        asked.format(subject=first),
        known[first],
        known[other],
        f"{relation} {couple[0]}, {couple[1]}",
        wording=wording,
        category=relation,
        counterfactual_question=asked.format(subject=other),
        subjects=(first, other),
        completion=True,
    )
