"""Visual CounterFact: an object as it usually is, and the same picture with another colour, or another size, of it.

Which of the two a file is about is told by its name. The counterfactual picture is the one in conflict with what is
usual; `prior_question` of a row asks what is usual. In which order a question names two objects is not told by the
file; it is drawn with the seed.
"""

import random
from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Collector, Format, ReaderOptions, Table, unlike_stems
from vlm_mech.data.readers.tables import read
from vlm_mech.data.user_files import Refused, Row, Rows
from vlm_mech.errors import UsageError

PICTURES = ("original_image", "counterfact_image")
KINDS = {"color": "colour", "colour": "colour", "size": "size"}
"""Words in the names of files, and what these are about."""


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The pairs of all files, the usual picture first.

    Raises:
        UsageError: a file whose name says neither color nor size.
    """
    found, stems = Collector(), unlike_stems(tables)
    for table in tables:
        kind = next((kind for word, kind in KINDS.items() if word in table.path.stem.lower()), None)
        if kind is None:
            raise UsageError(f"{table.name}: its name says neither color nor size, as color-0.parquet does")
        for row in read(table, PICTURES):
            name = f"{stems[table.path]}/{row.id}" if isinstance(row, Row) else row.id
            try:
                if isinstance(row, Refused):
                    raise UsageError(row.reason)
                found.keep(row.place, name, _fields(row, kind, f"{options.seed}/{table.path.name} row {row.line}"))
            except UsageError as error:
                found.refuse(name, error)
    return found.found


def _fields(row: Row, kind: str, seed: str) -> dict[str, Any]:
    texts = [row.fields.get(field) for field in ("correct_answer", "incorrect_answer", "object")]
    if not all(isinstance(each, str) and each.strip() for each in texts):
        raise UsageError(f"{row.place}: correct_answer, incorrect_answer, object are {texts!r:.100}; texts are needed")
    right, wrong, thing = (str(each).strip() for each in texts)
    fields: dict[str, Any] = {"image": row.fields[PICTURES[0]], "counterfactual_image": row.fields[PICTURES[1]]}
    if kind == "colour":
        seen, usual = f"What color is this {thing}?", f"What color are most {thing}s?"
        head = "Answer with one word."
    else:
        named = random.Random(seed).sample([right, wrong], 2)
        seen, usual = (f"Which is larger {when}, {named[0]} or {named[1]}?" for when in ("here", "usually"))
        head, fields["options"] = "Answer with the correct option.", named
    fields |= {"question": f"{head} {seen}", "prior_question": f"{head} {usual}"}
    return fields | {
        "answer": right,
        "counterfactual_answer": wrong,
        "conflict": "second",
        "prior": right,
        "category": kind,
        "group": f"{kind} {thing}",
    }


FORMAT = Format(
    name="visual-counterfact",
    holds="pairs",
    columns=("correct_answer", "incorrect_answer", "object", *PICTURES),
    rows=rows,
    layout="parquet files with `color` or `size` in their names: `correct_answer`, `incorrect_answer`, `object`, "
    "`original_image`, `counterfact_image`",
    becomes="each row is a pair, its counterfactual picture in conflict, `correct_answer` the prior; questions about "
    "what is seen, in the official wording; the order of two objects is drawn",
)
