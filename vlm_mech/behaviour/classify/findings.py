"""What a classification run says, in sentences made from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from vlm_mech.behaviour.classify.baselines import AT, PROBES
from vlm_mech.behaviour.classify.data import Design
from vlm_mech.behaviour.classify.study import Calibration
from vlm_mech.behaviour.classify.table import CLASSES, CLOSED, CONTRASTIVE, GENERATION, LOADED, MEAN, OPEN, SUM
from vlm_mech.behaviour.classify.two_hops import DRAWN, FIRST_HOP, NAMED, OTHERS, TWO_HOP, UNSEEN
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import Paired


def findings(
    result: Result,
    design: Design,
    paired: Sequence[Paired],
    calibrations: Sequence[Calibration],
) -> tuple[str, ...]:
    """Sentences: what is generated and what it names, scores, comparisons, candidates, frequency, two hops, tuning."""
    summary = result.summary("accuracy")
    correlations = (result.provenance["frequency"] or {}).get("correlations", ())
    found = [_data(design), *_open(result, summary, design), *_scores(summary, design, calibrations)]
    found += [*_others(summary, design, paired), *_candidates(summary, design), *_frequency(correlations, design)]
    return (*found, *_two_hops(summary), *_tuned(summary, design, result.provenance["tuned"]))


def _told(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})"


def _one(summary: pd.DataFrame, **wanted: Any) -> pd.Series | None:
    rows = summary[(summary[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    return None if rows.empty else rows.iloc[0]


def _all_classes(summary: pd.DataFrame, design: Design, method: str, model: str = LOADED) -> pd.Series | None:
    n = len(design.data.names)
    where = {"task": CLASSES, "model": model, "question": design.question, "world": OPEN, "method": method, "k": n}
    return _one(summary, **where)


def _data(design: Design) -> str:
    data, parts = design.data, ("train", "validation", "test")
    sizes = ", ".join(f"{len(getattr(data, part))} {part}" for part in parts)
    text = f"{len(data.names)} classes of {data.name}; {sizes} images"
    few = len(data.names) - len({each.label for each in data.test})
    missing = f"; {few} classes have no test image" if few else ""
    return f"{text}{missing}. Chance is {1 / len(data.names):.3f}; intervals are 95 % bootstrap over images."


def _open(result: Result, summary: pd.DataFrame, design: Design) -> list[str]:
    row = _all_classes(summary, design, GENERATION)
    if row is None:
        return []
    table = result.table
    chosen = (table["method"] == GENERATION) & (table["world"] == OPEN) & (table["question"] == design.question)
    some = table[chosen & (table["model"] == LOADED) & (table["task"] == CLASSES) & (table["label"] != "")]
    nothing, substring = (some["predicted"] == "").mean(), some["substring"].mean()
    usual = some["answer"].value_counts()
    return [
        f"Open world, {design.question!r}: {_told(row)} of the answers name the class and no other (n = {row['n']}). "
        f"{nothing:.2f} name no class, or several. By substring, as in the paper, {substring:.3f} are "
        "correct. "
        f"The most frequent answer is {usual.index[0]!r} ({usual.iloc[0]} of {len(some)})."
    ]


def _scores(summary: pd.DataFrame, design: Design, calibrations: Sequence[Calibration]) -> list[str]:
    plain = [(name, _all_classes(summary, design, name)) for name in (SUM, MEAN)]
    told = [f"{name} {_told(row)}" for name, row in plain if row is not None]
    for each in calibrations:
        row = _all_classes(summary, design, each.method)
        if each.question == design.question and row is not None:
            told.append(f"{each.method} (coefficient {each.coefficient:g}) {_told(row)}")
    text = "Log-probabilities of the class names, all classes: " + "; ".join(told)
    return [text + ". Coefficients were chosen on validation."] if told else []


def _others(summary: pd.DataFrame, design: Design, paired: Sequence[Paired]) -> list[str]:
    names = [CONTRASTIVE, *PROBES.values()]
    rows = [(name, _all_classes(summary, design, name)) for name in names]
    told = [f"{name} {_told(row)}" for name, row in rows if row is not None]
    found = ["For comparison, all classes: " + "; ".join(told) + "."] if told else []
    for other in (GENERATION, CONTRASTIVE):
        each = [one for one in paired if one.other == other and one.one in (SUM, CONTRASTIVE, *PROBES.values())]
        words = [f"{one.one} {one.only_one} to {one.only_other} (p {_p(one.p_corrected)})" for one in each]
        if words:
            found.append(
                f"Images that only one method gets right, compared with {other}: {'; '.join(words)}. McNemar's exact "
                f"test, Holm over {len(paired)} comparisons."
            )
    return found


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _candidates(summary: pd.DataFrame, design: Design) -> list[str]:
    chosen = (summary["world"] == CLOSED) & (summary["model"] == LOADED)
    found = []
    for order, rows in summary[chosen].groupby("order", sort=False):
        told = [f"K = {row['k']}: {_told(row)}, chance {row['baseline']:.3f}" for _, row in rows.iterrows()]
        found.append(f"Closed world, candidates in {order} order: {'; '.join(told)}.")
    for k, why in design.left_out.items():
        found.append(f"Closed world with K = {k} was skipped: a prompt of {why}.")
    return found


def _frequency(correlations: Sequence[Mapping[str, Any]], design: Design) -> list[str]:
    told = []
    for each in correlations:
        if each["question"] == design.question and not each["method"].startswith(AT):
            words = "undefined, the same for all classes" if each["spearman"] is None else f"{each['spearman']:.2f}"
            if each["spearman"] is not None:
                words += f" ({each['spearman_low']:.2f} to {each['spearman_high']:.2f})"
            told.append(f"{each['method']} {words}")
    if not told:
        return []
    return [f"Spearman correlation of training-text count with accuracy, 95 % over classes: {'; '.join(told)}."]


def _two_hops(summary: pd.DataFrame) -> list[str]:
    found = []
    for method in (GENERATION, DRAWN, MEAN):
        rows = [(task, _one(summary, task=task, model=LOADED, method=method)) for task in _tasks()]
        told = [f"{task} {_told(row)}" for task, row in rows if row is not None]
        if told:
            chance = next(row["baseline"] for _, row in rows if row is not None)
            found.append(f"Two hops ({method}, chance {chance:.3f}): {'; '.join(told)}.")
    return found


def _tasks() -> tuple[str, ...]:
    return (FIRST_HOP, TWO_HOP, NAMED, UNSEEN)


def _tuned(summary: pd.DataFrame, design: Design, tuned: Mapping[str, Any] | None) -> list[str]:
    """Before and after, on the same pictures and questions."""
    if tuned is None:
        return []
    after = tuned["model"]
    wanted = [({"task": CLASSES, "world": OPEN, "method": name}, f"{name}, open") for name in (GENERATION, SUM)]
    wanted += [
        ({"task": CLASSES, "world": CLOSED, "k": k, "order": design.orders[0]}, f"closed K = {k}")
        for k in design.closed
    ]
    wanted += [({"task": task, "method": GENERATION}, task) for task in (*OTHERS, *_tasks())]
    told = []
    for where, name in wanted:
        if where["task"] == CLASSES:
            where = where | {"question": design.question} | ({"k": len(design.data.names)} if "k" not in where else {})
        pair = [_one(summary, model=model, **where) for model in (LOADED, after)]
        if pair[0] is not None and pair[1] is not None:
            told.append(f"{name} {pair[0]['mean']:.3f} -> {_told(pair[1])}")
    text = (
        f"Fine-tuned: {tuned['what']} ({tuned['n_trained']} parameters); validation loss "
        f"{tuned['validation_loss_before']:.2f} -> {tuned['validation_loss_after']:.2f}. Before -> after: "
    )
    return [text + "; ".join(told) + "."]
