"""V* (Wu and Xie 2023, arXiv 2312.14135): small objects in large pictures, with lettered options in the text."""

from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.single import each_row, has_letter, lettered_item
from vlm_mech.data.user_files import Row, Rows


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; the options are taken out of the text."""
    return each_row(tables, _fields, id_column="question_id")


def _fields(row: Row, table: Table) -> dict[str, Any]:
    return lettered_item(row, table) | {"category": row.fields["category"], "group": str(row.fields["image"])}


FORMAT = Format(
    name="vstar",
    holds="items",
    columns=("image", "text", "category", "label", "question_id"),
    rows=rows,
    layout="`test_questions.jsonl` with `image`, `text`, `category`, `label` (a letter), `question_id`",
    becomes="one item a line; options that stand a line each in the text are taken out of it, the answer is the text "
    "of the option (a letter where the text has none)",
    fits=has_letter,
)
