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
        "The contrastive model is at chance but the VLM is not (its pair accuracy is above chance "
        f"and above the contrastive model's, p < {LEVEL}) on: {', '.join(shown) or 'no data set'}; not on: "
        f"{', '.join(hidden) or 'none'}. Unlike MMVP (DINO), no second vision encoder is used."
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
        f"{_told(rows[AMONG])}; chance {chance:.3g} (single images {single[0]:.3f} and {single[1]:.3f}). Only the VLM "
        f"is correct on {test['vlm']}, only the contrastive model on {test['contrastive']} of {test['n']} "
        f"({test['test']}, Holm over data sets: p = {test['p_corrected']:.2g})."
    )
    higher = rows[AMONG]["mean"] > rows[TO_TEXT]["mean"] and test["p_corrected"] < LEVEL
    return text, bool(higher and rows[TO_TEXT]["ci_low"] <= chance < rows[AMONG]["ci_low"])


def _sets_told(summary: pd.DataFrame, data: str) -> tuple[str, ...]:
    rows = summary[(summary["data"] == data) & (summary["metric"] == "set") & (summary["n"] > 0)]
    if rows.empty:
        return ()
    told = "; ".join(f"{row['view']} {_told(row)}" for _, row in rows.iterrows())
    return (f"{data}: all four images of a set correct (chance {rows['baseline'].iloc[0]:.4f}): {told}.",)


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
        f"{data}: pooled cosine {_told(row)}, above {tau:g} in {_told(above)} of pairs. "
        f"Unpaired images: median {floor['median']:.3f}, above {tau:g} in {floor['above_tau']:.3f}. A pair is "
        f"above {place['mean']:.3f} of these on average. Correlation of cosine and pair accuracy: {', '.join(told)}."
    )


def _correlation(found: dict[str, float]) -> str:
    if math.isnan(found["value"]):
        return f"undefined ({found['n_right']} of {found['n']} correct)"
    return f"{found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f}, n = {found['n']})"


def _row(summary: pd.DataFrame, data: str, view: str, metric: str) -> pd.Series:
    chosen = (summary["view"] == view) & (summary["data"] == data) & (summary["metric"] == metric)
    return summary[chosen].iloc[0]


def _told(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"
