"""Which axis of a table goes where in a figure that nobody has laid out: across, down, in panels."""

from dataclasses import dataclass

import pandas as pd

from vlm_mech.errors import UsageError

MOST_PANELS = 4


@dataclass(frozen=True)
class Roles:
    """An axis across; one down where it is a heat map, none where it is a line; one in panels where there are three."""

    x: str
    y: str | None = None
    facet: str | None = None


def roles_of(cells: pd.DataFrame) -> Roles:
    """Roles of the axes that take several values: of one a line, of two a heat map, of three panels of heat maps.

    Numbers go across, the longest axis of them first; names go down; the shortest axis goes into panels.

    Args:
        cells: the combinations of the axes, a column each.

    Raises:
        UsageError: more than three axes take several values, or the shortest of three too many for panels.
    """
    sizes = {axis: int(cells[axis].nunique()) for axis in map(str, cells.columns)}
    varied = [axis for axis, size in sizes.items() if size > 1]
    if not varied:
        return Roles(str(cells.columns[-1]))
    numbers = [axis for axis in varied if cells[axis].dtype.kind in "iuf"]
    facet = None
    if len(varied) > 2:
        facet = min(varied, key=lambda axis: (axis in numbers, sizes[axis]))
        if len(varied) > 3 or sizes[facet] > MOST_PANELS:
            told = ", ".join(f"{axis} ({sizes[axis]})" for axis in varied)
            raise UsageError(
                f"the axes {told} take several values, which is too much for one figure; where= chooses some, as in "
                f"plot(where={{{varied[0]!r}: {cells[varied[0]].tolist()[0]!r}}})"
            )
    left = [axis for axis in varied if axis != facet]
    across = [axis for axis in left if axis in numbers] or left
    # Of layer and head the heads go across, as the last axis of a grid changes fastest.
    x = across[-1]
    return Roles(x, next((axis for axis in left if axis != x), None), facet)
