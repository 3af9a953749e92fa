"""Pictures with a class dealt out and drawn into three parts, none of which shares a picture with another.

The parts are for fitting (`train`), for choosing (`validation`) and for reporting (`test`). What cannot be used is
refused by name and counted.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlm_mech.data.scenes import SPLITS
from vlm_mech.data.shared_pictures import pixel_hash
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike, load_image

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
"""How pictures without parts of their own are dealt out, within every class."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """A picture and the name of its class."""

    id: str
    image: ImageLike
    label: str


@dataclass(frozen=True)
class DrawnParts:
    """The pictures that are used by part, those met that cannot be, and how parts smaller than what there is arose."""

    parts: dict[str, tuple[Labelled, ...]]
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]


def deal(every: Iterable[Labelled], seed: int, shares: Mapping[str, float] = SHARES) -> dict[str, list[Labelled]]:
    """The pictures of each class dealt out over the parts in their shares, at least one each.

    Copies of one picture go to the same part, those of two classes too.

    Raises:
        UsageError: a class has fewer pictures that differ than there are parts.
    """
    by_class: dict[str, dict[str, list[Labelled]]] = {}
    for each in every:
        by_class.setdefault(each.label, {}).setdefault(_pixels(each), []).append(each)
    part_of: dict[str, str] = {}
    parts: dict[str, list[Labelled]] = {part: [] for part in shares}
    for label, copies in by_class.items():
        if len(copies) < len(shares):
            raise UsageError(
                f"class {label!r} has {len(copies)} picture(s) that differ; at least {len(shares)} are needed, "
                "one a part"
            )
        fresh = [pixels for pixels in copies if pixels not in part_of]
        mixed = random.Random(f"{seed}/{label}").sample(fresh, len(fresh))
        order = [*mixed, *(pixels for pixels in copies if pixels in part_of)]
        part_of |= _dealt(mixed, shares)
        for pixels in order:
            parts[part_of[pixels]] += copies[pixels]
    return parts


def _dealt(mixed: Sequence[str], shares: Mapping[str, float]) -> dict[str, str]:
    """A part for each, in their shares; the first part gets what the later ones leave, each of them one at least."""
    found, rest, later = {}, list(mixed), list(shares)[1:]
    for number, part in enumerate(later):
        wanted, spare = max(1, round(shares[part] * len(mixed))), len(rest) - (len(later) - number)
        size = max(0, min(wanted, spare))
        found |= dict.fromkeys(rest[:size], part)
        rest = rest[size:]
    return found | dict.fromkeys(rest, next(iter(shares)))


def _pixels(each: Labelled) -> str:
    try:
        return pixel_hash(each.image)
    except UsageError:
        return f"unreadable: {each.id}"


def draw_parts(
    name: str, parts: Mapping[str, Sequence[Labelled]], sizes: Mapping[str, int | None], seed: int
) -> DrawnParts:
    """As many pictures of each part as asked for, all where the size is None, classes in turn in an order drawn anew.

    A picture of the test part is no picture of another part, nor one of the validation part to train on: copies are
    refused there.

    Raises:
        UsageError: a part without a picture that can be used.
    """
    kept: dict[str, tuple[Labelled, ...]] = {}
    refused: dict[str, list[Refused]] = {part: [] for part in SPLITS}
    met: dict[str, tuple[str, str]] = {}
    for part in reversed(SPLITS):
        some = _in_turn(parts[part], random.Random(f"{seed}/{part}"))
        kept[part] = tuple(_usable(part, some, sizes[part], met, refused[part]))
        if not kept[part]:
            why = f": {refused[part][-1].reason}" if refused[part] else ""
            raise UsageError(f"the {part} part of {name} has no picture that can be used{why}")
    notes = [
        f"{part}: {len(kept[part])} of {len(parts[part])} pictures, drawn with seed {seed}, classes in turn"
        for part in SPLITS
        if sizes[part] is not None and len(kept[part]) < len(parts[part])
    ]
    return DrawnParts(kept, tuple(each for part in SPLITS for each in refused[part]), tuple(notes))


def _in_turn(some: Sequence[Labelled], rng: random.Random) -> Iterator[Labelled]:
    by_class: dict[str, list[Labelled]] = {}
    for each in rng.sample(list(some), len(some)):
        by_class.setdefault(each.label, []).append(each)
    while by_class:
        for label in list(by_class):
            yield by_class[label].pop()
            if not by_class[label]:
                del by_class[label]


def _usable(
    part: str, some: Iterable[Labelled], n: int | None, met: dict[str, tuple[str, str]], refused: list[Refused]
) -> Iterator[Labelled]:
    """The first n pictures that can be read and were not met in another part; those that fail go to `refused`.

    Args:
        met: part and id of each picture that is used, by its pixels; those yielded are added.
    """
    made = 0
    for each in some:
        if made == n:
            return
        try:
            opened = load_image(each.image)
        except UsageError as error:
            refused.append(Refused(each.id, str(error)))
            continue
        other, name = met.setdefault(pixel_hash(opened), (part, each.id))
        if other != part:
            refused.append(Refused(each.id, f"in {part}: it has the pixels of {name} in {other}"))
            continue
        made += 1
        # Files stay paths, so that a large data set need not fit into memory.
        in_memory = isinstance(each.image, Mapping) and each.image.get("bytes") is not None
        yield Labelled(each.id, opened if in_memory else each.image, each.label)
