"""Floating point operations of a piece of work, as torch counts them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


def counted(vlm: "VLM", work: Callable[[], object]) -> int:
    """Operations of what is run: of matrix products and convolutions, in attention over all pairs of positions."""
    # How logits are read out is found once, in a pass of its own.
    vlm.readout  # noqa: B018
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        work()
    return counter.get_total_flops()


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of the kernel that torch runs on a CPU, which it does not count itself."""
    return sdpa_flop_count(query, key, value)
