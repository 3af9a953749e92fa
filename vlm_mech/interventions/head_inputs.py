"""Queries, keys and values of single heads, read and written where the attention function is given them.

They are those after the rotary turn: between runs whose tokens stand at equal positions an exchange is the same before
and after it. Where heads share keys and values (grouped-query attention), those of the whole group are meant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Cells
from vlm_mech.interventions.attention import Attend, AttentionCall, allowed_edges, attending, is_causal
from vlm_mech.interventions.attention_plan import check_heads
from vlm_mech.interventions.attention_proof import rounding
from vlm_mech.interventions.plan import Plan, plan
from vlm_mech.interventions.reaching import reaches_from
from vlm_mech.interventions.receipt import Receipt, WriteReceipt, verify
from vlm_mech.interventions.specification import Intervention
from vlm_mech.interventions.trace import carry_out, read

PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class HeadInput:
    """The queries (`q`), keys (`k`) or values (`v`) of some heads of a block of the decoder."""

    part: Literal["q", "k", "v"]
    layer: int
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UsageError(f"HeadInput({self.part!r}, ...) is not known; use one of q, k, v")
        if not isinstance(self.heads, tuple) or not all(type(head) is int for head in self.heads):
            raise UsageError(
                f"heads of HeadInput are {self.heads!r:.60}; a tuple of whole numbers is needed, as in (0, 2)"
            )
        if not self.heads:
            raise UsageError(f"HeadInput({self.part!r}, {self.layer}, ()) names no head")

    def __str__(self) -> str:
        return f"{self.part} of L{self.layer}H{','.join(map(str, self.heads))}"

    def rows_of(self, held: Tensor, n_heads: int) -> list[int]:
        """Which heads, or groups of heads that share keys and values, are meant in batch x head x pos x d_head."""
        shared = n_heads // held.shape[1]
        return sorted({head // shared for head in self.heads})


def check_head_inputs(vlm: TracedModel, inputs: Sequence[HeadInput]) -> None:
    """Raise `UsageError` for a layer or head that is not there, or a back end whose attention cannot be reached."""
    vlm.check_maskable("llm")
    for each in inputs:
        vlm.check_site(Site("llm.head_out", each.layer))
        check_heads(each.heads, vlm.n_heads("llm"), f"llm layer {each.layer}")


def read_head_inputs(
    vlm: TracedModel, encoded: Encoded, inputs: Sequence[HeadInput], intervention: Intervention | None = None
) -> dict[HeadInput, Float[Tensor, "batch head pos d_head"]]:
    """What the attention function is given for some heads in one pass.

    Args:
        intervention: what to do during the pass.

    Raises:
        UsageError: a layer or head out of range.
        ReceiptError: the intervention did not take effect.
    """
    check_head_inputs(vlm, inputs)
    found: dict[HeadInput, Tensor] = {}
    made = plan(vlm, encoded, intervention, lambda source, sites: read(vlm, source, sites))

    def watch(function: Attend) -> Attend:
        def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Any:
            given = {"q": query, "k": key, "v": value}
            for each in modules[module]:
                held = given[each.part]
                found[each] = held[:, each.rows_of(held, query.shape[1])].detach().clone()
            return function(module, query, key, value, *more, **named)

        return watched

    modules = _modules(vlm, inputs)
    with attending(set(modules), watch):
        _, _, receipts = carry_out(vlm, encoded, made)
    verify(receipts)
    _check_seen(vlm, inputs, found)
    return found


def run_with_head_inputs(
    vlm: TracedModel,
    encoded: Encoded,
    written: Mapping[HeadInput, Float[Tensor, "batch head pos d_head"]],
    cells: Cells,
) -> tuple[Float[Tensor, "batch pos vocab"], tuple[Receipt, ...]]:
    """One pass in which some heads are given other queries, keys or values at some positions, and its proof.

    The receipt compares what the kernel gave for every query with what follows from the inputs that were written.

    Args:
        written: what is put there, as `read_head_inputs` gives it.

    Raises:
        UsageError: a layer or head out of range.
        ReceiptError: the kernel did not use what was written.
        WorkError: the attention of a layer was not seen.
    """
    check_head_inputs(vlm, tuple(written))
    modules = _modules(vlm, tuple(written))
    writer = _Writer(vlm, encoded, modules, written, cells)
    with attending(set(modules), writer.attend):
        _, logits, _ = carry_out(vlm, encoded, Plan({}, {}))
    assert logits is not None, "the pass runs to its end"
    _check_seen(vlm, tuple(written), writer.receipts)
    receipts = tuple(writer.receipts[each] for each in written)
    verify(receipts)
    return logits, receipts


def _modules(vlm: TracedModel, inputs: Sequence[HeadInput]) -> dict[nn.Module, list[HeadInput]]:
    blocks, found = vlm.blocks("llm"), dict[nn.Module, list[HeadInput]]()
    for each in inputs:
        module = vlm.model.get_submodule(f"{blocks.path}.{each.layer}.{blocks.attention}")
        found.setdefault(module, []).append(each)
    return found


def _check_seen(vlm: TracedModel, inputs: Sequence[HeadInput], found: Mapping[HeadInput, object]) -> None:
    missing = [each for each in inputs if each not in found]
    if missing:
        raise WorkError(f"{vlm.name}: the attention of layer {missing[0].layer} was not seen in the pass")


@dataclass(eq=False)
class _Writer:
    """Writes inputs of heads at some cells, and proves them."""

    vlm: TracedModel
    encoded: Encoded
    modules: dict[nn.Module, list[HeadInput]]
    written: Mapping[HeadInput, Tensor]
    cells: Cells
    receipts: dict[HeadInput, WriteReceipt] = field(default_factory=dict)

    def attend(self, function: Attend) -> Attend:
        """The attention function with other inputs."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> tuple[Tensor, Any]:
            given = {"q": query, "k": key, "v": value}
            changes = {each: self._write(each, given, query.shape[1]) for each in self.modules[module]}
            output, weights = function(module, given["q"], given["k"], given["v"], mask, **options)
            error = self._error(module, given, mask, output, options)
            for each, change in changes.items():
                self.receipts[each] = self._receipt(each, change, error, rounding(output))
            return output, weights

        return attend

    def _write(self, each: HeadInput, given: dict[str, Tensor], n_heads: int) -> float:
        """Puts what is written in the place of what was given; the largest change."""
        before = given[each.part]
        after, heads, other = before.clone(), each.rows_of(before, n_heads), self.written[each]
        rows, positions = (at.to(before.device) for at in (self.cells.rows, self.cells.positions))
        for number, head in enumerate(heads):
            after[rows, head, positions] = other[rows, number, positions].to(before)
        given[each.part] = after
        return (after.float() - before.float()).abs().max().item()

    def _error(
        self, module: nn.Module, given: dict[str, Tensor], mask: Any, output: Tensor, options: dict[str, Any]
    ) -> float:
        """How far the kernel's output is from what follows from the inputs, at every query that is no padding."""
        query = given["q"]
        keys, values = (given[part].repeat_interleave(query.shape[1] // given[part].shape[1], 1) for part in ("k", "v"))
        causal = is_causal(module, query, self.vlm.backend_of("llm"), options)
        sizes = {"n_query": query.shape[2], "n_key": keys.shape[2]}
        allowed = allowed_edges(mask, **sizes, causal=causal, device=query.device)
        nothing = allowed.new_zeros(query.shape[0], 1, *allowed.shape[-2:])
        scaling = options["scaling"]
        call = AttentionCall(query, keys, values, mask, scaling, causal, output, allowed, nothing)
        errors = [0.0]
        for row, present in self.encoded.cells("all").by_row.items():
            queries = torch.tensor(present, device=query.device)
            expected = (call.weights(row, queries) @ values[row].float()).transpose(0, 1)
            errors.append((output[row, queries].float() - expected).abs().max().item())
        return torch.tensor(errors).amax().item()

    def _receipt(self, each: HeadInput, change: float, error: float, tolerance: float) -> WriteReceipt:
        places = set(zip(self.cells.rows.tolist(), self.cells.positions.tolist(), strict=True))
        # Keys and values are read by other positions of the same block.
        reaches, reason = reaches_from(self.vlm, self.encoded, "llm", each.layer, places, mixes=each.part != "q")
        rows = tuple((row, row) for row in sorted({row for row, _ in places}))
        return WriteReceipt(
            intervention="HeadInput",
            site=str(each),
            n_cells=len(self.cells),
            change=change,
            witness="the attention function",
            readback_error=error,
            tolerance=tolerance,
            reaches=reaches,
            reason=reason,
            pass_readout_change=0.0,
            rows=rows,
        )
