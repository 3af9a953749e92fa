"""A prompt's own pass, made once: whatever is decoded from the same prompts begins from a copy of what it left."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**30
"""States and logits of more than this are not kept; the pass is then made each time."""


class FirstPass:
    """What the first forward call of a generation gave, and gives again, to the bit, to generations after it.

    Of the same inputs alone: one object serves one batch of prompts, in one branch.

    Args:
        most_bytes: of cache and logits (`MOST_BYTES` by default); what is larger is not kept.
    """

    def __init__(self, *, most_bytes: int | None = None) -> None:
        self.most_bytes = MOST_BYTES if most_bytes is None else most_bytes
        self._outputs: Any = None
        self._offsets: list[tuple[nn.Module, Any]] = []

    @property
    def kept(self) -> bool:
        """Whether there is something to begin from."""
        return self._outputs is not None

    def of(self, model: nn.Module, forward: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
        """Outputs of the call, in objects of their own: computed, or a copy of those that are kept."""
        if self._outputs is None:
            outputs = forward(*args, **inputs)
            if _bytes_of(outputs) <= self.most_bytes:
                self._outputs = copy.deepcopy(outputs)
                # Families with rotary positions in three dimensions keep an offset of the latest prompt in the model.
                self._offsets = [(each, each.rope_deltas) for each in model.modules() if hasattr(each, "rope_deltas")]
            return outputs
        for module, offset in self._offsets:
            module.rope_deltas = offset
        return copy.deepcopy(self._outputs)

    @contextlib.contextmanager
    def in_generate(self, model: nn.Module) -> Iterator[None]:
        """In the block, the model's first forward call is this pass; all others are the model's own."""
        own, first = model.forward, True

        @functools.wraps(own)
        def forward(*args: Any, **inputs: Any) -> Any:
            nonlocal first
            if not first:
                return own(*args, **inputs)
            first = False
            return self.of(model, own, *args, **inputs)

        before = model.__dict__.get("forward")
        model.forward = forward
        try:
            yield
        finally:
            if before is None:
                del model.forward
            else:
                model.forward = before


def _bytes_of(outputs: Any) -> int:
    """Bytes of all tensors of a model's outputs and of the cache in them."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[id(value)] = value.nbytes
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, list | tuple):
            for each in value:
                visit(each)
        elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | type):
            visit(vars(value))

    visit(dict(outputs))
    return sum(seen.values())
