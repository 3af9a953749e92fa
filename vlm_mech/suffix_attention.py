"""Attention of many edited versions over one shared prefix, with each version's own edges cut and proved.

Rows of a call are cell x batch. Queries are the positions from `start` on; keys before it are the same for all cells.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm_mech.attention import Attend
from vlm_mech.clean import Block, Clean
from vlm_mech.edit import Cut
from vlm_mech.errors import UsageError
from vlm_mech.proof import knockout_reaches
from vlm_mech.receipt import KnockoutReceipt

if TYPE_CHECKING:
    from vlm_mech.model import VLM


@dataclass(eq=False)
class SuffixAttention:
    """The attention of one decoder block; `cuts` are those of each cell, `receipts` what was proved, by cell.

    Keys and values before `start` are those of the pass `before`; masks and scaling those of `clean`.
    """

    vlm: "VLM"
    clean: Clean
    before: Clean
    layer: int
    start: int
    cuts: list[list[Cut]]
    receipts: dict[int, KnockoutReceipt] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Examples a cell has."""
        return self.clean.logits.shape[0]

    @property
    def record(self) -> Block:
        """The block as it was called in the clean pass."""
        return self.clean.blocks[self.layer]

    def attend(self, function: Attend) -> Attend:
        """A stand-in for the model's attention function that is given the suffix only."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
        ) -> tuple[Tensor, Any]:
            allowed = self.record.allowed(self.start, self.start + query.shape[2])
            blocked = self._blocked(allowed)
            before = self.before.blocks[self.layer]
            if blocked or (self.record.plain and shares_prefix(query.shape[1:], key.shape[1])):
                return self._shared(query, key, value, before, allowed, blocked), None
            return self._joined(function, module, query, key, value, before, allowed, options)

        return attend

    def _blocked(self, allowed: Bool[Tensor, "rows heads query pos"]) -> dict[int, Tensor]:
        """Edges to cut (batch x heads or 1 x query x pos), by number of the cell.

        Raises:
            UsageError: a query would be left with nothing to attend to, or no edge is cut.
        """
        queries, keys = range(self.start, self.start + allowed.shape[-2]), range(allowed.shape[-1])
        found: dict[int, Tensor] = {}
        for number, cuts in enumerate(self.cuts):
            if not cuts:
                continue
            each = [cut.blocked(self.batch, queries, keys, prompt=True, device=allowed.device) for cut in cuts]
            blocked = torch.stack(torch.broadcast_tensors(*each)).any(0)
            left = allowed & ~blocked
            emptied = (allowed.any(-1) & ~left.any(-1)).nonzero()
            if len(emptied):
                row, query = int(emptied[0][0]), self.start + int(emptied[0][-1])
                raise UsageError(
                    f"the knockout leaves position {query} of example {row} nothing to attend to; narrow its keys"
                )
            if not (allowed & blocked).any():
                raise UsageError(
                    f"{cuts[0].what} at llm layer {self.layer} cuts no edge: attention allows none of them"
                )
            found[number] = blocked
        return found

    def _shared(
        self,
        query: Float[Tensor, "rows head query d_head"],
        key: Float[Tensor, "rows group query d_head"],
        value: Float[Tensor, "rows group query d_head"],
        before: Block,
        allowed: Bool[Tensor, "mask_rows mask_heads query pos"],
        blocked: dict[int, Tensor],
    ) -> Float[Tensor, "rows query head d_head"]:
        """Softmax attention over the shared prefix, in one product for all rows, and over each row's own suffix.

        The softmax runs over both parts at once, without putting them together: each is shifted by the common maximum
        and the sum of both divides the output.
        """
        start, groups = self.start, key.shape[1]
        sizes = {"c": len(self.cuts), "b": self.batch, "g": groups, "n": query.shape[2]}
        prefix = rearrange(query, "(c b) (g r) n d -> b g (c r n) d", **sizes) @ before.keys[:, :, :start].mT
        own = rearrange(query, "(c b) (g r) n d -> (c b) g (r n) d", **sizes) @ key.mT
        parts = [
            rearrange(prefix, "b g (c r n) s -> b g c r n s", **sizes).float(),
            rearrange(own, "(c b) g (r n) m -> b g c r n m", **sizes).float(),
        ]
        del prefix, own
        total = self._weights(parts, grouped(allowed, groups), allowed, blocked)
        prefix, own = (part.to(query.dtype) for part in parts)
        out = rearrange(prefix, "b g c r n s -> b g (c r n) s") @ before.values[:, :, :start]
        out = rearrange(out, "b g (c r n) d -> (c b) n (g r) d", **sizes)
        more = rearrange(own, "b g c r n m -> (c b) g (r n) m") @ value
        out = out + rearrange(more, "(c b) g (r n) d -> (c b) n (g r) d", **sizes)
        return out.div_(rearrange(total, "b g c r n d -> (c b) n (g r) d"))

    def _weights(
        self,
        parts: list[Tensor],
        edges: Bool[Tensor, "mask_rows mask_groups 1 mask_shared query pos"],
        allowed: Bool[Tensor, "mask_rows mask_heads query pos"],
        blocked: dict[int, Tensor],
    ) -> Float[Tensor, "batch group cell shared query 1"]:
        """Turns raw scores over prefix and suffix into unnormalised weights, in place, and returns their sums."""
        sides = (slice(0, self.start), slice(self.start, None))
        for part, side in zip(parts, sides, strict=True):
            part.mul_(self.record.scaling)
            if not edges[..., side].all():
                part.masked_fill_(~edges[..., side], -torch.inf)
        natural = {number: _natural(_of_cell(parts, number), cut) for number, cut in blocked.items()}
        for part, side in zip(parts, sides, strict=True):
            for number, cut in blocked.items():
                part[:, :, number].masked_fill_(grouped(cut, part.shape[1])[:, :, 0, ..., side], -torch.inf)
        held = [part for part in parts if part.shape[-1]]
        top = torch.stack([part.amax(-1, keepdim=True) for part in held]).amax(0)
        # A padding position may have nothing to attend to; what it holds is never used.
        top = top.where(top > -torch.inf, 0.0)
        total = torch.zeros_like(top)
        for part in held:
            total += part.sub_(top).exp_().sum(-1, keepdim=True)
        total = total.where(total > 0, 1.0)
        for number, cut in blocked.items():
            weights = _of_cell(parts, number).div_(rearrange(total[:, :, number], "b g r n o -> b (g r) n o"))
            self.receipts[number] = self._receipt(number, natural[number], weights, int((allowed & cut).sum()), cut)
        return total

    def _receipt(
        self,
        number: int,
        natural: float,
        weights: Float[Tensor, "batch head query pos"],
        n_edges: int,
        blocked: Bool[Tensor, "batch cut_heads query pos"],
    ) -> KnockoutReceipt:
        """What is left on the cut edges of a cell; `natural` is the attention there would have been."""
        cuts = self.cuts[number]
        cut = blocked.expand(weights.shape)
        chosen = cut.any(-1)
        queries = {(row, query) for each in cuts for row, positions in each.queries.items() for query in positions}
        reaches, reason = knockout_reaches(self.vlm, self.clean.encoded, "llm", self.layer, queries)
        return KnockoutReceipt(
            intervention=" & ".join(each.what for each in cuts),
            site=f"llm.attention[{self.layer}]",
            n_edges=n_edges,
            natural_mass=natural,
            blocked_mass=(weights[chosen] * cut[chosen]).max().item(),
            row_sum_error=(weights[chosen].sum(-1) - 1).abs().max().item(),
            kernel_error=0.0,
            tolerance=64 * torch.finfo(weights.dtype).eps,
            reaches=reaches,
            reason=reason,
            readout_change=0.0,
        )

    def _joined(
        self,
        function: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        before: Block,
        allowed: Bool[Tensor, "mask_rows mask_heads query pos"],
        options: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        """The model's own attention function, each row given a copy of the prefix."""
        n_cells = len(self.cuts)
        keys, values = (
            torch.cat([repeat(shared[:, :, : self.start], "b g s d -> (c b) g s d", c=n_cells), own], dim=2)
            for shared, own in ((before.keys, key), (before.values, value))
        )
        mask = allowed if len(allowed) == 1 else repeat(allowed, "b h n p -> (c b) h n p", c=n_cells)
        if self.vlm.backend_of("llm") == "eager":
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
        return function(module, query, keys, values, mask, **options)


def shares_prefix(query: tuple[int, ...], n_groups: int) -> bool:
    """Whether scores of a suffix (heads, positions, d_head) take less room than a copy of all keys and values a row.

    Copies are made for all heads: transformers repeats keys that heads share.
    """
    n_heads, n_suffix, d_head = query
    return n_heads * n_suffix <= 2 * (n_heads + n_groups) * d_head


def grouped(
    edges: Bool[Tensor, "rows heads query pos"], n_groups: int
) -> Bool[Tensor, "rows groups 1 shared query pos"]:
    """Edges by key/value group, with an axis for cells; heads of size 1 stay so."""
    if edges.shape[1] == 1:
        return edges[:, :, None, None]
    return rearrange(edges, "b (g r) n p -> b g 1 r n p", g=n_groups)


def _of_cell(parts: list[Tensor], number: int) -> Float[Tensor, "batch head query pos"]:
    """Scores or weights of one cell over prefix and suffix together, as a copy."""
    return torch.cat([rearrange(part[:, :, number], "b g r n p -> b (g r) n p") for part in parts], dim=-1)


def _natural(
    scores: Float[Tensor, "batch head query pos"], blocked: Bool[Tensor, "batch cut_heads query pos"]
) -> float:
    """Mean attention on the edges to be cut, over the queries that lose one; examples count alike."""
    cut = blocked.expand(scores.shape)
    chosen = cut.any(-1)
    taken = torch.zeros(scores.shape[:-1], device=scores.device)
    taken[chosen] = (scores[chosen].softmax(-1).nan_to_num(0.0) * cut[chosen]).sum(-1)
    per_example = chosen.flatten(1).sum(1)
    return (taken.flatten(1).sum(1) / per_example.clamp(min=1))[per_example > 0].mean().item()
