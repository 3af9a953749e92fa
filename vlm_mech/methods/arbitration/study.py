"""What ablating parts does to lost pictures, what parts write themselves, and whether the picture is read."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Each
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.specification import Intervention, Knockout
from vlm_mech.interventions.trace import read
from vlm_mech.methods.arbitration.data import HEAD, MATCHED, MLP, Part, edits_of
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.measures import Measure, logit_diff, said
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.sweeps.sweep import Point, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("what", "part", "layer", "head")
RESTORED = Metric("restored", "share", "share of lost images for which greedy decoding gives what is shown")
DIFF = Metric("logit_diff", "logits", "logit of the shown answer minus that of the usual one", signed=True)
WITHHELD = Metric(
    "withheld", "logits", "rise of the shown answer's logit minus the fall of the usual one's, relative to the mean of "
    "all words: above 0 the part suppressed the shown answer, below 0 it supported the usual one", signed=True,
)  # fmt: skip
WRITTEN = Metric(
    "written", "logits", "what the part itself writes at the last token for the usual answer over the shown one: "
    "fall of logit_diff by it, read off the last residual stream", signed=True,
)  # fmt: skip
BEYOND = Metric("written_less_half", "logits", "what it writes, minus half of the effect of its ablation", signed=True)
BROUGHT = Metric(
    "brought_less_half", "logits", "rise in what heads write for the shown answer, minus half of the effect of the "
    "ablation", signed=True,
)  # fmt: skip
TURNED = Metric("turned", "share", "attention of the last token that shifts, in heads that then carry the shown answer")
IMAGE = Metric("image", "heads", "rise of the last token's attention to the image, summed over all heads", signed=True)
OF_OTHERS = (BROUGHT, TURNED, IMAGE)
METRICS = (DIFF, RESTORED, WITHHELD, WRITTEN, BEYOND, *OF_OTHERS)
ROWS = 2**22
"""Logits that are held at once."""


def _centred(answer: Sequence[str], other: Sequence[str], name: str) -> Measure:
    """Logit of an answer's first token minus the mean over all words."""
    metric = Metric(name, "logits", "logit minus the mean over all words", signed=True)
    number = 0 if name == "shown" else 1

    def of(logits: Tensor, *ids: Tensor) -> Tensor:
        logits = logits.float()
        return logits.gather(1, ids[number][:, None])[:, 0] - logits.mean(1)

    return Measure(metric, of, (answer, other))


def answers(vlm: "VLM", pairs: Pairs, *, batch: int = 32) -> pd.DataFrame:
    """What the model says of each picture in conflict: a row a pair, `shown` and `usual` 0 or 1, and `logit_diff`."""
    tables = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        measures = [
            said(some.answer), said(some.counterfactual_answer), logit_diff(some.answer, some.counterfactual_answer)
        ]  # fmt: skip
        asked = readings_of(vlm, vlm.encode(some.base), measures)
        values = asked.values(record(vlm, asked.encoded).reads)
        names = {"example": [pair.id for pair in some], "group": [pair.group or pair.id for pair in some]}
        numbers = (each.double().cpu().numpy() for each in values)
        tables.append(pd.DataFrame(names | dict(zip(("shown", "usual", "logit_diff"), numbers, strict=True))))
    return pd.concat(tables, ignore_index=True)


# Parts taken away


def take_away(
    vlm: "VLM",
    pairs: Pairs,
    parts: Sequence[Part],
    *,
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    check: int = 1,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Every part ablated in the run on each pair's first picture, and what matches it.

    Args:
        parts: heads, MLPs and tokens.
        batch, engine, memory, check: as for `sweep`.
        seed: draws tokens.

    Returns:
        A row an example and cell, with `METRICS`, those of other heads missing (see `looked_at`); and the summary of
        all receipts.
    """
    edits = edits_of(vlm, pairs, parts, seed=seed)
    both = pairs.answer, pairs.counterfactual_answer
    measures = (logit_diff(*both), said(both[0]), _centred(*both, "shown"), _centred(*both, "usual"))
    numbered = list(edits)
    points = [Point((("number", at),)) for at in range(len(numbered))]
    how: dict[str, Any] = {"batch": batch, "engine": engine, "memory": memory, "check": check}
    done = sweep(vlm, list(pairs.base), points, lambda at: edits[numbered[at.number]], measures, **how)
    table = done.table.assign(at=done.table["example"].astype(int)).sort_values(["number", "at"])
    shape, written = (len(numbered), len(pairs)), _written_by(vlm, pairs, batch)
    values = {name: table[name].to_numpy(float).reshape(shape) for name in ("logit_diff", "said", "shown", "usual")}
    before = {name: table[f"{name}_baseline"].to_numpy(float).reshape(shape)[0] for name in values}
    cells = {
        part: _numbers({name: each[at] for name, each in values.items()}, before, written.get(part))
        for at, part in enumerate(numbered)
    }
    return _table(pairs, cells, before), done.provenance["receipts"]


Values = dict[str, Float[np.ndarray, "example"]]


def _numbers(after: Values, before: Values, written: Float[np.ndarray, "example"] | None) -> Values:
    """The metrics of a part ablated.

    Args:
        after, before: what the sweep measured.
        written: by the part; None of tokens.
    """
    rise, nothing = after["logit_diff"] - before["logit_diff"], np.full(len(after["said"]), np.nan)
    own = nothing if written is None else written
    withheld = after["shown"] - before["shown"] + after["usual"] - before["usual"]
    found = {DIFF.name: after["logit_diff"], RESTORED.name: after["said"], WITHHELD.name: withheld}
    return found | {WRITTEN.name: own, BEYOND.name: own - rise / 2} | {metric.name: nothing for metric in OF_OTHERS}


def _table(pairs: Pairs, cells: Mapping[Part, Values], before: Values) -> pd.DataFrame:
    """Rows of every part, and of the mean over what matches it."""
    names = {"example": [pair.id for pair in pairs], "group": [pair.group or pair.id for pair in pairs]}
    clean: dict[str, Any] = {f"{metric.name}_baseline": 0.0 for metric in METRICS}
    clean |= {f"{DIFF.name}_baseline": before["logit_diff"], f"{RESTORED.name}_baseline": before["said"]}
    rows = []
    for part, values in cells.items():
        if part.draw is not None:
            continue
        rows.append(pd.DataFrame(names | part.cell | values | clean))
        others = [other for other in cells if _matches(other, part)]
        if others:
            means = {metric.name: np.mean([cells[each][metric.name] for each in others], 0) for metric in METRICS}
            rows.append(pd.DataFrame(names | part.cell | {"what": MATCHED} | means | clean))
    return pd.concat(rows, ignore_index=True)


def looked_at(
    vlm: "VLM", pairs: Pairs, table: pd.DataFrame, examined: Sequence[Part], *, batch: int = 32, seed: int = 0
) -> pd.DataFrame:
    """The table with what other heads then write and look at, of parts that are ablated in passes of their own.

    Args:
        table: as `take_away` gives it.
        examined: some of its parts.
        batch: examples per forward pass.
        seed: that of the table.
    """
    edits = edits_of(vlm, pairs, examined, seed=seed)
    looked = _looked(vlm, pairs, {part: edits[part] for part in examined}, batch)
    found, order = table.copy(), [pair.id for pair in pairs]
    for part, (brought, turned, image) in looked.items():
        of = (found[list(AXES)] == pd.Series(part.cell)).all(axis=1)
        rows = found[of].set_index("example").loc[order]
        half = (rows[DIFF.name] - rows[f"{DIFF.name}_baseline"]).to_numpy() / 2
        values = pd.DataFrame(np.stack([brought - half, turned, image], 1), index=order)
        found.loc[of, [metric.name for metric in OF_OTHERS]] = values.loc[found.loc[of, "example"]].to_numpy()
    return found


def _matches(other: Part, part: Part) -> bool:
    """Whether another part is a control of one: a head of its layer, the MLP of another layer, a token drawn."""
    if other.what != part.what or other == part:
        return False
    return other.layer == part.layer if part.what == HEAD else part.what == MLP or other.draw is not None


# What parts write, and what heads look at


def _sites(vlm: "VLM") -> list[Site]:
    points = ("llm.head_out", "llm.mlp_out")
    return [*(Site(point, layer) for point in points for layer in vlm.llm_layers), _end(vlm)]


def _end(vlm: "VLM") -> Site:
    return Site("llm.resid_post", vlm.n_layers("llm") - 1)


def _written(
    vlm: "VLM", encoded: Encoded, ids: Sequence[Tensor], intervention: Intervention | None = None
) -> dict[Part, Float[np.ndarray, "2 example"]]:
    """What each head and MLP writes at the last token: the fall of both answers' logits when it is taken out of the
    last residual stream alone, shown answer first, each beside the mean of all words.

    A norm between attention and residual stream, in families that have one, is left aside for heads.
    """
    states = read(vlm, encoded, _sites(vlm), intervention)
    end, found = states[_end(vlm)][:, -1], {}
    with torch.no_grad():
        whole = _both(vlm, end, ids)
        for layer in vlm.llm_layers:
            heads = _outputs(vlm, layer, states[Site("llm.head_out", layer)][:, -1])
            for head, out in enumerate(heads):
                found[Part(HEAD, layer, head)] = (whole - _both(vlm, end - out, ids)).numpy()
            out = states[Site("llm.mlp_out", layer)][:, -1]
            found[Part(MLP, layer)] = (whole - _both(vlm, end - out, ids)).numpy()
    return found


def _outputs(vlm: "VLM", layer: int, states: Float[Tensor, "example width"]) -> Float[Tensor, "head example width"]:
    """What each head adds to the residual stream."""
    path, _ = vlm.module_of(Site("llm.head_out", layer))
    out, n_heads = vlm.model.get_submodule(path), vlm.n_heads("llm")
    alone = states.new_zeros(n_heads, *states.shape)
    size = states.shape[-1] // n_heads
    for head in range(n_heads):
        alone[head, :, head * size : (head + 1) * size] = states[:, head * size : (head + 1) * size]
    return out(alone) - out(torch.zeros_like(states[:1]))


def _both(vlm: "VLM", states: Float[Tensor, "example width"], ids: Sequence[Tensor]) -> Float[Tensor, "2 example"]:
    """Logits of both answers beside the mean of all words."""
    found, step = [], max(1, ROWS // vlm.readout.n_words)
    for start in range(0, len(states), step):
        logits = vlm.readout(states[start : start + step])[:, : vlm.readout.n_words]
        each = [logits.gather(1, some[start : start + step].to(logits.device)[:, None])[:, 0] for some in ids]
        found.append(torch.stack(each) - logits.mean(1))
    return torch.cat(found, 1).double().cpu()


def _batches(vlm: "VLM", pairs: Pairs, batch: int) -> list[tuple[slice, Encoded, list[Tensor]]]:
    found = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        asked = readings_of(vlm, vlm.encode(some.base), [_centred(some.answer, some.counterfactual_answer, "shown")])
        found.append((slice(start, start + len(some)), asked.encoded, list(asked.each[0].ids)))
    return found


def _written_by(vlm: "VLM", pairs: Pairs, batch: int) -> dict[Part, Float[np.ndarray, "example"]]:
    """What each head and MLP writes for the usual answer over the shown one, unedited."""
    done = [_written(vlm, encoded, ids) for _, encoded, ids in _batches(vlm, pairs, batch)]
    return {part: np.concatenate([each[part][1] - each[part][0] for each in done]) for part in done[0]}


def _looked(
    vlm: "VLM", pairs: Pairs, edits: Mapping[Part, Intervention], batch: int
) -> dict[Part, Float[np.ndarray, "3 example"]]:
    """Of parts ablated: what other heads write more of the shown answer, how far their attention moves, and how
    much more all look at the image."""
    found = {part: np.zeros((3, len(pairs))) for part in edits}
    for rows, encoded, ids in _batches(vlm, pairs, batch) if edits else ():
        last = [[encoded.n_pos - 1]] * len(encoded)
        before, looks = _written(vlm, encoded, ids), attention_from(vlm, encoded, last, list(vlm.llm_layers))
        for part in edits:
            edit = _of_rows(edits[part], rows)
            after = _written(vlm, encoded, ids, edit)
            then = attention_from(vlm, encoded, last, list(vlm.llm_layers), intervention=edit)
            found[part][:, rows] = _compared(part, encoded, before, after, looks, then)
    return found


def _of_rows(edit: Intervention, rows: slice) -> Intervention:
    """An edit of all pairs for some of them."""
    if isinstance(edit, Knockout) and isinstance(edit.key, Each):
        return dataclasses.replace(edit, key=Each(edit.key.spans[rows]))
    return edit


def _compared(
    part: Part,
    encoded: Encoded,
    before: Mapping[Part, np.ndarray],
    after: Mapping[Part, np.ndarray],
    looks: Mapping[int, Tensor],
    then: Mapping[int, Tensor],
) -> Float[np.ndarray, "3 example"]:
    others = [each for each in before if each.what == HEAD and each != part]
    more = np.stack([after[each][0] - before[each][0] for each in others])
    moved = np.stack(
        [
            (then[each.layer][:, each.head] - looks[each.layer][:, each.head]).abs().sum(-1).numpy() / 2
            for each in others
        ]
    )
    gains = more.clip(min=0)
    whole = gains.sum(0)
    turned = np.divide((gains * moved).sum(0), whole, out=np.zeros_like(whole), where=whole > 0)
    change = sum(then[layer] - looks[layer] for layer in looks)
    image = [change[at][:, list(row.image)].sum().item() for at, row in enumerate(encoded.rows)]  # type: ignore[index]
    return np.stack([more.sum(0), turned, np.array(image)])


# Whether the picture is read


def picture_effects(vlm: "VLM", pairs: Pairs, *, batch: int = 32) -> Float[np.ndarray, "depth example"]:
    """By how much the picture in conflict raises the lens's lead of what it shows, against the other picture.

    Read at the last token, in the decoder's input and after every block; what no depth shows is not read.
    """
    found = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        leads = []
        for prompts in (some.base, some.counterfactual):
            asked = readings_of(vlm, vlm.encode(prompts), [logit_diff(some.answer, some.counterfactual_answer)])
            clean = record(vlm, asked.encoded)
            with torch.no_grad():
                states = [
                    clean.hidden(depth)[:, asked.encoded.n_prompt - 1 :] for depth in range(len(vlm.llm_layers) + 1)
                ]
                logits = [vlm.readout(each.flatten(0, 1)).unflatten(0, each.shape[:2]) for each in states]
            leads.append(np.stack([asked.value(0, each).double().cpu().numpy() for each in logits]))
        found.append(leads[0] - leads[1])
    return np.concatenate(found, 1)
