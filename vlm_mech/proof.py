"""From what a pass left behind to receipts: did each edit arrive, and could it reach the answer?"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_mech.attention import AttentionCall
from vlm_mech.edit import Cut, Plan, Write
from vlm_mech.prompt import Encoded
from vlm_mech.receipt import KnockoutReceipt, Receipt, ReceiptError, WriteReceipt
from vlm_mech.site import Site
from vlm_mech.step import Seen, witness_of

if TYPE_CHECKING:
    from vlm_mech.model import VLM


def receipts_of(
    vlm: "VLM", encoded: Encoded, made: Plan, seen: Seen, calls: dict[Any, list[AttentionCall]], moved: float
) -> tuple[Receipt, ...]:
    """A receipt for every edited site and every cut layer, in forward order, not yet verified.

    Args:
        calls: the attention calls of the cut layers as recorded by `attention.audited`.
        moved: largest absolute change of the last position's logits against the unedited run.
    """
    receipts: list[Receipt] = []
    for site, writes in sorted(made.writes.items(), key=lambda item: item[0].order):
        receipts.append(_write_receipt(vlm, encoded, site, writes, seen, moved))
    for layer, cuts in sorted(made.cuts.items()):
        receipts.append(_knockout_receipt(vlm, encoded, layer, cuts, seen, calls[layer], moved))
    return tuple(receipts)


def _write_receipt(
    vlm: "VLM", encoded: Encoded, site: Site, writes: list[Write], seen: Seen, moved: float
) -> WriteReceipt:
    what = " & ".join(write.what for write in writes)
    if site not in seen.written:
        raise ReceiptError(f"{what} at {site}: the site was never reached")
    before, written = seen.before[site], seen.written[site]
    witness = witness_of(vlm, site)
    error, tolerance = 0.0, 0.0
    if witness is not None:
        expected, exact = _expected(vlm, encoded, site, written, seen)
        received = _received(encoded, site, seen.received[site])
        error = (received.float() - expected.float()).abs().max().item()
        tolerance = 0.0 if exact else _rounding(expected)
    cells = [write.cells for write in writes if write.cells is not None]
    reaches, reason = _write_reaches(vlm, encoded, site, writes)
    return WriteReceipt(
        intervention=what,
        site=str(site),
        n_cells=sum(len(each) for each in cells),
        change=(written.float() - before.float()).abs().max().item(),
        witness="" if witness is None else witness.name,
        readback_error=error,
        tolerance=tolerance,
        reaches=reaches,
        reason=reason,
        readout_change=moved,
    )


def _rounding(states: Tensor) -> float:
    """Allowance for the same sum done in another order, in the data type of the states."""
    steps = 64 if states.dtype == torch.float32 else 4
    return steps * torch.finfo(states.dtype).eps * max(1.0, states.float().abs().max().item())


def _expected(vlm: "VLM", encoded: Encoded, site: Site, written: Tensor, seen: Seen) -> tuple[Tensor, bool]:
    """What the witness must receive given what was written, and whether exactly."""
    if site in seen.beside:
        return seen.beside[site] + written, False
    if site.point == "head_out":
        blocks = vlm.blocks(site.stream)
        out = vlm.model.get_submodule(f"{blocks.path}.{site.layer}.{blocks.attention}.{blocks.out}")
        return out.forward(written), False
    if site.point == "resid_post" and site.stream == "vision" and site.layer == vlm.vision_depth - 1:
        dropped = vlm.n_class_tokens if vlm.family.drops_class_tokens(vlm.config) else 0
        return written[:, dropped:], True
    if site.name == "projector.out" and not vlm.family.drops_class_tokens(vlm.config):
        return written[:, vlm.n_class_tokens :], True
    return written, True


def _received(encoded: Encoded, site: Site, received: Tensor) -> Tensor:
    if site.name != "projector.out":
        return received
    # The decoder's input holds the projected patches at the image positions of each prompt.
    return torch.stack([received[example, list(row.image)] for example, row in enumerate(encoded.rows)])


def _write_reaches(vlm: "VLM", encoded: Encoded, site: Site, writes: list[Write]) -> tuple[bool, str]:
    positions = {position for write in writes if write.cells is not None for position in write.cells.positions.tolist()}
    if not positions:
        return True, ""
    return _reaches(vlm, encoded, site.stream, site.layer, positions, mixes=site.point == "resid_pre")


def _reaches(
    vlm: "VLM", encoded: Encoded, stream: str, layer: int | None, positions: set[int], *, mixes: bool
) -> tuple[bool, str]:
    """Whether states of a layer at these positions can matter; `mixes`: they still pass this layer's attention."""
    if stream == "vision":
        depth = vlm.vision_depth
        if layer is not None and layer >= depth:
            return False, f"the projector reads the output of vision block {depth - 1}; later blocks never matter"
        only_class = max(positions) < vlm.n_class_tokens
        if layer == depth - 1 and not mixes and only_class and vlm.family.drops_class_tokens(vlm.config):
            return False, "the class token is dropped before the projector"
    last_layer = stream == "llm" and layer == vlm.n_layers("llm") - 1
    if last_layer and not mixes and encoded.n_pos - 1 not in positions:
        return False, "after the last attention nothing flows from these positions to the last one"
    return True, ""


def _knockout_receipt(
    vlm: "VLM",
    encoded: Encoded,
    where: tuple[str, int],
    cuts: list[Cut],
    seen: Seen,
    calls: list[AttentionCall],
    moved: float,
) -> KnockoutReceipt:
    stream, layer = where
    what = " & ".join(cut.what for cut in cuts)
    site = f"{stream}.attention[{layer}]"
    edges = seen.edges.get(where, [])
    if not edges or len(calls) < len(edges):
        raise ReceiptError(
            f"{what} at {site}: {len(edges)} masks were set but {len(calls)} attention calls seen; "
            "the model's attention does not pass through transformers' attention interface"
        )
    measures = [_measure(call, *edge) for call, edge in zip(calls, edges, strict=False)]
    queries = {position for cut in cuts for row in cut.queries for position in row}
    reaches, reason = _reaches(vlm, encoded, stream, layer, queries, mixes=False) if queries else (True, "")
    return KnockoutReceipt(
        intervention=what,
        site=site,
        n_edges=sum(int((allowed & blocked).sum()) for allowed, blocked in edges),
        natural_mass=sum(measure.natural for measure in measures) / len(measures),
        blocked_mass=max(measure.blocked for measure in measures),
        row_sum_error=max(measure.row_sum_error for measure in measures),
        kernel_error=max(measure.kernel_error for measure in measures),
        tolerance=_rounding(calls[0].output),
        reaches=reaches,
        reason=reason,
        readout_change=moved,
    )


@dataclasses.dataclass(frozen=True)
class _Measure:
    natural: float
    blocked: float
    row_sum_error: float
    kernel_error: float


def _measure(call: AttentionCall, allowed: Tensor, blocked: Tensor) -> _Measure:
    """Attention on the cut edges of one call: meant by the model, left over, and whether the kernel obeyed."""
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
    return _Measure(mean, max(left), max(row_sum), max(kernel))
