"""What is done to the image tokens, layer by layer, and the tokens of the controls.

"From layer i on": block i is the first one for which something is different. `i` may be the number of blocks; then
nothing is.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Each, Span, Tokens
from vlm_mech.interventions.attention_edits import Remove
from vlm_mech.interventions.specification import Intervention, Replace
from vlm_mech.interventions.state_edits import frozen
from vlm_mech.sweeps.sweep import Point

if TYPE_CHECKING:
    from vlm_mech.inputs.span import Row
    from vlm_mech.models.vlm import VLM

REMOVED, FROZEN = "removed", "frozen"
HALF, TEXT = "half removed", "text removed"
OTHER = "other picture"
EXCHANGED = "exchanged ("
"""How the name of an arm begins whose image states are of another layer, which follows."""
CONTROLS = (HALF, TEXT, OTHER)
IMAGE = "image"

Grid = Literal["few", "all", "none"]
"""Of which layers states are exchanged: of the first, the middle and the last one, of all, or of none."""


def exchanged(source: int) -> str:
    """The arm in which the image states that enter a block are those that entered block `source`."""
    return f"{EXCHANGED}{source})"


def source_of(arm: str) -> int | None:
    """The layer whose states such an arm takes; None for other arms."""
    return int(arm.removeprefix(EXCHANGED).removesuffix(")")) if arm.startswith(EXCHANGED) else None


def sources_of(grid: Grid, n_layers: int) -> tuple[int, ...]:
    """The layers whose states are exchanged.

    Raises:
        UsageError: another word than `few`, `all` or `none`.
    """
    known = {"few": (0, n_layers // 2, n_layers - 1), "all": tuple(range(n_layers)), "none": ()}
    if grid not in known:
        raise UsageError(f"exchange {grid!r} is not known; use one of {', '.join(known)}")
    return tuple(dict.fromkeys(known[grid]))


@dataclass(frozen=True)
class Scan:
    """What is done: `sources` are the layers whose states are exchanged; `floor` shows the other picture too.

    `only` are the arms that are measured, where not all are.
    """

    n_layers: int
    sources: tuple[int, ...] = ()
    floor: bool = True
    only: tuple[str, ...] | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the table."""
        return "arm", "layer"

    @property
    def asked(self) -> tuple[str, ...]:
        """The arms of which something can be claimed."""
        return (REMOVED, FROZEN, *map(exchanged, self.sources))

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms, the controls last."""
        every = (*self.asked, HALF, TEXT, *([OTHER] if self.floor else []))
        return every if self.only is None else tuple(arm for arm in every if arm in self.only)

    def layers(self, arm: str) -> tuple[int, ...]:
        """The layers of an arm at which something is edited that can reach the answer.

        Image states that the last block gives are read by nobody, so that none is frozen there; states exchanged with
        themselves are as they were. The other picture is shown from the first layer on alone.
        """
        if arm == OTHER:
            return (0,)
        n_layers = self.n_layers - 1 if arm == FROZEN else self.n_layers
        return tuple(layer for layer in range(n_layers) if layer != source_of(arm))

    def cells(self) -> tuple[tuple[str, int], ...]:
        """All cells by arm and layer, those among them in which nothing is edited."""
        rows = ((arm, self.layers(arm) if arm == OTHER else range(self.n_layers + 1)) for arm in self.arms)
        return tuple((arm, layer) for arm, layers in rows for layer in layers)

    def points(self) -> tuple[Point, ...]:
        """The cells in which something is edited."""
        found = (cell for cell in self.cells() if cell[1] in self.layers(cell[0]))
        return tuple(Point(tuple(zip(self.axes, cell, strict=True))) for cell in found)


def scan_of(vlm: "VLM", pairs: Pairs, exchange: Grid = "few") -> Scan:
    """The scan of a model's decoder.

    Args:
        pairs: what is asked; single items have no other picture of which an answer is known, which is left out then.
        exchange: of which layers states are exchanged.

    Raises:
        UsageError: another `exchange`, or a decoder of one block.
    """
    n_layers = len(vlm.llm_layers)
    if n_layers < 2:
        raise UsageError(f"{vlm.name} has {n_layers} decoder block; from which one on something holds needs two")
    return Scan(n_layers, sources_of(exchange, n_layers), floor=pairs.made is None)


@dataclass(frozen=True, eq=False)
class Edits:
    """The edits of some pairs; `half` and `text` are the tokens that the controls remove."""

    n_layers: int
    pairs: Pairs
    half: Span
    text: Span

    def of(self, point: Point) -> Intervention:
        """The edit of a cell."""
        arm, layer = point.arm, point.layer
        if arm in (HALF, TEXT):
            return Remove(self.half if arm == HALF else self.text, layer)
        if arm == OTHER:
            return Replace(Site("llm.resid_pre", layer), IMAGE, source=self.pairs.counterfactual)
        return edit_at(arm, layer, self.n_layers)


def edit_at(arm: str, layer: int, n_layers: int) -> Intervention:
    """What is done to the image in an arm that something can be claimed of, from a layer on."""
    if arm == REMOVED:
        return Remove(IMAGE, layer)
    if arm == FROZEN:
        return frozen(IMAGE, layer, n_layers=n_layers)
    source = source_of(arm)
    return Replace(Site("llm.resid_pre", layer), IMAGE, source_site=Site("llm.resid_pre", source))


def edits_of(vlm: "VLM", pairs: Pairs, scan: Scan, *, seed: int = 0) -> Edits:
    """The edits of some pairs, with the tokens of the controls drawn for each of them.

    Args:
        seed: draws them; they do not depend on how pairs are batched.
    """
    rows = vlm.encode(pairs.base).rows
    drawn = [_drawn(row, f"{seed}/{pair.id}") for row, pair in zip(rows, pairs, strict=True)]
    half, text = (Each(tuple(Tokens(each[which]) for each in drawn)) for which in (0, 1))
    return Edits(scan.n_layers, pairs, half, text)


def _drawn(row: "Row", seed: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Half of the image tokens; and as many other tokens as there are of these, at most half of the others.

    The first token, which may be a sink, and the last one stay. A prompt without others loses one image token more.
    """
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    numbers = {position: number for number, position in enumerate(row.present)}
    image = [numbers[position] for position in row.image]
    half = _some(rng, image, -(-len(image) // 2))
    others = sorted({*range(1, len(row.present) - 1)} - {*image})
    return half, _some(rng, others, min(len(image), -(-len(others) // 2))) or half


def _some(rng: np.random.Generator, among: Sequence[int], n: int) -> tuple[int, ...]:
    return tuple(sorted(int(each) for each in rng.choice(among, n, replace=False))) if n else ()
