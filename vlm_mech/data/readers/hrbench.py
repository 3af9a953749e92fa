"""HR-Bench (Wang et al. 2024, arXiv 2408.15556): pictures of 4K and 8K in the cells of a tsv.

A picture stays in the file until it is needed. Several rows ask the same of one picture, with the options in another
order; as items that share a picture they are a group.
"""

from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.single import chosen, each_row, text
from vlm_mech.data.user_files import Row, Rows

OPTIONS = ("A", "B", "C", "D")


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; the tsv is read once through, a row at a time."""
    return each_row(tables, _fields, id_column="index", held=("image",))


def _fields(row: Row, table: Table) -> dict[str, Any]:
    fields = {name: row.fields[name] for name in ("image", "category")} | {"question": text(row, "question")}
    return fields | chosen(row, "answer", {letter: text(row, letter) for letter in OPTIONS})


FORMAT = Format(
    name="hrbench",
    holds="items",
    columns=("index", "question", *OPTIONS, "answer", "category", "cycle_category", "image"),
    rows=rows,
    layout="`hr_bench_4k.tsv`, `hr_bench_8k.tsv` with `index`, `question`, `A` to `D`, `answer` (a letter), "
    "`category`, `cycle_category`, `image` (base64)",
    becomes="one item a row; rows about one picture are a group; pictures stay in the file until they are needed",
)
