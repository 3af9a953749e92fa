"""Runs many edited versions of one clean pass at once, computing only what can change.

Cells (edited versions) whose edits begin at the same position walk through the decoder together, as rows of one batch:
a cell joins at the first block it touches. What is before the first edited position is the same for all, so only its
keys and values are needed, and they are shared by all rows. The blocks are the model's own, called with the arguments
they were recorded with.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm_mech.attention import Attend, attending
from vlm_mech.clean import Block, Clean, read_out
from vlm_mech.edit import Cut, Write
from vlm_mech.errors import UsageError
from vlm_mech.proof import knockout_reaches, write_receipt
from vlm_mech.receipt import KnockoutReceipt, Receipt
from vlm_mech.site import Site
from vlm_mech.span import Cells
from vlm_mech.step import Seen

if TYPE_CHECKING:
    from vlm_mech.model import VLM


@dataclass(eq=False)
class Cell:
    """One edited version: its writes by site and cuts by layer in the decoder, and where it leaves the clean pass.

    It enters at block `entry` with the clean pass's states (or `hidden`, if the image was edited before the decoder),
    and everything from position `start` on is computed; before that it equals `before`.
    """

    writes: dict[Site, list[Write]]
    cuts: dict[int, list[Cut]]
    entry: int
    start: int
    before: Clean
    hidden: Float[Tensor, "batch pos d_model"] | None = None
    added: list[Float[Tensor, "token d_model"]] | None = None
    receipts: list[Receipt] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)


@dataclass(eq=False)
class Wave:
    """Cells with one start and one prefix, on their way through the decoder."""

    vlm: "VLM"
    clean: Clean
    cells: list[Cell]
    start: int
    before: Clean
    active: list[Cell] = field(default_factory=list)
    layer: int = 0

    @property
    def batch(self) -> int:
        """Examples a cell has."""
        return self.clean.logits.shape[0]

    def run(self) -> Float[Tensor, "cell batch vocab"]:
        """Next-token logits of every cell."""
        stack = list(self.vlm.model.get_submodule(self.vlm.family.llm.path).children())
        modules = {block.get_submodule(self.vlm.family.llm.attention) for block in stack}
        order = sorted(range(len(self.cells)), key=lambda number: self.cells[number].entry)
        queue = [self.cells[number] for number in order]
        states = None
        with torch.no_grad(), attending(modules, self._attend):
            for layer, block in enumerate([*stack, None]):
                self.layer = layer
                states, queue = self._join(states, queue, layer)
                if block is not None and states is not None:
                    states = self._through(block, states)
            self._prove(Site("llm.resid_post", layer - 1), states)
        assert states is not None, "every cell joins at some block"
        logits = read_out(self.vlm, states[:, :, -1].flatten(0, 1)[:, None])[:, 0].unflatten(0, (-1, self.batch))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return logits[back.to(logits.device)]

    def _join(self, states: Tensor | None, queue: list[Cell], layer: int) -> tuple[Tensor | None, list[Cell]]:
        """Cells that leave the clean pass before this block join with the states they have there.

        States are cell x batch x suffix x d_model, for the active cells.
        """
        new = [cell for cell in queue if cell.entry == layer]
        if not new:
            return states, queue
        clean = self.clean.hidden(layer)[:, self.start :]
        site = Site("llm.resid_post", layer - 1) if layer else None
        entering = [clean if cell.hidden is None else cell.hidden[:, self.start :] for cell in new]
        joined = torch.stack([self._written(cell, site, each) for cell, each in zip(new, entering, strict=True)])
        self.active += new
        return joined if states is None else torch.cat([states, joined]), queue[len(new) :]

    def _written(self, cell: Cell, site: Site | None, states: Float[Tensor, "batch pos width"]) -> Tensor:
        """States of one cell after its writes at a site."""
        writes = cell.writes.get(site, ()) if site is not None else ()
        if not writes:
            return states
        before = states
        for write in writes:
            states = shifted(write, self.start).apply(states, prompt=True)
        cell.seen.before[site], cell.seen.written[site] = before, states
        return states

    def _prove(self, site: Site, received: Tensor, beside: Tensor | None = None) -> None:
        """Receipts of the writes at a site, once the next module has received cell x batch x pos x width states."""
        for number, cell in enumerate(self.active):
            if site not in cell.seen.written:
                continue
            cell.seen.received[site] = received[number]
            if beside is not None:
                cell.seen.beside[site] = beside[number]
            cell.receipts.append(write_receipt(self.vlm, self.clean.encoded, site, cell.writes[site], cell.seen, 0.0))
            for kept in (cell.seen.before, cell.seen.written, cell.seen.received, cell.seen.beside):
                kept.pop(site, None)

    def _through(self, block: nn.Module, states: Float[Tensor, "cell batch pos d_model"]) -> Tensor:
        """All active cells through one block, edits inside it made and proved."""
        layer, blocks = self.layer, self.vlm.family.llm
        if layer:
            self._prove(Site("llm.resid_post", layer - 1), states)
        states = self._edited(states, Site("llm.resid_pre", layer))
        inner = {
            "head_out": (f"{blocks.attention}.{blocks.out}", True),
            "attn_out": (blocks.attention_added or blocks.attention, False),
            "mlp_out": (blocks.mlp_added or blocks.mlp, False),
        }
        heard: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for point, (path, is_input) in inner.items():
                site = Site(f"llm.{point}", layer)
                if any(site in cell.writes for cell in self.active):
                    hooks.enter_context(self._hooked(block.get_submodule(path), site, is_input=is_input))
            if any(site.layer == layer for cell in self.active for site in cell.writes):
                hooks.enter_context(self._heard(block, heard))
            arguments = {name: self._argument(value) for name, value in self.clean.blocks[layer].arguments.items()}
            out = block(states.flatten(0, 1), attention_mask=None, past_key_values=None, use_cache=False, **arguments)
        out = out[0] if isinstance(out, tuple) else out
        out = out.unflatten(0, (-1, self.batch))
        if heard:
            self._prove(Site("llm.resid_pre", layer), heard["norm_1"])
            self._prove(Site("llm.head_out", layer), heard["out"])
            self._prove(Site("llm.attn_out", layer), heard["norm_2"], heard["norm_1"])
            self._prove(Site("llm.mlp_out", layer), out, heard["norm_2"])
        return self._with_added(self._edited(out, Site("llm.resid_post", layer)))

    @contextmanager
    def _heard(self, block: nn.Module, heard: dict[str, Tensor]) -> Iterator[None]:
        """Keeps what the norms of the block receive and what its output projection gives."""
        blocks = self.vlm.family.llm

        def listener(name: str) -> Any:
            def listen(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
                value = out if name == "out" else given[0]
                rows = value.unflatten(0, (len(self.active) * self.batch, -1)) if value.ndim == 2 else value
                heard[name] = rows.unflatten(0, (-1, self.batch))

            return listen

        paths = {"norm_1": blocks.norm_1, "norm_2": blocks.norm_2, "out": f"{blocks.attention}.{blocks.out}"}
        hooks = [block.get_submodule(path).register_forward_hook(listener(name)) for name, path in paths.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _edited(self, states: Float[Tensor, "cell batch pos width"], site: Site) -> Tensor:
        if not any(site in cell.writes for cell in self.active):
            return states
        return torch.stack([self._written(cell, site, each) for cell, each in zip(self.active, states, strict=True)])

    @contextmanager
    def _hooked(self, module: nn.Module, site: Site, *, is_input: bool) -> Iterator[None]:
        """Edits what goes into or comes out of a module of the block, row by row."""

        def edit(value: Tensor) -> Tensor:
            flat = value.ndim == 2
            rows = value.unflatten(0, (len(self.active) * self.batch, -1)) if flat else value
            rows = self._edited(rows.unflatten(0, (-1, self.batch)), site).flatten(0, 1)
            return rows.flatten(0, 1) if flat else rows

        def going_in(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return (edit(given[0]), *given[1:])

        def coming_out(_: nn.Module, __: Any, out: Any) -> Any:
            return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

        hook = module.register_forward_pre_hook(going_in) if is_input else module.register_forward_hook(coming_out)
        try:
            yield
        finally:
            hook.remove()

    def _with_added(self, states: Float[Tensor, "cell batch pos d_model"]) -> Tensor:
        """Features that the model adds at image positions after its first blocks."""
        if self.layer >= len(self.clean.added):
            return states
        image = self.clean.encoded.cells("image")
        kept = image.positions >= self.start
        rows, positions = image.rows[kept], image.positions[kept] - self.start
        states = states.clone()
        for number, cell in enumerate(self.active):
            features = (cell.added or self.clean.added)[self.layer]
            states[number, rows, positions] += features[kept.to(features.device)].to(states.dtype)
            site = Site("llm.resid_post", self.layer)
            if site in cell.seen.written:
                # What the next block must receive is what was written and what the model adds to it.
                cell.seen.before[site] = cell.seen.before[site] + (states[number] - cell.seen.written[site])
                cell.seen.written[site] = states[number]
        return states

    def _argument(self, value: Any) -> Any:
        """A recorded argument of a block for the suffix, one row for each row of the batch."""
        if isinstance(value, tuple | list):
            return type(value)(self._argument(each) for each in value)
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        n_pos, batch = self.clean.final.shape[1], self.batch
        for axis, length in reversed(list(enumerate(value.shape))):
            if length == n_pos and (axis > 0 or value.ndim == 1):
                value = value.narrow(axis, self.start, n_pos - self.start)
                break
        # Rotary tables and positions have the batch first, three-axis positions second; one row serves all.
        axis = 1 if value.ndim == 3 and value.shape[0] in (3, 4) and not value.is_floating_point() else 0
        if value.ndim > 1 and value.shape[axis] == batch and batch > 1:
            value = torch.cat([value] * len(self.active), dim=axis)
        return value

    # Attention

    def _attend(self, function: Attend) -> Attend:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
        ) -> tuple[Tensor, Any]:
            record, before = self.clean.blocks[self.layer], self.before.blocks[self.layer]
            allowed = record.allowed(self.start, self.start + query.shape[2])
            cuts = self._cuts(allowed)
            edges = allowed[None] if not cuts else self._edges(allowed, cuts)
            if record.plain:
                return self._shared(query, key, value, before, record, allowed, cuts, edges), None
            return self._joined(function, module, query, key, value, before, edges, options)

        return attend

    def _cuts(self, allowed: Bool[Tensor, "rows heads query pos"]) -> dict[int, Tensor]:
        """Edges to cut at this layer (batch x heads or 1 x query x pos), by number of the active cell.

        Raises:
            UsageError: a query would be left with nothing to attend to, or no edge is cut.
        """
        queries, keys = range(self.start, self.start + allowed.shape[-2]), range(allowed.shape[-1])
        found: dict[int, Tensor] = {}
        for number, cell in enumerate(self.active):
            for cut in cell.cuts.get(self.layer, ()):
                more = cut.blocked(self.batch, queries, keys, prompt=True, device=allowed.device)
                found[number] = more if number not in found else found[number] | more
            if number not in found:
                continue
            what = cell.cuts[self.layer][0].what
            left = allowed & ~found[number]
            emptied = (allowed.any(-1) & ~left.any(-1)).nonzero()
            if len(emptied):
                row, query = int(emptied[0][0]), self.start + int(emptied[0][-1])
                raise UsageError(
                    f"the knockout leaves position {query} of example {row} nothing to attend to; narrow its keys"
                )
            if not (allowed & found[number]).any():
                raise UsageError(f"{what} at llm layer {self.layer} cuts no edge: attention allows none of them")
        return found

    def _edges(
        self, allowed: Bool[Tensor, "rows heads query pos"], cuts: dict[int, Tensor]
    ) -> Bool[Tensor, "cell batch some_heads query pos"]:
        """Allowed edges of each cell less those cut."""
        rows = [allowed & ~cuts[number] if number in cuts else allowed for number in range(len(self.active))]
        shape = torch.broadcast_shapes(*(row.shape for row in rows))
        return torch.stack([row.expand(shape) for row in rows])

    def _cut_receipt(
        self,
        number: int,
        scores: Float[Tensor, "batch head query pos"],
        weights: Float[Tensor, "batch head query pos"],
        allowed: Tensor,
        blocked: Tensor,
    ) -> None:
        """What attention there would have been on the cut edges of a cell, and what is left on them."""
        cell = self.active[number]
        cut = blocked.expand(weights.shape)
        # Only queries that lose an edge are looked at; examples count alike.
        chosen = cut.any(-1)
        meant = scores[chosen].masked_fill(~allowed.expand(weights.shape)[chosen], -torch.inf)
        taken = torch.zeros(weights.shape[:-1], device=weights.device)
        taken[chosen] = (meant.float().softmax(-1).nan_to_num(0.0) * cut[chosen]).sum(-1)
        per_example = chosen.flatten(1).sum(1)
        natural = (taken.flatten(1).sum(1) / per_example.clamp(min=1))[per_example > 0].mean()
        cuts = cell.cuts[self.layer]
        queries = {(row, query) for each in cuts for row, positions in each.queries.items() for query in positions}
        reaches, reason = knockout_reaches(self.vlm, self.clean.encoded, "llm", self.layer, queries)
        cell.receipts.append(
            KnockoutReceipt(
                intervention=" & ".join(each.what for each in cuts),
                site=f"llm.attention[{self.layer}]",
                n_edges=int((allowed & blocked).sum()),
                natural_mass=natural.item(),
                blocked_mass=(weights[chosen] * cut[chosen]).max().item(),
                row_sum_error=(weights[chosen].float().sum(-1) - 1).abs().max().item(),
                kernel_error=0.0,
                tolerance=64 * torch.finfo(weights.dtype).eps,
                reaches=reaches,
                reason=reason,
                readout_change=0.0,
            )
        )

    def _shared(
        self,
        query: Float[Tensor, "rows head query d_head"],
        key: Float[Tensor, "rows group query d_head"],
        value: Float[Tensor, "rows group query d_head"],
        before: Block,
        record: Block,
        allowed: Bool[Tensor, "mask_rows mask_heads query pos"],
        cuts: dict[int, Tensor],
        edges: Bool[Tensor, "mask_cells edge_rows edge_heads query pos"],
    ) -> Float[Tensor, "rows query head d_head"]:
        """Softmax attention over the shared prefix, in one product for all rows, and over each row's own suffix."""
        batch, start = self.batch, self.start
        groups = key.shape[1]
        of_batch = rearrange(query, "(c b) (g r) n d -> b g (c r n) d", b=batch, g=groups)
        sizes = {"c": len(self.active), "r": query.shape[1] // groups, "n": query.shape[2]}
        prefix = of_batch @ before.keys[:, :, :start].mT
        prefix = rearrange(prefix, "b g (c r n) s -> c b (g r) n s", **sizes)
        own = rearrange(query, "(c b) (g r) n d -> (c b) g (r n) d", b=batch, g=groups) @ key.mT
        own = rearrange(own, "(c b) g (r n) m -> c b (g r) n m", b=batch, r=sizes["r"])
        scores = torch.cat([prefix, own], dim=-1).mul_(record.scaling)
        uncut = {number: scores[number].clone() for number in cuts}
        scores = scores.masked_fill_(~edges, -torch.inf)
        # A padding position may have nothing to attend to; what it holds is never used.
        weights = scores.softmax(-1, dtype=torch.float32).nan_to_num_(0.0).to(query.dtype)
        for number, blocked in cuts.items():
            self._cut_receipt(number, uncut[number], weights[number], allowed, blocked)
        to_prefix = rearrange(weights[..., :start], "c b (g r) n s -> b g (c r n) s", g=groups)
        out = rearrange(to_prefix @ before.values[:, :, :start], "b g (c r n) d -> (c b) n (g r) d", **sizes)
        to_own = rearrange(weights[..., start:], "c b (g r) n m -> (c b) g (r n) m", g=groups)
        own = rearrange(to_own @ value, "(c b) g (r n) d -> (c b) n (g r) d", b=batch, r=sizes["r"])
        return out + own

    def _joined(
        self,
        function: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        before: Block,
        edges: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        """The model's own attention function, each row given a copy of the prefix."""
        n_cells = len(self.active)
        keys, values = (
            torch.cat([repeat(shared[:, :, : self.start], "b g s d -> (c b) g s d", c=n_cells), own], dim=2)
            for shared, own in ((before.keys, key), (before.values, value))
        )
        shape = (n_cells, self.batch, *edges.shape[2:])
        mask = edges.expand(shape).flatten(0, 1)
        if self.vlm.backend_of("llm") == "eager":
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
        return function(module, query, keys, values, mask, **options)


def shifted(write: Write, start: int) -> Write:
    """The same write in states that begin at position `start`."""
    cells = write.placed
    return replace(write, cells=Cells(cells.rows, cells.positions - start, cells.counts))
