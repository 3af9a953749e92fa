"""MMVP-VLM (Tong et al. 2024, arXiv 2401.06209): two pictures and two statements, nine visual patterns.

The official score is from text to image, with "a photo of " before each statement. The question to a model that answers
is ours; the statements are its options, and the captions for a contrastive model.
"""

import functools
from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Collector, Format, ReaderOptions, Table, unlike_stems
from vlm_mech.data.readers.in_twos import in_twos
from vlm_mech.data.user_files import Row, Rows
from vlm_mech.errors import UsageError

QUESTION = "Which statement is true of the picture?"


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The pairs by their numbers, each with its pattern as category."""
    found, stems = Collector(), unlike_stems(tables)
    for table in tables:
        before = f"{stems[table.path]}/" if len(tables) > 1 else ""
        in_twos(table, "Question ID", found, functools.partial(_fields, table=table), before=before)
    return found.found


def _fields(one: Row, other: Row, table: Table) -> dict[str, Any]:
    kinds = [each.fields["Type"].strip() for each in (one, other)]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{one.place}: its pair is of another type, {kinds[1]!r:.60} and not {kinds[0]!r:.60}")
    statements = [each.fields["Statement"].strip() for each in (one, other)]
    pictures = [_picture(table, kinds[0], int(each.fields["Question ID"])) for each in (one, other)]
    return {
        "image": pictures[0],
        "counterfactual_image": pictures[1],
        "question": QUESTION,
        "answer": statements[0],
        "counterfactual_answer": statements[1],
        "options": statements,
        "category": kinds[0],
        "caption": statements[0],
        "counterfactual_caption": statements[1],
    }


def _picture(table: Table, kind: str, number: int) -> Any:
    return table.picture(f"{kind}/{number}.jpg", "MLLM_VLM Images")


FORMAT = Format(
    name="mmvp-vlm",
    holds="pairs",
    columns=("Question ID", "Type", "Statement"),
    rows=rows,
    layout="`Questions.csv` with `Question ID`, `Type`, `Statement`; `MLLM_VLM Images/{Type}/{Question ID}.jpg`",
    becomes="rows 2k-1 and 2k are a pair; both statements are options, answers and captions, the type is the category; "
    "the question is ours",
)
