"""Pictures with a class dealt out and drawn into three parts, none of which shares a picture with another.

The parts are for fitting (`train`), for choosing (`validation`) and for reporting (`test`). What cannot be used is
refused by name and counted.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlm_mech.data.scenes import SPLITS
from vlm_mech.data.shared_pictures import pixel_hash
from vlm_mech.data.user_files import Refused, fewer_than_asked
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


def deal(
    every: Sequence[Labelled], seed: int, shares: Mapping[str, float] = SHARES
) -> tuple[dict[str, list[Labelled]], list[Refused]]:
    """The pictures of each class dealt out over the parts in their shares, at least one each, and those left out.

    Copies of one picture go to the same part. Left out are those that cannot be read, or are in two classes.

    Raises:
        UsageError: a class has fewer usable pictures that differ than there are parts.
    """
    by_pixels, refused = _by_pixels(every)
    by_class: dict[str, list[str]] = {each.label: [] for each in every}
    for pixels, copies in by_pixels.items():
        if other := next((each for each in copies if each.label != copies[0].label), None):
            refused += [_ambiguous(each, other if each.label == copies[0].label else copies[0]) for each in copies]
        else:
            by_class[copies[0].label].append(pixels)
    parts: dict[str, list[Labelled]] = {part: [] for part in shares}
    for label, found in by_class.items():
        if len(found) < len(shares):
            why = f" (left out: {refused[0].id}, {refused[0].reason})" if refused else ""
            raise UsageError(
                f"class {label!r} has {len(found)} image(s) that differ and can be used; at least {len(shares)} are "
                f"needed, one a part{why}"
            )
        mixed = random.Random(f"{seed}/{label}").sample(found, len(found))
        part_of = _dealt(mixed, shares)
        for pixels in mixed:
            parts[part_of[pixels]] += by_pixels[pixels]
    return parts, refused


def _by_pixels(every: Iterable[Labelled]) -> tuple[dict[str, list[Labelled]], list[Refused]]:
    """The pictures that can be read by their pixels, and the others."""
    found: dict[str, list[Labelled]] = {}
    refused = []
    for each in every:
        try:
            found.setdefault(pixel_hash(each.image), []).append(each)
        except UsageError as error:
            refused.append(Refused(each.id, str(error)))
    return found, refused


def _ambiguous(each: Labelled, other: Labelled) -> Refused:
    return Refused(each.id, f"it has the pixels of {other.id}, which is of class {other.label!r}")


def _dealt(mixed: Sequence[str], shares: Mapping[str, float]) -> dict[str, str]:
    """A part for each, in their shares; the first part gets what the later ones leave, each of them one at least."""
    found, rest, later = {}, list(mixed), list(shares)[1:]
    for number, part in enumerate(later):
        wanted, spare = max(1, round(shares[part] * len(mixed))), len(rest) - (len(later) - number)
        size = max(0, min(wanted, spare))
        found |= dict.fromkeys(rest[:size], part)
        rest = rest[size:]
    return found | dict.fromkeys(rest, next(iter(shares)))


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
    met: dict[str, _Met] = {}
    for part in reversed(SPLITS):
        some = _in_turn(parts[part], random.Random(f"{seed}/{part}"))
        kept[part] = tuple(_usable(part, some, sizes[part], met, refused[part]))
    for found in met.values():
        if found.other is not None:
            kept[found.part] = tuple(each for each in kept[found.part] if each.id != found.first.id)
            refused[found.part].append(_ambiguous(found.first, found.other))
    for part in SPLITS:
        if not kept[part]:
            why = f": {refused[part][-1].reason}" if refused[part] else ""
            raise UsageError(f"the {part} part of {name} has no image that can be used{why}")
    notes = [*_without_class(name, parts, kept, sizes)]
    notes += [
        f"{part}: {len(kept[part])} of {len(parts[part])} images, drawn with seed {seed}, classes in turn"
        for part in SPLITS
        if sizes[part] is not None and len(kept[part]) < len(parts[part])
    ]
    for part in SPLITS:
        notes += fewer_than_asked(sizes[part], len(kept[part]), len(parts[part]), f"{part} pictures")
    return DrawnParts(kept, tuple(each for part in SPLITS for each in refused[part]), tuple(notes))


def _without_class(
    name: str,
    parts: Mapping[str, Sequence[Labelled]],
    kept: Mapping[str, Sequence[Labelled]],
    sizes: Mapping[str, int | None],
) -> Iterator[str]:
    """What is told of classes none of whose pictures in the validation part can be used.

    Raises:
        UsageError: there is such a class in another part.
    """
    for part in SPLITS:
        used = {each.label for each in kept[part]}
        wanted = {each.label for each in parts[part]}
        size = sizes[part]
        lacking = sorted(wanted - used) if size is None or len(kept[part]) < size else []
        if lacking and part != "validation":
            raise UsageError(f"no image of class {lacking[0]!r} in the {part} part of {name} can be used")
        if lacking:
            yield f"{part}: no image of {', '.join(lacking)} can be used"


def _in_turn(some: Sequence[Labelled], rng: random.Random) -> Iterator[Labelled]:
    by_class: dict[str, list[Labelled]] = {}
    for each in rng.sample(list(some), len(some)):
        by_class.setdefault(each.label, []).append(each)
    while by_class:
        for label in list(by_class):
            yield by_class[label].pop()
            if not by_class[label]:
                del by_class[label]


@dataclass
class _Met:
    """Where a picture was met first, and one of the same pixels in another class."""

    part: str
    first: Labelled
    other: Labelled | None = None


def _usable(
    part: str, some: Iterable[Labelled], n: int | None, met: dict[str, _Met], refused: list[Refused]
) -> Iterator[Labelled]:
    """The first n pictures that can be read and were not met in another part or class; the others go to `refused`.

    Args:
        met: each picture that is used, by its pixels; those yielded are added.
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
        found = met.setdefault(pixel_hash(opened), _Met(part, each))
        if found.first.label != each.label:
            found.other = each
            refused.append(_ambiguous(each, found.first))
            continue
        if found.part != part:
            refused.append(Refused(each.id, f"in {part}: it has the pixels of {found.first.id} in {found.part}"))
            continue
        made += 1
        # Files stay paths, so that a large data set need not fit into memory.
        in_memory = isinstance(each.image, Mapping) and each.image.get("bytes") is not None
        yield Labelled(each.id, opened if in_memory else each.image, each.label)
