"""What can be done to a model during a forward pass, as frozen descriptions that compose with `&`.

An intervention says where (site, layers, span, heads) and what; `trace.run` and `trace.generate` carry it out and
return a receipt for each part.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, cast

from vlm_mech.architectures.site import Site, listed_sites
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Span, settled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Activations:
    """States read from a batch: for each site a tensor batch x pos x width, with the spans of that batch."""

    values: dict[Site, "torch.Tensor"]
    encoded: Encoded | DualEncoded

    def __getitem__(self, site: Site) -> "torch.Tensor":
        if site not in self.values:
            held = ", ".join(str(held) for held in self.values)
            raise UsageError(f"{site} was not read; these activations hold: {held}")
        return self.values[site]

    def __repr__(self) -> str:
        return f"Activations({', '.join(map(str, self.values))}; {len(self.encoded)} examples)"


Source = Activations | Encoded | DualEncoded | Sequence[Prompt]
"""Where foreign states come from: states already read, or prompts that are run when needed."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Something done during a forward pass. `a & b` does both in one pass."""

    def __and__(self, other: "Intervention") -> "Together":
        return Together(parts=(*self.flat(), *as_intervention(other).flat()))

    def flat(self) -> tuple["Intervention", ...]:
        """The single interventions this one consists of, in the order in which they are applied."""
        return (self,)


@dataclass(frozen=True, eq=False)
class Together(Intervention):
    """Several interventions in one pass; at the same site they act in the order given."""

    parts: tuple[Intervention, ...]

    def flat(self) -> tuple[Intervention, ...]:
        """The parts."""
        return self.parts


def as_intervention(given: object) -> Intervention:
    """What was given, if it is an intervention.

    Raises:
        UsageError: it is none, such as a list of them.
    """
    if isinstance(given, Intervention):
        return given
    if isinstance(given, list | tuple) and given and all(isinstance(each, Intervention) for each in given):
        raise UsageError(f"a {type(given).__name__} of {len(given)} interventions was given; a & b does both in a pass")
    raise UsageError(f"{_shown(given)} is no intervention; Replace, Ablate, Steer, Knockout are, and a & b of them")


def _shown(given: object) -> str:
    text = " ".join(repr(given).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, eq=False)
class StateEdit(Intervention):
    """An intervention on the tensor at one or several sites, at the positions of a span, for some heads or all."""

    site: Site | tuple[Site, ...]
    span: Span
    heads: tuple[int, ...] | None = field(default=None, kw_only=True)
    """Heads to edit, at `head_out` sites only; None means all."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.sites:
            raise UsageError(f"{name} names no site")
        for site in listed_sites(self.sites, name):
            if self.heads is not None and site.point != "head_out":
                raise UsageError(f"heads can be chosen at head_out sites only, not at {site}")
        _check_heads(name, self.heads)
        object.__setattr__(self, "span", settled(self.span))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites as a tuple."""
        return tuple(self.site) if isinstance(self.site, list | tuple) else (self.site,)


def _check_heads(name: str, heads: object) -> None:
    if heads is None:
        return
    _whole_numbers(f"heads of {name}", heads)
    if not tuple(cast(Iterable[int], heads)):
        raise UsageError(f"{name} names no head; leave heads out for all of them")


def _whole_numbers(what: str, given: object) -> None:
    whole = isinstance(given, Iterable) and all(
        isinstance(each, Integral) and not isinstance(each, bool) for each in given
    )
    if not whole:
        raise UsageError(f"{what} are {_shown(given)}; whole numbers are needed, such as (0, 1)")


def _check_source(what: str, given: object) -> None:
    """States come from activations, from a batch, or from prompts."""
    if isinstance(given, Activations | Encoded | DualEncoded):
        return
    if not isinstance(given, list | tuple) or not all(isinstance(each, Prompt) for each in given):
        raise UsageError(
            f"{what} is a {type(given).__name__}; Activations, a batch made by encode, or a list of Prompts is needed, "
            "such as pairs.counterfactual"
        )


@dataclass(frozen=True, eq=False)
class Replace(StateEdit):
    """Puts the states of another run in place of this run's (interchange intervention, activation patching).

    Example by example, the states of `source` at `source_span` (by default the same span) are written at `span`; both
    must have the same number of tokens. `Patches`, `Positions` and `Tokens` are paired in the order given, as are
    images and words of two tuples; other tokens from the first to the last.
    """

    source: Source = field(kw_only=True)
    source_span: Span | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_source("the source of Replace", self.source)
        if self.source_span is not None:
            object.__setattr__(self, "source_span", settled(self.source_span))


@dataclass(frozen=True, eq=False)
class Ablate(StateEdit):
    """Removes what a span holds: `zero`, the `mean` state over a reference, or a `resample`d example's states.

    `mean` averages over the span's tokens and examples of the reference. `resample` gives each example the states of
    another example of the reference, drawn with `seed`. The reference is the batch itself unless given.
    """

    to: Literal["zero", "mean", "resample"] = field(default="zero", kw_only=True)
    reference: Source | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in ("zero", "mean", "resample"):
            raise UsageError(f"Ablate(to={self.to!r}) is not known; one of zero, mean, resample is")
        if self.reference is not None:
            _check_source("the reference of Ablate", self.reference)


@dataclass(frozen=True, eq=False)
class Steer(StateEdit):
    """Adds `scale` times a vector (of the site's width) to every position of a span."""

    vector: "torch.Tensor" = field(kw_only=True)
    scale: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        from torch import Tensor

        super().__post_init__()
        if not isinstance(self.vector, Tensor):
            raise UsageError(f"the vector of Steer is a {type(self.vector).__name__}; a torch tensor is needed")
        if self.vector.is_complex():
            raise UsageError("the vector of Steer is complex; a real one is needed")
        if isinstance(self.scale, bool) or not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise UsageError(f"the scale of Steer is {_shown(self.scale)}; a finite number is needed")


@dataclass(frozen=True, eq=False)
class Knockout(Intervention):
    """Cuts attention edges: at these layers, `query` positions cannot attend to `key` positions (Geva et al. 2023).

    The mask is built anew for the attention back end in use, so that after the softmax the blocked edges carry exactly
    nothing and the rest of each row sums to one. In generation, the span `generated` as `query` means the tokens
    generated so far. `keep_self` spares the edge from a position to itself.
    """

    query: Span
    key: Span
    layers: int | Iterable[int]
    heads: tuple[int, ...] | None = field(default=None, kw_only=True)
    stream: Literal["vision", "text", "llm"] = field(default="llm", kw_only=True)
    keep_self: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        # An iterator would be used up by the first look.
        given = tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,)
        _whole_numbers("layers of Knockout", self.layers if isinstance(self.layers, str) else given)
        _check_heads("Knockout", self.heads)
        object.__setattr__(self, "query", settled(self.query))
        object.__setattr__(self, "key", settled(self.key))
        object.__setattr__(self, "layers", given)
        if not self.each_layer:
            raise UsageError("Knockout names no layer")
        if self.stream not in ("vision", "text", "llm"):
            raise UsageError(f"Knockout(stream={self.stream!r}) is not known; vision, text or llm is")

    @property
    def each_layer(self) -> tuple[int, ...]:
        """The layers as a tuple."""
        return (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)


def window(center: int, size: int, *, n_layers: int) -> tuple[int, ...]:
    """The layers of a window of `size` centred on a layer, clipped at the borders.

    As in Zhang et al. (cross-modal information flow): from `center - size // 2`, `size` layers, clipped to
    `0 .. n_layers - 1`.
    """
    if size < 1 or not 0 <= center < n_layers:
        raise UsageError(f"no window of size {size} around layer {center}: layers are 0..{n_layers - 1}, size >= 1")
    first = center - size // 2
    return tuple(range(max(0, first), min(n_layers, first + size)))
