"""ImageWikiQA (Zhang et al. 2024, arXiv 2405.18415): questions about what is known of the class in the picture."""

from collections.abc import Sequence

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.lettered import has_letter, lettered_rows
from vlm_mech.data.user_files import Rows


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; the options, and "Choose A, B, C, or D." after them, are taken out of the text."""
    return lettered_rows(tables, lambda row, picture, table: {"category": row.fields["classname"]}, "images")


FORMAT = Format(
    name="imagewikiqa",
    holds="items",
    columns=("image", "text", "label", "wiki", "classname"),
    rows=rows,
    layout="JSON lines with `image`, `text` (the question, a line for each of A. to D., and what to choose), `label` "
    "(a letter), `wiki`, `classname`",
    becomes="one item a row; options are taken out of the text as for vstar, the answer is the text of the option, the "
    "class the category",
    fits=has_letter,
)
