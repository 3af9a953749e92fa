"""Heads patched between two runs at the last position, both ways, and scores of what each looks at and writes.

After "Vision-Default, Prior-Override" (arXiv 2606.28273): recovered fractions, first component, routing and writing;
docs/methods.md says what is theirs and what is ours.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from vlm_mech.architectures.site import Site
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.receipt import add_up
from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import read
from vlm_mech.methods.head_roles.data import (
    DIRECTIONS,
    FIRST,
    HEAD,
    INTO_FIRST,
    INTO_SECOND,
    OTHERS,
    PROMOTING,
    SECOND,
    SUPPRESSING,
    Runs,
)
from vlm_mech.results.metrics import MIN_GAP
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.measures import logit_diff, said
from vlm_mech.sweeps.sweep import grid, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("of", "direction", "layer", "head")
RECOVERED = Metric(
    "recovered", "fraction", "share of the way from the run that is patched to the other one that the difference moves",
    signed=True,
)  # fmt: skip
METRICS = (logit_diff((), ()).metric, RECOVERED)
N_SD = 2.0
"""Standard deviations of centred scores beyond which a head is classified."""
WRONG = "not answered as it should be in both runs"
NO_GAP = f"logit differences of the two runs are less than {MIN_GAP} apart"
N_TOP, TOP_SHARE = 20, 0.05
"""A token is at the top (or bottom) of what a head writes among so many, in small vocabularies within this share."""
SCORES = (
    Metric("visual", "score", "attention of the last token to image tokens, times its concentration"),
    Metric("image_mass", "share", "attention of the last token to image tokens"),
    Metric("concentration", "share", "1 - H / log n of that attention over the n image tokens: 1 if all is on one"),
    Metric("routing", "share", "attention of the last token to image tokens, first run minus second", signed=True),
    Metric("writes_answer", "share", "examples in which the first run's answer is at the top of what the head writes"),
    Metric("writes_against", "share", "examples in which the second run's answer is at the bottom of it"),
)


def patch_heads(
    vlm: "VLM", runs: Runs, *, batch: int = 32, engine: str = "fast", memory: int | str | None = None, check: int = 1
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Every head's output at the last position put from each run into the other.

    Args:
        vlm: the model.
        runs: both runs of each example.
        batch: examples per forward pass.
        engine, memory, check: as for `sweep`.

    Returns:
        A row an example, head and direction, with `logit_diff` (the first run's answer minus the second's, in both
        runs), `recovered`, `right` (whether greedy decoding gives what it should in both runs) and `gap`; and rows `of`
        `OTHERS` with the mean over the other heads of the layer. And the summary of all receipts.
    """
    tables, receipts = [], []
    for start in range(0, len(runs.pairs), batch):
        table, noted = _patched(vlm, runs[slice(start, start + batch)], engine, memory, check if not start else 0)
        tables.append(table)
        receipts += noted
    table = _with_fractions(pd.concat(tables, ignore_index=True))
    return pd.concat([table, _others(table)], ignore_index=True), add_up(receipts)


def _patched(vlm: "VLM", runs: Runs, engine: str, memory: Any, check: int) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    pairs, layers, tables, receipts = runs.pairs, list(vlm.llm_layers), [], []
    points = grid(layer=layers, head=range(vlm.n_heads("llm")))
    heads = [Site("llm.head_out", layer) for layer in layers]
    for direction, target, source in ((INTO_FIRST, FIRST, SECOND), (INTO_SECOND, SECOND, FIRST)):
        donor = read(vlm, vlm.encode(runs.of(source)), heads)
        measures = (logit_diff(pairs.answer, pairs.counterfactual_answer), said(runs.said(target)))
        how = {"engine": engine, "memory": memory, "batch": len(pairs), "check": check}
        done = sweep(
            vlm,
            runs.of(target),
            points,
            lambda at, donor=donor: Replace(Site("llm.head_out", at.layer), "last", heads=(at.head,), source=donor),
            measures,
            **how,
        )
        names = [pair.id for pair in pairs]
        groups = [pair.group or pair.id for pair in pairs]
        numbers = done.table["example"].astype(int)
        table = done.table.assign(
            example=[names[at] for at in numbers], group=[groups[at] for at in numbers], direction=direction, of=HEAD
        )
        tables.append(table)
        receipts.append(done.provenance["receipts"])
    return pd.concat(tables, ignore_index=True), receipts


def _with_fractions(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the recovered fractions, and why one is missing."""
    first = table.groupby(["direction", "example"], sort=False).first()
    clean = {each: first.loc[each, "logit_diff_baseline"] for each in DIRECTIONS}
    right = (first.loc[INTO_FIRST, "said_baseline"] > 0) & (first.loc[INTO_SECOND, "said_baseline"] > 0)
    gap = clean[INTO_SECOND] - clean[INTO_FIRST]
    of = table["example"]
    whole = gap.reindex(of).to_numpy() * np.where(table["direction"] == INTO_FIRST, 1, -1)
    moved = (table["logit_diff"] - table["logit_diff_baseline"]).to_numpy()
    large = np.abs(whole) >= MIN_GAP
    kept = table[["example", "group", *AXES, "logit_diff", "logit_diff_baseline"]]
    return kept.assign(
        recovered=np.divide(moved, whole, out=np.full(len(whole), np.nan), where=large),
        recovered_baseline=np.where(large, 0.0, np.nan),
        gap=whole,
        right=right.reindex(of).to_numpy(),
        skipped=np.where(large, "", NO_GAP),
    )


def _others(table: pd.DataFrame) -> pd.DataFrame:
    """For each head the mean over the other heads of its layer, as rows of their own."""
    where, found = ["example", "direction", "layer"], table.copy()
    for name in ("logit_diff", "recovered"):
        by = table.groupby(where, sort=False)[name]
        n, whole = (by.transform(how).to_numpy(dtype=float) for how in ("size", "sum"))
        found[name] = np.divide(whole - table[name], n - 1, out=np.full(len(table), np.nan), where=n > 1)
    found["recovered"] = found["recovered"].where(table["recovered"].notna())
    return found.assign(of=OTHERS)


def counted(table: pd.DataFrame, *, only_correct: bool) -> pd.DataFrame:
    """The table with the values of examples that do not count left out, and why.

    Args:
        table: as `patch_heads` gives it.
        only_correct: those that are not answered as they should be in both runs do not count.
    """
    if not only_correct:
        return table
    wrong = ~table["right"].astype(bool)
    names = ["logit_diff", "logit_diff_baseline", "recovered", "recovered_baseline"]
    values = table[names].where(~wrong)
    return table.assign(**{name: values[name] for name in names}, skipped=table["skipped"].where(~wrong, WRONG))


def points_of(result: Result) -> pd.DataFrame:
    """Each head's mean recovered fraction in both directions, and its ratio of means, a row a head.

    Columns `into_first` and `into_second` are means of ratios over examples, as published; `..._of_means` the mean
    change over the mean gap, in which an example with a small gap counts little. `n` counts the examples that have a
    fraction; a head without any has NaN.

    Args:
        result: of the patching.
    """
    table = result.table[result.table["of"] == HEAD]
    moved = table.assign(moved=table["recovered"] * table["gap"], gap=table["gap"].where(table["recovered"].notna()))
    by = moved.groupby(["direction", "layer", "head"], sort=True)
    sums = cast(pd.DataFrame, by[["moved", "gap"]].sum())
    found = pd.DataFrame(
        {
            "": by["recovered"].mean(),
            "_of_means": np.divide(
                sums["moved"], sums["gap"], out=np.full(len(sums), np.nan), where=(sums["gap"] != 0).to_numpy()
            ),
            "n": by["recovered"].count(),
        }
    )
    names = {INTO_FIRST: "into_first", INTO_SECOND: "into_second"}
    both = {each: cast(pd.DataFrame, found.xs(each, level="direction")) for each in DIRECTIONS}
    columns = {f"{names[each]}{end}": both[each][end] for end in ("", "_of_means") for each in DIRECTIONS}
    return pd.DataFrame(columns).assign(n=both[INTO_FIRST]["n"]).reset_index()


def pc1_rule(points: Float[np.ndarray, "head 2"]) -> tuple[Float[np.ndarray, "head"], Float[np.ndarray, "2"]]:
    """Scores of heads along the first component of recovered fractions, in standard deviations, and its direction.

    The component is that of the covariance, its sign such that its entries sum to more than 0; scores are centred.
    Heads above `N_SD` are promoting, below -`N_SD` suppressing. Scores are 0 where all points are the same.

    Args:
        points: mean recovered fraction in each direction, of at least three heads.
    """
    centred = points - points.mean(0)
    _, vectors = np.linalg.eigh(np.cov(points.T))
    axis = vectors[:, -1] * (1 if vectors[:, -1].sum() >= 0 else -1)
    scores = centred @ axis
    width = scores.std(ddof=1)
    return (scores / width if width > 0 else np.zeros(len(scores))), axis


def roles_of(points: pd.DataFrame, *, by: str = "ratios") -> pd.DataFrame:
    """The points with the `score` of each head and its `role`: promoting, suppressing, or none.

    Args:
        points: as `points_of` gives them.
        by: `ratios` for means of ratios, `means` for ratios of means.
    """
    end = "" if by == "ratios" else "_of_means"
    values = points[[f"into_first{end}", f"into_second{end}"]].to_numpy(dtype=float)
    held = ~np.isnan(values).any(1)
    scores, axis = np.full(len(values), np.nan), np.full(2, np.nan)
    if held.sum() > 2:
        scores[held], axis = pc1_rule(values[held])
    role = np.where(scores > N_SD, PROMOTING, np.where(scores < -N_SD, SUPPRESSING, "none"))
    return points.assign(score=scores, role=role, axis_first=axis[0], axis_second=axis[1])


# What heads look at and write


def score_heads(vlm: "VLM", runs: Runs, *, batch: int = 32) -> Result:
    """What each head attends to at the last position in both runs, and what the difference of its outputs writes.

    Visual score (ours, after the outline of arXiv 2412.18108, whose formula was not found): with w the attention to
    image tokens and a its shares, w (1 - H(a) / log n). Routing and writing are those of arXiv 2606.28273: w of the
    first run minus that of the second; and (z_first - z_second) W_O W_U, without the final norm (nor a norm after
    attention, in the families that have one): is the first run's answer among its top 20 tokens, the second's among the
    bottom 20? Of vocabularies of fewer than 400 tokens within a twentieth of them.

    Args:
        vlm: the model.
        runs: both runs of each example.
        batch: examples per forward pass.

    Returns:
        A row an example and head; baselines are what chance gives, or 0.
    """
    tables = [_scored(vlm, runs[slice(start, start + batch)]) for start in range(0, len(runs.pairs), batch)]
    return Result("head scores", pd.concat(tables, ignore_index=True), ("layer", "head"), SCORES)


def _scored(vlm: "VLM", runs: Runs) -> pd.DataFrame:
    layers, heads = list(vlm.llm_layers), [Site("llm.head_out", layer) for layer in vlm.llm_layers]
    looks, states = {}, {}
    for run in (FIRST, SECOND):
        encoded = vlm.encode(runs.of(run))
        last = [[encoded.n_pos - 1]] * len(encoded)
        weights = attention_from(vlm, encoded, last, layers)
        images = [list(row.image) for row in encoded.rows]
        looks[run] = {
            layer: [weights[layer][at][:, image].double().numpy() for at, image in enumerate(images)]
            for layer in layers
        }
        found = read(vlm, encoded, heads)
        states[run] = {site.layer: found[site][:, -1] for site in heads}
    encoded = vlm.encode(runs.of(FIRST))
    ids = [vlm.answer_ids(encoded, list(runs.said(each))) for each in (FIRST, SECOND)]
    rows = []
    for layer in layers:
        top, bottom, chance = _written(vlm, layer, states[FIRST][layer] - states[SECOND][layer], ids)
        for at, pair in enumerate(runs.pairs):
            mass, concentration = _concentration(looks[FIRST][layer][at])
            other, _ = _concentration(looks[SECOND][layer][at])
            for head in range(len(mass)):
                values = (mass[head] * concentration[head], mass[head], concentration[head], mass[head] - other[head])
                values = (*values, float(top[at, head]), float(bottom[at, head]))
                row: dict[str, Any] = {"example": pair.id, "group": pair.group or pair.id, "layer": layer, "head": head}
                for metric, value in zip(SCORES, values, strict=True):
                    row |= {metric.name: value, f"{metric.name}_baseline": chance if "writes" in metric.name else 0.0}
                rows.append(row)
    return pd.DataFrame(rows)


def _concentration(
    weights: Float[np.ndarray, "head image"],
) -> tuple[Float[np.ndarray, "head"], Float[np.ndarray, "head"]]:
    """The attention to image tokens by head, and how concentrated it is."""
    mass = weights.sum(1)
    shares = np.divide(weights, mass[:, None], out=np.zeros_like(weights), where=mass[:, None] > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    n = weights.shape[1]
    return mass, 1 + (shares * logs).sum(1) / np.log(n) if n > 1 else np.ones(len(mass))


def _written(
    vlm: "VLM",
    layer: int,
    difference: Float[torch.Tensor, "example width"],
    ids: Sequence[Any],
) -> tuple[np.ndarray, np.ndarray, float]:
    """By example and head: is the first answer at the top of what is written, the second at the bottom? And chance."""
    path, _ = vlm.module_of(Site("llm.head_out", layer))
    out, n_heads = vlm.model.get_submodule(path), vlm.n_heads("llm")
    size, n = difference.shape[-1] // n_heads, len(difference)
    alone = difference.new_zeros(n, n_heads, difference.shape[-1])
    for head in range(n_heads):
        alone[:, head, head * size : (head + 1) * size] = difference[:, head * size : (head + 1) * size]
    with torch.no_grad():
        nothing = torch.zeros_like(difference[:1])
        written = out(alone.flatten(0, 1)) - out(nothing)
        logits = vlm.readout(written, normed=False).reshape(n, n_heads, -1)
    logits = logits[..., : vlm.readout.n_words]
    n_words = logits.shape[-1]
    k = min(N_TOP, max(1, int(TOP_SHARE * n_words)))
    own, other = (logits.gather(-1, each.to(logits.device)[:, None, None].expand(n, n_heads, 1)) for each in ids)
    silent = logits.abs().amax(-1) == 0
    top = ((logits >= own).sum(-1) <= k) & ~silent
    bottom = ((logits <= other).sum(-1) <= k) & ~silent
    return top.cpu().numpy(), bottom.cpu().numpy(), k / n_words


def leading(scores: Result, name: str, examples: Sequence[str], n: int, *, magnitude: bool = False) -> tuple[Any, ...]:
    """The heads with the largest mean of a score over some examples, the largest first.

    Args:
        scores: as `score_heads` gives them.
        name: of the score.
        examples: those that may choose.
        n: how many heads.
        magnitude: whether the sign is left aside.
    """
    some = scores.table[scores.table["example"].isin(set(examples))]
    means = some.groupby(["layer", "head"], sort=True)[name].mean()
    order = (means.abs() if magnitude else means).sort_values(ascending=False, kind="stable")
    return tuple((int(layer), int(head)) for layer, head in cast(Any, order.index[:n]))
