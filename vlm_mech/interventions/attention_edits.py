"""Edits of attention other than cut edges: tokens that nobody reads any more, and weights that are moved."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Span, settled
from vlm_mech.interventions.drawn import Edited
from vlm_mech.interventions.specification import (
    AttentionEdit,
    Stream,
    check_heads,
    listed_layers,
    shown,
    whole_numbers,
)


@dataclass(frozen=True, eq=False)
class Remove(AttentionEdit):
    """Takes tokens away from block `layer` on: no other position reads them there, generated tokens included.

    Positions stay as they are, so that rotary distances do not change: what is computed is what a model computes whose
    cache has lost the keys and values of these tokens in these blocks. What the tokens left in other positions before
    stays. Their own rows are still computed and read each other; nobody reads these rows. `until` is the first block
    where they are there again; None means that they do not come back. In the vision tower (`stream="vision"`) the other
    positions do not read them, but they go on to the projector all the same.
    """

    span: Span
    layer: int
    until: int | None = field(default=None, kw_only=True)
    stream: Stream = field(default="llm", kw_only=True)

    def __post_init__(self) -> None:
        whole_numbers("layers of Remove", (self.layer,) if self.until is None else (self.layer, self.until))
        if self.until is not None and self.until <= self.layer:
            raise UsageError(f"Remove from layer {self.layer} until {self.until} names no layer")
        object.__setattr__(self, "span", settled(self.span))
        self.check_stream()

    @property
    def first_layer(self) -> int:
        """The first block without the tokens."""
        return self.layer

    def edited(self) -> tuple[Edited, ...]:
        """The blocks without the tokens."""
        layers = (self.layer,) if self.until is None else tuple(range(self.layer, self.until))
        where = f"{shown(self.span)} is read by nobody"
        return (Edited("Remove", self.stream, layers, where, open_end=self.until is None),)


@dataclass(frozen=True, eq=False)
class Reweight(AttentionEdit):
    """Changes how much `query` positions attend to `key` positions at these layers, for some heads or all.

    `how="weights"`: after the softmax the weights at `key` are multiplied by `scale`, and what that frees (or needs)
    goes to the keys `to` in proportion to their weights; without `to`, to all other keys. Rows still sum to one. Keys
    in both spans count as `key`. With `scale=0` and no `to` it is a `Knockout`, and carried out and proved as one.
    `how="scores"`: before the softmax the scores at `key` are multiplied by `scale`, which is the same as scaling the
    key vectors (key gating). A score of 0 is no removal: the key keeps a weight.

    Where several edits meet in a layer, edges are cut first, then scores are scaled, then weights, each in the order
    given.
    """

    query: Span
    key: Span
    layers: int | Iterable[int]
    scale: float = field(kw_only=True)
    heads: tuple[int, ...] | None = field(default=None, kw_only=True)
    to: Span | None = field(default=None, kw_only=True)
    how: Literal["weights", "scores"] = field(default="weights", kw_only=True)
    stream: Stream = field(default="llm", kw_only=True)

    def __post_init__(self) -> None:
        check_heads("Reweight", self.heads)
        for name in ("query", "key", "to"):
            span = getattr(self, name)
            object.__setattr__(self, name, None if span is None else settled(span))
        object.__setattr__(self, "layers", listed_layers("Reweight", self.layers))
        self.check_stream()
        real = isinstance(self.scale, Real) and not isinstance(self.scale, bool) and math.isfinite(self.scale)
        if not real or self.scale < 0:
            raise UsageError(f"the scale of Reweight is {shown(self.scale)}; a finite number from 0 on is needed")
        if self.how not in ("weights", "scores"):
            raise UsageError(f"Reweight(how={self.how!r}) is not known; use weights or scores")
        if self.how == "scores" and self.to is not None:
            raise UsageError("Reweight(how='scores') hands nothing on, so it takes no `to`; how='weights' does")

    @property
    def each_layer(self) -> tuple[int, ...]:
        """The layers as a tuple."""
        return listed_layers("Reweight", self.layers)

    @property
    def first_layer(self) -> int:
        """The first block in which weights are changed."""
        return min(self.each_layer)

    def edited(self) -> tuple[Edited, ...]:
        """The blocks, and from where to where attention is changed."""
        where = f"{self.how} of {shown(self.query)} <- {shown(self.key)} times {self.scale}"
        return (Edited("Reweight", self.stream, self.each_layer, where),)

    @property
    def is_knockout(self) -> bool:
        """Whether it takes all weight from its keys and gives it to all others, which is what cut edges do."""
        return self.how == "weights" and self.scale == 0 and self.to is None
