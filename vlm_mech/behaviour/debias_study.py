"""Before and after a tuning towards looking: data, answers, findings and pictures of a run."""

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor

from vlm_mech.behaviour.debias import Recipe, train
from vlm_mech.behaviour.debias_adapter import History, checkpoint_at, put_back, save_adapter, trained_of
from vlm_mech.behaviour.decay import said
from vlm_mech.blocks import switched
from vlm_mech.data.pairs import Pair, Pairs, by_groups, load_pairs, turned
from vlm_mech.errors import UsageError
from vlm_mech.prompt import Prompt
from vlm_mech.result import Metric, Result
from vlm_mech.statistics import corrected, share_interval
from vlm_mech.trace import generate
from vlm_mech.visual_flow import CONFLICT, cases_of
from vlm_mech.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.model import VLM

AXES = ("state", "task")
BASE, TUNED, RANDOM = "base", "tuned", "random adapter of equal size"
STATES = (BASE, TUNED, RANDOM)
IN_CONFLICT, USUAL = "in conflict", "usual"
TRUTH = Metric("truth", "share", "share of answers that are the true one and nothing else", against=BASE)
PRIOR = Metric("prior", "share", "share of answers to pictures in conflict that are the prior's", against=BASE)
METRICS = (TRUTH, PRIOR)
SHARES = (0.6, 0.2)
"""Of the groups of a folder, to train and to validate; the rest is to test."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Pairs to tune on, to choose the checkpoint by, and to report; those in conflict come first in each."""

    train: Pairs
    validation: Pairs
    test: Pairs


def parts_of(data: str, *, n: int | None, n_train: int, n_validation: int, seed: int) -> Parts:
    """The pairs of a set in conflict, turned so that the picture in conflict is asked about first.

    Generated scenes have splits of their own. The pairs of a folder, whose first picture is in conflict and whose
    second answer is the prior's, are cut by groups: 60 % to train, 20 % to validate, the rest to test.

    Raises:
        UsageError: generated pairs without conflict, or a folder with too few groups.
    """
    if not data.startswith("scenes/"):
        return Parts(*by_groups(load_pairs(data, n=n), SHARES, seed=seed))
    if not data.endswith(CONFLICT):
        raise UsageError(f"data {data!r} has no pictures in conflict with a prior; scenes/colour{CONFLICT} has")
    wanted = {"train": n_train, "validation": n_validation, "test": n}
    found = {split: load_pairs(data, n=count, seed=seed, split=split) for split, count in wanted.items()}
    return Parts(**{split: cases_of(pairs).pairs for split, pairs in found.items()})


def with_answers_of_others(pairs: Pairs, *, seed: int) -> Pairs:
    """The pairs with an answer, for the picture in conflict, that is true of another one: a control of the tuning.

    It is neither the own true answer nor the prior's, so that a tuning can only learn to leave the prior.

    Raises:
        UsageError: no other pair has such an answer.
    """
    rng, changed = random.Random(f"others/{seed}"), []
    for pair in pairs:
        free = [each.answer for each in pairs if each.answer not in (pair.answer, pair.counterfactual_answer)]
        if not free:
            raise UsageError(f"pair {pair.id}: no other pair of {pairs.name} has an answer that is neither of its own")
        changed.append(dataclasses.replace(pair, answer=rng.choice(free)))
    return dataclasses.replace(pairs, pairs=tuple(changed))


# Answers


def tasks_of(test: Pairs, untouched: Sequence[Pairs]) -> dict[str, Pairs]:
    """What is asked before and after: pictures in conflict, their usual twins, and what nothing was tuned on."""
    return {IN_CONFLICT: test, USUAL: turned(test), **{pairs.name: pairs for pairs in untouched}}


def answered(vlm: "VLM", pairs: Pairs, *, batch: int, max_new_tokens: int) -> list[str]:
    """Greedy answers to the questions about the first pictures."""
    prompts = [Prompt(pair.question, pair.image) for pair in pairs]
    found: list[str] = []
    for start in range(0, len(prompts), batch):
        found += generate(vlm, prompts[start : start + batch], max_new_tokens=max_new_tokens).texts
    return found


def asked(vlm: "VLM", tasks: dict[str, Pairs], state: str, *, batch: int, max_new_tokens: int) -> pd.DataFrame:
    """One row per example of every task: the answer, and whether it is the true or the prior's one."""
    tables = []
    for task, pairs in tasks.items():
        texts = answered(vlm, pairs, batch=batch, max_new_tokens=max_new_tokens)
        rows = []
        for pair, text in zip(pairs, texts, strict=True):
            now = said(text)
            row: dict[str, Any] = {"example": f"{task}/{pair.id}", "group": pair.group or pair.id, "answer": text}
            row["truth"] = float(now.same(said(pair.answer)))
            row["prior"] = float(now.same(said(pair.counterfactual_answer))) if task == IN_CONFLICT else float("nan")
            rows.append(row)
        tables.append(pd.DataFrame(rows).assign(task=task, state=state))
    return pd.concat(tables, ignore_index=True)


def validated(vlm: "VLM", pairs: Pairs, *, batch: int, max_new_tokens: int) -> dict[str, Any]:
    """Shares of right answers on pictures in conflict and on their usual twins, with their number."""
    tasks = tasks_of(pairs, ())
    table = asked(vlm, tasks, "", batch=batch, max_new_tokens=max_new_tokens)
    conflict, usual = (float(table[table["task"] == task]["truth"].mean()) for task in (IN_CONFLICT, USUAL))
    return {"conflict": conflict, "usual": usual, "n": len(pairs)}


def chosen_step(history: History) -> int:
    """The checkpoint with the largest mean of both shares on validation; among equals the first."""
    kept = [entry for entry in history if "conflict" in entry]
    return max(kept, key=lambda entry: entry["conflict"] + entry["usual"])["step"]


def keep_answers(
    work: Workspace, vlm: "VLM", tasks: dict[str, Pairs], state: str, *, batch: int, max_new_tokens: int
) -> None:
    """Asks everything in a state of the model and keeps the table among the batches, unless it is there."""
    key = f"{STATES.index(state)}_{state.split()[0]}"
    if key not in work:
        work.keep(key, asked(vlm, tasks, state, batch=batch, max_new_tokens=max_new_tokens), {})


def tuned(
    work: Workspace,
    vlm: "VLM",
    adapter: Any,
    parts: Parts,
    recipe: Recipe,
    *,
    every: int,
    batch: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Tunes, gives the model the checkpoint chosen on validation, writes its adapter into the run's folder.

    Returns:
        What was done, step by step.
    """
    folder = work.partial / "training"
    validate = functools.partial(validated, vlm, parts.validation, batch=batch, max_new_tokens=max_new_tokens)
    history = train(
        vlm, adapter, parts.train, recipe, folder=folder, every=every, validate=validate, progress=work.progress
    )
    chosen = chosen_step(history)
    put_back(adapter, checkpoint_at(folder, chosen))
    save_adapter(vlm, adapter, work.folder / "adapter")
    n_trained = sum(parameter.numel() for parameter in trained_of(adapter).values())
    told = {"recipe": dataclasses.asdict(recipe), "chosen": chosen, "history": history}
    return told | {"n_trained": n_trained, "n_pairs": len(parts.train)}


def without_adapter(vlm: "VLM") -> AbstractContextManager[None]:
    """The model as it was, for a while."""
    return switched([vlm.model], on=False)


@contextmanager
def with_random_adapter(vlm: "VLM", *, seed: int) -> Iterator[None]:
    """For a while, an adapter of the same rank and singular values in every map, its directions drawn at random.

    So it is as large as the tuned one in the Frobenius norm and in every other that a rotation leaves alone.
    """
    generator, kept = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for down, up in factors(vlm):
            kept += [(down, down.clone()), (up, up.clone())]
            values = torch.linalg.svdvals((up.float() @ down.float()).cpu())[: down.shape[0]]
            left, right = (
                torch.linalg.qr(torch.randn(size, down.shape[0], generator=generator))[0]
                for size in (up.shape[0], down.shape[1])
            )
            down.copy_((right * values.sqrt()).T)
            up.copy_(left * values.sqrt())
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def factors(vlm: "VLM") -> list[tuple[Tensor, Tensor]]:
    """The two weights of every adapted map, rank x in and out x rank; the map gains a multiple of their product."""
    layers: list[Any] = [each for each in vlm.model.modules() if hasattr(each, "lora_A") and len(each.lora_A)]
    return [(each.lora_A["default"].weight, each.lora_B["default"].weight) for each in layers]


# The table


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """All examples in all cells: what belongs to another task is missing, and the baselines are the base's values."""
    cells = [(state, task) for state in table["state"].unique() for task in table["task"].unique()]
    examples = table.drop_duplicates("example")[["example", "group", "task"]].rename(columns={"task": "own"})
    whole = examples.merge(pd.DataFrame(cells, columns=list(AXES)), how="cross")
    whole = whole.merge(table.drop(columns="group"), how="left", on=["example", *AXES])
    before = table[table["state"] == BASE].set_index("example")[["truth", "prior"]]
    for name in ("truth", "prior"):
        whole[f"{name}_baseline"] = whole["example"].map(before[name]).where(whole["own"] == whole["task"])
    whole["skipped"] = (whole["own"] != whole["task"]).map({True: "an example of another task", False: ""})
    return whole.drop(columns="own").assign(answer=whole["answer"].fillna(""))


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
