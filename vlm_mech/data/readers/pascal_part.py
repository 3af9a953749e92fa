"""Pascal-Part (Chen et al. 2014): objects of VOC 2010 with masks of their parts, a file of MATLAB for each picture.

Parts of both sides, and those that are counted (`wheel_1`), are one part here, and abbreviations are spelt out, so
that a part's name is a word: `lfleg` and `rbleg` are both a leg. How they are spelt out is ours; names that are not
known stay as they are, and are told.
"""

import re
from collections.abc import Iterator, Sequence

from vlm_mech.data.readers.format import Collector, Format, ReaderOptions, Table
from vlm_mech.data.readers.mat_files import annotated, parts_of
from vlm_mech.data.readers.parts import ShownObject, keep_parts
from vlm_mech.data.readers.stored_masks import MatMask
from vlm_mech.data.user_files import Rows
from vlm_mech.errors import UsageError

SIDED = re.compile(r"[lr]?[fb]?[ul]?(eye|ear|ebrow|wing|leg|foot|pa|horn|ho|arm|hand|wheel)")
"""Left or right, front or back, upper or lower."""
SPELT = {
    "ebrow": "eyebrow", "pa": "paw", "ho": "hoof", "fliplate": "license plate", "bliplate": "license plate",
    "leftmirror": "mirror", "rightmirror": "mirror", "frontside": "front", "backside": "back", "leftside": "side",
    "rightside": "side", "roofside": "roof", "hfrontside": "front", "hbackside": "back", "hleftside": "side",
    "hrightside": "side", "hroofside": "roof", "cfrontside": "front", "cbackside": "back", "cleftside": "side",
    "crightside": "side", "croofside": "roof", "chainwheel": "chain wheel",
}  # fmt: skip
PLAIN = (
    "body stern tail engine saddle handlebar headlight head beak torso neck cap door window muzzle nose mouth hair pot "
    "plant coach screen"
).split()
KINDS = {"pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "monitor"}
PICTURES = ("JPEGImages", "VOC2010/JPEGImages", "VOCdevkit/VOC2010/JPEGImages")


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; every file is opened once for the names of its parts, and again for the masks that are needed."""
    found, objects, unknown = Collector(), list[ShownObject](), set[str]()
    for table in tables:
        objects += _objects(table, found, f"{table.name}/" if len(tables) > 1 else "", unknown)
    keep_parts(found, objects, options.seed)
    if unknown:
        found.note(f"names of parts that are not known stay as they are: {', '.join(sorted(unknown)):.200}")
    return found.found


def _objects(table: Table, found: Collector, before: str, unknown: set[str]) -> Iterator[ShownObject]:
    for path in sorted(table.path.glob("*.mat")):
        try:
            things = annotated(path)
        except UsageError as error:
            found.refuse(f"{before}{path.stem}", error)
            continue
        picture = table.picture(f"{path.stem}.jpg", *PICTURES)
        for number, thing in enumerate(things):
            name, parts = f"{before}{path.stem}/{number}", dict[str, list[int]]()
            for at, part in enumerate(parts_of(thing)):
                parts.setdefault(part_word(str(part.part_name), unknown), []).append(at)
            masks = {word: MatMask(path, number, tuple(some)) for word, some in parts.items()}
            kind = str(getattr(thing, "class"))
            kind, place = KINDS.get(kind, kind), f"{path.name} object {number}"
            yield ShownObject(name, place, picture, table.group_of(picture), kind, MatMask(path, number), masks)


def part_word(name: str, unknown: set[str]) -> str:
    """What a part is called in words; a name that is not known goes to `unknown`."""
    bare = re.sub(r"_\d+$", "", name.strip())
    sided = SIDED.fullmatch(bare)
    word = sided[1] if sided else bare
    if not sided and word not in SPELT and word not in PLAIN:
        unknown.add(word)
    return SPELT.get(word, word.replace("_", " "))


FORMAT = Format(
    name="pascal-part",
    holds="items",
    columns=("anno",),
    rows=rows,
    layout="`Annotations_Part/{image}.mat` with `anno.objects`, each with `class`, `mask` and `parts`, these with "
    "`part_name` and `mask`; `JPEGImages/{image}.jpg`, or in `VOCdevkit/VOC2010/`",
    becomes="as paco; parts of both sides and counted ones are one part, abbreviations are spelt out (ours)",
    fits=lambda table: table.path.is_dir(),
)
