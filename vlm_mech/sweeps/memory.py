"""How much memory there is, and how much a piece of work took at its peak."""

import contextlib
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_mech.errors import UsageError

UNITS = {"B": 1} | {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
SHARE = 0.8
"""Share of the free memory that a sweep may take when no budget is given."""


def parse_bytes(text: str | int) -> int:
    """The number of bytes in a text such as `2GiB`, `800MB` or `123456`.

    Raises:
        UsageError: no number, or an unknown unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = (found.group(2) or "B") if found else ""
    if found is None or unit not in UNITS or float(found.group(1)) == 0:
        raise UsageError(f"{text!r} is not an amount of memory; write 2GiB, 800MiB or a number of bytes")
    return int(float(found.group(1)) * UNITS[unit])


def readable(n_bytes: float) -> str:
    """A number of bytes as people read it."""
    for power, letter in reversed(list(enumerate("KMGT", 1))):
        if n_bytes >= 1024**power:
            return f"{n_bytes / 1024**power:.3g} {letter}iB"
    return f"{n_bytes:.0f} B"


def default_budget(device: torch.device) -> int:
    """What a sweep may take when nothing is said: half of the memory, or most of what is free if that is less."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        import psutil

        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return min(total // 2, int(SHARE * free))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@dataclass(eq=False)
class Peak:
    """The most memory that tensors made in a block held at one time, in bytes; of several devices that of the fullest.

    `by_device` has each device's own, by its name.
    """

    bytes: int = 0
    by_device: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def peak_memory(*devices: torch.device) -> Iterator[Peak]:
    """Measures the peak of the tensors made within the block on some GPUs or on the CPU; what was there before does
    not count.

    On a GPU the allocator keeps count. On a CPU every operation's output is followed until it is freed, which slows the
    work and leaves out what a single operation needs inside.
    """
    peak = Peak()
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        with _Followed(peak):
            yield peak
        peak.by_device = {str(device): peak.bytes for device in devices}
        return
    before = {}
    for device in gpus:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    yield peak
    for device in gpus:
        torch.cuda.synchronize(device)
        peak.by_device[str(device)] = torch.cuda.max_memory_allocated(device) - before[device]
    peak.bytes = max(peak.by_device.values())


@dataclass(eq=False)
class _Followed(TorchDispatchMode):
    """Counts the storages that operations make while they live."""

    peak: Peak
    live: int = 0
    known: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak.bytes = max(self.peak.bytes, self.live)
        return out

    def _freed(self, key: int, n_bytes: int) -> None:
        self.known.discard(key)
        self.live -= n_bytes
