"""MMMU (Yue et al. 2023, arXiv 2311.16502): questions in which `<image 1>` stands for a picture, often several."""

import ast
import re
from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.single import LETTERS, chosen, each_row, text
from vlm_mech.data.user_files import Row, Rows
from vlm_mech.errors import UsageError

PICTURES = tuple(f"image_{number}" for number in range(1, 8))
NAMED = re.compile(r"<image (\d)>")


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items; the folder of a file, if it is not the one given, is the category."""
    return each_row(tables, _fields, id_column="id", held=PICTURES)


def _fields(row: Row, table: Table) -> dict[str, Any]:
    question, options = text(row, "question"), _options(row)
    named = sorted({int(number) for each in (question, *options) for number in NAMED.findall(each)}) or [1]
    images = [row.fields.get(f"image_{number}") for number in named]
    lacking = [number for number, image in zip(named, images, strict=True) if not image]
    if lacking:
        raise UsageError(f"{row.place}: it has no image_{lacking[0]}, which its question names")
    fields: dict[str, Any] = {"image": images[0]} if len(images) == 1 else {"images": images}
    fields |= {"question": question, "category": None if table.path.parent == table.root else table.path.parent.name}
    if not options:
        return fields | {"answer": _open(row)}
    return fields | chosen(row, "answer", dict(zip(LETTERS, options, strict=False)))


def _options(row: Row) -> list[str]:
    """The options, a list or a list as text; none of an open question."""
    given = row.fields.get("options")
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given or "[]")
        except (ValueError, SyntaxError) as error:
            raise UsageError(f"{row.place}: options is {given!r:.60}; a list as text is needed") from error
    if not isinstance(given, list | tuple):
        raise UsageError(f"{row.place}: options is {given!r:.60}; a list is needed")
    return [str(each).strip() for each in given]


def _open(row: Row) -> str:
    """The answer of an open question."""
    answer = text(row, "answer")
    if answer.startswith("["):
        raise UsageError(f"{row.place}: its answer is {answer!r:.60}, several texts; one is needed")
    return answer


FORMAT = Format(
    name="mmmu",
    holds="items",
    columns=("question", "options", "answer", "image_1"),
    rows=rows,
    layout="parquet files with `question` (`<image 1>` stands for a picture), `options` (a list as text), `answer` (a "
    "letter), `image_1` to `image_7`",
    becomes="one item a row, with the pictures that question and options name; `<image 1>` stays in the text; of an "
    "open question (no options) the answer is the text, and one with several right answers is refused",
)
