"""HallusionBench (Guan et al. 2024, arXiv 2310.14566): a question about a figure, and about an edited one.

Rows with the same set and question are together; the figure with the lowest number is the original. Each other figure
for which the answer is another makes a pair with it.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from vlm_mech.data.readers.format import Collector, Format, ReaderOptions, Table
from vlm_mech.data.readers.single import text
from vlm_mech.data.readers.tables import read
from vlm_mech.data.user_files import Refused, Row, Rows, written
from vlm_mech.errors import UsageError

ANSWERS = {"0": "no", "1": "yes"}
WITHIN = ("category", "subcategory", "set_id")
"""What names a set; not all files have the first two."""


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The pairs; rows without a picture, and figures that change no answer, are refused."""
    found, asked = Collector(), dict[tuple[str, ...], list[tuple[Row, Table]]]()
    for table in tables:
        for row in read(table, ("image",)):
            try:
                if isinstance(row, Refused):
                    raise UsageError(row.reason)
                _check(row)
                question = " ".join(text(row, "question").split())
                asked.setdefault((*_set(row), question), []).append((row, table))
            except UsageError as error:
                found.refuse(row.id, error)
            except KeyError as error:
                found.refuse(row.id, f"{row.place}: it has no {error.args[0]}")
    for key, figures in asked.items():
        original, *others = sorted(figures, key=lambda each: _figure(each[0]))
        if not others:
            found.refuse(_name(original[0]), f"{original[0].place}: its question is asked about no other figure")
        for before, each in itertools.pairwise((original, *others)):
            if _figure(each[0]) == _figure(before[0]):
                found.refuse(_name(each[0]), f"{each[0].place}: figure {_figure(each[0])} is there twice")
                continue
            _keep(found, "/".join(key[:-1]), original, each)
    return found.found


def _set(row: Row) -> tuple[str, ...]:
    return tuple(written(row.fields[field]) or "" for field in WITHIN if row.fields.get(field) is not None)


def _figure(row: Row) -> int:
    return int(written(row.fields["figure_id"]) or "")


def _check(row: Row) -> None:
    if not row.fields.get("image"):
        raise UsageError(f"{row.place}: it has no image")
    if _said(row) not in ANSWERS:
        raise UsageError(f"{row.place}: gt_answer is {row.fields['gt_answer']!r:.40}; 0 or 1 is needed")
    if not (written(row.fields["figure_id"]) or "").isdecimal():
        raise UsageError(f"{row.place}: figure_id is {row.fields['figure_id']!r:.40}; a number is needed")


def _said(row: Row) -> str:
    return (written(row.fields["gt_answer"]) or "").strip()


def _answer(row: Row) -> str:
    return ANSWERS[_said(row)]


def _name(row: Row, other: Row | None = None) -> str:
    figures = "-".join(written(each.fields["figure_id"]) or "" for each in (row, other) if each is not None)
    question = written(row.fields.get("question_id"))
    return "/".join([*_set(row), f"figure {figures}", *([f"question {question}"] if question is not None else [])])


def _keep(found: Collector, group: str, original: tuple[Row, Table], edited: tuple[Row, Table]) -> None:
    (one, _), (other, _) = original, edited
    name = f"{_name(one, other)} ({one.id})" if one.fields.get("question_id") is None else _name(one, other)
    if _answer(one) == _answer(other):
        found.refuse(name, f"{other.place}: the answer about its figure is {_answer(one)} too, so it is not a pair")
        return
    pictures: list[Any] = [table.picture(row.fields["image"]) for row, table in (original, edited)]
    fields = {
        "image": pictures[0],
        "counterfactual_image": pictures[1],
        "question": str(one.fields["question"]),
        "answer": _answer(one),
        "counterfactual_answer": _answer(other),
        "options": ["yes", "no"],
        "group": group,
        "category": one.fields.get("subcategory") or one.fields.get("category"),
    }
    found.keep(one.place, name, fields)


FORMAT = Format(
    name="hallusionbench",
    holds="pairs",
    columns=("set_id", "figure_id", "question", "gt_answer", "image"),
    rows=rows,
    layout="JSON, JSON lines or parquet with `set_id`, `figure_id`, `question`, `gt_answer` (0 or 1), `image`, and "
    "perhaps `category`, `subcategory`, `question_id`",
    becomes="of one set and question, the figure with the lowest number and each other with another answer are a pair; "
    "answers yes and no",
)
