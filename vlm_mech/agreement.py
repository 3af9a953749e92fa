"""How well a cheap estimate of effects agrees with the true ones, on the cells where both are known."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata, spearmanr

from vlm_mech.result import N_RESAMPLES, Result
from vlm_mech.statistics import bootstrap_means

NUMBERS = ("effect", "estimate", "distance")
FEWEST = 3
"""Cells below which no rank correlation is given."""


def agreement_of(checked: Result) -> pd.DataFrame:
    """How well estimate and true effect agree, a row for each direction and kind of cells (means over examples).

    Columns: n cells, Spearman's `correlation` with a 95 % percentile bootstrap over examples (the cells stay) and `p`
    over cells; `n_signed` cells with an effect and `n_same_sign` of them; the `slope` of estimate on effect, 1 for a
    right size; the correlation of sizes `absolute`, and of distance with size of effect (`absolute_control`, a screen
    that knows no gradient); largest and median size of the true effects.

    Args:
        checked: effect, estimate and distance of cells whose column `chosen` is `top` or `random`.
    """
    kinds = checked.table.drop_duplicates(list(checked.axes)).reset_index(drop=True)
    values = {name: checked.matrix(name) for name in NUMBERS}
    rows = []
    for direction in kinds["direction"].unique():
        for kind in ("random", "top"):
            columns = np.flatnonzero((kinds["direction"] == direction) & (kinds["chosen"] == kind))
            if len(columns):
                some = {name: value[:, columns] for name, value in values.items()}
                rows.append({"direction": direction, "chosen": kind} | _compared(some, checked.groups()))
    return pd.DataFrame(rows)


def _compared(values: dict[str, np.ndarray], groups: Int[np.ndarray, "example"]) -> dict[str, float]:
    """Agreement of estimate and effect over cells, with an interval over pairs."""
    means = {name: value.mean(0) for name, value in values.items()}
    drawn = {name: bootstrap_means(value, groups, n_resamples=N_RESAMPLES, seed=0) for name, value in values.items()}
    correlations = _rank_correlation(drawn["estimate"], drawn["effect"])
    held = correlations[~np.isnan(correlations)]
    low, high = np.percentile(held, [2.5, 97.5]) if len(set(groups)) > 1 and len(held) else (np.nan, np.nan)
    correlation = _rank_correlation(means["estimate"][None], means["effect"][None])[0]
    sizes = {name: np.abs(mean)[None] for name, mean in means.items()}
    signed, squares = means["effect"] != 0, float((means["effect"] ** 2).sum())
    return {
        "n": len(means["effect"]),
        "correlation": correlation,
        "ci_low": low,
        "ci_high": high,
        "p": np.nan if np.isnan(correlation) else float(spearmanr(means["estimate"], means["effect"]).pvalue),
        "n_signed": int(signed.sum()),
        "n_same_sign": int((np.sign(means["estimate"]) == np.sign(means["effect"]))[signed].sum()),
        "slope": float((means["estimate"] * means["effect"]).sum()) / squares if squares else np.nan,
        "absolute": _rank_correlation(sizes["estimate"], sizes["effect"])[0],
        "absolute_control": _rank_correlation(sizes["distance"], sizes["effect"])[0],
        "largest_effect": float(sizes["effect"].max()),
        "median_effect": float(np.median(sizes["effect"])),
    }


def _rank_correlation(
    one: Float[np.ndarray, "resample cell"], other: Float[np.ndarray, "resample cell"]
) -> Float[np.ndarray, "resample"]:
    """Spearman's correlation of each row; NaN for too few cells and where all values of one are equal."""
    if one.shape[1] < FEWEST:
        return np.full(len(one), np.nan)
    ranks = [rankdata(values, axis=1) for values in (one, other)]
    first, second = (each - each.mean(1, keepdims=True) for each in ranks)
    scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return np.divide((first * second).sum(1), scale, out=np.full(len(one), np.nan), where=scale > 0)


def sentences(checked: Result, agreement: pd.DataFrame) -> tuple[str, ...]:
    """What the agreement says, one sentence a direction; cells of the largest estimate are named a selected set."""
    n_pairs = checked.table["example"].nunique()
    found = []
    for direction, rows in agreement.groupby("direction", sort=False):
        kinds = {row["chosen"]: row for row in rows.to_dict("records")}
        parts = []
        if "random" in kinds:
            parts.append(
                f"over {kinds['random']['n']} cells drawn at random from the rest, {_sentence(kinds['random'])}"
            )
        else:
            parts.append("every cell was patched in truth")
        top = kinds["top"]
        parts.append(f"over the {top['n']} cells of the largest estimate (a selected set), {_sentence(top)}")
        if "random" in kinds:
            parts.append(_missed(checked, str(direction), top["median_effect"]))
        found.append(f"{direction}, {n_pairs} pairs: " + "; ".join(parts) + ".")
    return tuple(found)


def _sentence(row: dict[str, Any]) -> str:
    signs = f"the sign agrees in {row['n_same_sign']} of {row['n_signed']} with an effect"
    signs += "" if np.isnan(row["slope"]) else f", estimates are {row['slope']:.2g} times as large (slope)"
    if np.isnan(row["correlation"]):
        return f"no rank correlation can be given, {signs}"
    interval = "" if np.isnan(row["ci_low"]) else f" (95 % interval {row['ci_low']:.2f} to {row['ci_high']:.2f})"
    return f"estimate and true effect have rank correlation {row['correlation']:.2f}{interval}, {signs}"


def _missed(checked: Result, direction: str, median: float) -> str:
    table = checked.table[(checked.table["direction"] == direction) & (checked.table["chosen"] == "random")]
    sizes = table.groupby(list(checked.axes), sort=False)["effect"].mean().abs()
    n_missed = int((sizes > median).sum())
    return f"{n_missed} of the {len(sizes)} random cells have a larger true effect than half of the top cells"
