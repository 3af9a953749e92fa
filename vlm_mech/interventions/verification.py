"""From what a pass left behind to receipts: did each edit arrive, and could it reach the answer?"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.architectures.weights import weight_of
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Cells
from vlm_mech.interventions.attention import Cutting, aside
from vlm_mech.interventions.attention_proof import attention_receipts, rounding
from vlm_mech.interventions.passes import Batch, Window, prompt_pass
from vlm_mech.interventions.plan import Plan, Write
from vlm_mech.interventions.reaching import reaches_from, reaches_nothing
from vlm_mech.interventions.receipt import Receipt, ReceiptError, WriteReceipt
from vlm_mech.interventions.timeline import Seen, witness_of

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
        for receipt in attention_receipts(vlm, encoded, where, cutting, moved):
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
        tolerance = 0.0 if exact else rounding(expected)
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
        return reaches_nothing(encoded, all(not write.generated for write in writes))
    return reaches_from(vlm, encoded, site.stream, site.layer, cells, mixes=site.point == "resid_pre")
