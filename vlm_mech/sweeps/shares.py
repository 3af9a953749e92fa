"""Which device of a model holds what: each has a budget of memory of its own, and a peak of its own in a plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.weights import device_of
from vlm_mech.sweeps.memory import default_budget, parse_bytes

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

PerDevice = Int[np.ndarray, "device"]
Bytes = int | PerDevice
"""Bytes on each device of a model: one number that holds for each, or one each."""


@dataclass(frozen=True, eq=False)
class Shares:
    """What each device of a model has of it.

    `layers` and `tower` are numbers of its blocks of decoder and tower. Of the others one device is 1 and all others
    are 0: where `inputs` are embedded and logits kept, where the `projector` is, where the decoder's last block gives
    its `final` states, and where the `head` makes logits of them.
    """

    devices: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]
    tower: tuple[tuple[int, ...], ...]
    inputs: PerDevice
    projector: PerDevice
    final: PerDevice
    head: PerDevice

    @property
    def n_layers(self) -> PerDevice:
        """Blocks of the decoder."""
        return np.array([len(each) for each in self.layers])

    @property
    def n_tower(self) -> PerDevice:
        """Blocks of the tower."""
        return np.array([len(each) for each in self.tower])

    @property
    def decodes(self) -> PerDevice:
        """1 where there are blocks of the decoder, else 0."""
        return np.minimum(self.n_layers, 1)

    @property
    def sees(self) -> PerDevice:
        """1 where there is a part of tower or projector, else 0."""
        return np.minimum(self.n_tower + self.projector, 1)

    def at(self, site: Site) -> PerDevice:
        """1 on the device where the states of a site lie, else 0."""
        if site.layer is None:
            return self.projector
        return np.array([int(site.layer in each) for each in (self.layers if site.stream == "llm" else self.tower)])

    def entered(self, entries: Sequence[int]) -> PerDevice:
        """How many versions that enter the decoder before these blocks are on a device, all of them on the last one."""
        last = [max(each, default=-1) for each in self.layers]
        return np.where(self.final, len(entries), [sum(entry <= layer for entry in entries) for layer in last])

    def of(self, tensors: Sequence[torch.Tensor]) -> PerDevice:
        """Bytes of some tensors by device."""
        found = [0] * len(self.devices)
        for each in tensors:
            found[self.devices.index(str(each.device))] += each.nbytes
        return np.array(found)


def block_devices(vlm: "VLM", stream: str) -> tuple[torch.device, ...]:
    """Where each block of a stream computes; a device map may spread them."""
    return tuple(map(device_of, vlm.model.get_submodule(vlm.blocks(stream).path).children()))


def devices_of(vlm: "VLM") -> list[torch.device]:
    """All devices on which parts of a model compute, that of its inputs first."""
    parts = [device_of(vlm.model.get_submodule(path)) for path in (vlm.family.projector, vlm.family.head)]
    return list(dict.fromkeys([vlm.device, *block_devices(vlm, "vision"), *block_devices(vlm, "llm"), *parts]))


def shares_of(vlm: "VLM") -> Shares:
    """What each device of a model has of it."""
    devices, llm, vision = devices_of(vlm), block_devices(vlm, "llm"), block_devices(vlm, "vision")
    projector, head = (device_of(vlm.model.get_submodule(path)) for path in (vlm.family.projector, vlm.family.head))
    one = {"inputs": vlm.device, "projector": projector, "final": llm[-1], "head": head}
    layers, tower = (
        tuple(tuple(number for number, own in enumerate(blocks) if own == device) for device in devices)
        for blocks in (llm, vision)
    )
    marks = {name: np.array([int(device == own) for device in devices]) for name, own in one.items()}
    return Shares(tuple(map(str, devices)), layers, tower, **marks)


def budget_of(vlm: "VLM", memory: int | str | None) -> Bytes:
    """A budget in bytes for each device from what a user says; the default of each where that is nothing."""
    if memory is not None:
        return parse_bytes(memory)
    budgets = [default_budget(device) for device in devices_of(vlm)]
    return budgets[0] if len(budgets) == 1 else np.array(budgets)
