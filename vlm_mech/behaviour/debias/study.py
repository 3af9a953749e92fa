"""Before and after a tuning towards looking: the answers of a run, as the rows of a table."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlm_mech.behaviour.adapter_files import save_adapter
from vlm_mech.behaviour.debias.adapter import History, checkpoint_at, put_back, trained_of
from vlm_mech.behaviour.debias.data import IN_CONFLICT, USUAL, Parts, tasks_of
from vlm_mech.behaviour.debias.training import Recipe, train
from vlm_mech.data.pairs import Pairs
from vlm_mech.data.reading import read_answer
from vlm_mech.errors import UsageError
from vlm_mech.interventions.trace import generate
from vlm_mech.methods.weight_swap.blocks import switched
from vlm_mech.results.result import Metric, share_of
from vlm_mech.results.statistics import Paired, holm, mcnemar
from vlm_mech.runs.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("state", "task")
BASE, TUNED, RANDOM = "base", "tuned", "random adapter of equal size"
STATES = (BASE, TUNED, RANDOM)
TRUTH = Metric("truth", "share", "share of answers that name the true one, and not the other one", against=BASE)
PRIOR = Metric(
    "prior",
    "share",
    "share of answers to images in conflict that name the prior's alone",
    against=BASE,
)
METRICS = (TRUTH, PRIOR)


def answered(vlm: "VLM", pairs: Pairs, *, batch: int, max_new_tokens: int) -> list[str]:
    """Greedy answers to the questions about the first pictures."""
    prompts = pairs.base
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
            named = read_answer(text, (pair.answer, pair.counterfactual_answer)).only
            row: dict[str, Any] = {"example": f"{task}/{pair.id}", "group": pair.group or pair.id, "answer": text}
            row["truth"] = float(named == 0)
            row["prior"] = float(named == 1) if task == IN_CONFLICT else float("nan")
            rows.append(row)
        tables.append(pd.DataFrame(rows).assign(task=task, state=state))
    return pd.concat(tables, ignore_index=True)


def validated(vlm: "VLM", pairs: Pairs, *, batch: int, max_new_tokens: int) -> dict[str, Any]:
    """Shares of correct answers on pictures in conflict and on their usual counterfactuals, if any, with their number.

    Beside each, as `conflict_ends` and `usual_ends`, its 95 % interval over groups; None of one group alone.
    """
    tasks = tasks_of(pairs, ())
    table = asked(vlm, tasks, "", batch=batch, max_new_tokens=max_new_tokens)
    found: dict[str, Any] = {"n": len(pairs)}
    for column, task in (("conflict", IN_CONFLICT), ("usual", USUAL)):
        if task in tasks:
            rows = table[table["task"] == task]
            told = share_of(rows, "truth")
            found |= {column: float(rows["truth"].mean())}
            found[f"{column}_ends"] = None if told is None or np.isnan(told.low) else [told.low, told.high]
    return found


def validated_before(vlm: "VLM", pairs: Pairs, *, batch: int, max_new_tokens: int) -> dict[str, Any]:
    """What `validated` gives of the model as it is.

    Raises:
        UsageError: it is right on every picture in conflict.
    """
    before = validated(vlm, pairs, batch=batch, max_new_tokens=max_new_tokens)
    if before["conflict"] == 1:
        raise UsageError(f"{vlm.name} is right on every validation image of {pairs.name}: nothing to tune away")
    return before


def chosen_step(history: History) -> int:
    """The checkpoint with the largest mean of the shares on validation; among equals the first."""
    kept = [entry for entry in history if "conflict" in entry]
    return max(kept, key=lambda entry: entry["conflict"] + entry.get("usual", 0))["step"]


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


def changes(table: pd.DataFrame, after: str) -> dict[str, Paired]:
    """By task McNemar's test of correct answers in a state against those of the base, Holm over tasks."""
    held = table[(table["state"] == after) & (table["skipped"] == "")]
    tests = [
        mcnemar(rows["truth"].eq(1).to_numpy(), rows["truth_baseline"].eq(1).to_numpy(), (after, BASE))
        for _, rows in held.groupby("task", sort=False)
    ]
    return dict(zip(held["task"].drop_duplicates().tolist(), holm(tests), strict=True))
