"""Attention masks for any back end, and an audit of what the attention function was really given."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.errors import UsageError

BACKENDS = ("sdpa", "eager")


def allowed_edges(
    mask: Tensor | None, *, n_query: int, n_key: int, causal: bool, device: torch.device
) -> Bool[Tensor, "rows heads query key"]:
    """Which edges a model's own attention mask allows, whatever its form.

    Args:
        mask: what the attention module received: None, boolean (True = may attend) or additive float.
        causal: what None means in this module: causal with the queries at the end of the keys, or everything.

    Returns:
        Boolean tensor, rows and heads of size 1 where the mask is shared.
    """
    if mask is None:
        everything = torch.ones(1, 1, n_query, n_key, dtype=torch.bool, device=device)
        return everything.tril(n_key - n_query) if causal else everything
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
    """A new mask in the back end's own form that allows what `mask` allows, less the blocked edges.

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
    if backend == "eager":
        return torch.zeros_like(after, dtype=dtype).masked_fill(~after, torch.finfo(dtype).min)
    return after


@dataclass(eq=False)
class AttentionCall:
    """One call of the attention function, as the model made it."""

    query: Float[Tensor, "rows heads query d_head"]
    key: Float[Tensor, "rows heads key d_head"]
    value: Float[Tensor, "rows heads key d_head"]
    mask: Tensor | None
    scaling: float
    causal: bool
    output: Float[Tensor, "rows query heads d_head"]

    def weights(self, row: int, queries: Tensor) -> Float[Tensor, "heads chosen key"]:
        """Attention after the softmax at some query positions of one row, in fp32."""
        scores = self.query[row][:, queries].float() @ self.key[row].float().mT * self.scaling
        n_query, n_key = self.query.shape[-2], self.key.shape[-2]
        if self.mask is None or self.mask.dtype == torch.bool:
            edges = allowed_edges(self.mask, n_query=n_query, n_key=n_key, causal=self.causal, device=self.query.device)
            edges = edges[row if edges.shape[0] > 1 else 0][:, queries]
            return scores.masked_fill(~edges, -torch.inf).softmax(-1)
        bias = self.mask[row if self.mask.shape[0] > 1 else 0][:, queries, :n_key]
        return (scores + bias.float()).softmax(-1)


@contextlib.contextmanager
def audited(modules: dict[torch.nn.Module, Any]) -> Iterator[dict[Any, list[AttentionCall]]]:
    """Within the block, records every attention call of the given modules, under the names given.

    The function that transformers looks up for each back end is wrapped for the duration, so what is recorded is the
    very call whose output the model used. Not for use from several threads at once.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls: dict[Any, list[AttentionCall]] = {name: [] for name in modules.values()}
    backends = {module.config._attn_implementation for module in modules}
    originals = {backend: ALL_ATTENTION_FUNCTIONS._local_mapping.get(backend) for backend in backends}
    for backend in backends:
        ALL_ATTENTION_FUNCTIONS[backend] = _recorder(ALL_ATTENTION_FUNCTIONS.get(backend), modules, calls)
    try:
        yield calls
    finally:
        for backend, original in originals.items():
            if original is None:
                del ALL_ATTENTION_FUNCTIONS[backend]
            else:
                ALL_ATTENTION_FUNCTIONS[backend] = original


def _recorder(
    original: Callable | None, modules: dict[torch.nn.Module, Any], calls: dict[Any, list[AttentionCall]]
) -> Callable:
    def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        # Eager attention is not in transformers' table: each architecture has its own.
        function = original or sys.modules[type(module).__module__].eager_attention_forward
        output, weights = function(module, query, key, value, mask, **options)
        if module in modules:
            groups = query.shape[1] // key.shape[1]
            calls[modules[module]].append(
                AttentionCall(
                    query=query,
                    key=key.repeat_interleave(groups, dim=1),
                    value=value.repeat_interleave(groups, dim=1),
                    mask=mask,
                    scaling=options["scaling"],
                    causal=bool(getattr(module, "is_causal", True)) and query.shape[2] > 1,
                    output=output,
                )
            )
        return output, weights

    return attend
