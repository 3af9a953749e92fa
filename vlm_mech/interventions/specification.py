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
from vlm_mech.interventions.drawn import Edited, drawn
from vlm_mech.interventions.subspace import check_rows

if TYPE_CHECKING:
    import torch

    from vlm_mech.architectures.traced_model import TracedModel


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

    def edited(self) -> tuple[Edited, ...]:
        """Which blocks are edited and where in them, in the words of `repr` for spans: a part for each stream."""
        return ()

    def _repr_html_(self) -> str:
        return drawn([each for part in self.flat() for each in part.edited()])


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
    raise UsageError(
        f"{shown(given)} is not an intervention; Replace, Ablate, Steer, Project, Knockout, Remove, Reweight are, and "
        "a & b"
    )


def shown(given: object) -> str:
    """What was given, on one short line."""
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
        check_heads(name, self.heads)
        object.__setattr__(self, "span", settled(self.span))

    def check(self, vlm: "TracedModel") -> None:
        """Raise `UsageError` where a model does not have one of the sites or layers."""
        for site in self.sites:
            vlm.check_site(site)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites as a tuple."""
        return tuple(self.site) if isinstance(self.site, list | tuple) else (self.site,)

    def edited(self) -> tuple[Edited, ...]:
        """One part for each stream and point of its sites."""
        by_point: dict[tuple[str, str], list[int]] = {}
        for site in self.sites:
            by_point.setdefault((site.stream, site.point), []).extend([] if site.layer is None else [site.layer])
        heads = "" if self.heads is None else f", heads {', '.join(map(str, self.heads))}"
        return tuple(
            Edited(type(self).__name__, stream, tuple(layers), f"{point} at {shown(self.span)}{heads}")
            for (stream, point), layers in by_point.items()
        )

    @property
    def source_sites(self) -> tuple[Site, ...]:
        """Where states for each of the sites are taken, if any are."""
        return self.sites


def check_heads(name: str, heads: object) -> None:
    """Raise `UsageError` unless heads are whole numbers, at least one, or None."""
    if heads is None:
        return
    whole_numbers(f"heads of {name}", heads)
    if not tuple(cast(Iterable[int], heads)):
        raise UsageError(f"{name} names no head; leave heads out for all of them")


def whole_numbers(what: str, given: object) -> None:
    """Raise `UsageError` unless several whole numbers are given."""
    whole = isinstance(given, Iterable) and all(
        isinstance(each, Integral) and not isinstance(each, bool) for each in given
    )
    if not whole:
        raise UsageError(f"{what} are {shown(given)}; whole numbers are needed, such as (0, 1)")


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

    Args:
        source: the other run; None is the unedited run of this very batch, whose states then come from another
            `source_site` (back-patching, freezing) or another `source_span`.
        source_site: where in the source's run the states are taken: a site, or one for each of `site`, of the same
            stream and width; the site itself unless given.
        subspace: k x width, any independent rows: only what lies in the subspace that they span is replaced, so that
            a state b becomes b + P(s - b). With `heads` the width is that of these heads together, in their order.
    """

    source: Source | None = field(default=None, kw_only=True)
    source_span: Span | None = field(default=None, kw_only=True)
    source_site: Site | tuple[Site, ...] | None = field(default=None, kw_only=True)
    subspace: "torch.Tensor | None" = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is not None:
            _check_source("the source of Replace", self.source)
        if self.source_span is not None:
            object.__setattr__(self, "source_span", settled(self.source_span))
        if self.source_site is not None:
            self._check_source_sites()
        if self.source is None and self.source_sites == self.sites and self.source_span in (None, self.span):
            raise UsageError(
                "Replace without a source takes states of the same run, and without another source_site changes "
                "nothing; give source=, or the site that they come from as source_site="
            )
        if self.subspace is not None:
            check_rows("the subspace of Replace", self.subspace)

    @property
    def source_sites(self) -> tuple[Site, ...]:
        """Where in the source's run the states for each of the sites are taken."""
        given = self.sites if self.source_site is None else self.source_site
        return (given,) if isinstance(given, Site) else tuple(given)

    @property
    def is_plain(self) -> bool:
        """Whether whole states of another run are put where they were in that run."""
        plain = self.source is not None and self.source_span is None and self.subspace is None
        return plain and self.source_sites == self.sites

    def _check_source_sites(self) -> None:
        taken = listed_sites(self.source_site, "source_site of Replace")
        if len(taken) != len(self.sites):
            raise UsageError(
                f"Replace has {len(self.sites)} site(s) and {len(taken)} source_site(s); one each is needed"
            )
        for site, other in zip(self.sites, taken, strict=True):
            if site.place != other.place:
                raise UsageError(f"Replace at {site} cannot take states of {other}: their positions are not the same")
            if self.heads is not None and other.point != "head_out":
                raise UsageError(f"heads can be chosen at head_out sites only, not at {other}")


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
            raise UsageError(f"Ablate(to={self.to!r}) is not known; use one of zero, mean, resample")
        if self.reference is not None:
            _check_source("the reference of Ablate", self.reference)


@dataclass(frozen=True, eq=False)
class Steer(StateEdit):
    """Adds `scale` times a vector to every position of a span.

    Args:
        vector: as wide as the site, of shape (width,); or (n examples, width), one for each example of the batch.
    """

    vector: "torch.Tensor" = field(kw_only=True)
    scale: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        from torch import Tensor

        super().__post_init__()
        if not isinstance(self.vector, Tensor):
            raise UsageError(f"the vector of Steer is a {type(self.vector).__name__}; a torch tensor is needed")
        if self.vector.ndim not in (1, 2):
            raise UsageError(
                f"the vector of Steer has shape {tuple(self.vector.shape)}; (width,) is needed, or (n, width) with "
                "one for each example"
            )
        if self.vector.is_complex():
            raise UsageError("the vector of Steer is complex; a real one is needed")
        if isinstance(self.scale, bool) or not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise UsageError(f"the scale of Steer is {shown(self.scale)}; a finite number is needed")


Stream = Literal["vision", "text", "llm"]


class AttentionEdit(Intervention):
    """An intervention on what positions read of each other: `Knockout`, `Remove`, `Reweight`."""

    stream: Stream

    @property
    def first_layer(self) -> int:
        """The first block in which anything is edited."""
        raise NotImplementedError

    def check_stream(self) -> None:
        """Raise `UsageError` unless the stream is one with attention."""
        if self.stream not in ("vision", "text", "llm"):
            raise UsageError(f"{type(self).__name__}(stream={self.stream!r}) is not known; use vision, text or llm")


@dataclass(frozen=True, eq=False)
class Knockout(AttentionEdit):
    """Cuts attention edges: at these layers, `query` positions cannot attend to `key` positions (Geva et al. 2023).

    The mask is built anew for the attention back end in use, so that after the softmax the blocked edges carry exactly
    nothing and the rest of each row sums to one. In generation, the span `generated` as `query` means the tokens
    generated so far. `keep_self` spares the edge from a position to itself.
    """

    query: Span
    key: Span
    layers: int | Iterable[int]
    heads: tuple[int, ...] | None = field(default=None, kw_only=True)
    stream: Stream = field(default="llm", kw_only=True)
    keep_self: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_heads("Knockout", self.heads)
        object.__setattr__(self, "query", settled(self.query))
        object.__setattr__(self, "key", settled(self.key))
        object.__setattr__(self, "layers", listed_layers("Knockout", self.layers))
        self.check_stream()

    @property
    def each_layer(self) -> tuple[int, ...]:
        """The layers as a tuple."""
        return (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)

    @property
    def first_layer(self) -> int:
        """The first block in which edges are cut."""
        return min(self.each_layer)

    def edited(self) -> tuple[Edited, ...]:
        """The blocks, and from where to where attention is cut."""
        heads = "" if self.heads is None else f", heads {', '.join(map(str, self.heads))}"
        return (Edited("Knockout", self.stream, self.each_layer, f"{shown(self.query)} <- {shown(self.key)}{heads}"),)


def listed_layers(name: str, layers: object) -> tuple[int, ...]:
    """One layer or several, as a tuple.

    Raises:
        UsageError: there is none, or one is no whole number.
    """
    # An iterator would be used up by the first look.
    given = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    whole_numbers(f"layers of {name}", layers if isinstance(layers, str) else given)
    if not given:
        raise UsageError(f"{name} names no layer")
    return cast(tuple[int, ...], given)


def window(center: int, size: int, *, n_layers: int) -> tuple[int, ...]:
    """The layers of a window of `size` centred on a layer, clipped at the borders.

    As in Zhang et al. (cross-modal information flow): from `center - size // 2`, `size` layers, clipped to
    `0 .. n_layers - 1`.
    """
    if size < 1 or not 0 <= center < n_layers:
        raise UsageError(f"no window of size {size} around layer {center}: layers are 0..{n_layers - 1}, size >= 1")
    first = center - size // 2
    return tuple(range(max(0, first), min(n_layers, first + size)))
