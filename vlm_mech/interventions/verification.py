"""From what a pass left behind to receipts: did each edit arrive, and could it reach the answer?"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.architectures.weights import weight_of
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Cells
from vlm_mech.interventions.attention import AttentionCall, Cutting, aside
from vlm_mech.interventions.passes import Batch, Window, prompt_pass
from vlm_mech.interventions.plan import Plan, Write
from vlm_mech.interventions.receipt import KnockoutReceipt, Receipt, ReceiptError, WriteReceipt
from vlm_mech.interventions.timeline import Seen, witness_of

NONE_GIVEN = "no token of an answer is given to the model, since what is read is foretold by the prompt alone"
NONE_GENERATED = "every answer ended with its first token, so no pass had a generated token to edit"


@dataclasses.dataclass(eq=False)
class Proofs:
    """Receipts of the state edits of a plan, taken pass by pass."""

    vlm: TracedModel
    encoded: Batch
    made: Plan
    seen: Seen = dataclasses.field(default_factory=Seen)
    receipts: dict[Site, WriteReceipt] = dataclasses.field(default_factory=dict)
    saw_generated: bool = False

    def take(self, window: Window) -> None:
        """Proves what the pass that just ended has written; of several passes the worst is kept.

        Raises:
            ReceiptError: an edit did not take effect.
        """
        self.saw_generated |= window.has_generated
        for site, writes in self.made.writes.items():
            unread = witness_of(self.vlm, site) is None and site in self.seen.written and site not in self.receipts
            if not unread and site not in self.seen.received:
                continue
            receipt = write_receipt(self.vlm, self.encoded, site, writes, self.seen, 0.0, window)
            before = self.receipts.get(site, receipt)
            worst = max(before, receipt, key=lambda each: each.readback_error - each.tolerance)
            # A NaN must not be lost behind a number.
            change = max(before.change, receipt.change) if receipt.change == receipt.change else receipt.change
            self.receipts[site] = dataclasses.replace(worst, change=change)
            self.seen.received.pop(site, None)


def receipts_of(proofs: Proofs, cuttings: Sequence[Cutting], moved: float) -> tuple[Receipt, ...]:
    """A receipt for every edited site and every cut layer, in forward order, not yet verified.

    Args:
        cuttings: what passed through the cut layers, in the order of `made.cuts`.
        moved: largest absolute change of the read-out (`Run.readout`) against the unedited run.

    Raises:
        ReceiptError: an edited site or a cut layer was never reached.
    """
    vlm, encoded, made = proofs.vlm, proofs.encoded, proofs.made
    receipts: list[Receipt] = []
    for site, writes in sorted(made.writes.items(), key=lambda item: item[0].order):
        if site not in proofs.receipts and not proofs.saw_generated and all(write.cells is None for write in writes):
            receipts.append(WriteReceipt(_named(writes), str(site), 0, 0.0, "", 0.0, 0.0, False, NONE_GENERATED, moved))
            continue
        if site not in proofs.receipts:
            raise ReceiptError(f"{_named(writes)} at {site}: the site was never reached")
        receipts.append(dataclasses.replace(proofs.receipts[site], pass_readout_change=moved))
    layers = zip(made.cuts, cuttings, strict=True)
    for where, cutting in sorted(layers, key=lambda item: item[0]):
        receipt = _knockout_receipt(vlm, encoded, where, cutting, moved)
        if not proofs.saw_generated and all(cut.generated and not cut.queries for cut in cutting.cuts):
            receipt = dataclasses.replace(receipt, reaches=False, reason=NONE_GENERATED)
        receipts.append(receipt)
    return tuple(receipts)


def _named(writes: Sequence[Write]) -> str:
    return " & ".join(write.what for write in writes)


def write_receipt(
    vlm: TracedModel,
    encoded: Batch,
    site: Site,
    writes: list[Write],
    seen: Seen,
    moved: float,
    window: Window | None = None,
) -> WriteReceipt:
    """The receipt of the writes at one site in one pass (by default that over the prompts), not yet verified."""
    window = prompt_pass(encoded) if window is None else window
    before, written = seen.before[site], seen.written[site]
    witness = witness_of(vlm, site)
    error, tolerance = 0.0, 0.0
    if witness is not None:
        expected, exact = _expected(vlm, encoded, site, seen, window)
        error = _difference(_received(vlm, encoded, site, seen.received[site], window), expected)
        tolerance = 0.0 if exact else _rounding(expected)
    cells = [write.cells for write in writes if write.cells is not None]
    reaches, reason = _write_reaches(vlm, encoded, site, writes)
    return WriteReceipt(
        intervention=_named(writes),
        site=str(site),
        n_cells=sum(len(each) for each in cells),
        change=(written.float() - before.float()).abs().max().item(),
        witness="" if witness is None else witness.name,
        readback_error=error,
        tolerance=tolerance,
        reaches=reaches,
        reason=reason,
        pass_readout_change=moved,
        rows=_rows(site, writes, window),
    )


def _rows(site: Site, writes: Sequence[Write], window: Window) -> tuple[tuple[int, int], ...]:
    """The rows of the pass in which states are written, each with the number of its prompt."""
    found: set[tuple[int, int]] = set()
    for write in writes:
        examples = torch.arange(len(write.placed.counts)).repeat_interleave(torch.tensor(write.placed.counts).long())
        found |= set(zip(write.placed.rows.tolist(), examples.tolist(), strict=True))
        if write.generated:
            found |= {(prompt, prompt) for prompt in range(window.n_prompts)}
    if site.stream != "llm":
        return tuple(sorted(found))
    return tuple((row, prompt) for row, prompt in enumerate(window.prompts) if (prompt, prompt) in found)


def _rounding(states: Tensor) -> float:
    """Allowance for the same sum done in another order, in the data type of the states."""
    steps = 64 if states.dtype == torch.float32 else 4
    return steps * torch.finfo(states.dtype).eps * max(1.0, states.float().abs().max().item())


def _difference(received: Tensor, expected: Tensor) -> float:
    """Largest difference; where the receiver only arranges the numbers anew, that of the sorted numbers."""
    received, expected = received.float(), expected.to(received.device).float()
    if received.shape != expected.shape:
        if received.numel() != expected.numel():
            return float("inf")
        received, expected = received.flatten().sort().values, expected.flatten().sort().values
    # A chunk of the prompt may hold none of what was written.
    return (received - expected).abs().max().item() if received.numel() else 0.0


def _expected(vlm: TracedModel, encoded: Batch, site: Site, seen: Seen, window: Window) -> tuple[Tensor, bool]:
    """What the witness must receive in a pass given what was written, and whether exactly."""
    written = seen.written[site]
    if site.point == "embed":
        return written / written.norm(dim=-1, keepdim=True), False
    family, blocks = vlm.family, vlm.blocks(site.stream)
    block = "" if site.layer is None else f"{blocks.path}.{site.layer}"
    if site.name == "llm.resid_post" and site in seen.beside:
        chosen, rows, positions = window.within(encoded.cells("image"))
        total = written.clone()
        total[rows, positions] += seen.beside[site].flatten(0, 1)[chosen].to(written.device)
        return total, True
    if site in seen.beside:
        scale = 1.0
        if blocks.scales is not None:
            name = blocks.scales[site.point == "mlp_out"]
            scale = weight_of(vlm.model, f"{block}.{name}")
        return seen.beside[site] + scale * written, False
    if site.point == "head_out":
        return _given_by(vlm, f"{block}.{blocks.attention}.{blocks.out}", written), False
    if site.name == "projector.in" and family.projector_first is None:
        return _given_by(vlm, family.projector, written), False
    if vlm.is_contrastive:
        # Of an image with a class token nothing else is pooled.
        last = site.name == "vision.resid_post" and site.layer == vlm.n_layers("vision") - 1
        return written[:, :1] if last and family.class_tokens else written, True
    if site.name == "vision.resid_post" and site.layer == vlm.vision_depth - 1 and blocks.after is None:
        return written[:, vlm.n_class_tokens - vlm.n_kept_class_tokens :], True
    if site.name == "projector.out":
        given, standing = _plain_tokens(encoded)
        given = given[window.within(standing)[0]]
        return written[given[:, 0], given[:, 1]], True
    return written, True


def _given_by(vlm: TracedModel, path: str, states: Tensor) -> Tensor:
    """What a module makes of these states; in a generation the trace that proves the edit is still open."""
    with aside(vlm):
        return vlm.model.get_submodule(path).forward(states)


def _plain_tokens(encoded: Encoded) -> tuple[Tensor, Cells]:
    """Cells of projector.out that become one token each, unmixed, and the cells of the decoder where those stand."""
    given, standing = [], []
    for example, row in enumerate(encoded.rows):
        for picture in row.images:
            layout = picture.layout
            if not layout.views:
                given += layout.given.tolist()
                standing += [(example, position) for position in picture.positions]
            for view in layout.views:
                plain = view.given[:, 0] >= 0
                given += view.given[plain].tolist()
                standing += [(example, picture.positions[slot]) for slot in view.slots[plain]]
    cells = torch.tensor(standing).reshape(-1, 2)
    return torch.tensor(given).reshape(-1, 2), Cells(cells[:, 0], cells[:, 1], (len(cells),))


def _received(vlm: TracedModel, encoded: Batch, site: Site, received: Tensor, window: Window) -> Tensor:
    if vlm.is_contrastive:
        return received
    reads = vlm.family.vision_reads(vlm.config)
    if site.stream == "vision" and site.point == "resid_post" and site.layer == vlm.vision_depth - 1 and len(reads) > 1:
        # The outputs of several blocks lie side by side.
        return received.chunk(len(reads), dim=-1)[reads.index(vlm.vision_depth)]
    if site.name != "projector.out":
        return received
    # The decoder's embeddings hold the projected patches at the image positions of each prompt.
    _, rows, positions = window.within(_plain_tokens(encoded)[1])
    return received[rows, positions]


def _write_reaches(vlm: TracedModel, encoded: Batch, site: Site, writes: list[Write]) -> tuple[bool, str]:
    cells = {
        cell
        for write in writes
        if write.cells is not None
        for cell in zip(write.cells.rows.tolist(), write.cells.positions.tolist(), strict=True)
    }
    if not cells:
        return _reaches_nothing(encoded, all(not write.generated for write in writes))
    return _reaches(vlm, encoded, site.stream, site.layer, cells, mixes=site.point == "resid_pre")


def _reaches(
    vlm: TracedModel, encoded: Batch, stream: str, layer: int | None, cells: set[tuple[int, int]], *, mixes: bool
) -> tuple[bool, str]:
    """Whether states of a layer at these cells can matter; `mixes`: they still pass this layer's attention."""
    if isinstance(encoded, DualEncoded):
        return _reaches_embedding(vlm, encoded, stream, layer, cells, mixes=mixes)
    if stream == "vision":
        depth = vlm.vision_depth
        if layer is not None and layer >= depth:
            return False, f"the projector reads the output of vision block {depth - 1}; later blocks never matter"
        if layer == depth - 1 and not mixes and not cells & encoded.read_cells:
            if all(position < vlm.n_class_tokens for _, position in cells):
                return False, "the class token is dropped before the projector"
            return False, "no image token is made from these positions of the tower"
    last_layer = stream == "llm" and layer == vlm.n_layers("llm") - 1
    # The prompt's last token and those of an answer are read.
    if last_layer and not mixes and all(position < encoded.n_prompt - 1 for _, position in cells):
        return False, "after the last attention nothing flows from these positions to the last one"
    return True, ""


def _reaches_embedding(
    vlm: TracedModel, encoded: DualEncoded, stream: str, layer: int | None, cells: set[tuple[int, int]], *, mixes: bool
) -> tuple[bool, str]:
    pooled = encoded.pooled_cells(stream)
    if layer == vlm.n_layers(stream) - 1 and not mixes and not cells & pooled:
        return False, "after the last attention nothing flows from these positions to those that are pooled"
    if layer is not None and stream == "text" and vlm.family.causal:
        ends = dict(pooled)
        if all(position > ends[row] for row, position in cells):
            return False, "the tower is causal: the pooled position does not see what comes after it"
    return True, ""


def _knockout_receipt(
    vlm: TracedModel, encoded: Batch, where: tuple[str, int], cutting: Cutting, moved: float
) -> KnockoutReceipt:
    stream, layer = where
    what = " & ".join(cut.what for cut in cutting.cuts)
    site = f"{stream}.attention[{layer}]"
    if not cutting.n_calls:
        raise ReceiptError(
            f"{what} at {site}: no attention call was seen; the model's attention does not pass through "
            "transformers' attention interface"
        )
    n_edges = sum(int((call.allowed & call.blocked).sum()) for call in cutting.calls)
    queries = {(row, query) for cut in cutting.cuts for row, positions in cut.queries.items() for query in positions}
    if not n_edges and queries:
        name = cutting.cuts[0].what
        raise UsageError(f"{name} at {stream} layer {layer} cuts no edge: attention allows none of them")
    measures = [_measure(call) for call in cutting.calls] or [_Measure(0.0, 0.0, 0.0, 0.0)]
    reaches, reason = knockout_reaches(vlm, encoded, stream, layer, queries)
    return KnockoutReceipt(
        intervention=what,
        site=site,
        n_edges=n_edges,
        natural_mass=sum(measure.natural for measure in measures) / len(measures),
        blocked_mass=max(measure.blocked for measure in measures),
        row_sum_error=max(measure.row_sum_error for measure in measures),
        kernel_error=max(measure.kernel_error for measure in measures),
        tolerance=_rounding(cutting.calls[0].output) if cutting.calls else 0.0,
        reaches=reaches,
        reason=reason,
        pass_readout_change=moved,
        rows=_cut_rows(stream, cutting),
    )


def _cut_rows(stream: str, cutting: Cutting) -> tuple[tuple[int, int], ...]:
    """The rows of the decoder's passes in which edges are cut, each with the number of its prompt."""
    if stream != "llm":
        return ()
    window = None if cutting.passes is None else cutting.passes.now
    prompts = tuple(range(cutting.n_rows)) if window is None else window.prompts
    named = {prompt for cut in cutting.cuts for prompt in cut.keys if cut.generated or prompt in cut.queries}
    return tuple((row, prompt) for row, prompt in enumerate(prompts) if prompt in named)


def knockout_reaches(
    vlm: TracedModel, encoded: Batch, stream: str, layer: int, queries: set[tuple[int, int]]
) -> tuple[bool, str]:
    """Whether a cut at these (row, position) queries of a layer can matter, and why not."""
    if not queries:
        return _reaches_nothing(encoded, isinstance(encoded, Encoded) and encoded.answers is not None)
    return _reaches(vlm, encoded, stream, layer, queries, mixes=False)


def _reaches_nothing(encoded: Batch, none_given: bool) -> tuple[bool, str]:
    """Whether an edit of no position of the prompt can matter: of generated tokens it can."""
    return (False, NONE_GIVEN) if none_given and isinstance(encoded, Encoded) and encoded.answers else (True, "")


@dataclasses.dataclass(frozen=True)
class _Measure:
    natural: float
    blocked: float
    row_sum_error: float
    kernel_error: float


def _measure(call: AttentionCall) -> _Measure:
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
    return _Measure(mean, max(left), max(row_sum), max(kernel))
