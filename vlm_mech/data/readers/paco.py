"""PACO (Ramanathan et al. 2023): objects of COCO's pictures with masks of their parts, in COCO's JSON.

An annotation whose `obj_ann_id` is another one's id is a part of that object; an object has its own id there. Names of
categories of parts are taken to end in the part after a colon, as in `bottle:cap`.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_mech.data.readers.format import Collector, Format, ReaderOptions, Table, unlike_stems
from vlm_mech.data.readers.parts import ShownObject, in_words, keep_parts
from vlm_mech.data.readers.stored_masks import CocoMask
from vlm_mech.data.text_files import opened_text
from vlm_mech.data.user_files import Rows, written
from vlm_mech.errors import UsageError

LISTS = ("images", "annotations", "categories")


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; segmentations are decoded when they are needed.

    Raises:
        UsageError: a file that cannot be read, or is no JSON of COCO.
    """
    found, stems, objects = Collector(), unlike_stems(tables), list[ShownObject]()
    for table in tables:
        objects += _objects(table, found, f"{stems[table.path]}/" if len(tables) > 1 else "")
    keep_parts(found, objects, options.seed)
    return found.found


def _objects(table: Table, found: Collector, before: str) -> Iterator[ShownObject]:
    try:
        with opened_text(table.path) as file:
            told = json.loads(file.read().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"file {str(table.path)!r} cannot be read: {error}") from error
    if not isinstance(told, dict) or not all(isinstance(told.get(name), list) for name in LISTS):
        raise UsageError(f"{table.name}: lists {', '.join(LISTS)} are needed, as in COCO")
    images, known, kinds = (_by_id(table, name, told[name]) for name in LISTS)
    parts = dict[Any, dict[str, list[dict[str, Any]]]]()
    for number, each in known.items():
        of = each.get("obj_ann_id", number)
        if of == number:
            continue
        try:
            kind = _category(kinds, each)
            if of not in known:
                raise UsageError(f"its object, annotation {of}, is missing")
            parts.setdefault(of, {}).setdefault(in_words(kind.rpartition(":")[2]), []).append(each)
        except UsageError as error:
            found.refuse(f"{before}{number}", f"{table.name} annotation {number}: {error}")
    for number, some in parts.items():
        place = f"{table.name} annotation {number}"
        try:
            yield _object(table, place, f"{before}{number}", images, kinds, known[number], some)
        except UsageError as error:
            for part in some:
                found.refuse(f"{before}{number}/{part}", f"{place}: {error}")


def _object(
    table: Table,
    place: str,
    name: str,
    images: dict[Any, dict[str, Any]],
    kinds: dict[Any, dict[str, Any]],
    given: dict[str, Any],
    parts: dict[str, list[dict[str, Any]]],
) -> ShownObject:
    shown = images.get(given.get("image_id"))
    if shown is None:
        raise UsageError(f"its image {given.get('image_id')!r:.40} is missing")
    size = shown.get("height"), shown.get("width")
    if not all(isinstance(each, int) and each > 0 for each in size):
        raise UsageError(f"height and width of its image are {size!r:.40}; numbers of pixels are needed")

    def mask(some: Sequence[dict[str, Any]]) -> CocoMask:
        lacking = [each for each in some if not isinstance(each.get("segmentation"), list | dict)]
        if lacking or any(each.get("image_id") != given["image_id"] for each in some):
            raise UsageError("it or a part of it has no segmentation, or lies in another image")
        return CocoMask(tuple(each["segmentation"] for each in some), *size, place)  # pyright: ignore

    picture = _picture(table, str(shown.get("file_name") or shown.get("coco_url", "")))
    kind = in_words(_category(kinds, given))
    masks = {part: mask(some) for part, some in parts.items()}
    return ShownObject(name, place, picture, table.group_of(picture), kind, mask([given]), masks)


def _picture(table: Table, name: str) -> Any:
    """The picture by its path, or by its name alone in COCO's folders."""
    found = table.picture(name, "train2017", "val2017")
    bare = table.picture(name.rpartition("/")[2], "train2017", "val2017")
    return found if not isinstance(found, str) or isinstance(bare, str) else bare


def _category(kinds: dict[Any, dict[str, Any]], given: dict[str, Any]) -> str:
    name = kinds.get(given.get("category_id"), {}).get("name")
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"its category {given.get('category_id')!r:.40} has no name")
    return name.strip()


def _by_id(table: Table, name: str, given: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    found = dict[Any, dict[str, Any]]()
    for at, each in enumerate(given):
        number = each.get("id") if isinstance(each, dict) else None
        if written(number) is None:
            raise UsageError(f"{table.name}: number {at} of {name} has no id")
        if number in found:
            raise UsageError(f"{table.name}: the id {number} occurs twice in {name}")
        found[number] = each
    return found


def _fits(table: Table) -> bool:
    """Whether it has the official name, or its first annotation says of which object it is a part."""
    first = table.first.get("annotations")
    one = first[0] if isinstance(first, list) and first else None
    return table.path.name.lower().startswith("paco") or (isinstance(one, dict) and "obj_ann_id" in one)


FORMAT = Format(
    name="paco",
    holds="items",
    columns=LISTS,
    rows=rows,
    layout="`paco_lvis_v1_{train,val,test}.json` as COCO's: `annotations` with `id`, `category_id`, `image_id`, "
    "`segmentation` (polygons or run lengths), `obj_ann_id` (of a part, its object); pictures in `train2017/` or "
    "`val2017/`",
    becomes="one item for each part of each object, with both masks (for `compensation`); several annotations of one "
    "part are one; question and options are ours, the other option a part that is not shown",
    fits=_fits,
)
