"""Attention of many edited versions over one shared prefix, with each version's own edges cut and proved.

Rows of a call are cell x batch. Queries are the positions from `start` on; keys before it are the same for all cells.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm_mech.errors import UsageError
from vlm_mech.interventions.attention import Attend, in_form
from vlm_mech.interventions.plan import Cut
from vlm_mech.interventions.receipt import KnockoutReceipt
from vlm_mech.interventions.verification import knockout_reaches
from vlm_mech.sweeps.recorded_pass import Block, RecordedPass

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

FLOAT = 4
"""Bytes of a score: they are kept in single precision whatever the model's own."""
FAST_BYTES = {"cpu": 2**23, "cuda": 2**28}
"""Scores that are worked on at once: little enough not to count, and enough to keep the machine busy."""
QUERIES = 128
"""Queries whose attention is computed at once: of the keys after the first of them it may see none."""
NEAR = 5.0
"""Scores this far below the largest lose no precision to speak of when they are lowered by it."""


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
            groups = self._groups(allowed)
            before = self.before.blocks[self.layer]
            if self.listen is not None:
                self.listen(key, value)
            if groups or (self.record.plain and shares_prefix(query.shape[1:], key.shape[1])):
                return self._shared(query, key, value, before, allowed, groups), None
            return self._joined(function, module, query, key, value, before, allowed, options)

        return attend

    def _groups(self, allowed: Bool[Tensor, "rows heads query pos"]) -> "list[Group]":
        """Cells with cuts here, those with the same edges together.

        Raises:
            UsageError: a query would be left with nothing to attend to, or no edge is cut.
        """
        numbers: dict[tuple, list[int]] = {}
        for number, cuts in enumerate(self.cuts):
            if cuts:
                numbers.setdefault(tuple(cut.edges for cut in cuts), []).append(number)
        return [Group(each, self._blocked(self.cuts[each[0]], allowed)) for each in numbers.values()]

    def _blocked(
        self, cuts: list[Cut], allowed: Bool[Tensor, "rows heads query pos"]
    ) -> Bool[Tensor, "batch cut_heads query pos"]:
        """The edges that some cuts name; heads of size 1 where all lose the same."""
        queries, keys = range(self.start, self.start + allowed.shape[-2]), range(allowed.shape[-1])
        at = {"n_pos": allowed.shape[-1], "device": allowed.device}
        each = [cut.blocked(range(self.batch), queries, keys, **at) for cut in cuts]
        blocked = torch.stack(torch.broadcast_tensors(*each)).any(0)
        left = allowed & ~blocked
        emptied = (allowed.any(-1) & ~left.any(-1)).nonzero()
        if len(emptied):
            row, query = int(emptied[0][0]), self.start + int(emptied[0][-1])
            raise UsageError(
                f"the knockout leaves position {query} of example {row} nothing to attend to; narrow its keys"
            )
        if not (allowed & blocked).any() and any(cut.queries for cut in cuts):
            raise UsageError(f"{cuts[0].what} at llm layer {self.layer} cuts no edge: attention allows none of them")
        return blocked

    def _shared(
        self,
        query: Float[Tensor, "rows head query d_head"],
        key: Float[Tensor, "rows group query d_head"],
        value: Float[Tensor, "rows group query d_head"],
        before: Block,
        allowed: Bool[Tensor, "mask_rows mask_heads query pos"],
        cut: "list[Group]",
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
        cut: "list[Group]",
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
        cut: "list[Group]",
    ) -> Float[Tensor, "batch group cell shared query 1"]:
        """Turns scores over prefix and suffix into unnormalised weights, in place, and returns their sums."""
        sides = (slice(0, self.start), slice(self.start, None))
        for part, side in zip(parts, sides, strict=True):
            if not edges[..., side].all():
                part.masked_fill_(~edges[..., side], -torch.inf)
        held = [(part, side) for part, side in zip(parts, sides, strict=True) if part.shape[-1]]
        top = torch.stack([part.amax(-1, keepdim=True) for part, _ in held]).amax(0)
        for group in cut:
            top[:, :, group.cells] = _shift(held, group, top[:, :, group.cells])
        # A padding position may have nothing to attend to; what it holds is never used.
        top = top.where(top > -torch.inf, 0.0)
        total = torch.zeros_like(top)
        for part, _ in held:
            total += part.sub_(top).exp_().sum(-1, keepdim=True)
        total = total.where(total > 0, 1.0)
        for group in cut:
            left = _without(held, group)
            natural = 1 - left / total[:, :, group.cells]
            total[:, :, group.cells] = left
            self._prove(group, held, left, natural=natural, allowed=allowed)
        return total

    def _prove(
        self,
        group: "Group",
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
        rows = zip(group.of_wave, meant.tolist(), left.tolist(), strict=True)
        cuts = self.cuts[group.of_wave[0]]
        queries = {(row, query) for each in cuts for row, positions in each.queries.items() for query in positions}
        reaches, reason = knockout_reaches(self.vlm, self.clean.encoded, "llm", self.layer, queries)
        for number, mass, most in rows:
            self.receipts[number] = KnockoutReceipt(
                intervention=" & ".join(each.what for each in self.cuts[number]),
                site=f"llm.attention[{self.layer}]",
                n_edges=n_edges,
                natural_mass=mass,
                blocked_mass=most,
                # Nothing is recomputed: these are the weights that are used, divided by their own sum.
                row_sum_error=0.0,
                kernel_error=0.0,
                tolerance=64 * torch.finfo(total.dtype).eps,
                reaches=reaches,
                reason=reason,
                pass_readout_change=0.0,
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


def grouped(
    edges: Bool[Tensor, "rows heads query pos"], n_groups: int
) -> Bool[Tensor, "rows groups 1 shared query pos"]:
    """Edges by key/value group, with an axis for cells; heads of size 1 stay so."""
    if edges.shape[1] == 1:
        return edges[:, :, None, None]
    return rearrange(edges, "b (g r) n p -> b g 1 r n p", g=n_groups)


@dataclass(frozen=True, eq=False)
class Group:
    """Numbers of cells that lose the same edges at a layer, in ascending order, counted from cell `first`."""

    numbers: list[int]
    blocked: Bool[Tensor, "batch cut_heads query pos"]
    first: int = 0

    @property
    def of_wave(self) -> list[int]:
        """The same numbers counted over all cells."""
        return [self.first + number for number in self.numbers]

    def within(self, first: int, stop: int) -> "Group":
        """Those of the cells from `first` on and before `stop`."""
        return Group([number - first for number in self.numbers if first <= number < stop], self.blocked, first)

    @property
    def cells(self) -> slice | list[int]:
        """What selects these cells: a slice where they follow one another, so that nothing is copied."""
        first, last = self.numbers[0], self.numbers[-1]
        return slice(first, last + 1) if last - first == len(self.numbers) - 1 else self.numbers


def _shift(
    held: list[tuple[Tensor, slice]], group: Group, top: Float[Tensor, "batch group cell shared query 1"]
) -> Float[Tensor, "batch group cell shared query 1"]:
    """What a group's scores are lowered by: the largest of all, or of those that stay where these are far below it.

    So one exponential serves for the weights before the cut and after it. Where it overflows for edges that are cut,
    they had all of the attention, to the last bit.
    """
    stay = []
    for part, side in held:
        blocked = grouped(group.blocked, part.shape[1])[..., side]
        stay.append(part[:, :, group.cells].masked_fill(blocked, -torch.inf).amax(-1, keepdim=True))
    of_those = torch.stack(stay).amax(0)
    return torch.where(top - of_those < NEAR, top, of_those)


def _without(held: list[tuple[Tensor, slice]], group: Group) -> Float[Tensor, "batch group cell shared query 1"]:
    """Takes a group's cut edges out of its weights, in place, and returns the sums of what is left."""
    sums: Any = 0.0
    for part, side in held:
        blocked = grouped(group.blocked, part.shape[1])[..., side]
        some = part[:, :, group.cells]
        some.masked_fill_(blocked, 0.0)
        if not isinstance(group.cells, slice):
            part[:, :, group.cells] = some
        sums = sums + some.sum(-1, keepdim=True)
    return sums.where(sums > 0, 1.0)
