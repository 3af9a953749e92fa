"""Agreement of estimates with truth, on tables whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from vlm_mech.methods.attribution.agreement import agreement_of
from vlm_mech.methods.attribution.findings import agreement_told
from vlm_mech.results.result import Metric, Result

METRICS = tuple(Metric(name, "logits", "") for name in ("effect", "estimate", "distance"))


def checked(effects: dict[str, list[float]], estimates: dict[str, list[float]], n_examples: int = 6) -> Result:
    """Cells by kind with these means; examples spread evenly around them."""
    rows = []
    for kind, values in effects.items():
        for cell, (effect, estimate) in enumerate(zip(values, estimates[kind], strict=True)):
            for example in range(n_examples):
                off = 0.01 * (example - (n_examples - 1) / 2)
                row = {"effect": effect + off * (effect != 0), "estimate": estimate + off, "distance": 1.0 + cell}
                place = {"example": str(example), "direction": "noising", "layer": cell, "span": kind, "chosen": kind}
                rows.append(place | row | {f"{name}_baseline": 0.0 for name in row})
    return Result("checked", pd.DataFrame(rows), ("direction", "span", "layer"), METRICS)


def test_correlation_is_scipys_and_kinds_are_apart():
    effects = {"top": [9.0, -8.0, 7.0, 6.0], "random": [0.5, -0.4, 0.0, 0.1, 3.0]}
    estimates = {"top": [4.0, -5.0, 6.0, 3.0], "random": [0.4, 0.2, -0.1, 0.3, 0.6]}
    found = agreement_of(checked(effects, estimates)).set_index("chosen")
    for kind in ("top", "random"):
        expected = spearmanr(estimates[kind], effects[kind])
        assert found.loc[kind, "correlation"] == pytest.approx(expected.statistic)
        assert found.loc[kind, "p"] == pytest.approx(expected.pvalue)
        assert found.loc[kind, "ci_low"] <= found.loc[kind, "correlation"] <= found.loc[kind, "ci_high"]
    assert found["n"].to_dict() == {"random": 5, "top": 4}
    assert found["n_signed"].to_dict() == {"random": 4, "top": 4}
    assert found["n_same_sign"].to_dict() == {"random": 3, "top": 4}
    expected = np.dot(estimates["top"], effects["top"]) / np.dot(effects["top"], effects["top"])
    assert found.loc["top", "slope"] == pytest.approx(expected)
    sizes = spearmanr(range(5), np.abs(effects["random"])).statistic
    assert found.loc["random", "absolute_control"] == pytest.approx(sizes)
    assert found.loc["random", "largest_effect"] == pytest.approx(3.0)


def test_a_reversed_estimate_has_correlation_minus_one_and_no_sign():
    effects = {"top": [3.0, 2.0, 1.0], "random": [0.5, -0.25, 0.75, 4.0]}
    found = checked(effects, {kind: [-value for value in values] for kind, values in effects.items()})
    table = agreement_of(found)
    assert table["correlation"].tolist() == pytest.approx([-1.0, -1.0]) and table["n_same_sign"].tolist() == [0, 0]
    (sentence,) = agreement_told(found, table)
    assert (
        "over 4 randomly drawn other cells" in sentence
        and "rank correlation of estimate and true effect -1.00" in sentence
    )
    assert "the sign agrees in 0 of 4 cells with an effect, slope of estimate on effect -1" in sentence
    assert "1 of the 4 random cells have a larger true effect than half of the top cells" in sentence


def test_nothing_is_claimed_where_nothing_varies():
    found = checked({"top": [1.0, 2.0]}, {"top": [1.0, 2.0]})
    assert agreement_of(found)["correlation"].isna().all()
    (sentence,) = agreement_told(found, agreement_of(found))
    assert "every cell was patched" in sentence and "rank correlation undefined" in sentence
    still = agreement_of(
        checked({"top": [1.0, 2.0, 3.0], "random": [0.0] * 3}, {"top": [1.0] * 3, "random": [0.1] * 3})
    )
    assert still["correlation"].isna().all() and still.set_index("chosen").loc["random", "n_signed"] == 0
