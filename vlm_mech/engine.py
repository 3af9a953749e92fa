"""The fast path of a sweep: from interventions to cells, and from cells to waves that share what they can.

What it computes equals `trace.run` once per intervention; `sweep` checks that on a sample of every sweep.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.clean import Clean, record
from vlm_mech.edit import Cut, Plan, Write, plan
from vlm_mech.errors import UsageError
from vlm_mech.intervene import Activations, Intervention, Knockout, Replace, Source
from vlm_mech.prompt import Encoded
from vlm_mech.receipt import Receipt, WriteReceipt, verify
from vlm_mech.replay import Cell, Wave
from vlm_mech.site import Site
from vlm_mech.trace import Run, edited_embeddings, read, run

if TYPE_CHECKING:
    from vlm_mech.model import VLM


RESIDUAL = ("llm.resid_pre", "llm.resid_post")
AFTER_THE_LAST = "after the last attention nothing flows from these positions to the last one"


@dataclass(eq=False)
class Engine:
    """Clean passes and states read so far for one batch, shared by all its edited versions."""

    vlm: "VLM"
    encoded: Encoded
    clean: Clean = field(init=False)
    known: dict[int, tuple[object, Clean]] = field(default_factory=dict)
    states: dict[tuple[int, Site], tuple[object, Tensor]] = field(default_factory=dict)
    encodings: dict[int, tuple[object, Encoded]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clean = record(self.vlm, self.encoded)

    @property
    def baseline(self) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of the unedited run."""
        return self.clean.logits

    def lend(self, other: "Engine") -> None:
        """Takes the clean pass of another batch, so that states from it need no pass of their own."""
        self.known[id(other.encoded)] = (other.encoded, other.clean)

    def answers(
        self, interventions: Sequence[Intervention], *, max_cells: int = 64
    ) -> tuple[Float[Tensor, "cell batch vocab"], list[tuple[Receipt, ...]]]:
        """Next-token logits of the batch under each intervention, and the receipts of each, verified.

        Args:
            max_cells: how many edited versions run together at most.

        Raises:
            UsageError: an intervention does not fit the model or the batch.
            ReceiptError: one did not take effect.
        """
        if not self.provable(interventions):
            return self._by_reference(interventions)
        self._read_ahead(interventions)
        cells = [self.cell(plan(self.vlm, self.encoded, each, self._read), each) for each in interventions]
        found: list[Any] = [None] * len(cells)
        for numbers in self._waves(cells, max_cells):
            chosen = [cells[number] for number in numbers]
            wave = Wave(self.vlm, self.clean, chosen, chosen[0].start, chosen[0].before)
            for number, *answer in zip(numbers, *wave.run(), strict=True):
                found[number] = answer
        receipts = []
        for number, (logits, proofs) in enumerate(found):
            if proofs and not any(receipt.reaches for receipt in proofs):
                # What provably cannot reach the answer leaves it alone; other batch sizes would only round otherwise.
                logits = found[number][0] = self.clean.logits
            moved = (logits - self.clean.logits).abs().max().item()
            receipts.append(tuple(dataclasses.replace(receipt, readout_change=moved) for receipt in proofs))
            verify(receipts[-1])
        return torch.stack([logits for logits, _ in found]), receipts

    def provable(self, interventions: Sequence[Intervention]) -> bool:
        """Whether cut edges can be proved here: not where attention is more than a softmax of scaled scores."""
        cuts = any(
            isinstance(part, Knockout) and part.stream == "llm" for each in interventions for part in each.flat()
        )
        return not cuts or all(block.plain for block in self.clean.blocks)

    def _by_reference(
        self, interventions: Sequence[Intervention]
    ) -> tuple[Float[Tensor, "cell batch vocab"], list[tuple[Receipt, ...]]]:
        warnings.warn(
            f"{self.vlm.name}: attention that is no plain softmax; knockouts run through the reference, one by one",
            stacklevel=3,
        )
        return Reference(self.vlm, self.encoded).answers(interventions)

    # Sources

    def _encoded(self, source: Source) -> Encoded:
        if isinstance(source, Encoded):
            return source
        key = id(source)
        if key not in self.encodings:
            self.encodings[key] = (source, self.vlm.encode(list(source)))
        return self.encodings[key][1]

    def _read_ahead(self, interventions: Sequence[Intervention]) -> None:
        """Reads all states that the interventions take from other prompts, in one pass for each source."""
        wanted: dict[int, tuple[Source, set[Site]]] = {}
        for part in (part for each in interventions for part in each.flat()):
            source = getattr(part, "source", None) if isinstance(part, Replace) else getattr(part, "reference", None)
            if source is None and getattr(part, "to", "zero") != "zero":
                source = self.encoded
            if source is not None and not isinstance(source, Activations):
                wanted.setdefault(id(source), (source, set()))[1].update(part.sites)
        for key, (source, sites) in wanted.items():
            missing = [site for site in sites if (key, site) not in self.states]
            if missing and all(site.name in RESIDUAL for site in missing):
                # One recorded pass gives all residual states, and keys and values besides.
                clean = self._clean_of(source)
                for site in missing:
                    if site.name == "llm.resid_pre" or site.depth >= len(clean.added):
                        layer = site.depth + (site.name == "llm.resid_post")
                        self.states[key, site] = (source, clean.hidden(layer))
                missing = [site for site in missing if (key, site) not in self.states]
            if missing:
                values = read(self.vlm, self._encoded(source), missing).values
                self.states |= {(key, site): (source, value) for site, value in values.items()}

    def _read(self, source: Source, sites: tuple[Site, ...]) -> Activations:
        return Activations({site: self.states[id(source), site][1] for site in sites}, self._encoded(source))

    def _clean_of(self, source: Source) -> Clean:
        key = id(source)
        if key not in self.known:
            self.known[key] = (source, record(self.vlm, self._encoded(source)))
        return self.known[key][1]

    # Cells

    def cell(self, made: Plan, intervention: Intervention) -> Cell:
        """Where an edited version leaves the clean pass, and what is done to it from there on."""
        writes = {site: each for site, each in made.writes.items() if site.stream == "llm"}
        cuts = {layer: each for (stream, layer), each in made.cuts.items() if stream == "llm"}
        n_added = len(self.clean.added)
        image = self._with_edited_image(made, writes, cuts)
        if image is not None:
            return image
        entries = [_entry(site, n_added) for site in writes] + list(cuts)
        first = min([_first(each) for each in writes.values()] + [_first_cut(each) for each in cuts.values()])
        donor = self._donor(writes, cuts, intervention)
        if donor is not None:
            before, start, site = donor
            kept = {other: each for other, each in writes.items() if other != site}
            proof = self._taken_over(site, writes[site][0], before)
            return Cell(kept, cuts, min(entries), start, before, receipts=(proof,))
        return Cell(writes, cuts, min(entries), self.clean.widened(first), self.clean)

    def _donor(
        self, writes: dict[Site, list[Write]], cuts: dict[int, list[Cut]], intervention: Intervention
    ) -> tuple[Clean, int, Site] | None:
        """A run whose keys and values this version has before some position, once its states are put there.

        That is so when one `Replace` of the residual stream covers everything from where the two runs begin to
        differ up to some position: from there on these positions are as in the run the states come from.
        """
        parts = [part for part in intervention.flat() if isinstance(part, Replace)]
        if len(parts) != 1 or len(parts[0].sites) != 1 or isinstance(parts[0].source, Activations):
            return None
        part, site = parts[0], parts[0].sites[0]
        if site.name not in ("llm.resid_pre", "llm.resid_post") or part.source_span is not None:
            return None
        if site.depth < len(self.clean.added) or len(writes[site]) != 1 or _entry(site, 0) > min([99999, *cuts]):
            return None
        others = [each for other, each in writes.items() if other != site]
        block = _block(writes[site][0], len(self.encoded))
        if block is None or any(_entry(other, 0) < _entry(site, 0) for other in writes):
            return None
        begin, end = block
        if any(_first(each) < end for each in others) or any(_first_cut(each) < end for each in cuts.values()):
            return None
        other = self._clean_of(part.source)
        same = other.final.shape == self.clean.final.shape and torch.equal(
            other.hidden(0)[:, :begin], self.clean.hidden(0)[:, :begin]
        )
        if not same or self.clean.widened(end) != end or other.widened(end) != end or end >= self.encoded.n_pos:
            return None
        return other, end, site

    def _taken_over(self, site: Site, write: Write, other: Clean) -> WriteReceipt:
        """The receipt of a write that was made by taking the keys and values of the run the states come from."""
        layer = site.depth + (site.name == "llm.resid_post")
        cells = write.placed
        difference = (
            other.hidden(layer)[cells.rows, cells.positions] - self.clean.hidden(layer)[cells.rows, cells.positions]
        )
        return WriteReceipt(
            intervention=write.what,
            site=str(site),
            n_cells=len(cells),
            change=difference.abs().max().item(),
            witness="keys and values of the run the states come from",
            readback_error=0.0,
            tolerance=0.0,
            reaches=layer < len(self.clean.blocks),
            reason="" if layer < len(self.clean.blocks) else AFTER_THE_LAST,
            readout_change=0.0,
        )

    def _with_edited_image(
        self, made: Plan, writes: dict[Site, list[Write]], cuts: dict[int, list[Cut]]
    ) -> Cell | None:
        """A version whose image was edited before the decoder: tower and projector run once for it, by a trace."""
        towers = Plan(
            {site: each for site, each in made.writes.items() if site.stream != "llm"},
            {where: each for where, each in made.cuts.items() if where[0] != "llm"},
        )
        if not towers.writes and not towers.cuts:
            return None
        hidden, added, receipts = edited_embeddings(self.vlm, self.encoded, towers)
        first = [int(self.encoded.cells("image").positions.min())]
        first += [_first(each) for each in writes.values()] + [_first_cut(each) for each in cuts.values()]
        start = self.clean.widened(min(first))
        return Cell(writes, cuts, 0, start, self.clean, hidden, added or None, receipts)

    def _waves(self, cells: list[Cell], max_cells: int) -> list[list[int]]:
        """Numbers of the cells that run together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, cell in enumerate(cells):
            groups.setdefault((id(cell.before), cell.start), []).append(number)
        waves = []
        for numbers in groups.values():
            numbers.sort(key=lambda number: cells[number].entry)
            waves += [numbers[at : at + max_cells] for at in range(0, len(numbers), max_cells)]
        return waves


@dataclass(eq=False)
class Reference:
    """The same answers by one whole traced forward pass for each intervention."""

    vlm: "VLM"
    encoded: Encoded
    unedited: Run = field(init=False)

    def __post_init__(self) -> None:
        self.unedited = run(self.vlm, self.encoded)

    @property
    def baseline(self) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of the unedited run."""
        return self.unedited.last

    def lend(self, other: "Reference") -> None:
        """Nothing is shared."""

    def answers(
        self, interventions: Sequence[Intervention], *, max_cells: int = 1
    ) -> tuple[Float[Tensor, "cell batch vocab"], list[tuple[Receipt, ...]]]:
        """Next-token logits of the batch under each intervention, and the verified receipts of each."""
        done = [run(self.vlm, self.encoded, each, baseline=self.unedited) for each in interventions]
        return torch.stack([each.last for each in done]), [each.receipts for each in done]


ENGINES = {"fast": Engine, "trace": Reference}


def engine_of(vlm: "VLM", encoded: Encoded, name: str) -> Engine | Reference:
    """The engine of that name around a batch.

    Raises:
        UsageError: there is no such engine.
    """
    if name not in ENGINES:
        raise UsageError(f"engine {name!r} is not known; {' or '.join(ENGINES)} is")
    return ENGINES[name](vlm, encoded)


def _entry(site: Site, n_added: int) -> int:
    """The block before which a version with a write at this site leaves the clean pass.

    What comes out of a block is written before the next; unless features are added in between.
    """
    after = site.point == "resid_post" and site.depth >= n_added
    return site.depth + 1 if after else site.depth


def _first(writes: list[Write]) -> int:
    return min(int(write.placed.positions.min()) for write in writes)


def _first_cut(cuts: list[Cut]) -> int:
    return min(min(positions) for cut in cuts for positions in cut.queries.values())


def _block(write: Write, n_rows: int) -> tuple[int, int] | None:
    """First position and the one after the last, if the write covers the same unbroken range in every example."""
    rows = [write.placed.positions[write.placed.rows == row].tolist() for row in range(n_rows)]
    begin, end = rows[0][0], rows[0][-1] + 1
    return (begin, end) if all(positions == list(range(begin, end)) for positions in rows) else None
