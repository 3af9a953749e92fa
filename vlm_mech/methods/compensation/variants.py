"""Which attention edges of a part's patches are cut, in the vision tower, in the decoder, or in both.

After Takishita et al. (2025, arXiv 2506.05439), who ablate self-attention to ask whether the decoder makes up for what
the visual features lack. Which edges they cut, and at which layers, could not be found; the sets below are our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Each, Patches, Positions, Span, resolve
from vlm_mech.interventions.specification import Intervention, Knockout, Together

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Patch = tuple[int, int]
Tower = Literal["vision", "llm"]
ALL, THIRDS = "all", ("first", "middle", "last")
RANGES = (ALL, *THIRDS)


@dataclass(frozen=True)
class Places:
    """Patches (row, column) of the first view of the first image: of a part, its object, and as much background."""

    part: tuple[Patch, ...]
    object: tuple[Patch, ...]
    background: tuple[Patch, ...]


@dataclass(frozen=True)
class Variant:
    """What is cut in which towers; `cut` names the keys that the queries keep, lose, or see alone.

    `part`: the part's patches see nothing outside the part; `object`: nothing outside its object; `self`: nothing but
    themselves; `class`: all but the class token; `text`: image tokens see no text before them. With `background` the
    patches are as many of the background.
    """

    name: str
    towers: tuple[Tower, ...]
    cut: str
    background: bool = False


CUTS = ("part", "obj", "self")
"""The cuts that exist in both towers."""
NONE = Variant("none", (), "none")
BACKGROUND = " at background"
_PREFIXES: tuple[tuple[str, tuple[Tower, ...]], ...] = (("V", ("vision",)), ("L", ("llm",)), ("V+L", ("vision", "llm")))
VARIANTS = {
    each.name: each
    for each in (
        *(Variant(f"{prefix}-{cut}", towers, cut) for prefix, towers in _PREFIXES for cut in CUTS),
        Variant("V-cls", ("vision",), "cls"),
        Variant("L-text", ("llm",), "text"),
        *(
            Variant(f"{prefix}-{cut}{BACKGROUND}", towers, cut, background=True)
            for prefix, towers in _PREFIXES[:2]
            for cut in ("part", "self")
        ),
    )
}
"""Every variant by name; the last ones are controls, the same edges of background patches."""


def variants_of(vlm: "VLM", encoded: Encoded, names: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The variants of these names, or all that the model has: no V-cls without class token, no L-text without text.

    Raises:
        UsageError: a name that is unknown or named twice, or a variant that this model does not have.
    """
    lacking = {} if vlm.n_class_tokens else {"V-cls": "its tower has no class token"}
    if not _text_before(encoded, 0):
        lacking["L-text"] = "no text stands before its image tokens"
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"variant {name!r} is not known; use one of {', '.join(VARIANTS)}")
        if name in lacking:
            raise UsageError(f"variant {name} does not exist in {vlm.name}: {lacking[name]}")
    if len(set(names)) < len(names):
        raise UsageError(f"variant {next(name for name in names if names.count(name) > 1)} is named twice")
    return tuple(VARIANTS[name] for name in names or [each for each in VARIANTS if each not in lacking])


@dataclass(frozen=True)
class Layers:
    """The layers of both towers that are cut together, by the name of the range."""

    vision: tuple[int, ...]
    llm: tuple[int, ...]


def layer_ranges(vlm: "VLM", names: Sequence[str] = RANGES) -> dict[str, Layers]:
    """All layers, and thirds that partition them; of the tower only the blocks that the projector reads from count.

    Raises:
        UsageError: an unknown name, or a tower of fewer than three layers for a third.
    """
    unknown = [name for name in names if name not in RANGES]
    if unknown or not names:
        raise UsageError(f"layers {', '.join(unknown) or 'of no range'}: {', '.join(RANGES)} are known")
    towers = {"vision": range(vlm.vision_depth), "llm": vlm.llm_layers}
    short = [f"{tower} with {len(layers)}" for tower, layers in towers.items() if len(layers) < len(THIRDS)]
    if short and set(names) & set(THIRDS):
        raise UsageError(f"thirds need 3 layers, {vlm.name} has {' and '.join(short)}; ask for --layers all")
    found = {}
    for name in names:
        chosen = {tower: _range(layers, name) for tower, layers in towers.items()}
        found[name] = Layers(**chosen)
    return found


def _range(layers: range, name: str) -> tuple[int, ...]:
    if name == ALL:
        return tuple(layers)
    return tuple(np.array_split(np.arange(len(layers)), len(THIRDS))[THIRDS.index(name)].tolist())


def edit_of(encoded: Encoded, places: Sequence[Places], variant: Variant, layers: Layers) -> Intervention:
    """The knockouts of a variant on a batch, one for each tower.

    Args:
        encoded: prompts of equally many tokens, because decoder positions are named by number.
        places: the patches of each example.

    Raises:
        UsageError: prompts of unequal length, `none`, or tower patches that no image token is made from.
    """
    if len({len(row.present) for row in encoded.rows}) > 1:
        raise UsageError("the prompts have unequal numbers of tokens; batch those of equal length")
    if not variant.towers:
        raise UsageError("the variant 'none' edits nothing; run the model without an intervention")
    parts = [_knockout(encoded, places, variant, tower, getattr(layers, tower)) for tower in variant.towers]
    return parts[0] if len(parts) == 1 else Together(parts=tuple(parts))


def _knockout(
    encoded: Encoded, places: Sequence[Places], variant: Variant, tower: Tower, layers: tuple[int, ...]
) -> Knockout:
    if variant.cut == "text":
        before = tuple(Positions(_text_before(encoded, example)) for example in range(len(encoded)))
        return Knockout("image", Each(before), layers, stream=tower)
    chosen = [place.background if variant.background else place.part for place in places]
    query = Each(tuple(Patches(cells) for cells in chosen))
    if variant.cut == "cls":
        return Knockout(query, "class", layers, stream=tower)
    if variant.cut == "self":
        return Knockout(query, "all" if tower == "vision" else "image", layers, stream=tower, keep_self=True)
    seen = [place.object for place in places] if variant.cut == "obj" else chosen
    outside = _outside_in_tower if tower == "vision" else _outside_in_prompt
    return Knockout(query, Each(tuple(outside(encoded, *each) for each in enumerate(seen))), layers, stream=tower)


def _outside_in_tower(encoded: Encoded, example: int, cells: tuple[Patch, ...]) -> Span:
    """Every patch of the image but these, and its class token: that token looks at the whole image."""
    views = encoded.rows[example].images[0].layout.views
    spans: list[Span] = ["class"] if encoded.vlm.n_class_tokens else []
    for number, view in enumerate(views):
        left = tuple(cell for cell in np.ndindex(*view.grid) if number or cell not in cells)
        spans += [Patches(left, view=number)] if left else []
    row = encoded.rows[example]
    named = resolve(row, (*spans, Patches(cells)), "vision", example)
    if named != resolve(row, "all", "vision", example):
        raise UsageError(f"the tower of {encoded.vlm.name} has patches that no image token of example {example} shows")
    return tuple(spans)


def _outside_in_prompt(encoded: Encoded, example: int, cells: tuple[Patch, ...]) -> Span:
    inside = set(encoded.positions(Patches(cells), example))
    return Positions(tuple(position for position in encoded.rows[example].image if position not in inside))


def _text_before(encoded: Encoded, example: int) -> tuple[int, ...]:
    """Positions of everything but image tokens before the last of them."""
    row = encoded.rows[example]
    image = set(row.image)
    return tuple(position for position in row.present if position < max(image) and position not in image)
