"""Clock and memory: contenders in random interleaved order, several times, and whether they computed the same."""

import ctypes
import gc
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vlm_mech.errors import UsageError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference, relative to the largest value of ours, that counts as the same."""
MIB = 2**20


@runtime_checkable
class Contender(Protocol):
    """One way to compute cells: `begin` is done once, `answers` for as many cells as are asked for."""

    name: str

    def begin(self, task: Any) -> Any:
        """What is needed once whatever the number of cells."""
        ...

    def answers(self, task: Any, begun: Any, numbers: Sequence[int]) -> Any:
        """What the cells with these numbers give."""
        ...


@dataclass(frozen=True)
class Timed:
    """One measurement: seconds for all cells, peak memory above what was held before, in MiB (NaN if unknown)."""

    seconds: float
    memory: float
    answer: Any


@dataclass(frozen=True, eq=False)
class Entry:
    """A contender with the cells that it runs, and how many of these its time stands for."""

    contender: Contender
    numbers: tuple[int, ...]
    n_cells: int


def subset(n_cells: int, size: int, seed: int) -> tuple[int, ...]:
    """Numbers of a random part of the cells, in order; all of them if there are no more than `size`.

    Raises:
        UsageError: the size is not above zero.
    """
    if size < 1:
        raise UsageError(f"rivals need at least one cell, not {size}")
    return tuple(sorted(random.Random(seed).sample(range(n_cells), min(size, n_cells))))


def clock(entry: Entry, task: Any, device: torch.device) -> Timed:
    """One measurement of time; that of a part of the cells is scaled by their count, that of `begin` is not.

    With a single thread on a CPU the process's own time counts, so that waiting for other processes does not.
    """
    gc.collect()
    _wait(device)
    now = time.perf_counter if device.type == "cuda" or torch.get_num_threads() > 1 else time.process_time
    started = now()
    begun = entry.contender.begin(task)
    _wait(device)
    ready = now()
    answer = entry.contender.answers(task, begun, entry.numbers)
    _wait(device)
    ended = now()
    seconds = (ready - started) + (ended - ready) * entry.n_cells / len(entry.numbers)
    return Timed(seconds, float("nan"), answer)


def weigh(entry: Entry, task: Any, device: torch.device) -> float:
    """Peak memory of one run above what was held before, in MiB.

    It takes a run of its own: giving freed memory back first, so that the peak can be seen, makes every page of it new,
    and that would cost time.
    """
    gc.collect()
    before = _reset(device)
    entry.contender.answers(task, entry.contender.begin(task), entry.numbers)
    _wait(device)
    return (_peak(device) - before) / MIB


def interleaved(
    entries: Sequence[Entry], task: Any, *, repeats: int, seed: int, device: torch.device
) -> list[dict[str, Timed]]:
    """Every contender once in each repeat, in an order drawn anew, after an untimed run each that is weighed.

    Raises:
        UsageError: there is no repeat.
    """
    if repeats < 1:
        raise UsageError(f"at least one repeat is needed, not {repeats}")
    peaks = [weigh(entry, task, device) for entry in entries]
    generator, done = random.Random(seed), []
    gc.collect()
    # What is there already needs no looking through while the clock runs.
    gc.freeze()
    try:
        for _ in range(repeats):
            order = generator.sample(range(len(entries)), len(entries))
            measured = {number: replace(clock(entries[number], task, device), memory=peaks[number]) for number in order}
            done.append({entry.contender.name: measured[number] for number, entry in enumerate(entries)})
    finally:
        gc.unfreeze()
    return done


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value of ours."""
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def machine() -> dict[str, Any]:
    """What the times were taken on; `load` is the average load of the last minute."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {"accelerator": accelerator, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return facts | {"load": round(os.getloadavg()[0], 2)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset(device: torch.device) -> float:
    """Bytes held now, the peak counted from here on; on Linux what was freed is given back first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    if sys.platform != "linux":
        return float("nan")
    # Memory that the allocator keeps would hide that the next contender needs it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") if sys.platform == "linux" else float("nan")


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) * 1024
