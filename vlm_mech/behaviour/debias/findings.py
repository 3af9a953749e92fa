"""What a tuning towards looking says, in sentences made from its numbers."""

from typing import Any

from vlm_mech.behaviour.debias.data import IN_CONFLICT
from vlm_mech.behaviour.debias.study import BASE, RANDOM, STATES, TUNED, changes
from vlm_mech.results.result import Result, told_share


def findings(result: Result, adapter: str) -> tuple[str, ...]:
    """What was tuned how, what it changed in conflict and elsewhere, what chance changes do, and how to go on."""
    told: dict[str, Any] = result.provenance["training"]
    table, found = result.table, [_tuning(told)]
    asked = table[table["skipped"] == ""].groupby(["task", "state"], sort=False)
    shares = {key: told_share(rows, "truth") for key, rows in asked}
    shown = table[table["prior"].notna()]
    priors = {state: told_share(shown[shown["state"] == state], "prior") for state in STATES}
    turned = changes(table, TUNED)
    for task, test in turned.items():
        found.append(
            f"{task}: accuracy from {shares[task, BASE]} to {shares[task, TUNED]}; {test.only_one} became correct "
            f"and {test.only_other} wrong, McNemar p = {test.p:.2g} ({test.p_corrected:.2g} after Holm's correction)."
        )
    found.insert(2, f"{IN_CONFLICT}: the prior answer from {priors[BASE]} to {priors[TUNED]}.")
    elsewhere = "; ".join(f"{task} {shares[task, RANDOM]}" for task in turned)
    found.append(
        f"Control, a random adapter of equal rank and singular values: accuracy {elsewhere}; "
        f"the prior answer in conflict {priors[RANDOM]}."
    )
    model = result.provenance["model"]["name"]
    found.append(
        f"The adapter is in {adapter}; python -m experiments.layer_swap --swap weights --model {model} "
        f"--tuned {adapter} --data {result.provenance['data']['name']} shows in which blocks it acts."
    )
    return tuple(found)


def _tuning(told: dict[str, Any]) -> str:
    history = told["history"]
    recipe, start = told["recipe"], told["before"]
    what = "pairs" if "usual" in start else "items"
    at = next(entry for entry in history if entry["step"] == told["chosen"])
    taught = " on answers that are true of other images (a control)" if told["answers"] == "others" else ""
    text = (
        f"objective {recipe['objective']}{taught}, rank {recipe['rank']}, {told['n_trained']} weights, "
        f"{told['n_pairs']} {what}, {recipe['n_steps']} steps; step {told['chosen']} was chosen on {at['n']} "
        f"validation {what} (accuracy {_right(at)}; base model {_right(start)})."
    )
    if "usual" not in at:
        text += " Single items have no usual images, so retention of usual answers was not measured."
    if recipe["objective"] == "reward":
        tenth = max(1, len(history) // 10)
        ends = [sum(each["reward_conflict"] for each in some) / tenth for some in (history[:tenth], history[-tenth:])]
        equal, groups = (sum(each[name] for each in history) for name in ("n_equal", "n_groups"))
        text += (
            f" Mean reward of sampled answers in conflict {ends[0]:.3f} in the first tenth of the steps, "
            f"{ends[1]:.3f} in the last; {equal} of {groups} groups had equal rewards and gave no gradient."
        )
    return text


def _right(shares: dict[str, Any]) -> str:
    """Shares of correct answers in conflict and, where such pictures were asked about, on usual ones."""
    usual = f", usual {shares['usual']:.3f}" if "usual" in shares else ""
    return f"in conflict {shares['conflict']:.3f}{usual}"
