"""What can be done to a model during a forward pass, as frozen descriptions that compose with `&`.

An intervention says where (site, layers, span, heads) and what; `trace.run` and `trace.generate` carry it out and
return a receipt for each part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Span

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
        return Together(parts=(*self.flat(), *other.flat()))

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


@dataclass(frozen=True, eq=False)
class StateEdit(Intervention):
    """An intervention on the tensor at one or several sites, at the positions of a span, for some heads or all."""

    site: Site | tuple[Site, ...]
    span: Span
    heads: tuple[int, ...] | None = field(default=None, kw_only=True)
    """Heads to edit, at `head_out` sites only; None means all."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise UsageError(f"{type(self).__name__} names no site")
        for site in self.sites:
            if self.heads is not None and site.point != "head_out":
                raise UsageError(f"heads can be chosen at head_out sites only, not at {site}")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites as a tuple."""
        return (self.site,) if isinstance(self.site, Site) else tuple(self.site)


@dataclass(frozen=True, eq=False)
class Replace(StateEdit):
    """Puts the states of another run in place of this run's (interchange intervention, activation patching).

    Example by example, the states of `source` at `source_span` (by default the same span) are written at `span`; both
    must have the same number of tokens.
    """

    source: Source = field(kw_only=True)
    source_span: Span | None = field(default=None, kw_only=True)


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


@dataclass(frozen=True, eq=False)
class Steer(StateEdit):
    """Adds `scale` times a vector (of the site's width) to every position of a span."""

    vector: "torch.Tensor" = field(kw_only=True)
    scale: float = field(default=1.0, kw_only=True)


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
        object.__setattr__(self, "layers", self.layers if isinstance(self.layers, int) else tuple(self.layers))
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
