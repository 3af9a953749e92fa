"""Pairs made of others: turned, about other pictures, those in conflict, those that pass a check, parts by groups."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pair import SIDES, Pair
from vlm_mech.data.pairs import Pairs, linked
from vlm_mech.data.shared_pictures import linked_groups
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError


def partners(n: int, *, seed: int, groups: Sequence[str] = ()) -> list[int]:
    """For each of n examples another one, so that every one is taken once.

    Args:
        groups: of the examples; the other one is of another group. Where more than half of them are of one, the others
            are taken more than once, and not all of that one are.

    Raises:
        UsageError: fewer than two, or all are of one group.
    """
    if n < 2:
        raise UsageError(f"{n} example has no other one whose image it could be asked about; at least two are needed")
    order, step = np.random.default_rng(seed).permutation(n), 1
    largest, most = max(Counter(groups).items(), key=lambda each: each[1], default=("", 1))
    if most == n:
        raise UsageError(f"all {n} examples are of group {largest!r}; one of another group is needed for each")
    if most > max(1, n / 2):
        inside, outside = ([int(each) for each in order if (groups[each] == largest) == of] for of in (True, False))
        taken = {True: itertools.cycle(outside), False: itertools.cycle(inside)}
        return [next(taken[group == largest]) for group in groups]
    if most > 1:
        first = {group: place for place, group in reversed(list(enumerate(groups[number] for number in order)))}
        order, step = np.array(sorted(order, key=lambda number: first[groups[number]])), most
    return [int(other) for _, other in sorted(zip(order, np.roll(order, step), strict=True))]


def lenders(pairs: Pairs, *, seed: int) -> list[int]:
    """For each example another one, whose picture is shown in the place of its own (see `partners`).

    It is of another group; where all are of one, it shares no picture with it, and is not linked to it over others.

    Args:
        seed: draws them.

    Raises:
        UsageError: fewer than two examples, or all share a picture.
    """
    groups = [pair.group or pair.id for pair in pairs]
    if len(pairs) > 1 and len(set(groups)) == 1:
        names = [pair.id for pair in pairs]
        found = linked_groups(names, [pair.shown for pair in pairs])
        groups = [name if group is None else group for name, group in zip(names, found, strict=True)]
        if len(set(groups)) == 1:
            raise UsageError(
                f"all {len(pairs)} {nouns_of(pairs).many} of {pairs.name} share an image; another one's is needed, "
                "which they are asked about as the floor"
            )
    return partners(len(pairs), seed=seed, groups=groups)


def about_others(pairs: Pairs, others: Sequence[Pair]) -> Pairs:
    """The questions of the pairs, about the pictures of others.

    Raises:
        UsageError: pairs of texts, which show none.
    """
    for pair in pairs:
        if pair.is_text:
            raise UsageError(f"pair {pair.id} of {pairs.name} shows no image that could be exchanged for another's")
    changed = [
        dataclasses.replace(pair, image=other.image, counterfactual_image=other.counterfactual_image)
        for pair, other in zip(pairs, others, strict=True)
    ]
    return dataclasses.replace(pairs, pairs=tuple(changed))


def turned(pairs: Pairs) -> Pairs:
    """The pairs the other way round: the counterfactual image is the first."""
    return dataclasses.replace(pairs, pairs=tuple(_turned(pair) for pair in pairs))


def _turned(pair: Pair) -> Pair:
    if pair.made:
        raise UsageError(f"pair {pair.id} is a single item: what is true of its counterfactual image is not known")
    return dataclasses.replace(
        pair.exchanged,
        answer=pair.counterfactual_answer,
        counterfactual_answer=pair.answer,
        conflict=None if pair.conflict is None else SIDES[1 - SIDES.index(pair.conflict)],
        captions=None if pair.captions is None else (pair.captions[1], pair.captions[0]),
    )


def conflict_first(pairs: Pairs) -> Pairs:
    """The pairs, those whose second picture is in conflict turned, so that it is asked about; others as they are."""
    if all(pair.conflict != "second" for pair in pairs):
        return pairs
    changed = (_turned(pair) if pair.conflict == "second" else pair for pair in pairs)
    return dataclasses.replace(pairs, pairs=tuple(changed))


def with_conflict(pairs: Pairs) -> Pairs:
    """The pairs that say which of their pictures is in conflict; the others move to `refused`.

    Raises:
        UsageError: none says it.
    """
    what = (
        "says which image is in conflict with the usual answer" if pairs.made is None else "is known to be in conflict"
    )
    return checked(pairs, _check_conflict, what)


def _check_conflict(pair: Pair) -> None:
    if pair.conflict is None:
        raise UsageError(
            'conflict is not given; "first" or "second" is needed in its line (scenes/colour-conflict has "second")'
            if pair.made is None
            else "conflict is not true; an item is needed that contradicts the usual answer"
        )
    if pair.made and pair.counterfactual_answer != pair.prior:
        raise UsageError("its usual answer is not known; prior is needed, another than the right answer")


def apart(pairs: Pairs, others: Pairs) -> Pairs:
    """The pairs that show no picture of the others; the rest, equal to the pixel, move to `refused`.

    Raises:
        UsageError: none is left.
    """
    met = {shown: other.id for other in others for shown in other.shown}

    def check(pair: Pair) -> None:
        shared = [met[shown] for shown in pair.shown if shown in met]
        if shared:
            raise UsageError(f"it shows an image of pair {shared[0]} of {others.name}")

    return checked(pairs, check, f"shows images that {others.name} does not")


def by_groups(pairs: Pairs, shares: Sequence[float], *, seed: int) -> tuple[Pairs, ...]:
    """Parts of a data set with at least these shares of its groups, the last with what is left.

    Pairs of one group, and those that share a picture (`linked`), stay together; groups are drawn at random. What was
    refused stays with the last part.

    Raises:
        UsageError: no group is left for a part.
    """
    groups = [pair.group or pair.id for pair in linked(pairs)]
    distinct = sorted(set(groups))
    # Rounded first, so that 0.1 + 0.2 of ten groups are three.
    ends = [0, *(min(len(distinct), math.ceil(round(share * len(distinct), 9))) for share in np.cumsum(shares))]
    ends.append(len(distinct))
    if any(end <= start for start, end in itertools.pairwise(ends)):
        raise UsageError(
            f"{pairs.name} has {len(distinct)} groups of pairs; too few for {len(shares) + 1} parts, the first with "
            f"{' and '.join(f'{share:.3g}' for share in shares)} of them (pairs that share an image are one group)"
        )
    order = np.random.default_rng(seed).permutation(len(distinct))
    chosen = [{distinct[at] for at in order[start:end]} for start, end in itertools.pairwise(ends)]
    parts = [tuple(pair for pair, group in zip(pairs, groups, strict=True) if group in some) for some in chosen]
    refused = [()] * len(shares) + [pairs.refused]
    return tuple(
        dataclasses.replace(pairs, pairs=part, refused=some) for part, some in zip(parts, refused, strict=True)
    )


def with_others_answers(pairs: Pairs, *, seed: int) -> Pairs:
    """The pairs, each with both answers of another one: shuffled labels, of which a model's states can say nothing.

    Where many pairs have the same two answers, some keep theirs and some have them turned.

    Args:
        seed: draws the order.

    Raises:
        UsageError: fewer than two pairs.
    """
    other = partners(len(pairs), seed=seed)
    asked = [
        dataclasses.replace(
            pair,
            answer=pairs[at].answer,
            counterfactual_answer=pairs[at].counterfactual_answer,
            options=(),
            prior=None,
            prior_question=None,
            captions=None,
        )
        for pair, at in zip(pairs, other, strict=True)
    ]
    return dataclasses.replace(pairs, pairs=tuple(asked), refused=())


def checked(pairs: Pairs, check: Callable[[Pair], object], what: str) -> Pairs:
    """The pairs that pass a check; those for which it raises `UsageError` move to `refused` with the reason.

    Args:
        what: what none does when none passes, for the error.

    Raises:
        UsageError: none passes.
    """
    kept: list[Pair] = []
    refused = list(pairs.refused)
    for pair in pairs:
        try:
            check(pair)
        except UsageError as error:
            refused.append(Refused(pair.id, str(error)))
        else:
            kept.append(pair)
    if not kept:
        raise UsageError(
            f"none of the {len(pairs)} {nouns_of(pairs).many} of {pairs.name} {what}: {refused[-1].reason}"
        )
    return dataclasses.replace(pairs, pairs=tuple(kept), refused=tuple(refused))
