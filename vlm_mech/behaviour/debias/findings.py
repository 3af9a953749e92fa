"""What a tuning towards looking says, in sentences made from its numbers."""

from typing import Any

import pandas as pd
from scipy.stats import binomtest

from vlm_mech.behaviour.debias.data import IN_CONFLICT
from vlm_mech.behaviour.debias.study import BASE, RANDOM, STATES, TUNED
from vlm_mech.data.pairs import Pair
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import corrected, share_interval


def changes(table: pd.DataFrame, after: str, *, metric: str = "truth") -> pd.DataFrame:
    """By task: counts of answers that became right and wrong, and McNemar's exact p, corrected by Holm's method."""
    rows = []
    for task, some in table[(table["state"] == after) & (table["skipped"] == "")].groupby("task", sort=False):
        won = int(((some[metric] == 1) & (some[f"{metric}_baseline"] == 0)).sum())
        lost = int(((some[metric] == 0) & (some[f"{metric}_baseline"] == 1)).sum())
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        shares = {"before": share(some[f"{metric}_baseline"]), "after": share(some[metric])}
        rows.append({"task": task, "won": won, "lost": lost, "p": p, **shares})
    found = pd.DataFrame(rows).set_index("task")
    return found.assign(p_corrected=corrected(found["p"].to_numpy(), "holm"))


def share(values: pd.Series) -> str:
    """A share with its 95 % Wilson interval and n, in words."""
    n, hits = len(values), int(values.sum())
    low, high = share_interval(hits, n)
    return f"{hits / n:.3f} ({low:.3f} to {high:.3f}, n = {n})"


# What follows


def findings(result: Result, adapter: str) -> tuple[str, ...]:
    """What was tuned how, what it changed in conflict and elsewhere, what chance changes do, and how to go on."""
    told: dict[str, Any] = result.provenance["training"]
    table, found = result.table, [_tuning(told)]
    turned, random_ones = changes(table, TUNED), changes(table, RANDOM)
    shown = table[table["prior"].notna()]
    priors = {state: share(shown[shown["state"] == state]["prior"]) for state in STATES}
    for task, row in turned.iterrows():
        found.append(
            f"{task}: right answers from {row['before']} to {row['after']}; {row['won']} became right and "
            f"{row['lost']} wrong, McNemar p = {row['p']:.2g} ({row['p_corrected']:.2g} after Holm's correction)."
        )
    found.insert(2, f"{IN_CONFLICT}: the prior's answer from {priors[BASE]} to {priors[TUNED]}.")
    elsewhere = "; ".join(f"{task} {row['after']}" for task, row in random_ones.iterrows())
    found.append(
        f"control, an adapter of the same rank and singular values in random directions: right answers {elsewhere}; "
        f"the prior's answer in conflict {priors[RANDOM]}."
    )
    model = result.provenance["model"]["name"]
    found.append(
        f"the adapter lies in {adapter}; python -m experiments.layer_swap --swap weights --model {model} "
        f"--tuned {adapter} says in which blocks it works."
    )
    return tuple(found)


def _tuning(told: dict[str, Any]) -> str:
    history = told["history"]
    recipe, start = told["recipe"], told["before"]
    at = next(entry for entry in history if entry["step"] == told["chosen"])
    taught = " on answers that are true of other pictures (a control)" if told["answers"] == "others" else ""
    text = (
        f"objective {recipe['objective']}{taught}, rank {recipe['rank']}, {told['n_trained']} weights, "
        f"{told['n_pairs']} pairs, {recipe['n_steps']} steps; step {told['chosen']} was chosen on {at['n']} validation "
        f"pairs (right in conflict {at['conflict']:.3f}, usual {at['usual']:.3f}; the base {start['conflict']:.3f} and "
        f"{start['usual']:.3f})."
    )
    if recipe["objective"] == "reward":
        tenth = max(1, len(history) // 10)
        ends = [sum(each["reward_conflict"] for each in some) / tenth for some in (history[:tenth], history[-tenth:])]
        equal, groups = (sum(each[name] for each in history) for name in ("n_equal", "n_groups"))
        text += (
            f" Mean reward of sampled answers in conflict {ends[0]:.3f} in the first tenth of the steps, "
            f"{ends[1]:.3f} in the last; {equal} of {groups} groups had equal rewards and taught nothing."
        )
    return text


def caption(table: pd.DataFrame, pair: Pair) -> str:
    """The question and the true answer of a picture in conflict, and what was said before and after."""
    rows = table[(table["example"] == f"{IN_CONFLICT}/{pair.id}") & (table["task"] == IN_CONFLICT)]
    before, after = (rows[rows["state"] == state]["answer"].iloc[0] for state in (BASE, TUNED))
    return f"{pair.question} {pair.answer} (before: {before}; after: {after})"
