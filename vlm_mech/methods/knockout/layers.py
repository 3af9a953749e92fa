"""Which layers a knockout cuts together: windows around each, groups that partition the model, or all."""

from dataclasses import dataclass

import numpy as np

from vlm_mech.errors import UsageError
from vlm_mech.interventions.specification import window

PAPER_WINDOW = 9
MANY_LAYERS = 27
"""From this many layers on the paper's window is at most a third of the model."""
EVERY = 3
"""Of such windows every third is cut where nothing else is asked: two thirds of each are in the one before it."""


@dataclass(frozen=True)
class Layers:
    """Which layers are cut together: for each value of the axis `layer` its layers; `about` says it in words."""

    sets: dict[int | str, tuple[int, ...]]
    about: str
    where: str


def layer_sets(n_layers: int, layers: str, size: int | None = None) -> Layers:
    """The layers that are cut together.

    Args:
        layers: `each` for a window around every layer, `every:K` for one around every K-th (the middle one of each run
            of K layers), `groups:K` for K runs of layers that partition the model (their sizes differ by one at most),
            `all` for all at once.
        size: of the windows of `each` and `every:K`. By default 9, as in Zhang et al., in a model of 27 layers or more,
            otherwise 1: nine layers of six are the whole model. Windows are clipped at the borders.

    Raises:
        UsageError: another word, more groups than layers, or a size for what has no windows.
    """
    kind, _, count = layers.partition(":")
    if kind not in ("each", "every") and size is not None:
        raise UsageError(f"layers {layers!r} have no windows; a window's size goes with layers 'each' or 'every:K'")
    if layers == "all":
        return Layers({f"0-{n_layers - 1}": tuple(range(n_layers))}, f"all {n_layers} layers are cut at once.", "in")
    if kind == "groups" and count.isdigit():
        return _groups(n_layers, int(count))
    if layers != "each" and not (kind == "every" and count.isdigit()):
        raise UsageError(f"layers {layers!r} is not known; each, every:K, all or groups:K is")
    centres = _centres(n_layers, int(count or 1))
    chosen = size or (PAPER_WINDOW if n_layers >= MANY_LAYERS else 1)
    if size is not None and size < 1:
        raise UsageError(f"a window of {size} layers is none; 1 or more is needed")
    sets: dict[int | str, tuple[int, ...]] = {layer: window(layer, chosen, n_layers=n_layers) for layer in centres}
    each = "each" if kind == "each" else f"every {_ordinal(int(count))} layer"
    if chosen == 1:
        about = "layers are cut one at a time." if kind == "each" else f"{each} is cut, one at a time."
        return Layers(sets, about, "at")
    n_clipped = sum(len(each) < chosen for each in sets.values())
    about = f"{chosen} layers around {each} are cut; at the borders {n_clipped} of {len(sets)} windows are clipped."
    return Layers(sets, about, "around")


def usual_layers(n_layers: int, size: int | None) -> str:
    """Which layers a command cuts where none are named: windows of 9 around every third, single layers each."""
    return f"every:{EVERY}" if n_layers >= MANY_LAYERS and size in (None, PAPER_WINDOW) else "each"


def _centres(n_layers: int, step: int) -> range:
    if not 1 <= step <= n_layers:
        raise UsageError(f"'every:{step}' of {n_layers} layers is none; every:1 to every:{n_layers} are possible")
    return range((step - 1) // 2, n_layers, step)


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _groups(n_layers: int, count: int) -> Layers:
    if not 1 <= count <= n_layers:
        raise UsageError(f"{n_layers} layers cannot be parted into {count} groups; 1 to {n_layers} are possible")
    parts = [tuple(part.tolist()) for part in np.array_split(np.arange(n_layers), count)]
    sets: dict[int | str, tuple[int, ...]] = {f"{part[0]}-{part[-1]}": part for part in parts}
    return Layers(sets, f"the {n_layers} layers are cut in {count} groups, each layer in one of them.", "in")
