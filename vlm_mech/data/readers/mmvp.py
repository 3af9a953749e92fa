"""MMVP (Tong et al. 2024, arXiv 2401.06209): rows 2k-1 and 2k of `Questions.csv` are a pair, asked the same question.

The official wording puts letters before the options and ends with "Answer with the option's letter from the given
choices directly."; a question here has neither. The labels of rows 99/100 and 279/280 are reported to be wrong; what
is right is not known, so that they stay as they are.
"""

import functools
import re
from collections.abc import Sequence

from vlm_mech.data.readers.format import Collector, Format, ReaderOptions, Table, unlike_stems
from vlm_mech.data.readers.in_twos import in_twos
from vlm_mech.data.readers.single import text
from vlm_mech.data.user_files import Row, Rows
from vlm_mech.errors import UsageError

LETTER = re.compile(r"\(([a-zA-Z])\)")
REPORTED = ((99, 100), (279, 280))


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The pairs by their numbers; two rows that ask different questions, or have equal answers, are refused."""
    found, stems = Collector(), unlike_stems(tables)
    for table in tables:
        before = f"{stems[table.path]}/" if len(tables) > 1 else ""
        fields = functools.partial(_fields, table=table)
        numbers = in_twos(table, "Index", found, fields, before=before)
        for each in REPORTED:
            if each in numbers:
                found.note(
                    f"the labels of rows {each[0]} and {each[1]} are reported to be wrong; what is right is not known, "
                    "and they are left as they are"
                )
    return found.found


def _fields(one: Row, other: Row, table: Table) -> dict:
    if _plain(text(one, "Question")) != _plain(text(other, "Question")):
        raise UsageError(f"{one.place}: its pair is asked another question, {other.fields['Question']!r:.80}")
    chosen, answers = zip(*map(_chosen, (one, other)), strict=True)
    if set(chosen[0]) != set(chosen[1]):
        raise UsageError(f"{one.place}: its pair has other options, {other.fields['Options']!r:.80}")
    pictures = [table.picture(f"{int(each.fields['Index'])}.jpg", "MMVP Images") for each in (one, other)]
    return {
        "image": pictures[0],
        "counterfactual_image": pictures[1],
        "question": one.fields["Question"].strip(),
        "answer": answers[0],
        "counterfactual_answer": answers[1],
        "options": list(chosen[0]),
    }


def _chosen(row: Row) -> tuple[tuple[str, ...], str]:
    """The options of a row, and the one whose letter is right."""
    _, *parts = LETTER.split(text(row, "Options"))
    letters = [each.lower() for each in parts[::2]]
    twice = next((each for each in letters if letters.count(each) > 1), None)
    if twice is not None:
        raise UsageError(f"{row.place}: its options {row.fields['Options']!r:.80} have the letter ({twice}) twice")
    options = {letter.lower(): text.strip() for letter, text in zip(parts[::2], parts[1::2], strict=True)}
    said = LETTER.search(text(row, "Correct Answer"))
    letter = said[1].lower() if said else ""
    if letter not in options:
        raise UsageError(
            f"{row.place}: the correct answer {row.fields['Correct Answer']!r:.40} is none of the options "
            f"{row.fields['Options']!r:.80}"
        )
    return tuple(options.values()), options[letter]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


FORMAT = Format(
    name="mmvp",
    holds="pairs",
    columns=("Index", "Question", "Options", "Correct Answer"),
    rows=rows,
    layout="`Questions.csv` with `Index`, `Question`, `Options` such as (a) Open (b) Closed, and `Correct Answer` such "
    "as (a); `MMVP Images/{Index}.jpg`",
    becomes="rows 2k-1 and 2k are a pair; the question without letters, the texts of options and answers",
)
