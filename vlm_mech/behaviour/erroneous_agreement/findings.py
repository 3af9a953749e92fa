"""What a run of erroneous agreements says, in sentences made from its numbers."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from vlm_mech.behaviour.answering.by_category import by_category, has_categories, told_by_category
from vlm_mech.behaviour.erroneous_agreement.study import (
    AMONG,
    BY_CATEGORY,
    POOLED,
    TO_IMAGE,
    TO_TEXT,
    likeness_with_right,
    paired_tests,
)
from vlm_mech.results.claim import LEVEL
from vlm_mech.results.result import Result


def findings(result: Result, *, tau: float, floors: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Who tells the pairs apart, how alike they are beside unpaired images, and whether the one follows the other."""
    summary, tests = result.summary(), paired_tests(result)
    found, shown, hidden = [], [], []
    for name, test in tests.items():
        text, is_so = _accuracy_told(summary, name, test)
        (shown if is_so else hidden).append(name)
        found += [text, *_sets_told(summary, name), _similarity_told(summary, result, name, tau, floors)]
    verdict = (
        "the contrastive model near chance on pairs that the VLM tells apart (its pair accuracy not above chance, the "
        f"VLM's above it and above the contrastive one, p < {LEVEL}): {', '.join(shown) or 'on no data set'}; not: "
        f"{', '.join(hidden) or 'on none'}. No second tower is asked, as MMVP does with DINO."
    )
    if has_categories(result):
        table = by_category(result, **BY_CATEGORY)
        for metric in BY_CATEGORY["metrics"]:
            found += told_by_category(table[table["view"].isin([TO_TEXT, TO_IMAGE, AMONG])], ["data", "view"], metric)
    n = result.table["example"].nunique()
    return (f"{n} pairs of {len(tests)} data sets.", verdict, *found)


def _accuracy_told(summary: pd.DataFrame, data: str, test: dict[str, Any]) -> tuple[str, bool]:
    rows = {view: _row(summary, data, view, "pair") for view in (TO_TEXT, AMONG)}
    single = [_row(summary, data, view, "individual")["mean"] for view in (TO_TEXT, AMONG)]
    chance = float(rows[AMONG]["baseline"])
    text = (
        f"{data}: pair accuracy of the contrastive model {_told(rows[TO_TEXT])}, of the VLM "
        f"{_told(rows[AMONG])}; chance {chance:.3g} (single images {single[0]:.3f} and {single[1]:.3f}); the VLM "
        f"alone right on {test['vlm']}, the contrastive model alone on {test['contrastive']} of {test['n']} "
        f"({test['test']}, Holm over data sets: p = {test['p_corrected']:.2g})."
    )
    higher = rows[AMONG]["mean"] > rows[TO_TEXT]["mean"] and test["p_corrected"] < LEVEL
    return text, bool(higher and rows[TO_TEXT]["ci_low"] <= chance < rows[AMONG]["ci_low"])


def _sets_told(summary: pd.DataFrame, data: str) -> tuple[str, ...]:
    rows = summary[(summary["data"] == data) & (summary["metric"] == "set") & (summary["n"] > 0)]
    if rows.empty:
        return ()
    told = "; ".join(f"{row['view']} {_told(row)}" for _, row in rows.iterrows())
    return (f"{data}: all four images of a set right (chance {rows['baseline'].iloc[0]:.4f}): {told}.",)


def _similarity_told(
    summary: pd.DataFrame, result: Result, data: str, tau: float, floors: Sequence[dict[str, Any]]
) -> str:
    row, above, place = (_row(summary, data, POOLED, name) for name in ("similarity", "above_tau", "place"))
    floor = next(each for each in floors if each["data"] == data and each["view"] == POOLED)
    told = [
        f"{name} {_correlation(likeness_with_right(result, data, view))}"
        for view, name in ((TO_TEXT, "contrastive"), (AMONG, "VLM"))
    ]
    return (
        f"{data}: pooled cosine {_told(row)}, above {tau:g} in {_told(above)} of pairs; of "
        f"unpaired images {floor['median']:.3f} in the median, above {tau:g} in {floor['above_tau']:.3f}; a pair is "
        f"above {place['mean']:.3f} of these on average; correlation of cosine and pair right: {', '.join(told)}."
    )


def _correlation(found: dict[str, float]) -> str:
    if math.isnan(found["value"]):
        return f"not told ({found['n_right']} of {found['n']} right)"
    return f"{found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f}, n = {found['n']})"


def _row(summary: pd.DataFrame, data: str, view: str, metric: str) -> pd.Series:
    chosen = (summary["view"] == view) & (summary["data"] == data) & (summary["metric"] == metric)
    return summary[chosen].iloc[0]


def _told(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"
