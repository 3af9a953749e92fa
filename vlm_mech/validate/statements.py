"""`Claims`: what a method says about a planted model, in the same words for every method."""

from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from vlm_mech.results.claim import LEVEL, SHARE, SMALLEST, Claim
from vlm_mech.results.result import Result

WHOLE = -1
"""Number of the head in cells that concern all heads of a layer."""
COLUMNS = ("place", "layer", "head", "effect", "low", "high", "p")

LayerHead = tuple[int, int]
"""Layer and head."""


@dataclass(frozen=True, eq=False)
class Claims:
    """What a method finds in one model; None stands for what it does not say, nothing found is an empty tuple.

    `cells` has a row for every cell that the method measured: `place` (a span, or an edge), `layer`, `head` (`WHOLE`
    where all heads are meant), `effect` (mean change in logits) with its 95 % interval `low` to `high`, and `p`,
    corrected over all cells. `strengths` ranks heads: how strong each one is, whichever place it was measured at.
    `readable` has, for each span, the numbers of blocks after which the answer can be read there, which says nothing
    of its being used. Of methods that make claims, `told` are those declared and `possible` all that could
    have been.
    """

    cells: pd.DataFrame
    reading: tuple[int, ...] | None = None
    carrying: tuple[int, ...] | None = None
    writing: tuple[int, ...] | None = None
    suppressing: tuple[int, ...] | None = None
    route: Literal["direct", "two-hop", "none"] | None = None
    heads: tuple[LayerHead, ...] | None = None
    strengths: dict[LayerHead, float] = field(default_factory=dict)
    readable: dict[str, tuple[int, ...]] | None = None
    told: tuple[Claim, ...] | None = None
    possible: tuple[Claim, ...] = ()

    @property
    def significant(self) -> bool:
        """Whether any cell is, however small its effect."""
        return bool((self.cells["p"] < LEVEL).any())

    def beyond(self, least: float) -> bool:
        """Whether any cell is significantly larger than `least` logits: its whole interval lies above or below."""
        far = (self.cells["low"] > least) | (self.cells["high"] < -least)
        return bool((far & (self.cells["p"] < LEVEL)).any())

    @property
    def claims(self) -> bool:
        """Whether it says of anything that it matters to the answer."""
        return bool(self.reading or self.carrying or self.writing or self.heads)


def cells_of(result: Result, metric: str | None = None, *, place: str = "place") -> pd.DataFrame:
    """The cells of a result as `Claims` has them; `place` is the axis that becomes the column of that name."""
    summary = result.summary(result.metric(metric).name)
    head = summary.get("head", WHOLE)
    names = {"effect_low": "low", "effect_high": "high"}
    kept = summary.drop(columns="p").rename(columns=names | {place: "place", "p_corrected": "p"}).assign(head=head)
    return pd.DataFrame(kept[list(COLUMNS)])


def counted(cells: pd.DataFrame, unedited: float) -> pd.DataFrame:
    """The cells with an effect: significant after correction, and neither below `SMALLEST` nor below `SHARE`.

    Args:
        unedited: mean logit difference of the two answers without any edit.
    """
    least = max(SMALLEST, SHARE * abs(unedited))
    return pd.DataFrame(cells[(cells["p"] < LEVEL) & (cells["effect"].abs() >= least)])


def layers(cells: pd.DataFrame) -> tuple[int, ...]:
    """The layers of some cells, in order."""
    return tuple(int(layer) for layer in sorted(set(cells["layer"])))


def layer_heads(cells: pd.DataFrame) -> tuple[LayerHead, ...]:
    """The heads of some cells, in order."""
    return tuple(sorted({(int(row["layer"]), int(row["head"])) for _, row in cells.iterrows()}))


def strengths(cells: pd.DataFrame) -> dict[LayerHead, float]:
    """Size of every head's largest effect, in logits."""
    size = cells["effect"].abs().groupby([cells["layer"], cells["head"]]).max()
    return {(int(layer), int(head)): float(value) for (layer, head), value in size.items()}  # type: ignore[misc]
