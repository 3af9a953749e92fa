"""From what attention functions were given to receipts: did cut edges carry nothing, did others get their weights?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.interventions.attention import AttentionCall, Cutting
from vlm_mech.interventions.attention_plan import Cut, kinds_of
from vlm_mech.interventions.passes import Batch
from vlm_mech.interventions.reaching import attention_reaches
from vlm_mech.interventions.receipt import KnockoutReceipt, ReceiptError, ReweightReceipt
from vlm_mech.interventions.reweighting import (
    asked_weights,
    keys_of,
    mean_mass,
    named_queries,
    over_examples,
    weights_of,
)


def rounding(states: Tensor) -> float:
    """Allowance for the same sum done in another order, in the data type of the states."""
    steps = 64 if states.dtype == torch.float32 else 4
    return steps * torch.finfo(states.dtype).eps * max(1.0, states.float().abs().max().item())


def attention_receipts(
    vlm: TracedModel, encoded: Batch, where: tuple[str, int], cutting: Cutting, moved: float
) -> list[KnockoutReceipt | ReweightReceipt]:
    """The receipts of edges cut at one layer, and of those given other weights there, not yet verified.

    Args:
        moved: largest absolute change of the read-out against the unedited run.

    Raises:
        ReceiptError: the layer's attention was never reached.
        UsageError: attention allows none of the edges.
    """
    site = f"{where[0]}.attention[{where[1]}]"
    if not cutting.n_calls:
        what = " & ".join(cut.what for cut in cutting.cuts)
        raise ReceiptError(
            f"{what} at {site}: no attention call was seen; the model's attention does not pass through "
            "transformers' attention interface"
        )
    receipts: list[KnockoutReceipt | ReweightReceipt] = []
    for kind, edits in zip((_knockout, _reweight), kinds_of(cutting.cuts), strict=True):
        if not edits:
            continue
        reaches, reason = attention_reaches(vlm, encoded, *where, queries_of(edits))
        common = {
            "intervention": " & ".join(each.what for each in edits),
            "site": site,
            "tolerance": rounding(cutting.calls[0].output) if cutting.calls else 0.0,
            "reaches": reaches,
            "reason": reason,
            "pass_readout_change": moved,
            "rows": _cut_rows(where[0], cutting, edits),
        }
        receipts.append(kind(cutting, edits, common))
    return receipts


def queries_of(edits: Sequence[Cut]) -> set[tuple[int, int]]:
    """(row, position) of all queries of the prompt whose edges are named."""
    return {(row, query) for cut in edits for row, positions in cut.queries.items() for query in positions}


def check_any_edge(edits: Sequence[Cut], n_edges: int, where: str, done: str) -> None:
    """Raise `UsageError` where attention allows none of the edges that are named for tokens of the prompt."""
    if not n_edges and any(cut.queries for cut in edits) and not all(cut.may_be_idle for cut in edits):
        raise UsageError(f"{edits[0].what} at {where} {done} no edge: attention allows none of them")


def _cut_rows(stream: str, cutting: Cutting, edits: Sequence[Cut]) -> tuple[tuple[int, int], ...]:
    """The rows of the decoder's passes in which edges are edited, each with the number of its prompt."""
    if stream != "llm":
        return ()
    window = None if cutting.passes is None else cutting.passes.now
    prompts = tuple(range(cutting.n_rows)) if window is None else window.prompts
    named = {prompt for cut in edits for prompt in cut.keys if cut.generated or prompt in cut.queries}
    return tuple((row, prompt) for row, prompt in enumerate(prompts) if prompt in named)


def _knockout(cutting: Cutting, edits: Sequence[Cut], common: dict[str, Any]) -> KnockoutReceipt:
    n_edges = sum(int((call.allowed & call.blocked).sum()) for call in cutting.calls)
    check_any_edge(edits, n_edges, _layer(edits), "cuts")
    measures = [_measure_cut(call) for call in cutting.calls if call.blocked.any()] or [_CutMeasure(0.0, 0.0, 0.0, 0.0)]
    return KnockoutReceipt(
        n_edges=n_edges,
        natural_mass=sum(measure.natural for measure in measures) / len(measures),
        blocked_mass=max(measure.blocked for measure in measures),
        row_sum_error=max(measure.row_sum_error for measure in measures),
        kernel_error=max(measure.kernel_error for measure in measures),
        **common,
    )


def _layer(edits: Sequence[Cut]) -> str:
    return f"{edits[0].stream} layer {edits[0].layer}"


@dataclasses.dataclass(frozen=True)
class _CutMeasure:
    natural: float
    blocked: float
    row_sum_error: float
    kernel_error: float


def _measure_cut(call: AttentionCall) -> _CutMeasure:
    """Attention on the cut edges of one call: meant by the model, left over, and whether the kernel obeyed."""
    allowed, blocked = call.allowed, call.blocked
    natural, left, row_sum, kernel = [], [0.0], [0.0], [0.0]
    meant = dataclasses.replace(call, mask=allowed)
    for row in range(blocked.shape[0]):
        queries = blocked[row].any(dim=(0, -1)).nonzero().flatten()
        if not len(queries):
            continue
        cut = blocked[row][:, queries]
        weights = call.weights(row, queries)
        cut_everywhere = cut.expand_as(weights)
        natural.append(meant.weights(row, queries)[cut_everywhere].sum() / cut_everywhere.any(-1).sum())
        left.append(weights[cut_everywhere].max().item())
        row_sum.append((weights.sum(-1) - 1).abs().max().item())
        output = (weights @ call.value[row].float()).transpose(0, 1)
        kernel.append((call.output[row, queries].float() - output).abs().max().item())
    mean = torch.stack(natural).mean().item() if natural else 0.0
    return _CutMeasure(mean, max(left), max(row_sum), max(kernel))


def _reweight(cutting: Cutting, edits: Sequence[Cut], common: dict[str, Any]) -> ReweightReceipt:
    measures = [_measure_shift(call) for call in cutting.calls if call.shifts]
    n_edges = sum(measure.n_edges for measure in measures)
    check_any_edge(edits, n_edges, _layer(edits), "reweights")
    mean = max(1, len(measures))
    return ReweightReceipt(
        n_edges=n_edges,
        natural_mass=sum(measure.natural for measure in measures) / mean,
        mass=sum(measure.mass for measure in measures) / mean,
        weight_error=max((measure.weight_error for measure in measures), default=0.0),
        row_sum_error=max((measure.row_sum_error for measure in measures), default=0.0),
        kernel_error=max((measure.kernel_error for measure in measures), default=0.0),
        **common,
    )


@dataclasses.dataclass(frozen=True)
class _ShiftMeasure:
    n_edges: int
    natural: float
    mass: float
    weight_error: float
    row_sum_error: float
    kernel_error: float


def _measure_shift(call: AttentionCall) -> _ShiftMeasure:
    """Attention at the scaled edges of one call, before and after, and whether the kernel obeyed."""
    at, n_edges = named_queries(call.shifts), 0
    natural, mass, errors = [], [], [(0.0, 0.0, 0.0)]
    queries = torch.tensor(at, device=call.query.device)
    for row in range(call.query.shape[0]):
        shifts = [each.within(at, row) for each in call.shifts]
        left = call.left(row, queries)[None]
        scores = call.scores(row, queries)[None].masked_fill(~left, -torch.inf)
        named = keys_of(shifts)
        if not named.any():
            continue
        n_edges += int((named & left).sum())
        weights, asked = call.weights(row, queries), asked_weights(scores, shifts)[0]
        natural.append(mean_mass(weights_of(scores), named))
        mass.append(mean_mass(weights[None], named))
        edited = named[0].any(-1).any(0)
        output = (weights @ call.value[row].float()).transpose(0, 1)
        given = call.output[row, queries].float()
        errors.append(
            (
                _largest(weights - asked, edited),
                _largest(weights.sum(-1) - 1, edited),
                (given - output)[edited].abs().max().item(),
            )
        )
    # Of a NaN nothing may be lost.
    worst = torch.tensor(errors).amax(0).tolist()
    return _ShiftMeasure(n_edges, over_examples(torch.cat(natural)), over_examples(torch.cat(mass)), *worst)


def _largest(difference: Tensor, edited: Tensor) -> float:
    """The largest difference of head x query x ... at the queries that are edited."""
    return difference[:, edited].abs().max().item()
