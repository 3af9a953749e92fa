"""What a run of contrastive decoding says, in sentences made from its numbers."""

from collections.abc import Sequence

from vlm_mech.behaviour.decoding.data import GREEDY, PLAIN, Setting, label
from vlm_mech.behaviour.decoding.study import (
    DEPENDENCY,
    OWN,
    STRANGER,
    USUAL,
    WHOLE,
    Answers,
    against_greedy,
    answers_on_test,
)
from vlm_mech.results.result import Result, told_share


def findings(result: Result, settings: Sequence[Setting], choice: Sequence[Setting]) -> tuple[str, ...]:
    """Rates of every setting on test with their intervals, its paired test against greedy, the floor and identity."""
    values = answers_on_test(result)
    plain = values[OWN, GREEDY, 0.0]
    told = [each for each in settings[1:] if each.dose > 0 or each.kind == PLAIN]
    tests = against_greedy(values, told)
    found = [
        f"{len(plain)} test examples. Greedy decoding is correct in {told_share(plain, 'truth')} and gives the usual "
        f"answer in {told_share(plain, 'prior')}. Correct given another example's image: "
        f"{told_share(values[STRANGER, GREEDY, 0.0], 'truth')}{_usual(values, GREEDY, 0.0)}."
    ]
    for setting, test in zip(told, tests, strict=True):
        own, floor = (values[each, setting.method, setting.dose] for each in (OWN, STRANGER))
        origin = " (chosen on validation)" if setting in choice else ""
        found.append(
            f"{label(setting.method, setting.dose)}{origin}: correct {told_share(own, 'truth')}, usual "
            f"{told_share(own, 'prior')}; compared with greedy {test.only_one} gained, {test.only_other} lost "
            f"(McNemar exact p = {test.p:.2g}, Holm {test.p_corrected:.2g}). Correct given another example's image: "
            f"{told_share(floor, 'truth')}{_usual(values, setting.method, setting.dose)}."
        )
    for setting in settings:
        if setting.kind == "M3ID" and setting.dose == 0:
            same = int((values[OWN, setting.method, 0.0]["answer"] == plain["answer"]).sum())
            found.append(f"Control: with lambda 0, {same} of {len(plain)} answers are identical to greedy.")
    return (*found, *(_dependence(result) if DEPENDENCY in result.metrics else ()))


def _usual(values: Answers, method: str, dose: float) -> str:
    """How often usual pictures are answered correctly; of single items there are none."""
    found = values.get((USUAL, method, dose))
    return "" if found is None else f", given the usual image: {told_share(found, 'truth')}"


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
            found.append(f"Dependency on the image (PDM), {picture}: {'; '.join(steps[:6])}.")
    return tuple(found)
