"""Cutting attention edges in any back end, and an audit of what the attention function was really given.

transformers looks its attention function up by name at every call. The first time one is needed, a router takes its
place in that table for good; within a block of `attending`, and only there, it hands the calls of the modules named to
another function, which gives masks to those whose edges are cut and records those calls. Which block a call is in is
known by its context (`contextvars`), so that threads do not see each other's. One mechanism serves decoders and
towers, plain, windowed and packed ones, whatever a module's own mask looks like.
"""

import contextlib
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.interventions.attention_plan import Cut, kinds_of
from vlm_mech.interventions.passes import Passes
from vlm_mech.interventions.reweighting import Shift, added_to_scores, named_queries, shifts_of

BACKENDS = ("sdpa", "eager")


def allowed_edges(
    mask: Tensor | None, *, n_query: int, n_key: int, causal: bool, device: torch.device
) -> Bool[Tensor, "rows heads query key"]:
    """Which edges a model's own attention mask allows, whatever its form.

    Args:
        mask: what the attention module received: None, boolean (True = may attend) or additive float.
        causal: what None means in this module: causal, or everything. Causal, the first of several queries sees the
            first key (so the kernel has it; a static cache has keys to spare after the last), a single one sees all.

    Returns:
        Boolean tensor, rows and heads of size 1 where the mask is shared.
    """
    if mask is None:
        everything = torch.ones(1, 1, n_query, n_key, dtype=torch.bool, device=device)
        return everything.tril() if causal and n_query > 1 else everything
    mask = mask[..., :n_key]
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def masked(
    mask: Tensor | None,
    blocked: Bool[Tensor, "rows heads query key"],
    *,
    causal: bool,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    """A new mask in the back end's own form that allows what `mask` allows, minus the blocked edges.

    Raises:
        UsageError: a query position would be left with nothing to attend to.
    """
    n_query, n_key = blocked.shape[-2:]
    before = allowed_edges(mask, n_query=n_query, n_key=n_key, causal=causal, device=blocked.device)
    after = before & ~blocked
    emptied = (before.any(-1) & ~after.any(-1)).nonzero()
    if len(emptied):
        row, _, query = emptied[0].tolist()
        raise UsageError(f"the knockout leaves position {query} of example {row} nothing to attend to; narrow its keys")
    if mask is not None and mask.dtype != torch.bool:
        return mask[..., :n_key].masked_fill(blocked, torch.finfo(mask.dtype).min)
    return in_form(after, backend, dtype)


def in_form(edges: Bool[Tensor, "rows heads query key"], backend: str, dtype: torch.dtype) -> Tensor:
    """The mask that allows these edges, in the form that a back end takes."""
    if backend == "eager":
        return torch.zeros_like(edges, dtype=dtype).masked_fill(~edges, torch.finfo(dtype).min)
    return edges


@dataclass(eq=False)
class AttentionCall:
    """One call of the attention function on which edges were cut or given other weights, as the kernel got it.

    `allowed` are the edges under the model's own mask, `blocked` those cut, `shifts` what is asked of weights.
    """

    query: Float[Tensor, "rows heads query d_head"]
    key: Float[Tensor, "rows heads key d_head"]
    value: Float[Tensor, "rows heads key d_head"]
    mask: Tensor | None
    scaling: float
    causal: bool
    output: Float[Tensor, "rows query heads d_head"]
    allowed: Bool[Tensor, "mask_rows mask_heads query key"]
    blocked: Bool[Tensor, "rows cut_heads query key"]
    shifts: Sequence[Shift] = ()

    def scores(self, row: int, queries: Tensor) -> Float[Tensor, "heads chosen key"]:
        """Scores at some query positions of one row before any mask, in fp32."""
        return self.query[row][:, queries].float() @ self.key[row].float().mT * self.scaling

    def left(self, row: int, queries: Tensor) -> Bool[Tensor, "left_heads chosen key"]:
        """Edges of some query positions of one row that attention allows and that are not cut."""
        edges = self.allowed[row if self.allowed.shape[0] > 1 else 0][:, queries]
        return edges & ~self.blocked[row][:, queries]

    def weights(self, row: int, queries: Tensor) -> Float[Tensor, "heads chosen key"]:
        """Attention after the softmax at some query positions of one row, in fp32."""
        scores = self.scores(row, queries)
        n_query, n_key = self.query.shape[-2], self.key.shape[-2]
        if self.mask is None or self.mask.dtype == torch.bool:
            edges = allowed_edges(self.mask, n_query=n_query, n_key=n_key, causal=self.causal, device=self.query.device)
            edges = edges[row if edges.shape[0] > 1 else 0][:, queries]
            return scores.masked_fill(~edges, -torch.inf).softmax(-1)
        bias = self.mask[row if self.mask.shape[0] > 1 else 0][:, queries, :n_key]
        return (scores + bias.float()).softmax(-1)


@dataclass(eq=False)
class Cutting:
    """The edits of edges at one attention module, and what has passed through it.

    A pass has `n_rows` rows of `n_pos` positions; packed towers take it in several calls. `passes` says of the passes
    of a generation which rows and positions they hold. `calls` are those in which an edge was named, `n_calls` counts
    all.
    """

    cuts: Sequence[Cut]
    backend: str
    n_rows: int
    n_pos: int
    passes: Passes | None = None
    seen: int = 0
    n_calls: int = 0
    calls: list[AttentionCall] = field(default_factory=list)

    def edits(self, query: Tensor, key: Tensor) -> tuple[Bool[Tensor, "rows heads query key"], list[Shift]]:
        """Edges to cut in a call, and what is asked of the weights of others.

        Args:
            query, key: those of the call (rows x heads x positions x d_head).
        """
        n_query, n_key = query.shape[2], key.shape[2]
        window = None if self.passes is None else self.passes.now
        if window is None:
            prompts, first = tuple(range(self.n_rows)), self.seen
            # A call of a packed tower has the keys of its queries.
            first_key = first
        else:
            prompts, first = window.prompts, window.first
            # A static cache has room for more keys than there are; a sliding-window cache holds the newest only.
            first_key = max(0, first + n_query - n_key)
        if query.shape[0] != len(prompts) or (window is not None and n_query != window.length):
            raise WorkError(
                f"attention of {query.shape[0]} rows and {n_query} positions; "
                f"{len(prompts)} rows{f' and {window.length} positions' if window else ''} were expected"
            )
        self.seen, self.n_calls = self.seen + n_query, self.n_calls + 1
        queries, keys = range(first, first + n_query), range(first_key, first_key + n_key)
        at = {"n_pos": self.n_pos, "device": query.device}
        cut, others = kinds_of(self.cuts)
        blocked = [each.blocked(prompts, queries, keys, **at) for each in cut]
        if not blocked:
            blocked = [torch.zeros(len(prompts), 1, n_query, n_key, dtype=torch.bool, device=query.device)]
        total = blocked[0]
        for more in blocked[1:]:
            total = total | more
        return total, [each for each in shifts_of(others, prompts, queries, keys, **at) if each.keys.any()]


Attend = Callable[..., tuple[Tensor, Any]]
Routes = tuple[tuple[set[nn.Module], Callable[[Attend], Attend]], ...]
_routes: contextvars.ContextVar[Routes] = contextvars.ContextVar("routes", default=())
_placing = threading.Lock()


@contextlib.contextmanager
def own_attention() -> Iterator[None]:
    """Within the block, attention is the model's own, whatever `attending` put in its place around it."""
    before = _routes.set(())
    try:
        yield
    finally:
        _routes.reset(before)


@contextlib.contextmanager
def aside(vlm: TracedModel) -> Iterator[None]:
    """Within the block the model runs as if nobody traced it: no intervention acts, and no pass of it is counted.

    For what runs the model a second time while an answer is generated, such as a logits processor.
    """
    interleaver = vlm.nn.interleaver
    before = interleaver.interleaving
    interleaver.interleaving = False
    try:
        with own_attention():
            yield
    finally:
        interleaver.interleaving = before


@contextlib.contextmanager
def attending(modules: set[nn.Module], attend: Callable[[Attend], Attend]) -> Iterator[None]:
    """Within the block, the attention function of these modules is the one that `attend` makes of the original."""
    for backend in {module.config._attn_implementation for module in modules}:
        _place_router(backend)
    before = _routes.set((*_routes.get(), (modules, attend)))
    try:
        yield
    finally:
        _routes.reset(before)


@dataclass(frozen=True, eq=False)
class Router:
    """An attention function that is the original but for calls within a block of `attending`; None is eager's."""

    original: Attend | None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """As the original is called."""
        # Eager attention is not in transformers' table: each architecture has its own.
        function = self.original or sys.modules[type(module).__module__].eager_attention_forward
        for modules, attend in _routes.get():
            if module in modules:
                function = attend(function)
        # Where somebody else's function stands around a router, a call must not be routed twice.
        with own_attention():
            return function(module, query, key, value, attention_mask, **options)


def _place_router(backend: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with _placing:
        current = ALL_ATTENTION_FUNCTIONS.get(backend)
        if not isinstance(current, Router):
            ALL_ATTENTION_FUNCTIONS[backend] = Router(current)


@contextlib.contextmanager
def cutting(modules: dict[nn.Module, Cutting]) -> Iterator[None]:
    """Within the block, the given attention modules attend without the edges that are cut."""
    with attending(set(modules), lambda function: _cutter(function, modules)):
        yield


def _cutter(function: Attend, modules: dict[nn.Module, Cutting]) -> Attend:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        here = modules[module]
        blocked, shifts = here.edits(query, key)
        if not blocked.any() and not shifts:
            return function(module, query, key, value, attention_mask, **options)
        causal = is_causal(module, query, here.backend, options)
        n_query, n_key = query.shape[2], key.shape[2]
        allowed = allowed_edges(attention_mask, n_query=n_query, n_key=n_key, causal=causal, device=query.device)
        mask = masked(attention_mask, blocked, causal=causal, backend=here.backend, dtype=query.dtype)
        groups, scaling = query.shape[1] // key.shape[1], options["scaling"]
        if shifts:
            mask = shifted(allowed & ~blocked, shifts, query, key.repeat_interleave(groups, dim=1), scaling)
        output, weights = function(module, query, key, value, mask, **options)
        keys, values = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        here.calls.append(AttentionCall(query, keys, values, mask, scaling, causal, output, allowed, blocked, shifts))
        return output, weights

    return attend


def shifted(
    left: Bool[Tensor, "mask_rows mask_heads query key"],
    shifts: Sequence[Shift],
    query: Float[Tensor, "rows heads query d_head"],
    key: Float[Tensor, "rows heads key d_head"],
    scaling: float,
) -> Float[Tensor, "rows heads query key"]:
    """An additive mask that allows the edges left, and gives some of them the weights that are asked for."""
    lowest, at = torch.finfo(query.dtype).min, named_queries(shifts)
    mask = torch.zeros(*query.shape[:3], key.shape[2], dtype=query.dtype, device=query.device)
    mask.masked_fill_(~left, lowest)
    scores = (query[:, :, at].float() @ key.float().mT * scaling).masked_fill(~left[:, :, at], -torch.inf)
    added = added_to_scores(scores, [each.within(at) for each in shifts]).to(mask.dtype)
    # What is allowed no weight at all is as good as masked.
    mask[:, :, at] = (mask[:, :, at] + added).clamp(min=lowest)
    return mask


def is_causal(module: nn.Module, query: Tensor, backend: str, options: dict[str, Any]) -> bool:
    """Whether a missing mask means causal attention in this call; eager attention then attends to everything."""
    if backend == "eager" or query.shape[2] == 1:
        return False
    said = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)
