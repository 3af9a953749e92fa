"""How well a cheap estimate of effects agrees with the true ones, on the cells where both are known."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata, spearmanr

from vlm_mech.results.result import N_RESAMPLES, Result
from vlm_mech.results.statistics import bootstrap_means

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


def larger_than(checked: Result, direction: str, effect: float) -> tuple[int, int]:
    """How many of the random cells of a direction have a true effect of larger size, and how many there are."""
    table = checked.table[(checked.table["direction"] == direction) & (checked.table["chosen"] == "random")]
    sizes = table.groupby(list(checked.axes), sort=False)["effect"].mean().abs()
    return int((sizes > effect).sum()), len(sizes)


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
