"""What generated answers say beside the logits of the same runs: whose answer it is, and how often both agree."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from vlm_mech.results.result import Metric, Result

Says = Literal["own", "other", "neither"]
SAYS: tuple[Says, ...] = ("own", "other", "neither")
AGREES = Metric(
    "agrees", "share", "share of answers that name one of the two, and the one that the logits of this run prefer"
)
MOST_ROWS = 20
"""Rows of a table of examples at most."""
NAMED = Metric("named", "share", "share of generated answers that name one of the two")


def agreement(table: pd.DataFrame, apart: Sequence[str] = ()) -> Result | None:
    """How often generated answers say what the logits prefer, with edits and without; None where none was generated.

    Args:
        table: rows of a sweep with `says`, `flip` and their values without edit; others are empty in `says`.
        apart: axes whose values are not pooled, such as `cut`, so that controls are distinguished from what they
            control.

    Returns:
        A row an example and run: `unedited`, and `edited`, with `apart` as in `edited (control of equal size)`.
    """
    rows = _spoken(table)
    if rows.empty:
        return None
    kinds = table[list(apart)].astype(str).agg(", ".join, axis=1) if apart else None
    edited = "edited" if kinds is None else "edited (" + kinds + ")"
    parts = []
    for run, suffix in ((edited, ""), ("unedited", "_baseline")):
        said = rows[f"says{suffix}"]
        named = said != "neither"
        agrees = np.where(named, (said == "other") == (rows[f"flip{suffix}"] > 0.5), np.nan)
        part = rows[["example", "group"]].assign(run=run, named=named.astype(float), agrees=agrees)
        parts.append(part.groupby(["example", "group", "run"], sort=False, as_index=False).mean())
    each = pd.concat(parts, ignore_index=True)
    # In the order of the table; some examples lack a control, or the edge of a cell that was drawn.
    every = ["edited"] if kinds is None else list(dict.fromkeys(edited))
    runs = [run for run in (*every, "unedited") if run in set(each["run"])]
    places = pd.MultiIndex.from_product([each["example"].unique(), runs], names=["example", "run"])
    groups = each.groupby("example")["group"].first()
    each = each.set_index(["example", "run"])[["named", "agrees"]].reindex(places).reset_index()
    each = each.assign(group=each["example"].map(groups), agrees_baseline=0.0, named_baseline=0.0)
    return Result("generated answers", each, ("run",), (AGREES, NAMED))


def _spoken(table: pd.DataFrame) -> pd.DataFrame:
    """The rows for which an answer was generated and the logits are known."""
    if "says" not in table:
        return table.iloc[:0]
    return pd.DataFrame(table[(table["says"].fillna("") != "") & table["flip"].notna()])


def _of_cell(place: Any, rows: pd.DataFrame) -> str:
    """What is named in a cell: its axes, and how often the other answer and neither."""
    other, neither = (100 * (rows["says"] == name).mean() for name in ("other", "neither"))
    return f"{', '.join(map(str, place))}: other {other:.0f} %, neither {neither:.0f} %"


def told(table: pd.DataFrame, axes: Sequence[str], measure: str, apart: Sequence[str] = ()) -> tuple[str, ...]:
    """What generated answers say beside the logits, in sentences; nothing where none was generated.

    Args:
        axes: what tells the cells apart.
        measure: what prefers an answer.
        apart: axes whose values have a sentence each on how often both agree (see `agreement`).
    """
    found = agreement(table, apart)
    if found is None:
        return ()
    rows, cells = _spoken(table), list(axes)
    listed = "; ".join(_of_cell(place, some) for place, some in rows.groupby(cells, sort=False))
    clean = rows.drop_duplicates([name for name in ("example", "direction") if name in rows])
    before = ", ".join(f"{name} {100 * (clean['says_baseline'] == name).mean():.0f} %" for name in SAYS)
    n_cells, n_examples = len(rows[cells].drop_duplicates()), rows["example"].nunique()
    sentences = [
        f"Answers were generated in {n_cells} randomly drawn cells, for at most {n_examples} examples each. Unedited, "
        f"they name the run's own answer, the other one, or neither: {before}. Edited: {listed}."
    ]
    for row in found.summary("agrees").to_dict("records"):
        if row["n"] > 1:
            run, _, kind = str(row["run"]).partition(" ")
            interval = f"95 % interval {100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f} %"
            what = f"of the answers that name one of the two, {100 * row['mean']:.0f} % name what {measure} prefers"
            sentences.append(f"{run} runs{kind and f' {kind}'}: {what} ({interval}, n = {row['n']}).")
    return tuple(sentences)


def examples(table: pd.DataFrame, axes: Sequence[str], questions: Mapping[str, str]) -> pd.DataFrame | None:
    """Some of the answers that were generated in each cell, as a table to read; None where none was generated.

    As many of each cell as `MOST_ROWS` allow, of more cells than that the first ones; by turns an answer that the edit
    changed and one that it did not.

    Args:
        axes: what tells the cells apart.
        questions: what is asked, by example.

    Returns:
        The axes, `question`, `without the edit`, `with the edit`, and `whose answer` the latter is: that of the run
        itself (own), the other one, or neither.
    """
    rows = _spoken(table)
    if rows.empty:
        return None
    rows = rows.assign(same=rows["text"] == rows["text_baseline"], cell=rows.groupby(list(axes), sort=False).ngroup())
    rows = rows.assign(turn=rows.groupby(["cell", "same"]).cumcount()).sort_values(["cell", "turn", "same"])
    shown = rows.groupby("cell").head(max(1, MOST_ROWS // rows["cell"].nunique())).head(MOST_ROWS)
    named = {"text_baseline": "without the edit", "text": "with the edit", "says": "whose answer"}
    shown = shown.assign(question=shown["example"].map(questions)).rename(columns=named)
    return pd.DataFrame(shown[[*axes, "question", *named.values()]].reset_index(drop=True))
