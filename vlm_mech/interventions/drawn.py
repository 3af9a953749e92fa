"""An intervention on a picture of the stack, for notebooks: which blocks of which stream it edits, and where there."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_mech.inputs.as_html import escaped, tabled

SIDE, GAP = 9, 2
"""Pixels of a block's square, and between two."""
EDITED, FREE = "#d55e00", "#e4e4e4"
FEW = 12
"""Blocks that are drawn at least."""


@dataclass(frozen=True)
class Edited:
    """One part of an intervention: its kind, the stream, the blocks (none: no block), and where in them in words."""

    kind: str
    stream: str
    layers: tuple[int, ...]
    where: str
    open_end: bool = False
    """Whether all blocks after these are edited too."""


def drawn(parts: Sequence[Edited]) -> str:
    """A row a part: what is done, in which blocks (filled squares), and where in them.

    How many blocks the model has is not known here: squares end soon after the last edited one.
    """
    n = max(FEW, *(max(part.layers, default=0) + 3 for part in parts)) if parts else FEW
    rows = [(escaped(part.kind), escaped(part.stream), _strip(part, n), escaped(part.where)) for part in parts]
    return tabled(("intervention", "stream", "blocks, from 0", "where"), rows)


def _strip(part: Edited, n: int) -> str:
    if not part.layers:
        return "no block"
    filled = {*part.layers} | ({*range(min(part.layers), n)} if part.open_end else set())
    squares = "".join(
        f"<rect x='{number * (SIDE + GAP)}' y='0' width='{SIDE}' height='{SIDE}' "
        f"fill='{EDITED if number in filled else FREE}'><title>block {number}</title></rect>"
        for number in range(n)
    )
    listed = _listed(part.layers) + (" and later" if part.open_end else "")
    label = f"role='img' aria-label='{part.stream} blocks {listed}'"
    width = n * (SIDE + GAP)
    return f"<svg {label} width='{width}' height='{SIDE}'>{squares}</svg> ... <small>{listed}</small>"


def _listed(layers: Sequence[int]) -> str:
    """Numbers, runs of them by their ends: `0, 3 to 5`."""
    runs: list[list[int]] = []
    for layer in sorted({*layers}):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
