"""V* (Wu and Xie 2023, arXiv 2312.14135): small objects in large pictures, with lettered options in the text."""

from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.lettered import has_letter, lettered_rows
from vlm_mech.data.user_files import Row, Rows


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; the options are taken out of the text."""

    def more(row: Row, picture: Any, table: Table) -> dict[str, Any]:
        return {"category": row.fields["category"], "group": table.group_of(picture)}

    return lettered_rows(tables, more, id_column="question_id")


FORMAT = Format(
    name="vstar",
    holds="items",
    columns=("image", "text", "category", "label", "question_id"),
    rows=rows,
    layout="`test_questions.jsonl`, or parquet, with `image`, `text`, `category`, `label` (a letter), `question_id`",
    becomes="one item a row; options that stand in the text, a line each or in one, are taken out of it, the answer "
    "is the text of the option (a letter where the text has none, or they cannot be told from it, which is noted)",
    fits=has_letter,
)
