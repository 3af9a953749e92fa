"""Which decoder blocks are exchanged together: from a layer on, up to it, alone, or in a window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm_mech.errors import UsageError
from vlm_mech.interventions.specification import window

Schedule = Literal["suffix", "prefix", "single", "window"]


@dataclass(frozen=True)
class Exchange:
    """Layers whose blocks (or parts) come from elsewhere; `layer` is where it stands on the axis of its schedule."""

    schedule: str
    layer: int
    layers: tuple[int, ...]


def exchanges(schedule: str, n_layers: int, *, size: int = 3) -> list[Exchange]:
    """All exchanges of a schedule, one a layer.

    `suffix` takes the layers from `layer` on, `prefix` those up to and with it, `single` this one alone, `window` those
    around it (`size` of them, fewer at the borders).

    Raises:
        UsageError: there is no such schedule.
    """
    ranges: dict[str, Callable[[int], Sequence[int]]] = {
        "suffix": lambda layer: range(layer, n_layers),
        "prefix": lambda layer: range(layer + 1),
        "single": lambda layer: (layer,),
        "window": lambda layer: window(layer, size, n_layers=n_layers),
    }
    if schedule not in ranges:
        raise UsageError(f"schedule {schedule!r} is not known; use one of {', '.join(ranges)}")
    return [Exchange(schedule, layer, tuple(ranges[schedule](layer))) for layer in range(n_layers)]
