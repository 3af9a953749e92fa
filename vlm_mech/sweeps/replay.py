"""Runs many edited versions of one clean pass at once, computing only what can change.

Cells (edited versions) whose edits begin at the same position walk through the decoder together, as rows of one batch:
a cell joins at the first block it touches, and cells that lose the same edges are one row until they part. What is
before the first edited position is the same for all, so only its keys and values are needed, and they are shared by all
rows. The blocks are the model's own, called with the arguments they were recorded with.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.span import Cells
from vlm_mech.interventions.attention import attending
from vlm_mech.interventions.attention_plan import Cut, kinds_of
from vlm_mech.interventions.module_hooks import passed
from vlm_mech.interventions.plan import Write
from vlm_mech.interventions.receipt import Receipt
from vlm_mech.interventions.timeline import Seen
from vlm_mech.interventions.verification import write_receipt
from vlm_mech.sweeps.branching import alike
from vlm_mech.sweeps.recorded_pass import RecordedPass, position_axis, read_out
from vlm_mech.sweeps.suffix_attention import SuffixAttention

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


LOGITS = 2**26
"""Bytes of logits that are made at once where several tokens are read."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One edited version: its writes by site and cuts by layer in the decoder, and where it leaves the clean pass.

    It enters at block `entry` with the clean pass's states (or `hidden`, if the image was edited before the decoder),
    and everything from position `start` on is computed; before that it equals `before`.
    """

    writes: dict[Site, list[Write]]
    cuts: dict[int, list[Cut]]
    entry: int
    start: int
    before: RecordedPass
    hidden: Float[Tensor, "batch pos d_model"] | None = None
    added: list[Float[Tensor, "token d_model"]] | None = None
    receipts: tuple[Receipt, ...] = ()

    @property
    def only_cut(self) -> bool:
        """Whether nothing but attention edges differs from the pass it leaves."""
        return not self.writes and self.hidden is None


@dataclass(eq=False)
class Active:
    """A row on its way: the numbers of the cells it stands for, all alike so far, and what was seen of their writes."""

    cell: Cell
    numbers: list[int]
    seen: Seen = field(default_factory=Seen)

    @property
    def writes(self) -> dict[Site, list[Write]]:
        """What is written; a cell with writes has a row of its own."""
        return self.cell.writes


@dataclass(eq=False)
class Wave:
    """Cells with one start and one prefix, on their way through the decoder.

    `listen` is given the keys and values that each block makes of the active rows.
    """

    vlm: "VLM"
    clean: RecordedPass
    cells: list[Cell]
    start: int
    before: RecordedPass
    listen: Callable[["Wave", Tensor, Tensor], None] | None = None
    active: list[Active] = field(default_factory=list)
    receipts: list[list[Receipt]] = field(default_factory=list)
    layer: int = 0

    @property
    def batch(self) -> int:
        """Examples a cell has."""
        return self.clean.logits.shape[0]

    def run(self) -> Iterator[tuple[int, Float[Tensor, "batch read vocab"]]]:
        """The number of each cell with the logits that are read; its `receipts` are then there, not yet verified."""
        stack = list(self.vlm.model.get_submodule(self.vlm.family.llm.path).children())
        self.receipts = [list(cell.receipts) for cell in self.cells]
        states = None
        with torch.no_grad(), self.vlm.passing():
            for layer, block in enumerate([*stack, None]):
                self.layer = layer
                if states is not None:
                    states = states.to(self.clean.hidden(layer).device)
                states = self._joined(self._parted(states))
                if block is not None and states is not None:
                    states = self._through(block, states)
            self._prove(Site("llm.resid_post", layer - 1), states)
        assert states is not None, "every cell joins at some block"
        n_reads = self.clean.reads.shape[1]
        # One token's logits are of no size; those of long answers are made for some cells at a time.
        at_once = len(states) if n_reads == 1 else max(1, LOGITS // self.clean.reads.nbytes)
        for first in range(0, len(states), at_once):
            some = states[first : first + at_once, :, -n_reads:]
            logits = read_out(self.vlm, some.flatten(0, 2)).unflatten(0, some.shape[:3])
            for active, each in zip(self.active[first : first + at_once], logits, strict=True):
                yield from ((number, each) for number in active.numbers)

    def _parted(self, states: Float[Tensor, "row batch pos d_model"] | None) -> Tensor | None:
        """Rows divided where their cells lose different edges in the block that comes."""
        parts = [(row, part) for row, each in enumerate(self.active) for part in self._alike(each.numbers)]
        if states is None or len(parts) == len(self.active):
            return states
        whole = self.active
        self.active = [
            whole[row] if part == whole[row].numbers else Active(self.cells[part[0]], part) for row, part in parts
        ]
        return states[torch.tensor([row for row, _ in parts], device=states.device)]

    def _alike(self, numbers: list[int]) -> list[list[int]]:
        return alike(self.cells, numbers, self.layer)

    def _joined(self, states: Float[Tensor, "row batch pos d_model"] | None) -> Tensor | None:
        """Cells that leave the clean pass before this block join with the states they have there."""
        layer = self.layer
        entering = self._alike([number for number, cell in enumerate(self.cells) if cell.entry == layer])
        new = [Active(self.cells[part[0]], part) for part in entering]
        if not new:
            return states
        clean = self.clean.hidden(layer)[:, self.start :]
        site = Site("llm.resid_post", layer - 1) if layer else None
        brought = [each.cell.hidden for each in new]
        entered = [clean if each is None else each[:, self.start :].to(clean.device) for each in brought]
        joined = torch.stack([self._written(each, site, value) for each, value in zip(new, entered, strict=True)])
        self.active += new
        return joined if states is None else torch.cat([states, joined])

    def _written(self, active: Active, site: Site | None, states: Float[Tensor, "batch pos width"]) -> Tensor:
        """States of one cell after its writes at a site."""
        writes = active.writes.get(site, ()) if site is not None else ()
        if not writes:
            return states
        before = states
        for write in writes:
            states = shifted(write, self.start).apply(states)
        active.seen.before[site], active.seen.written[site] = before, states
        return states

    def _prove(self, site: Site, received: Tensor, beside: Tensor | None = None) -> None:
        """Receipts of the writes at a site, once the next module has received cell x batch x pos x width states."""
        for number, cell in enumerate(self.active):
            if site not in cell.seen.written:
                continue
            cell.seen.received[site] = received[number]
            if beside is not None:
                cell.seen.beside[site] = beside[number]
            receipt = write_receipt(self.vlm, self.clean.encoded, site, cell.writes[site], cell.seen, 0.0)
            self.receipts[cell.numbers[0]].append(receipt)
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
        cuts = [each.cell.cuts.get(layer, []) for each in self.active]
        listen = None if self.listen is None else functools.partial(self.listen, self)
        attention = SuffixAttention(self.vlm, self.clean, self.before, layer, self.start, cuts, listen)
        with ExitStack() as hooks:
            hooks.enter_context(attending({block.get_submodule(blocks.attention)}, attention.attend))
            for point, (path, is_input) in inner.items():
                site = Site(f"llm.{point}", layer)
                if any(site in cell.writes for cell in self.active):
                    edit = partial(self._edited_rows, site)
                    hooks.enter_context(passed(block.get_submodule(path), edit, is_input=is_input))
            if any(site.layer == layer for cell in self.active for site in cell.writes):
                hooks.enter_context(self._heard(block, heard))
            arguments = {name: self._argument(value) for name, value in self.clean.blocks[layer].arguments.items()}
            out = block(states.flatten(0, 1), attention_mask=None, past_key_values=None, use_cache=False, **arguments)
        out = out[0] if isinstance(out, tuple) else out
        out = out.unflatten(0, (-1, self.batch))
        for row, receipts in attention.receipts.items():
            for number in self.active[row].numbers:
                kinds = [each for each in kinds_of(self.cells[number].cuts[layer]) if each]
                for receipt, edits in zip(receipts, kinds, strict=True):
                    meant = " & ".join(edit.what for edit in edits)
                    self.receipts[number].append(replace(receipt, intervention=meant))
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

    def _edited_rows(self, site: Site, value: Tensor) -> Tensor:
        """What goes into or comes out of a module of the block, edited row by row."""
        flat = value.ndim == 2
        rows = value.unflatten(0, (len(self.active) * self.batch, -1)) if flat else value
        rows = self._edited(rows.unflatten(0, (-1, self.batch)), site).flatten(0, 1)
        return rows.flatten(0, 1) if flat else rows

    def _with_added(self, states: Float[Tensor, "cell batch pos d_model"]) -> Tensor:
        """Features that the model adds at image positions after its first blocks."""
        if self.layer >= len(self.clean.added):
            return states
        image = self.clean.encoded.cells("image")
        kept = image.positions >= self.start
        rows, positions = image.rows[kept], image.positions[kept] - self.start
        states = states.clone()
        for number, cell in enumerate(self.active):
            features = (cell.cell.added or self.clean.added)[self.layer]
            states[number, rows, positions] += features[kept.to(features.device)].to(states.device, states.dtype)
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
        along = position_axis(value, n_pos)
        if along is not None:
            value = value.narrow(along, self.start, n_pos - self.start)
        # Rotary tables and positions have the batch first, three-axis positions second; one row serves all.
        axis = 1 if value.ndim == 3 and value.shape[0] in (3, 4) and not value.is_floating_point() else 0
        if value.ndim > 1 and value.shape[axis] == batch and batch > 1:
            value = torch.cat([value] * len(self.active), dim=axis)
        return value


def shifted(write: Write, start: int) -> Write:
    """The same write in states that begin at position `start`."""
    cells = write.placed
    return replace(write, cells=Cells(cells.rows, cells.positions - start, cells.counts))
