"""VLMBias (Vo et al. 2025, arXiv 2505.23941): pictures of well-known things, changed so that the usual answer is wrong.

The official prompts ask for the answer in {braces}; they are the questions.
"""

from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.single import each_row, text
from vlm_mech.data.user_files import Row, Rows, written
from vlm_mech.errors import UsageError


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; the biased answer that is expected is the prior, and in conflict where it is not the right one."""
    return each_row(tables, _fields, held=("image",))


def _fields(row: Row, table: Table) -> dict[str, Any]:
    right, usual = (_answer(row, column) for column in ("ground_truth", "expected_bias"))
    return {
        "image": table.picture(row.fields["image"]),
        "question": text(row, "prompt"),
        "answer": right,
        "prior": usual,
        "conflict": right.lower() != usual.lower(),
        "category": row.fields["topic"],
    }


def _answer(row: Row, column: str) -> str:
    """A text, or a number written as one: columns of numbers some of which are missing are read as fractions."""
    given = row.fields.get(column)
    told = (written(given) or "").strip()
    if not told:
        raise UsageError(f"{row.place}: {column} is {given!r:.60}; a text or a number is needed")
    return told


FORMAT = Format(
    name="vlmbias",
    holds="items",
    columns=("image", "prompt", "ground_truth", "expected_bias", "topic"),
    rows=rows,
    layout="parquet, JSON or JSON lines with `image`, `prompt`, `ground_truth`, `expected_bias`, `topic`",
    becomes="one item a row; `expected_bias` is the prior, and the picture in conflict where that is not the answer",
)
