"""What an attribution says, in sentences made from its numbers."""

from typing import Any

import numpy as np
import pandas as pd

from vlm_mech.methods.attribution.agreement import larger_than
from vlm_mech.results.claim import sentences
from vlm_mech.results.result import Result


def findings(result: Result, agreement: pd.DataFrame) -> tuple[str, ...]:
    """What the agreement says, one sentence a direction, and the claims, which alone name layers and heads.

    Args:
        result: what an `Attribution` has `checked`.
        agreement: of `agreement_of`.
    """
    return (*agreement_told(result, agreement), *sentences(result.claims))


def agreement_told(result: Result, agreement: pd.DataFrame) -> tuple[str, ...]:
    """What the agreement says, one sentence a direction; cells of the largest estimate are named a selected set.

    Args:
        result: what an `Attribution` has `checked`.
        agreement: of `agreement_of`.
    """
    n_pairs = result.table["example"].nunique()
    found = []
    for direction, rows in agreement.groupby("direction", sort=False):
        kinds = {row["chosen"]: row for row in rows.to_dict("records")}
        parts = []
        if "random" in kinds:
            parts.append(f"over {kinds['random']['n']} randomly drawn other cells, {_sentence(kinds['random'])}")
        else:
            parts.append("every cell was patched")
        top = kinds["top"]
        parts.append(f"over the {top['n']} cells with the largest estimates (a selected set), {_sentence(top)}")
        if "random" in kinds:
            parts.append(_missed(result, str(direction), top["median_effect"]))
        found.append(f"{direction}, {n_pairs} pairs: " + "; ".join(parts) + ".")
    return tuple(found)


def _sentence(row: dict[str, Any]) -> str:
    signs = f"the sign agrees in {row['n_same_sign']} of {row['n_signed']} cells with an effect"
    signs += "" if np.isnan(row["slope"]) else f", slope of estimate on effect {row['slope']:.2g}"
    if np.isnan(row["correlation"]):
        return f"rank correlation undefined, {signs}"
    interval = "" if np.isnan(row["ci_low"]) else f" (95 % interval {row['ci_low']:.2f} to {row['ci_high']:.2f})"
    return f"rank correlation of estimate and true effect {row['correlation']:.2f}{interval}, {signs}"


def _missed(checked: Result, direction: str, median: float) -> str:
    n_missed, n = larger_than(checked, direction, median)
    return f"{n_missed} of the {n} random cells have a larger true effect than half of the top cells"
