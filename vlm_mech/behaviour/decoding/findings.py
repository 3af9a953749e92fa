"""What a run of contrastive decoding says, in sentences made from its numbers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from vlm_mech.behaviour.decoding.data import GREEDY, PLAIN, Setting, label
from vlm_mech.behaviour.decoding.study import DEPENDENCY, OWN, STRANGER, TEST, USUAL, WHOLE
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import corrected, share_interval


def findings(result: Result, settings: Sequence[Setting], choice: Sequence[Setting]) -> tuple[str, ...]:
    """Rates of every setting on test with their intervals, its paired test against greedy, the floor and identity."""
    answers = result.table[(result.table["step"] == WHOLE) & (result.table["split"] == TEST)]
    values = {
        key: rows.set_index("example")[["truth", "prior", "answer"]].dropna()
        for key, rows in answers.groupby(["picture", "method", "dose"], sort=False)
    }
    plain = values[OWN, GREEDY, 0.0]
    told = [each for each in settings[1:] if each.dose > 0 or each.kind == PLAIN]
    tests = [mcnemar(values[OWN, each.method, each.dose]["truth"], plain["truth"]) for each in told]
    adjusted = corrected(np.array([each[2] for each in tests]), "holm")
    found = [
        f"{len(plain)} test examples. greedy is right in {_share(plain['truth'])}, says what is usual in "
        f"{_share(plain['prior'])}; right about another's picture: {_share(values[STRANGER, GREEDY, 0.0]['truth'])}, "
        f"about the usual one: {_share(values[USUAL, GREEDY, 0.0]['truth'])}."
    ]
    for setting, (gained, lost, p), p_holm in zip(told, tests, adjusted, strict=True):
        own, floor, usual = (values[each, setting.method, setting.dose] for each in (OWN, STRANGER, USUAL))
        origin = " (chosen on validation)" if setting in choice else ""
        found.append(
            f"{label(setting.method, setting.dose)}{origin}: right {_share(own['truth'])}, usual "
            f"{_share(own['prior'])}; against greedy {gained} gained, {lost} lost (McNemar exact p = {p:.2g}, Holm "
            f"{p_holm:.2g}); right about another's picture: {_share(floor['truth'])}, about the usual one: "
            f"{_share(usual['truth'])}."
        )
    for setting in settings:
        if setting.kind == "M3ID" and setting.dose == 0:
            same = int((values[OWN, setting.method, 0.0]["answer"] == plain["answer"]).sum())
            found.append(f"control: with lambda 0, {same} of {len(plain)} answers are those of greedy.")
    return (*found, *(_dependence(result) if DEPENDENCY in result.metrics else ()))


def mcnemar(values: pd.Series, reference: pd.Series) -> tuple[int, int, float]:
    """Examples gained and lost against a reference, and the exact two-sided p of McNemar's test (1 without any)."""
    gained = int(((values == 1) & (reference == 0)).sum())
    lost = int(((values == 0) & (reference == 1)).sum())
    return gained, lost, float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _dependence(result: Result) -> tuple[str, ...]:
    summary = result.summary("dependency")
    found = []
    for picture in (OWN, STRANGER, USUAL):
        rows = summary[(summary["picture"] == picture) & (summary["step"] != WHOLE) & (summary["n"] > 0)]
        steps = [
            f"token {row['step'] + 1} {row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"
            for row in rows.sort_values("step").to_dict("records")
        ]
        if steps:
            found.append(f"dependency on the picture (PDM), {picture}: {'; '.join(steps[:6])}.")
    return tuple(found)


def _share(values: pd.Series) -> str:
    hits, n = int(values.sum()), len(values)
    low, high = share_interval(hits, n)
    return f"{hits / n:.3f} ({low:.3f} to {high:.3f})"
