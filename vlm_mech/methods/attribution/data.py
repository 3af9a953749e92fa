"""The cells of an attribution: sites, spans and heads, and which of them are re-checked."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import DIRECTIONS, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Each, Span, settled
from vlm_mech.interventions.specification import StateEdit
from vlm_mech.sweeps.measures import Measure
from vlm_mech.sweeps.readings import NOTHING_BEFORE, Readings

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True)
class Cell:
    """One cell of the screen."""

    site: Site
    span: Span
    head: int | None

    @property
    def axes(self) -> dict[str, Any]:
        """Its place in a table."""
        axes: dict[str, Any] = {"site": self.site.name, "span": str(self.span)}
        axes |= {} if self.site.layer is None else {"layer": self.site.layer}
        return axes if self.head is None else axes | {"head": self.head}


def cells_of(vlm: "VLM", sites: Sequence[Site], spans: Sequence[Span], heads: bool) -> list[Cell]:
    """Every site and span as a cell, and every head of its own if asked for.

    Args:
        heads: a cell for each attention head; sites must then be `head_out`.

    Raises:
        UsageError: no site or span, one given twice, a site that the model does not have, heads elsewhere than at
            `head_out`, sites with layers beside sites without, or a span that differs from pair to pair.
    """
    if not sites or not spans:
        raise UsageError("an attribution needs sites and spans")
    for name, given in (("site", sites), ("span", spans)):
        twice = next((each for each in given if list(given).count(each) > 1), None)
        if twice is not None:
            raise UsageError(f"{name} {twice} is given twice")
    for site in sites:
        vlm.check_site(site)
        if heads and site.point != "head_out":
            raise UsageError(f"heads can be told apart at head_out sites only, not at {site}")
    if len({site.layer is None for site in sites}) == 2:
        raise UsageError("sites with layers and sites without cannot share a table; attribute them apart")
    if any(isinstance(settled(span), Each) for span in spans):
        raise UsageError("an attribution takes spans that mean the same in every pair, not Each")
    own = {site: range(vlm.n_heads(site.stream)) if heads else (None,) for site in sites}
    return [Cell(site, span, head) for site in sites for span in spans for head in own[site]]


def check(pairs: Pairs, measure: Measure, directions: Sequence[str], numbers: dict[str, int]) -> None:
    """Raise `UsageError` when an attribution cannot be made of these.

    That is: no pairs, another number of answers than pairs, no direction, one unknown or twice, or a number below 1.

    Args:
        numbers: by name for the message, what must be at least 1.
    """
    if not isinstance(measure, Measure):
        raise UsageError(f"an attribution takes one Measure, not a {type(measure).__name__}")
    if measure.clean:
        name = measure.metric.name
        raise UsageError(
            f"{name} compares with the unedited run, where it has no slope; an attribution takes a measure of one run"
        )
    if not len(pairs):
        raise UsageError("an attribution needs at least one pair")
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} is {number}; at least 1 is needed")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise UsageError(f"direction {direction!r} is not known; use one of {', '.join(DIRECTIONS)}")
    if not directions or len(set(directions)) < len(directions):
        raise UsageError(
            f"directions are {', '.join(directions) or 'none'}; each of {', '.join(DIRECTIONS)} at most once"
        )
    for answers in measure.answers:
        if len(answers) != len(pairs):
            raise UsageError(f"{measure.metric.name} has {len(answers)} answers for {len(pairs)} pairs")


def check_touched(pairs: Pairs, read: Readings, spots: Sequence[Cell]) -> None:
    """Raise `UsageError` where a span is of an answer's tokens alone and none comes before what is read of a pair."""
    for span in dict.fromkeys(spot.span for spot in spots):
        untouched = read.untouched(StateEdit(spots[0].site, span))[0].tolist()
        if any(untouched):
            raise UsageError(
                f"span {span!r} has nothing to exchange in pair {pairs[untouched.index(True)].id!r}: {NOTHING_BEFORE}; "
                "leave out the span or such pairs, or take a span such as ('last', 'answer')"
            )


# The re-check


TOP, RANDOM, TOP_OF_HALF = "top", "random", "top of half"
"""How a cell was chosen: by the estimates of all pairs, at random from the rest, or by those of half of the pairs."""


def top_cells(table: pd.DataFrame, top_k: int | None = None) -> list[int]:
    """Cells in the order of their mean estimate's size, largest first, `top_k` of them or all."""
    means = table.groupby("cell")["estimate"].mean().abs()
    return [int(cell) for cell in means.sort_values(ascending=False, kind="stable").index][:top_k]


def chosen_cells(table: pd.DataFrame, top_k: int, n_random: int, seed: int) -> dict[int, str]:
    """Cells to patch: those of the largest mean estimate, and a sample of the rest."""
    order = top_cells(table)
    rest = order[top_k:]
    drawn = random.Random(seed).sample(rest, min(n_random, len(rest)))
    return dict.fromkeys(order[:top_k], TOP) | dict.fromkeys(drawn, RANDOM)


def exchanged(pairs: Pairs) -> Pairs:
    """The same pairs with image and counterfactual image exchanged; answers stay those of the measure."""
    return dataclasses.replace(pairs, pairs=tuple(pair.exchanged for pair in pairs))
