"""What a tuning of a contrastive model says, in sentences made from its numbers."""

from typing import Any

import pandas as pd

from vlm_mech.behaviour.contrastive_tuning.data import NONE, READER
from vlm_mech.behaviour.contrastive_tuning.study import CHANCE, tests
from vlm_mech.results.claim import LEVEL
from vlm_mech.results.result import Result

LEARNED = 0.9
"""Share of the pairs tuned on from which on they count as learned."""


def findings(result: Result) -> tuple[str, ...]:
    """What tuning moved on which data set, beside no tuning, the VLM, chance and the controls."""
    told = result.provenance["tuning"]
    summary, tested = result.summary("pair"), tests(result)
    summary = summary[summary["n"] > 0]
    data = list(summary["data"].drop_duplicates())
    found = [_tuned_on(told), _verdict(summary, tested, told)]
    found += [_beside_vlm(summary, tested, name) for name in data]
    found.append(
        "By fine-tuning: pair accuracy; in brackets, pairs gained and lost compared with none, McNemar's p (Holm)."
    )
    for note in told["variants"]:
        parts = [_moved(summary, tested, note["tuning"], name) for name in data]
        fitted = f"{note['fitted']:.2f} of the training {_what(told)}"
        found.append(f"{note['tuning']} (rate {note['rate']:g}, {fitted}): {'; '.join(parts)}.")
    return tuple(found)


def _what(told: dict[str, Any]) -> str:
    return "images" if told.get("captions") else "pairs"


def _tuned_on(told: dict[str, Any]) -> str:
    """What was tuned on, how long, and how the rate was chosen."""
    recipe, rates = told["recipe"], ", ".join(f"{rate:g}" for rate in told["rates"])
    if recipe.get("epochs"):
        steps = sorted({trial["n_steps"] for note in told["variants"] for trial in note["trials"]})
        sizes = [size for note in told["variants"] for trial in note["trials"] for size in trial["batches"]]
        few = f"{min(sizes)} to " if min(sizes) < max(sizes) else ""
        length = f"{recipe['epochs']} epochs ({' or '.join(map(str, steps))} steps),"
        length += f" batches of {few}{max(sizes)} images, one seed"
    else:
        length = f"{recipe['n_steps']} steps of {recipe['batch']} images, one seed"
    asked = "numbers below: pair accuracy on test pairs (chance 0.25), intervals over pairs."
    if not told.get("captions"):
        n = told["n_validation"]
        chosen = (
            f"rates chosen among {rates} by pair accuracy on {n} validation pairs of these sets"
            if n and "," in rates
            else f"rate {rates}"
        )
        return (
            f"Fine-tuned on {told['n_train']} pairs of {', '.join(told['train'])} (train split), {length}; {chosen}; "
            f"{asked}"
        )
    chosen = f"chosen among {rates} by the loss on {told['n_validation']} held out" if "," in rates else rates
    return (
        f"Fine-tuned on {told['n_train']} images with captions of {', '.join(told['train'])}, "
        f"{told['captions']['used']}; {length}; a randomly drawn answer as caption each time; rates {chosen}; {asked}"
    )


def _verdict(summary: pd.DataFrame, tested: pd.DataFrame, told: dict[str, Any]) -> str:
    """Which tunings tell a relation apart after all, and which lose what they were not tuned on."""
    lifted, lost = [], []
    rows: list[dict[str, Any]] = tested[tested["other"] == NONE].to_dict("records")
    for test in rows:
        where = f"{test['tuning']} on {test['data']}"
        if test["p_corrected"] >= LEVEL:
            continue
        low = float(_row(summary, test["tuning"], test["data"])["ci_low"])
        if test["won"] > test["lost"] and low > CHANCE["pair"]:
            lifted.append(where)
        if test["lost"] > test["won"] and test["data"] not in told["train"]:
            lost.append(where)
    best = max(told["variants"], key=lambda note: note["fitted"])
    carried = (
        "errors on test pairs are not for lack of steps, but may be for lack of pairs"
        if best["fitted"] >= LEARNED
        else "if this is low too, training was too short or the encoder lacks the information (not distinguished)"
    )
    asked = "tested again" if not told.get("captions") else "matched to their own text among all"
    return (
        f"Above chance and above no fine-tuning (McNemar, Holm over variants and data sets, p < {LEVEL}): "
        f"{', '.join(lifted) or 'none'}. Worse than before on data not trained on: {', '.join(lost) or 'none'}. "
        f"Best fit to the training {_what(told)}: {best['tuning']}, {best['fitted']:.2f} of "
        f"{told['n_fitted']} {asked}; {carried}."
    )


def _beside_vlm(summary: pd.DataFrame, tested: pd.DataFrame, data: str) -> str:
    """What the model does untuned and the VLM, and which tunings do not stay behind the VLM."""
    own = tested[(tested["data"] == data) & (tested["other"] == READER) & (tested["tuning"] != NONE)]
    behind = (own["p_corrected"] < LEVEL) & (own["lost"] > own["won"])
    near = ", ".join(own["tuning"][~behind]) or "none"
    untuned, reader = (_told(_row(summary, tuning, data)) for tuning in (NONE, READER))
    text = f"{data}: no fine-tuning {untuned}; the VLM {reader}"
    return f"{text}; not significantly below the VLM (McNemar, Holm, p < {LEVEL}): {near}."


def _moved(summary: pd.DataFrame, tested: pd.DataFrame, tuning: str, data: str) -> str:
    chosen = (tested["tuning"] == tuning) & (tested["data"] == data) & (tested["other"] == NONE)
    own = tested[chosen].iloc[0]
    counts = f"+{int(own['won'])} -{int(own['lost'])}, p = {own['p_corrected']:.2g}"
    return f"{data} {_told(_row(summary, tuning, data))} [{counts}]"


def _row(summary: pd.DataFrame, tuning: str, data: str) -> pd.Series:
    return summary[(summary["tuning"] == tuning) & (summary["data"] == data)].iloc[0]


def _told(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, n = {row['n']})"
