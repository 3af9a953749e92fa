"""POPE (Li et al. 2023, arXiv 2305.10355) and RePOPE (Neuhaus and Hein 2025), its labels corrected: JSON lines."""

from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.single import each_row, text
from vlm_mech.data.user_files import Row, Rows
from vlm_mech.errors import UsageError

ANSWERS = ["yes", "no"]
KINDS = ("random", "popular", "adversarial")


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; how the absent objects were drawn, if the name of the file says it, is the category."""
    return each_row(tables, _fields, id_column="question_id")


def _fields(row: Row, table: Table) -> dict[str, Any]:
    answer = text(row, "label").lower()
    if answer not in ANSWERS:
        raise UsageError(f"{row.place}: label is {row.fields['label']!r:.40}; yes or no is needed")
    picture = table.picture(row.fields["image"], "val2014", "images")
    return {
        "image": picture,
        "question": text(row, "text"),
        "answer": answer,
        "options": ANSWERS,
        "category": next((kind for kind in KINDS if kind in table.path.stem.lower()), None),
        "group": table.group_of(picture),
    }


FORMAT = Format(
    name="pope",
    holds="items",
    columns=("question_id", "image", "text", "label"),
    rows=rows,
    layout="JSON lines with `question_id`, `image`, `text`, `label` (yes or no), such as `coco_pope_random.json` or "
    "`coco_repope_random.json`; pictures beside them or in `val2014/`",
    becomes="one item a line, answers yes and no; random, popular or adversarial in a file's name is the category",
    fits=lambda table: str(table.first.get("label", "")).lower() in ANSWERS,
)
