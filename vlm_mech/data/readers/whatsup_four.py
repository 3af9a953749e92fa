"""What'sUp, each picture among all four relations of its group, so that groups are sets of four (see `whatsup`).

The four-way prompt of arXiv 2411.05195 was not found; this is a published one.
"""

from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers import whatsup
from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.whatsup import Shown, opposites, read_caption
from vlm_mech.data.user_files import Rows

QUESTION = "Where is the {x} in relation to the {y}? Answer with {others} or {last}."
ANSWERS = {"left": "left", "right": "right", "on": "on", "under": "under", "in front of": "front", "behind": "behind"}
"""What is answered for each relation, in the order in which a question lists them."""


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The pairs of `whatsup`, with all relations of their group as options."""
    return opposites(tables, options, _four_way)


def _four_way(one: Shown, other: Shown) -> dict[str, Any]:
    relations = {read_caption(each, one.row)[2] for each in one.captions}
    *others, last = answers = [ANSWERS[each] for each in ANSWERS if each in relations]
    return {
        "question": QUESTION.format(x=one.x, y=one.y, others=", ".join(others), last=last),
        "answer": ANSWERS[one.relation],
        "counterfactual_answer": ANSWERS[other.relation],
        "options": answers,
    }


FORMAT = Format(
    name="whatsup-four",
    holds="pairs",
    columns=whatsup.FORMAT.columns,
    rows=rows,
    layout="those of `whatsup`; this name has to be given, as in `whatsup-four:FOLDER`",
    becomes="the pairs of `whatsup`, with all relations of their group as options, so that the pairs of a group are a "
    "set of four; a published four-way prompt (that of arXiv 2411.05195 was not found)",
    known_by_files=False,
)
