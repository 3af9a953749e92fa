"""What state edits write, made concrete for one batch: where states are taken from, and what becomes of those there.

Everything that can be wrong with a state edit is found here, before the model runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Cells, in_order, whole_images
from vlm_mech.interventions.answered import split_generated
from vlm_mech.interventions.passes import Batch
from vlm_mech.interventions.specification import Ablate, Activations, Replace, StateEdit, Steer
from vlm_mech.interventions.state_edits import Project
from vlm_mech.interventions.subspace import orthonormal

ReadStates = Callable[[Batch, tuple[Site, ...]], Activations]
"""Reads states of a batch, for sources and references given as prompts."""


def prompts_of(encoded: Batch) -> Batch:
    """The batch without the answers that follow it: what is averaged over, or drawn from, unless told otherwise."""
    before = encoded.before if isinstance(encoded, Encoded) else None
    return encoded if before is None else before


def source_of(vlm: TracedModel, part: StateEdit, encoded: Batch, read: ReadStates) -> Activations | None:
    """The states that a part takes; None where it takes none.

    Raises:
        UsageError: the model has no such site, or states of another width there.
    """
    if isinstance(part, Replace):
        # Of this very batch with its answers, where no other is given.
        source = encoded if part.source is None else part.source
        for site, other in zip(part.sites, part.source_sites, strict=True):
            _check_taken(vlm, site, other)
    elif isinstance(part, Ablate) and part.to != "zero":
        source = prompts_of(encoded) if part.reference is None else part.reference
    else:
        return None
    if isinstance(source, Activations):
        return source
    if not isinstance(source, Encoded | DualEncoded) and not all(isinstance(prompt, Prompt) for prompt in source):
        raise UsageError(f"a source is Activations, Encoded or prompts, not {type(source).__name__}")
    return read(source, part.source_sites)


def _check_taken(vlm: TracedModel, site: Site, other: Site) -> None:
    if other == site:
        return
    vlm.check_site(other)
    width, found = vlm.width(site), vlm.width(other)
    if width != found:
        raise UsageError(f"Replace at {site}, {width} wide, cannot take states of {other}, which are {found} wide")


@dataclass(frozen=True, eq=False)
class Subspace:
    """A subspace of a site's states, by orthonormal rows, and a centre."""

    rows: Float[Tensor, "k width"]
    center: Float[Tensor, " width"]

    def of(self, states: Float[Tensor, "cell width"], less: Tensor) -> Float[Tensor, "cell width"]:
        """What of `states - less` lies in it, in the precision of the states, or in single if that is lower."""
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        rows = self.rows.to(wide)
        return ((wide - less.to(wide)) @ rows.T) @ rows


def subspace_of(vlm: TracedModel, part: StateEdit) -> Subspace | None:
    """The subspace in which a part acts, laid into the width of its sites; None where it has none.

    Raises:
        UsageError: rows of another width than the states, or some that follow from the others.
    """
    if isinstance(part, Project):
        what, given, center = "the basis of Project", part.basis, part.center
    elif isinstance(part, Replace) and part.subspace is not None:
        what, given, center = "the subspace of Replace", part.subspace, None
    else:
        return None
    for site in part.sites:
        width, n_heads = vlm.width(site), vlm.n_heads(site.stream)
        own = width if part.heads is None else width // n_heads * len(set(part.heads))
        if given.shape[1] != own:
            of = "" if part.heads is None else f" in {len(set(part.heads))} head(s)"
            raise UsageError(f"{what} has rows {given.shape[1]} wide; states at {site} are {own} wide{of}")
    rows = orthonormal(what, given)
    middle = torch.zeros(rows.shape[1]) if center is None else center.detach().cpu()
    if part.heads is None:
        return Subspace(rows, middle)
    width, n_heads = vlm.width(part.sites[0]), vlm.n_heads(part.sites[0].stream)
    heads = list(dict.fromkeys(part.heads))

    def laid(narrow: Tensor) -> Tensor:
        wide = narrow.new_zeros(len(narrow), n_heads, width // n_heads)
        wide[:, heads] = narrow.unflatten(1, (len(heads), -1))
        return wide.flatten(1)

    return Subspace(laid(rows), laid(middle[None])[0])


def change_of(
    vlm: TracedModel,
    part: StateEdit,
    at: tuple[Site, Site],
    cells: Cells | None,
    encoded: Batch,
    source: Activations | None,
    subspace: Subspace | None,
) -> Callable[..., Tensor]:
    """What becomes of the states at a site: a function of them, and of which cells they are (see `Write`).

    Args:
        at: the site, and where in the source's run states for it are taken.
        cells: where it is edited in the prompts; None where only generated tokens are.

    Raises:
        UsageError: the source has other tokens than the span, or other rows and columns of images; or NaN.
    """
    site, other = at
    if isinstance(part, Steer):
        return _steer(vlm, part, site, cells)
    if isinstance(part, Ablate) and part.to == "zero":
        if site.point == "embed":
            raise UsageError(f"{site} cannot be zero: a zero vector has no direction; use to='mean' or to='resample'")
        return lambda old, chosen=None: torch.zeros_like(old)
    if isinstance(part, Project):
        assert subspace is not None, "it has a basis"
        return _projected(part, site, subspace)
    taken = _taken(part, other, source)
    counts = taken.cells.counts
    if isinstance(part, Ablate) and part.to == "mean":
        mean = taken.states().mean(0)
        return lambda old, chosen=None: mean.to(old.device).expand_as(old)
    if isinstance(part, Ablate):
        taken = _resampled(taken, part.seed)
        counts = taken.cells.counts
    if cells is None or counts != cells.counts:
        wanted = () if cells is None else cells.counts
        example = next((i for i, pair in enumerate(zip(wanted, counts, strict=False)) if pair[0] != pair[1]), None)
        if example is None:
            raise UsageError(
                f"{type(part).__name__} at {site}: source has {len(counts)} examples, the batch {len(wanted)}"
            )
        raise UsageError(
            f"{type(part).__name__} at {site}: span {part.span!r} of example {example} has {wanted[example]} tokens, "
            f"its source has {counts[example]}; both must be equal"
        )
    if isinstance(part, Replace) and source is not None:
        _check_grids(part, site, cells, encoded, source.encoded)
    if subspace is None:
        return lambda old, chosen=None: taken.states(chosen).to(old.device)
    return lambda old, chosen=None: old + subspace.of(taken.states(chosen).to(old.device), old)


def _projected(part: Project, site: Site, subspace: Subspace) -> Callable[..., Tensor]:
    if site.point == "embed" and not part.onto and len(subspace.rows) == subspace.rows.shape[1]:
        raise UsageError(f"{site} cannot lose all that it holds: what is left has no direction")

    def change(old: Tensor, chosen: Tensor | None = None) -> Tensor:
        within = subspace.of(old, subspace.center)
        return subspace.center.to(within) + within if part.onto else old - within

    return change


def _check_grids(part: Replace, site: Site, cells: Cells, encoded: Batch, source: Batch) -> None:
    """States of image tokens can only be exchanged between images cut into the same rows and columns."""
    if site.stream == "text" or site.point == "embed":
        return
    pairs = set(zip(cells.rows.tolist(), cells.positions.tolist(), strict=True))
    for example, row in enumerate(encoded.rows):
        own, other = encoded.grids(example), source.grids(example)
        if part.source_span is not None:
            # Tokens that are named one by one are paired as they are named.
            own = whole_images(row, part.span, example)
            other = whole_images(source.rows[example], part.source_span, example)
            if not own or not other:
                continue
        touched = site.stream != "llm" or any((example, position) in pairs for position in row.image)
        if touched and own != other:
            raise UsageError(
                f"Replace at {site}: the images of example {example} are cut into {_shown(own)} tokens, those of its "
                f"source into {_shown(other)}; give both the same size"
            )


def _shown(grids: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{rows} x {columns}" for rows, columns in grids)


@dataclass(frozen=True, eq=False)
class Taken:
    """States of another run that are to be written, gathered only when they are needed."""

    held: Float[Tensor, "rows pos width"]
    cells: Cells

    def states(self, chosen: Tensor | None = None) -> Float[Tensor, "cell width"]:
        """One row for each cell, or for each of those chosen."""
        rows, positions = self.cells.rows, self.cells.positions
        if chosen is not None:
            rows, positions = rows[chosen], positions[chosen]
        return self.held[rows.to(self.held.device), positions.to(self.held.device)]


def _taken(part: StateEdit, site: Site, source: Activations) -> Taken:
    other = part.source_span if isinstance(part, Replace) else None
    ordered = other is not None and in_order(part.span, other)
    span, _ = split_generated(part.span if other is None else other)
    if span is None:
        raise UsageError(
            f"{type(part).__name__}(to='mean') at generated tokens needs a span of the prompt to average over"
        )
    taken = Taken(source[site], source.encoded.cells(span, place=site.place, ordered=ordered))
    if taken.states().isnan().any():
        raise UsageError(f"the source of {type(part).__name__} at {site} holds NaN")
    return taken


def _resampled(taken: Taken, seed: int) -> Taken:
    """The same states, those of every example handed to another one."""
    counts = taken.cells.counts
    n = len(counts)
    if n < 2:
        raise UsageError("resampling needs a reference of at least two examples")
    # A random cyclic order is a permutation that leaves no example with its own states.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    donor = torch.empty(n, dtype=torch.long)
    donor[order] = order.roll(1)
    rows, positions = taken.cells.rows.split(counts), taken.cells.positions.split(counts)
    chosen = donor.tolist()
    cells = Cells(
        torch.cat([rows[index] for index in chosen]),
        torch.cat([positions[index] for index in chosen]),
        tuple(counts[index] for index in chosen),
    )
    return Taken(taken.held, cells)


def _steer(vlm: TracedModel, part: Steer, site: Site, cells: Cells | None) -> Callable[..., Tensor]:
    width, vector = vlm.width(site), part.vector
    if vector.shape[-1:] != (width,) or vector.ndim > 2:
        raise UsageError(
            f"a steering vector for {site} has shape ({width},), or (n, {width}) with one for each example, not "
            f"{tuple(vector.shape)}"
        )
    if not vector.isfinite().all():
        held = "NaN" if vector.isnan().any() else "infinite numbers"
        raise UsageError(f"the steering vector for {site} holds {held}")
    if vector.ndim == 1:
        return lambda old, chosen=None: old + part.scale * vector.to(old.device, old.dtype)
    if cells is None or split_generated(part.span)[1]:
        raise UsageError("Steer with a vector per example acts at tokens of the prompt; of generated ones it takes one")
    if len(vector) != len(cells.counts):
        raise UsageError(f"Steer has {len(vector)} vectors for {len(cells.counts)} examples; one each is needed")
    examples = torch.repeat_interleave(torch.arange(len(vector)), torch.tensor(cells.counts))

    def change(old: Tensor, chosen: Tensor | None = None) -> Tensor:
        at = examples if chosen is None else examples[chosen.cpu()]
        return old + part.scale * vector[at.to(vector.device)].to(old.device, old.dtype)

    return change
