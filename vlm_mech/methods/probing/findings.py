"""What the probes found, in sentences made from the numbers; places are chosen on validation losses."""

from collections.abc import Sequence

import pandas as pd

from vlm_mech.data.nouns import nouns_in
from vlm_mech.methods.probing.controls import NONE, TASK
from vlm_mech.methods.probing.study import CONFLICT, TEST, Notes, best_spot, summary_of
from vlm_mech.results.result import Result


def findings(result: Result, notes: list[Notes]) -> tuple[str, ...]:
    """Sentences for every model and probe: the best place, its controls, and what is read in conflict."""
    found = []
    summary = summary_of(result)
    of_metric = [summary[summary["metric"] == metric] for metric in ("accuracy", "p_true", "p_prior")]
    accuracy, *both = (each.reset_index(drop=True) for each in of_metric)
    for step in notes:
        for probe in accuracy["probe"].drop_duplicates() if step["step"] == NONE else ():
            found.append(_readable(result, accuracy, step, probe))
            found += _in_conflict(both, step["model"], probe) if CONFLICT in set(accuracy["read_on"]) else []
    if CONFLICT not in set(accuracy["read_on"]):
        found.append("no pictures in conflict were given (conflict), so no probability of a usual answer is told.")
    return tuple(found)


def _readable(result: Result, accuracy: pd.DataFrame, step: Notes, probe: str) -> str:
    place, span = best_spot(step, probe)
    where = {"model": step["model"], "probe": probe, "read_on": TEST, "span": span, "place": place}
    rows = accuracy.loc[(accuracy[list(where)] == pd.Series(where)).all(axis=1)].set_index("control")
    best = rows.loc[NONE]
    seeds = next(row for row in step[probe]["seeds"] if row["spot"] == f"{place} at {span}")
    units = nouns_in(result.provenance).units
    text = (
        f"{step['model']}, {probe}: lowest validation loss at {place}, {span}; test accuracy {best['mean']:.2f} "
        f"(95 % over {units} {best['ci_low']:.2f} to {best['ci_high']:.2f}, n = {best['n']:.0f}"
    )
    if seeds["low"] is not None:
        text += f"; over {seeds['n_seeds']} seeds {seeds['low']:.2f} to {seeds['high']:.2f}"
    text += f"), commonest label {best['baseline']:.2f}"
    controls = [f"{name} {row['mean']:.2f}" for name, row in rows.iterrows() if name != NONE]
    text += f"; controls: {', '.join(controls)}" if controls else ""
    if TASK in rows.index:
        gap = result.contrast(where | {"control": NONE}, where | {"control": TASK}, "accuracy")
        text += f"; selectivity {gap['mean']:.2f} ({gap['ci_low']:.2f} to {gap['ci_high']:.2f})"
    return text + "."


def _in_conflict(both: Sequence[pd.DataFrame], model: str, probe: str) -> list[str]:
    """At the last place of each span: what is shown, against what is usual."""
    (shown, usual), found = both, []
    for span in shown["span"].drop_duplicates():
        chosen = (shown["model"] == model) & (shown["probe"] == probe) & (shown["span"] == span)
        chosen &= (shown["read_on"] == CONFLICT) & (shown["control"] == NONE)
        rows, others = shown[chosen], usual[chosen]
        if rows.empty:
            continue
        true, prior = rows.iloc[-1], others.iloc[-1]
        found.append(
            f"{model}, {probe}, in conflict (n = {true['n']:.0f}) at {true['place']}, {span}: "
            f"P(shown) {_with_interval(true)}, P(usual) {_with_interval(prior)}."
        )
    return found


def _with_interval(row: pd.Series) -> str:
    return f"{row['mean']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
