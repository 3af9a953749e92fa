"""Counts of class names in training text, kept batch by batch, so that a killed run goes on after the last one."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlm_mech.behaviour.classify.frequency import Rule, counted
from vlm_mech.behaviour.frequency.data import texts
from vlm_mech.errors import UsageError
from vlm_mech.results.result import Metric
from vlm_mech.runs.workspace import Workspace

AXES = ("source",)
METRICS = (
    Metric(
        "count",
        "texts",
        "texts that mention the class; a class counts once in each; there is no baseline, and so no test",
    ),
)
BATCH = 20_000
"""Texts that are counted between two that are kept."""


def kept(
    work: Workspace,
    sources: Sequence[str],
    names: Sequence[str],
    *,
    rule: Rule,
    said: Sequence[str] = (),
    batch: int = BATCH,
) -> tuple[pd.DataFrame, dict[str, int]]:
    """A row for each class and source, and how many texts each source has.

    Args:
        said: what text calls each class, where that is not its name (`Classes.said`).

    Raises:
        UsageError: a source without any text.
    """
    for number, source in enumerate(sources):
        found = texts(source, rule, said or names)
        for at in itertools.count():
            key = f"{number:03d}-{at:08d}"
            # Those counted before are read over.
            some = list(itertools.islice(found, batch))
            if not some:
                break
            if key not in work:
                counts = counted(some, said or names, rule=rule)
                table = pd.DataFrame({"example": list(names), "source": source, "count": counts.astype(float)})
                work.keep(key, table, {"source": source, "n": len(some)})
    return _summed(work, sources, names)


def _summed(work: Workspace, sources: Sequence[str], names: Sequence[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    missing = [number for number in range(len(sources)) if f"{number:03d}-{0:08d}" not in work]
    if missing:
        raise UsageError(f"text {sources[missing[0]]!r} holds no text")
    table, notes = work.collect()
    summed = table.groupby(["source", "example"], sort=False)["count"].sum().reset_index()
    found: dict[str, int] = {}
    for note in notes:
        found[note["source"]] = found.get(note["source"], 0) + note["n"]
    order = [(source, name) for source in sources for name in names]
    summed = summed.set_index(["source", "example"]).loc[order].reset_index()
    return summed.assign(group=summed["example"], count_baseline=np.nan, skipped=""), found


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """`class` and `count` over all sources, as `classify --counts` reads them."""
    summed = table.groupby("example", sort=False)["count"].sum().astype(int).reset_index()
    return summed.rename(columns={"example": "class"})


def about(
    question: str,
    sources: Sequence[str],
    names: Sequence[str],
    rule: Rule,
    n_texts: dict[str, int],
    said: Sequence[str] = (),
) -> dict[str, Any]:
    """What the provenance of a run says; `alike` are classes of one name, which are counted alike."""
    text: dict[str, Any] = {"rule": rule, "n_texts": n_texts, "sources": list(sources)}
    alike = [name for name, plain in zip(names, said, strict=True) if name != plain] if said else []
    text |= {"alike": alike} if alike else {}
    return {"question": question, "data": {"name": " + ".join(sources), "n": len(names)}, "text": text, "receipts": {}}
