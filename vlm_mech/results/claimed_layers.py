"""Claims about many layers in one sentence: at which of them they are made, with the numbers of one of them."""

import itertools
from collections.abc import Sequence

from vlm_mech.results.claim import Claim

Run = tuple[int, int]
"""Layers that follow each other, from the first to the last."""


def runs(layers: Sequence[int], asked: Sequence[int]) -> list[Run]:
    """Layers as runs of such as follow each other among those that were asked about, in ascending order."""
    places = sorted({sorted(asked).index(layer) for layer in layers})
    order, found = sorted(asked), []
    for _, each in itertools.groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        some = [place for _, place in each]
        found.append((order[some[0]], order[some[-1]]))
    return found


def placed(found: Sequence[Run], *, first: int | None = None, last: int | None = None) -> str:
    """Runs in words, such as "up to layer 3" or "at layer 2 and from layer 5 on".

    Args:
        first: a run that begins here holds of all layers before it too.
        last: a run that ends here holds of all layers after it too.
    """
    texts = []
    for start, end in found:
        if end == last and start != first:
            texts.append(f"from layer {start} on")
        elif start == end:
            texts.append(f"at layer {start}")
        else:
            texts.append(f"up to layer {end}" if start == first else f"from layer {start} to layer {end}")
    return " and ".join(texts)


def numbers(claims: Sequence[Claim], label: str, *, strongest: bool = False) -> str:
    """The numbers of one of several claims that are made, the largest p of all, and which gates were lost where.

    By default of the claim whose first condition is met by least, so that those of the others need not be told.

    Args:
        label: the words before the mean.
        strongest: tell of the claim that was the strongest where it was declared, and so not where it was tested.
    """
    if strongest:
        told = max(claims, key=lambda claim: claim.strength(claim.declared))
    else:
        told = min(claims, key=lambda claim: abs(claim.tested[0].mean - claim.conditions[0].bound))
    p = max(claim.p for claim in claims)
    where = f" at layer {told.about['layer']}" if len(claims) > 1 else ""
    text = f"{label} {told.tested[0]}{where}, p = {p:.2g}"
    for gate in dict.fromkeys(name for claim in claims for name in claim.lost):
        lost = [f"layer {claim.about['layer']}" for claim in claims if gate in claim.lost and "layer" in claim.about]
        text += f"; fails {gate}: {' and '.join(lost)}" if lost else f"; fails {gate}"
    return text
