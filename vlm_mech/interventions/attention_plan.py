"""Edits of attention made concrete for one batch: which edges are cut, and which are given another weight."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.answered import split_generated
from vlm_mech.interventions.attention_edits import Remove, Reweight
from vlm_mech.interventions.passes import Batch
from vlm_mech.interventions.specification import AttentionEdit, Knockout

Positions = dict[int, tuple[int, ...]]
"""Positions by row of the tower."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Attention edges to cut at one layer: positions of queries and keys by row of the tower.

    `named` says which edges are meant where the positions of queries were made for this cut alone. `may_be_idle`:
    attention may allow none of them.
    """

    what: str
    stream: str
    layer: int
    queries: Positions
    keys: Positions
    heads: tuple[int, ...] | None
    n_heads: int
    keep_self: bool
    generated: bool
    named: object = dataclasses.field(default=None, kw_only=True)
    may_be_idle: bool = dataclasses.field(default=False, kw_only=True)

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
        return self.named or id(self.queries), id(self.keys), self.heads, self.keep_self


@dataclass(frozen=True, eq=False)
class Reweighing(Cut):
    """Attention edges that are given another weight: `how`, by which `scale`, and the keys `to` that gain by it."""

    scale: float = dataclasses.field(kw_only=True)
    how: str = dataclasses.field(kw_only=True)
    to: Positions | None = dataclasses.field(kw_only=True)

    @property
    def edges(self) -> tuple[Any, ...]:
        """The same for edges of the same spans of a batch that are given the same weights."""
        return (*super().edges, self.scale, self.how, self.to and id(self.to))

    def gaining(
        self, prompts: Sequence[int], queries: range, keys: range, *, n_pos: int, device: torch.device
    ) -> Bool[Tensor, "rows head query key"] | None:
        """True at the edges that gain, as `blocked`; None where all others do."""
        if self.to is None:
            return None
        other = dataclasses.replace(self, keys=self.to)
        return other.blocked(prompts, queries, keys, n_pos=n_pos, device=device)


def kinds_of(cuts: Sequence[Cut]) -> tuple[list[Cut], list[Reweighing]]:
    """Edges that are cut, and edges that are given another weight."""
    cut = [each for each in cuts if not isinstance(each, Reweighing)]
    return cut, [each for each in cuts if isinstance(each, Reweighing)]


def cuts_of(vlm: TracedModel, encoded: Batch, part: AttentionEdit, *, generating: bool) -> list[Cut]:
    """The edges of an attention edit at each of its layers.

    Args:
        generating: whether tokens will be generated.

    Raises:
        UsageError: a layer or head out of range, an empty span, a back end without masks, or the last token removed.
    """
    if isinstance(part, Remove):
        return _removed(vlm, encoded, part, generating=generating)
    if isinstance(part, Reweight):
        return _reweighed(vlm, encoded, part)
    assert isinstance(part, Knockout), "there is no other edit of attention"
    return _cuts(vlm, encoded, part, f"Knockout {_named(part.query)}<-{_named(part.key)}")


def _cuts(vlm: TracedModel, encoded: Batch, part: Knockout | Reweight, what: str) -> list[Cut]:
    stream, kind = part.stream, type(part).__name__
    _check_layers(vlm, stream, part.each_layer)
    query, generated = split_generated(part.query)
    if generated and stream != "llm":
        raise UsageError(f"generated tokens do not pass through the {stream} tower")
    queries = {} if query is None else encoded.cells(query, place=stream).by_row
    keys = _keys(encoded, part.key, stream, kind)
    n_heads = vlm.n_heads(stream)
    keep_self = isinstance(part, Knockout) and part.keep_self
    cuts = []
    for layer in part.each_layer:
        check_heads(part.heads, n_heads, f"{stream} layer {layer}")
        cuts.append(Cut(what, stream, layer, queries, keys, part.heads, n_heads, keep_self, generated))
    return cuts


def _reweighed(vlm: TracedModel, encoded: Batch, part: Reweight) -> list[Cut]:
    what = f"Reweight {_named(part.query)}<-{_named(part.key)} {part.how} x {part.scale:g}"
    cuts = _cuts(vlm, encoded, part, what)
    if part.is_knockout:
        return cuts
    to = None if part.to is None else _keys(encoded, part.to, part.stream, "Reweight")
    more = {"scale": float(part.scale), "how": part.how, "to": to}
    return [Reweighing(**_fields(cut), **more) for cut in cuts]


def _fields(cut: Cut) -> dict[str, Any]:
    return {each.name: getattr(cut, each.name) for each in dataclasses.fields(cut)}


def _removed(vlm: TracedModel, encoded: Batch, part: Remove, *, generating: bool) -> list[Cut]:
    stream = part.stream
    layers = range(part.layer, vlm.n_layers(stream) if part.until is None else part.until)
    _check_layers(vlm, stream, (part.layer, *layers))
    keys = _keys(encoded, part.span, stream, "Remove")
    _check_read(encoded, part, keys)
    taken = {row: set(at) for row, at in keys.items()}
    queries = {
        row: tuple(each for each in at if each not in taken[row]) for row, at in _readers(vlm, encoded, keys, stream)
    }
    if not any(queries.values()):
        raise UsageError(f"Remove {_named(part.span)} removes all positions of the {stream} tower; leave some")
    how = {"named": ("all that could read", id(keys)), "may_be_idle": True}
    what, n_heads, generated = f"Remove {_named(part.span)}", vlm.n_heads(stream), generating and stream == "llm"
    return [Cut(what, stream, layer, queries, keys, None, n_heads, False, generated, **how) for layer in layers]


def _readers(vlm: TracedModel, encoded: Batch, keys: Positions, stream: str) -> list[tuple[int, range | list[int]]]:
    """For each row with keys the positions that can attend to one of them in any layer."""
    if stream == "vision":
        return [(row, range(encoded.shape(stream)[1])) for row in keys]
    answered = not isinstance(encoded, DualEncoded) and encoded.answers is not None
    present = encoded.cells(("all", "answer") if answered else "all", place=stream).by_row
    found = []
    for row, at in keys.items():
        first = min(at)
        if stream == "text":
            first = first if vlm.family.causal else 0
        elif vlm.family.both_ways == "prefix":
            first = 0
        elif vlm.family.both_ways == "image":
            first = min(first, *encoded.cells("image", place=stream).by_row.get(row, (first,)))
        found.append((row, [position for position in present[row] if position >= first]))
    return found


def _check_read(encoded: Batch, part: Remove, keys: Positions) -> None:
    """What is read must stay: the last token of the prompt and those of its answer, or pooled positions."""
    if isinstance(encoded, DualEncoded):
        read = encoded.pooled_cells(part.stream)
        lost = any((row, position) in read for row, at in keys.items() for position in at)
    else:
        lost = part.stream == "llm" and any(max(at) >= encoded.n_prompt - 1 for at in keys.values())
    if lost:
        where = "the embedding is" if isinstance(encoded, DualEncoded) else "the answer is"
        raise UsageError(f"Remove {_named(part.span)} removes a position that {where} read from; leave it out")


def _check_layers(vlm: TracedModel, stream: str, layers: Sequence[int]) -> None:
    for layer in layers:
        vlm.check_site(Site(f"{stream}.resid_pre", layer))
    vlm.check_maskable(stream)


def _named(span: Any) -> str:
    return span if isinstance(span, str) else type(span).__name__


def _keys(encoded: Batch, span: Span, stream: str, kind: str) -> Positions:
    if split_generated(span)[1]:
        if kind == "Remove":
            raise UsageError("generated tokens cannot be removed, as the answer is read from them")
        raise UsageError(f"generated tokens can be queries of a {kind.lower()}, not keys")
    return encoded.cells(span, place=stream).by_row


def check_heads(heads: tuple[int, ...] | None, n_heads: int, where: str) -> None:
    """Raise `UsageError` for a head that a layer does not have."""
    for head in heads or ():
        if not 0 <= head < n_heads:
            raise UsageError(f"head {head} is out of range at {where}: heads are 0..{n_heads - 1}")
