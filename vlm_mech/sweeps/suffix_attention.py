"""Attention of many edited versions over one shared prefix, with each version's own edges cut and proved.

Rows of a call are cell x batch. Queries are the positions from `start` on; keys before it are the same for all cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm_mech.errors import UsageError
from vlm_mech.interventions.attention import Attend, in_form
from vlm_mech.interventions.attention_plan import Cut, kinds_of
from vlm_mech.interventions.attention_proof import check_any_edge, queries_of
from vlm_mech.interventions.reaching import attention_reaches
from vlm_mech.interventions.receipt import KnockoutReceipt, ReweightReceipt
from vlm_mech.interventions.reweighting import asked_weights, keys_of, mean_mass, over_examples, shifts_of, weights_of
from vlm_mech.sweeps.edge_groups import Group, by_group, grouped, lowered_by, without
from vlm_mech.sweeps.recorded_pass import Block, RecordedPass

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

FLOAT = 4
"""Bytes of a score: they are kept in single precision whatever the model's own."""
FAST_BYTES = {"cpu": 2**23, "cuda": 2**28}
"""Scores that are worked on at once: little enough not to count, and enough to keep the machine busy."""
QUERIES = 128
"""Queries whose attention is computed at once: of the keys after the first of them it may see none."""


@dataclass(eq=False)
class SuffixAttention:
    """The attention of one decoder block; `cuts` are those of each cell, `receipts` what was proved, by cell.

    Keys and values before `start` are those of the pass `before`; masks and scaling those of `clean`. `listen` is given
    those of the suffix.
    """

    vlm: "VLM"
    clean: RecordedPass
    before: RecordedPass
    layer: int
    start: int
    cuts: list[list[Cut]]
    listen: Callable[[Tensor, Tensor], None] | None = None
    receipts: dict[int, list[KnockoutReceipt | ReweightReceipt]] = field(default_factory=dict)

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
            groups = self._groups(allowed)
            before = self.before.blocks[self.layer]
            if self.listen is not None:
                self.listen(key, value)
            if groups or (self.record.plain and shares_prefix(query.shape[1:], key.shape[1])):
                return self._shared(query, key, value, before, allowed, groups), None
            return self._joined(function, module, query, key, value, before, allowed, options)

        return attend

    def _groups(self, allowed: Bool[Tensor, "rows heads query pos"]) -> list[Group]:
        """Cells with edits here, those of the same edges together.

        Raises:
            UsageError: a query would be left with nothing to attend to, or no edge is cut.
        """
        queries, keys = range(self.start, self.start + allowed.shape[-2]), range(allowed.shape[-1])
        at = {"n_pos": allowed.shape[-1], "device": allowed.device}
        numbers: dict[tuple, list[int]] = {}
        for number, cuts in enumerate(self.cuts):
            if cuts:
                numbers.setdefault(tuple(cut.edges for cut in cuts), []).append(number)
        groups = []
        for each in numbers.values():
            cut, others = kinds_of(self.cuts[each[0]])
            blocked = [one.blocked(range(self.batch), queries, keys, **at) for one in cut]
            shifts = shifts_of(others, range(self.batch), queries, keys, **at)
            groups.append(Group(each, self._blocked(cut, blocked, allowed), shifts))
        return groups

    def _blocked(
        self, cuts: list[Cut], each: list[Tensor], allowed: Bool[Tensor, "rows heads query pos"]
    ) -> Bool[Tensor, "batch cut_heads query pos"] | None:
        """The edges that some cuts name; heads of size 1 where all lose the same, None without cuts."""
        if not cuts:
            return None
        blocked = torch.stack(torch.broadcast_tensors(*each)).any(0)
        left = allowed & ~blocked
        emptied = (allowed.any(-1) & ~left.any(-1)).nonzero()
        if len(emptied):
            row, query = int(emptied[0][0]), self.start + int(emptied[0][-1])
            raise UsageError(
                f"the knockout leaves position {query} of example {row} nothing to attend to; narrow its keys"
            )
        check_any_edge(cuts, int((allowed & blocked).any()), f"llm layer {self.layer}", "cuts")
        return blocked

    def _shared(
        self,
        query: Float[Tensor, "rows head query d_head"],
        key: Float[Tensor, "rows group query d_head"],
        value: Float[Tensor, "rows group query d_head"],
        before: Block,
        allowed: Bool[Tensor, "mask_rows mask_heads query pos"],
        cut: list[Group],
    ) -> Float[Tensor, "rows query head d_head"]:
        """Softmax attention of all cells, as many at a time as have their scores in fast memory."""
        n_query = query.shape[2]
        # Edges that are cut are proved over all queries together.
        parts = [(slice(0, n_query), allowed.shape[-1])] if cut else self._parts(n_query)
        most = n_query if cut else min(n_query, QUERIES)
        per_cell = FLOAT * self.batch * query.shape[1] * most * (self.start + n_query)
        step, out = cells_at_once(per_cell, query.device), []
        for first in range(0, len(self.cuts), step):
            rows = slice(first * self.batch, (first + step) * self.batch)
            some = [each for each in (group.within(first, first + step) for group in cut) if each.numbers]
            for part, n_keys in parts:
                own, edges = slice(0, n_keys - self.start), allowed[:, :, part, :n_keys]
                out.append(
                    self._chunk(query[rows, :, part], key[rows, :, own], value[rows, :, own], before, edges, some)
                )
        return _together(out, len(parts))

    def _chunk(
        self,
        query: Float[Tensor, "rows head query d_head"],
        key: Float[Tensor, "rows group own d_head"],
        value: Float[Tensor, "rows group own d_head"],
        before: Block,
        allowed: Bool[Tensor, "mask_rows mask_heads query pos"],
        cut: list[Group],
    ) -> Float[Tensor, "rows query head d_head"]:
        """Softmax attention over the shared prefix, in one product for all rows, and over each row's own keys.

        The softmax runs over both parts at once, without putting them together: each is shifted by the common maximum
        and the sum of both divides the output.
        """
        start, groups = self.start, key.shape[1]
        sizes = {"c": len(query) // self.batch, "b": self.batch, "g": groups, "n": query.shape[2]}
        query = query * self.record.scaling
        prefix = rearrange(query, "(c b) (g r) n d -> b g (c r n) d", **sizes) @ before.keys[:, :, :start].mT
        own = rearrange(query, "(c b) (g r) n d -> (c b) g (r n) d", **sizes) @ key.mT
        parts = [
            rearrange(prefix, "b g (c r n) s -> b g c r n s", **sizes).float(),
            rearrange(own, "(c b) g (r n) m -> b g c r n m", **sizes).float(),
        ]
        del prefix, own
        total = self._weights(parts, grouped(allowed, groups), allowed, cut)
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
        cut: list[Group],
    ) -> Float[Tensor, "batch group cell shared query 1"]:
        """Turns scores over prefix and suffix into unnormalised weights, in place, and returns their sums."""
        sides = (slice(0, self.start), slice(self.start, None))
        for part, side in zip(parts, sides, strict=True):
            if not edges[..., side].all():
                part.masked_fill_(~edges[..., side], -torch.inf)
        held = [(part, side) for part, side in zip(parts, sides, strict=True) if part.shape[-1]]
        for group in cut:
            for number in group.numbers if group.shifts else ():
                # Scores of which the softmax makes what is asked for.
                moved = self._moved(parts, group, number, allowed).log()
                for part, side in held:
                    part[:, :, number] = moved[..., side]
        top = torch.stack([part.amax(-1, keepdim=True) for part, _ in held]).amax(0)
        cut = [group for group in cut if not group.shifts]
        for group in cut:
            top[:, :, group.cells] = lowered_by(held, group, top[:, :, group.cells])
        # A padding position may have nothing to attend to; what it holds is never used.
        top = top.where(top > -torch.inf, 0.0)
        total = torch.zeros_like(top)
        for part, _ in held:
            total += part.sub_(top).exp_().sum(-1, keepdim=True)
        total = total.where(total > 0, 1.0)
        for group in cut:
            left = without(held, group)
            natural = 1 - left / total[:, :, group.cells]
            total[:, :, group.cells] = left
            self._prove(group, held, left, natural=natural, allowed=allowed)
        return total

    def _moved(
        self, parts: list[Tensor], group: Group, number: int, allowed: Bool[Tensor, "mask_rows mask_heads query pos"]
    ) -> Float[Tensor, "batch group shared query pos"]:
        """The attention of one cell in which weights are moved, with its receipts.

        Args:
            parts: scores over prefix and suffix, -inf where nothing is attended to.
        """
        scores = torch.cat([part[:, :, number] for part in parts], -1)
        n_groups, of_wave = scores.shape[1], group.first + number
        cut, others = kinds_of(self.cuts[of_wave])
        proved: list[KnockoutReceipt | ReweightReceipt] = []
        if group.blocked is not None:
            lost, n_edges = by_group(group.blocked, n_groups), int((allowed & group.blocked).sum())
            natural = over_examples(mean_mass(weights_of(scores), lost))
            scores, allowed = scores.masked_fill(lost, -torch.inf), allowed & ~group.blocked
            common = self._common(cut, scores.dtype)
            proved.append(KnockoutReceipt(n_edges=n_edges, natural_mass=natural, blocked_mass=0.0, **common))
        shifts = group.by_group(n_groups)
        weights, n_edges = asked_weights(scores, shifts), int((keys_of(group.shifts) & allowed).sum())
        check_any_edge(others, n_edges, f"llm layer {self.layer}", "reweights")
        before, after = (over_examples(mean_mass(each, keys_of(shifts))) for each in (weights_of(scores), weights))
        masses = {"natural_mass": before, "mass": after, "weight_error": 0.0}
        proved.append(ReweightReceipt(n_edges=n_edges, **masses, **self._common(others, scores.dtype)))
        self.receipts[of_wave] = proved
        return weights

    def _prove(
        self,
        group: Group,
        held: "list[tuple[Tensor, slice]]",
        total: Float[Tensor, "batch group cell shared query 1"],
        *,
        natural: Float[Tensor, "batch group cell shared query 1"],
        allowed: Bool[Tensor, "mask_rows mask_heads query pos"],
    ) -> None:
        """Receipts of cells that lose the same edges.

        Args:
            natural: the attention that went over these edges before they were cut.
        """
        assert group.blocked is not None, "edges are cut"
        blocked = grouped(group.blocked, total.shape[1])
        each = "b g c r n p -> c"
        left = torch.zeros(len(group.numbers), device=total.device)
        for part, side in held:
            most = (part[:, :, group.cells] * blocked[..., side]).amax(-1, keepdim=True) / total
            left = torch.maximum(left, reduce(most, each, "max"))
        losing = blocked.any(-1, keepdim=True).expand(total.shape)
        # Examples count alike, whatever the number of their queries that lose an edge.
        per_example = reduce(losing.float(), "b g c r n p -> c b", "sum")
        taken = reduce(natural.where(losing, 0.0), "b g c r n p -> c b", "sum") / per_example.clamp(min=1)
        meant = taken.sum(1) / (per_example > 0).sum(1)
        n_edges = int((allowed & group.blocked).sum())
        common = self._common(self.cuts[group.of_wave[0]], total.dtype)
        for number, mass, most in zip(group.of_wave, meant.tolist(), left.tolist(), strict=True):
            receipt = KnockoutReceipt(n_edges=n_edges, natural_mass=mass, blocked_mass=most, **common)
            self.receipts[number] = [receipt]

    def _common(self, cuts: Sequence[Cut], dtype: torch.dtype) -> dict[str, Any]:
        """What all receipts of edges here say."""
        reaches, reason = attention_reaches(self.vlm, self.clean.encoded, "llm", self.layer, queries_of(cuts))
        return {
            "intervention": " & ".join(each.what for each in cuts),
            "site": f"llm.attention[{self.layer}]",
            # Nothing is recomputed: these are the weights that are used, divided by their own sum.
            "row_sum_error": 0.0,
            "kernel_error": 0.0,
            "tolerance": 64 * torch.finfo(dtype).eps,
            "reaches": reaches,
            "reason": reason,
            "pass_readout_change": 0.0,
        }

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
        if self.start == 0 and self.record.mask is None:
            return function(module, query, key, value, None, **options)
        keys, values = (
            torch.cat([repeat(shared[:, :, : self.start], "b g s d -> (c b) g s d", c=n_cells), own], dim=2)
            for shared, own in ((before.keys, key), (before.values, value))
        )
        backend, out = self.vlm.backend_of("llm"), []
        for part, n_keys in self._parts(query.shape[2]):
            known, edges = slice(0, n_keys), allowed[:, :, part, :n_keys]
            edges = edges if len(edges) == 1 else repeat(edges, "b h n p -> (c b) h n p", c=n_cells)
            mask = in_form(edges, backend, query.dtype)
            out.append(function(module, query[:, :, part], keys[:, :, known], values[:, :, known], mask, **options)[0])
        return _together(out, len(out)), None

    def _parts(self, n_query: int) -> list[tuple[slice, int]]:
        """The queries of the suffix whose attention is computed together, each with how many keys they may have."""
        parts = [slice(first, min(first + QUERIES, n_query)) for first in range(0, n_query, QUERIES)]
        return [(part, self.clean.n_keys(self.start + part.start, self.start + part.stop)) for part in parts]


def _together(out: list[Tensor], n_parts: int) -> Float[Tensor, "rows query head d_head"]:
    """What was computed for some rows and queries at a time: all parts of the first rows, then of the next ones."""
    rows = [out[at] if n_parts == 1 else torch.cat(out[at : at + n_parts], 1) for at in range(0, len(out), n_parts)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def cells_at_once(per_cell: int, device: torch.device) -> int:
    """How many cells' scores (of so many bytes) are worked on at once."""
    return max(1, FAST_BYTES.get(device.type, FAST_BYTES["cuda"]) // per_cell)


def shares_prefix(query: tuple[int, ...], n_groups: int) -> bool:
    """Whether scores of a suffix (heads, positions, d_head) take less room than a copy of all keys and values a row.

    Copies are made for all heads: transformers repeats keys that heads share.
    """
    n_heads, n_suffix, d_head = query
    return n_heads * n_suffix <= 2 * (n_heads + n_groups) * d_head
