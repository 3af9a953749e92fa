"""What'sUp A and B (Kamath et al. 2023, arXiv 2310.19785): pairs of opposite relations, asked as by arXiv 2411.05195.

A row names a picture and four captions, the right one first; rows with the same captions are a group. Two opposite
relations of a group are a pair. One label error is known: `pillow_left_of_chair` and `pillow_right_of_chair` are
exchanged.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_mech.data.readers.format import Collector, Format, ReaderOptions, Table
from vlm_mech.data.readers.tables import read
from vlm_mech.data.user_files import Refused, Row, Rows
from vlm_mech.errors import UsageError

CAPTION = re.compile(
    r"(?:an? |the )?(?P<x>.+?) (?P<relation>(?:to the )?left of|(?:to the )?right of|in[ -]front of|behind|on|under) "
    r"(?:an? |the )?(?P<y>.+?)\.?",
    re.IGNORECASE,
)
OPPOSITE = {"left": "right", "on": "under", "in front of": "behind"}
"""Relations that stand first in a question, and their opposites; also what is answered."""
QUESTIONS = {
    "left": "Is the {x} to the left of or to the right of the {y}? Answer left or right.",
    "on": "Is the {x} on or under the {y}? Choose from the two options.",
    "in front of": "Is the {x} in front of or behind the {y}? Answer in front of or behind",
}
"""The two-way prompts of arXiv 2411.05195."""
EXCHANGED = {"pillow_left_of_chair": "pillow_right_of_chair", "pillow_right_of_chair": "pillow_left_of_chair"}


@dataclass(frozen=True)
class Shown:
    """A row: its picture, and what its right caption says."""

    row: Row
    table: Table
    name: str
    captions: tuple[str, ...]
    x: str
    y: str
    relation: str

    @property
    def caption(self) -> str:
        return self.captions[0]

    @property
    def group(self) -> str:
        return " | ".join(sorted(self.captions))


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The pairs, the side that a question names first being `image`; what has no opposite is refused."""
    return opposites(tables, options, _two_way)


def opposites(tables: Sequence[Table], options: ReaderOptions, asked: Callable[[Shown, Shown], dict[str, Any]]) -> Rows:
    """The pairs of two opposite relations of a group.

    Args:
        asked: question, answers and options of two pictures.
    """
    found, groups = Collector(), dict[str, list[Shown]]()
    for table in tables:
        for row in read(table):
            try:
                if isinstance(row, Refused):
                    raise UsageError(row.reason)
                shown = _shown(row, table)
                groups.setdefault(shown.group, []).append(shown)
            except UsageError as error:
                found.refuse(row.id, error)
    for group in groups.values():
        _pairs(_corrected(group, found, options.fix_labels), found, asked, named_by_part=len(tables) > 1)
    return found.found


def _shown(row: Row, table: Table) -> Shown:
    path, captions = row.fields.get("image_path"), row.fields.get("caption_options")
    if not isinstance(path, str) or not path.strip():
        raise UsageError(f"{row.place}: image_path is {path!r:.60}; a text is needed")
    if not isinstance(captions, list) or len(captions) < 2 or not all(isinstance(each, str) for each in captions):
        raise UsageError(f"{row.place}: caption_options is {captions!r:.60}; a list of captions is needed")
    x, y, relation = read_caption(captions[0], row)
    return Shown(row, table, PurePosixPath(path).stem, tuple(captions), x, y, relation)


def read_caption(caption: str, row: Row) -> tuple[str, str, str]:
    """Two objects and the relation that a caption tells."""
    said = CAPTION.fullmatch(caption.strip())
    if said is None:
        raise UsageError(f"{row.place}: caption {caption!r:.80} tells no relation such as left of, on or in front of")
    relation = said["relation"].lower().removeprefix("to the ").replace("-", " ")
    return (
        said["x"],
        said["y"],
        relation.removesuffix(" of") if relation.endswith(("left of", "right of")) else relation,
    )


def _corrected(group: list[Shown], found: Collector, fix: bool) -> list[Shown]:
    """The group with the labels of the two exchanged pictures exchanged back, if that is asked for."""
    by_name = {each.name: each for each in group}
    if not all(name in by_name for name in EXCHANGED):
        return group
    names = " and ".join(EXCHANGED)
    if not fix:
        found.note(f"known label error: {names} are exchanged; left as they are, --fix-labels corrects them")
        return group
    found.note(f"known label error corrected: {names} are exchanged")
    changed = []
    for each in group:
        other = by_name.get(EXCHANGED.get(each.name, ""), each)
        changed.append(replace(each, captions=other.captions, relation=other.relation))
    return changed


def _pairs(
    group: list[Shown], found: Collector, asked: Callable[[Shown, Shown], dict[str, Any]], *, named_by_part: bool
) -> None:
    by_relation: dict[str, Shown] = {}
    for each in group:
        if each.relation in by_relation:
            found.refuse(each.name, f"{each.row.place}: its group has another image of {each.relation!r}")
        else:
            by_relation[each.relation] = each
    for first, second in OPPOSITE.items():
        sides = [by_relation[each] for each in (first, second) if each in by_relation]
        if len(sides) == 2:
            part = f"{PurePosixPath(sides[0].row.fields['image_path']).parent.name}/" if named_by_part else ""
            _keep(found, part, asked, *sides)
        elif sides:
            lacking = second if sides[0].relation == first else first
            found.refuse(sides[0].name, f"{sides[0].row.place}: its group has no image of {lacking!r}")


def _keep(
    found: Collector, part: str, asked: Callable[[Shown, Shown], dict[str, Any]], one: Shown, other: Shown
) -> None:
    name = f"{part}{one.name}/{other.name}"
    try:
        told = asked(one, other)
    except UsageError as error:
        return found.refuse(name, error)
    pictures = {"image": _picture(one), "counterfactual_image": _picture(other)}
    captions = {"caption": one.caption, "counterfactual_caption": other.caption}
    category = {"group": one.group, "category": f"{one.relation}/{other.relation}"}
    found.keep(one.row.place, name, pictures | told | category | captions)


def _two_way(one: Shown, other: Shown) -> dict[str, Any]:
    return {
        "question": QUESTIONS[one.relation].format(x=one.x, y=one.y),
        "answer": one.relation,
        "counterfactual_answer": other.relation,
        "options": [one.relation, other.relation],
    }


def _picture(shown: Shown) -> object:
    """The picture; where the folder `data` of its path is the one given, it lies beside the table."""
    path = shown.row.fields["image_path"]
    found = shown.table.picture(path)
    beside = shown.table.picture(path.removeprefix("data/"))
    return beside if found == path and isinstance(beside, Path) else found


FORMAT = Format(
    name="whatsup",
    holds="pairs",
    columns=("image_path", "caption_options"),
    rows=rows,
    layout="`controlled_images_dataset.json` (A), `controlled_clevr_dataset.json` (B): a list of objects with "
    "`image_path` and `caption_options`, the right caption first",
    becomes="two opposite relations of a group are a pair (left/right, on/under, in front of/behind); questions are "
    "the two-way prompts of arXiv 2411.05195; captions are those of the files",
)
