"""VLMBias (Vo et al. 2025, arXiv 2505.23941): pictures of well-known things, changed so that the usual answer is wrong.

The official prompts ask for the answer in {braces}; they are the questions.
"""

from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.single import each_row, text
from vlm_mech.data.user_files import Row, Rows
from vlm_mech.errors import UsageError


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; the biased answer that is expected is the prior, and in conflict where it is not the right one."""
    return each_row(tables, _fields, held=("image",))


def _fields(row: Row, table: Table) -> dict[str, Any]:
    answers = [row.fields.get(column) for column in ("ground_truth", "expected_bias")]
    if any(each is None or not str(each).strip() for each in answers):
        raise UsageError(f"{row.place}: ground_truth and expected_bias are {answers!r:.60}; both are needed")
    right, usual = (str(each).strip() for each in answers)
    return {
        "image": table.picture(row.fields["image"]),
        "question": text(row, "prompt"),
        "answer": right,
        "prior": usual,
        "conflict": right.lower() != usual.lower(),
        "category": row.fields["topic"],
    }


FORMAT = Format(
    name="vlmbias",
    holds="items",
    columns=("image", "prompt", "ground_truth", "expected_bias", "topic"),
    rows=rows,
    layout="parquet, JSON or JSON lines with `image`, `prompt`, `ground_truth`, `expected_bias`, `topic`",
    becomes="one item a row; `expected_bias` is the prior, and the picture in conflict where that is not the answer",
)
