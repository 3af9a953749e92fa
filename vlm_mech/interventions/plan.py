"""Interventions made concrete for one batch: which cells of which tensor get which values, which edges are cut.

Everything that can be wrong with an intervention is found here, before the model runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Cells, Each, Span, in_order, whole_images
from vlm_mech.interventions.answered import GENERATED, of_generated, with_answers
from vlm_mech.interventions.passes import Batch, Window
from vlm_mech.interventions.specification import (
    Ablate,
    Activations,
    Intervention,
    Knockout,
    Replace,
    StateEdit,
    Steer,
    as_intervention,
)

ReadStates = Callable[[Batch, tuple[Site, ...]], Activations]


@dataclass(frozen=True, eq=False)
class Write:
    """An edit of one site: `change` maps the states at `cells` (cell x width) to new ones.

    Its second argument says which of the cells they are, in which order, if not plainly all. `cells` is None when only
    generated positions are edited; `generated` says whether those are edited too.
    """

    what: str
    site: Site
    cells: Cells | None
    heads: tuple[int, ...] | None
    n_heads: int
    change: Callable[..., Tensor]
    generated: bool

    @property
    def placed(self) -> Cells:
        """The cells in the prompt; none where only generated tokens are edited."""
        nowhere = torch.empty(0, dtype=torch.long)
        return Cells(nowhere, nowhere, ()) if self.cells is None else self.cells

    def acts(self, window: Window | None) -> bool:
        """Whether anything is edited in a pass of the decoder; None is the pass of a tower."""
        if window is None or window.is_prompt:
            return self.cells is not None
        return (self.generated and window.has_generated) or len(window.within(self.placed)[0]) > 0

    def apply(self, states: Float[Tensor, "rows pos width"], window: Window | None = None) -> Tensor:
        """A new tensor with the edit made; the tensor given stays as it is.

        Args:
            window: what rows and positions the states have; by default those of the cells.
        """
        states = states.clone()
        if window is None or window.is_prompt:
            chosen, rows, positions = None, self.placed.rows, self.placed.positions
        else:
            chosen, rows, positions = window.within(self.placed)
        if len(rows):
            rows, positions = rows.to(states.device), positions.to(states.device)
            states[rows, positions] = self._changed(states[rows, positions], chosen)
        if window is not None and self.generated and window.has_generated:
            new = states[:, window.generated]
            states[:, window.generated] = self._changed(new.flatten(0, 1)).view_as(new)
        return states

    def _changed(self, states: Float[Tensor, "cell width"], chosen: Tensor | None = None) -> Tensor:
        new = self.change(states, chosen).to(states.dtype)
        if self.heads is None:
            return new
        split = rearrange(states, "cell (head d_head) -> cell head d_head", head=self.n_heads).clone()
        new = rearrange(new, "cell (head d_head) -> cell head d_head", head=self.n_heads)
        split[:, list(self.heads)] = new[:, list(self.heads)]
        return rearrange(split, "cell head d_head -> cell (head d_head)")


@dataclass(frozen=True, eq=False)
class Cut:
    """Attention edges to cut at one layer: positions of queries and keys by row of the tower."""

    what: str
    stream: str
    layer: int
    queries: dict[int, tuple[int, ...]]
    keys: dict[int, tuple[int, ...]]
    heads: tuple[int, ...] | None
    n_heads: int
    keep_self: bool
    generated: bool

    def blocked(
        self, prompts: Sequence[int], queries: range, keys: range, *, n_pos: int, device: torch.device
    ) -> Bool[Tensor, "rows head query key"]:
        """True where an edge is cut, in a call with these positions as queries and keys.

        Args:
            prompts: whose edges each row has, by prompt in the decoder and by row in a tower.
            n_pos: positions from here on are generated tokens.
        """
        cut, seen = np.zeros((len(prompts), len(queries)), bool), np.zeros((len(prompts), len(keys)), bool)
        after = np.array(queries) >= n_pos
        for row, prompt in enumerate(prompts):
            if prompt not in self.keys:
                continue
            seen[row, [position - keys.start for position in self.keys[prompt] if position in keys]] = True
            chosen = self.queries.get(prompt, ())
            cut[row, [position - queries.start for position in chosen if position in queries]] = True
            cut[row] |= after & self.generated
        blocked = cut[:, :, None] & seen[:, None, :]
        if self.keep_self:
            blocked &= np.array(queries)[:, None] != np.array(keys)
        heads = np.isin(np.arange(self.n_heads), self.heads) if self.heads is not None else np.ones(1, bool)
        return torch.from_numpy(blocked[:, None] & heads[:, None, None]).to(device)

    @property
    def edges(self) -> tuple[Any, ...]:
        """The same for cuts of the same spans of a batch, whatever the layer."""
        return id(self.queries), id(self.keys), self.heads, self.keep_self


@dataclass(frozen=True, eq=False)
class Plan:
    """All writes by site, in the order given, and all cuts by (stream, layer)."""

    writes: dict[Site, list[Write]]
    cuts: dict[tuple[str, int], list[Cut]]

    def apart(self) -> "list[Plan]":
        """A plan for each edited site and each cut layer alone, in the order of their receipts."""
        sites, layers = sorted(self.writes, key=lambda site: site.order), sorted(self.cuts)
        return [Plan({site: self.writes[site]}, {}) for site in sites] + [
            Plan({}, {layer: self.cuts[layer]}) for layer in layers
        ]


def plan(
    vlm: TracedModel, encoded: Batch, intervention: Intervention | None, read: ReadStates, *, generating: bool = False
) -> Plan:
    """The concrete edits of an intervention on this batch.

    Args:
        read: reads states of a batch, for sources and references given as prompts.
        generating: whether there will be generated tokens to edit.

    Raises:
        UsageError: a layer or head out of range, an empty span, a source of another length or with NaN, an attention
            back end that takes no mask.
    """
    made = Plan({}, {})
    given = None if intervention is None else with_answers(vlm, encoded, as_intervention(intervention))
    for part in () if given is None else given.flat():
        if generating:
            part = of_generated(part)
        if isinstance(part, Knockout):
            for cut in _cuts(vlm, encoded, part):
                made.cuts.setdefault((cut.stream, cut.layer), []).append(cut)
        elif isinstance(part, StateEdit):
            for write in _writes(vlm, encoded, part, read):
                made.writes.setdefault(write.site, []).append(write)
        else:
            raise UsageError(f"{type(part).__name__} is not an intervention; Replace, Ablate, Steer, Knockout are")
    edits = [each for several in (*made.writes.values(), *made.cuts.values()) for each in several]
    if not generating and any(each.generated for each in edits):
        raise UsageError("generated tokens are edited by generate alone; a pass over prompts has none")
    return made


def prompts_of(encoded: Batch) -> Batch:
    """The batch without the answers that follow it: what is averaged over, or drawn from, unless told otherwise."""
    before = encoded.before if isinstance(encoded, Encoded) else None
    return encoded if before is None else before


def _split_generated(span: Span) -> tuple[Span | None, bool]:
    if span == GENERATED:
        return None, True
    if isinstance(span, tuple) and GENERATED in span:
        left = tuple(part for part in span if part != GENERATED)
        return left or None, True
    if isinstance(span, Each):
        parts = [_split_generated(part) for part in span.spans]
        of_prompt = [part for part, _ in parts if part is not None]
        generated = {generated for _, generated in parts}
        if len(generated) > 1 or len(of_prompt) not in (0, len(parts)):
            raise UsageError("generated tokens are edited for every example of an Each, or for none")
        return Each(tuple(of_prompt)) if of_prompt else None, generated == {True}
    return span, False


def _writes(vlm: TracedModel, encoded: Batch, part: StateEdit, read: ReadStates) -> list[Write]:
    span, generated = _split_generated(part.span)
    if generated and (isinstance(part, Replace) or (isinstance(part, Ablate) and part.to == "resample")):
        raise UsageError(f"{type(part).__name__} has no states to put at generated tokens; use Ablate or Steer there")
    for site in part.sites:
        vlm.check_site(site)
        if generated and site.stream != "llm":
            raise UsageError(f"generated tokens do not pass through {site}")
        _check_heads(part.heads, vlm.n_heads(site.stream), str(site))
    source = _source(part, encoded, read)
    writes = []
    for site in part.sites:
        ordered = isinstance(part, Replace) and part.source_span is not None and in_order(part.span, part.source_span)
        cells = None if span is None else encoded.cells(span, place=site.place, ordered=ordered)
        change = _change(vlm, part, site, cells, encoded, source)
        n_heads = vlm.n_heads(site.stream)
        writes.append(Write(type(part).__name__, site, cells, part.heads, n_heads, change, generated))
    return writes


def _source(part: StateEdit, encoded: Batch, read: ReadStates) -> Activations | None:
    if isinstance(part, Replace):
        source = part.source
    elif isinstance(part, Ablate) and part.to != "zero":
        source = prompts_of(encoded) if part.reference is None else part.reference
    else:
        return None
    if isinstance(source, Activations):
        return source
    if not isinstance(source, Encoded | DualEncoded) and not all(isinstance(prompt, Prompt) for prompt in source):
        raise UsageError(f"a source is Activations, Encoded or prompts, not {type(source).__name__}")
    return read(source, part.sites)


def _change(
    vlm: TracedModel, part: StateEdit, site: Site, cells: Cells | None, encoded: Batch, source: Activations | None
) -> Callable[[Tensor], Tensor]:
    if isinstance(part, Steer):
        return _steer(vlm, part, site)
    if isinstance(part, Ablate) and part.to == "zero":
        if site.point == "embed":
            raise UsageError(f"{site} cannot be zero: a zero vector has no direction; use to='mean' or to='resample'")
        return lambda old, chosen=None: torch.zeros_like(old)
    taken = _taken(part, site, source)
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
    return lambda old, chosen=None: taken.states(chosen).to(old.device)


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
    span, _ = _split_generated(part.span if other is None else other)
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


def _steer(vlm: TracedModel, part: Steer, site: Site) -> Callable[[Tensor], Tensor]:
    width = vlm.width(site)
    if part.vector.shape != (width,):
        raise UsageError(f"a steering vector for {site} has shape ({width},), not {tuple(part.vector.shape)}")
    if not part.vector.isfinite().all():
        held = "NaN" if part.vector.isnan().any() else "infinite numbers"
        raise UsageError(f"the steering vector for {site} holds {held}")
    return lambda old, chosen=None: old + part.scale * part.vector.to(old.device, old.dtype)


def _cuts(vlm: TracedModel, encoded: Batch, part: Knockout) -> list[Cut]:
    for layer in part.each_layer:
        vlm.check_site(Site(f"{part.stream}.resid_pre", layer))
    vlm.check_maskable(part.stream)
    query, generated = _split_generated(part.query)
    if generated and part.stream != "llm":
        raise UsageError(f"generated tokens do not pass through the {part.stream} tower")
    queries = {} if query is None else encoded.cells(query, place=part.stream).by_row
    keys = _keys(encoded, part.key, part.stream)
    n_heads = vlm.n_heads(part.stream)
    cuts = []
    for layer in part.each_layer:
        _check_heads(part.heads, n_heads, f"{part.stream} layer {layer}")
        what = f"Knockout {_named(part.query)}<-{_named(part.key)}"
        cuts.append(Cut(what, part.stream, layer, queries, keys, part.heads, n_heads, part.keep_self, generated))
    return cuts


def _named(span: Any) -> str:
    return span if isinstance(span, str) else type(span).__name__


def _keys(encoded: Batch, span: Span, stream: str) -> dict[int, tuple[int, ...]]:
    if _split_generated(span)[1]:
        raise UsageError("generated tokens can be queries of a knockout, not keys")
    return encoded.cells(span, place=stream).by_row


def _check_heads(heads: tuple[int, ...] | None, n_heads: int, where: str) -> None:
    for head in heads or ():
        if not 0 <= head < n_heads:
            raise UsageError(f"head {head} is out of range at {where}: heads are 0..{n_heads - 1}")
