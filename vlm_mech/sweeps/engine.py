"""The fast path of a sweep: from interventions to cells, and from cells to waves that share what they can.

What it computes equals `trace.run` once per intervention; `sweep` checks that on a sample of every sweep.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import TooLargeError, UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.answered import Given, with_answers
from vlm_mech.interventions.plan import Plan, Write, plan
from vlm_mech.interventions.receipt import Receipt, WriteReceipt, verify
from vlm_mech.interventions.specification import Activations, AttentionEdit, Intervention, Source
from vlm_mech.sweeps.branching import Branch, branch_of
from vlm_mech.sweeps.cost import Sizes, copies_at_once, kept_bytes, pass_bytes, sizes
from vlm_mech.sweeps.memory import is_out_of_memory
from vlm_mech.sweeps.recorded_pass import RecordedPass, record
from vlm_mech.sweeps.reference import Keep, Kept, Listen, Reference, next_token, read_side_by_side
from vlm_mech.sweeps.replay import Cell, Wave
from vlm_mech.sweeps.schedule import MAX_CELLS, check_pass, needs_tower, recorded, sources_of, waves
from vlm_mech.sweeps.shares import Bytes, PerDevice, budget_of
from vlm_mech.sweeps.tower import Copy, TowerPass, tower_outputs

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AFTER_THE_LAST = "after the last attention nothing flows from these positions to the last one"


@dataclass(eq=False)
class Engine:
    """RecordedPass passes and states read so far for one batch, shared by all its edited versions.

    `budget` is how many bytes they may take at their peak on each device, the model itself not counted; `limit` is that
    or the default. `ran` is the unedited pass where it was run already.

    Raises:
        TooLargeError: not even the unedited pass fits.
    """

    vlm: "VLM"
    encoded: Encoded
    budget: Bytes | None = None
    ran: RecordedPass | None = None
    limit: Bytes = field(init=False)
    size: Sizes = field(init=False)
    clean: RecordedPass = field(init=False)
    known: dict[int, tuple[object, RecordedPass]] = field(default_factory=dict)
    states: dict[tuple[int, Site], tuple[object, Tensor]] = field(default_factory=dict)
    encodings: dict[int, tuple[object, Encoded]] = field(default_factory=dict)
    answered: Given = field(default_factory=dict)
    tower: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limit = budget_of(self.vlm, None) if self.budget is None else self.budget
        self.size = sizes(self.vlm, self.encoded)
        check_pass(self.size, self.limit)
        self.clean = self.ran or record(self.vlm, self.encoded)
        self._know(self.encoded, self.clean)

    @property
    def baseline(self) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of the unedited run."""
        return self.clean.logits

    def lend(self, other: "Engine") -> None:
        """Takes the clean pass of another batch, so that states from it need no pass of their own."""
        self._know(other.encoded, other.clean)

    def afresh(self) -> "Engine":
        """The engine of the same clean pass without what it was lent or read since."""
        return Engine(self.vlm, self.encoded, self.budget, self.clean)

    def alone(self) -> "Engine":
        """The engine of the prompts without the answers after them; nothing is run again."""
        if self.encoded.before is None:
            return self
        made = Engine(self.vlm, self.encoded.before, self.limit, self.clean.of_prompts())
        known = {key: each for key, each in self.known.items() if each[1] is not self.clean}
        made.known, made.states, made.encodings = known | made.known, self.states, self.encodings
        return made

    def _know(self, encoded: Encoded, clean: RecordedPass) -> None:
        # States of a batch's prompts are the same with answers after them.
        for each in (encoded, encoded.before):
            if each is not None:
                self.known[id(each)] = (each, clean)
        # Where the answers are those of this batch, states of their tokens need no pass of their own either.
        own = self.encoded.answers
        if encoded.before is not None and own is not None and encoded.answers == own:
            self.answered[id(encoded.before)] = (encoded.before, encoded)

    @property
    def reads(self) -> Float[Tensor, "batch read vocab"]:
        """Logits of the unedited run at each prompt's last position and at the answers' tokens after it."""
        return self.clean.reads

    def answers(
        self, interventions: Sequence[Intervention], *, max_cells: int = MAX_CELLS, keep: Keep | None = None
    ) -> tuple[Tensor, list[tuple[Receipt, ...]]]:
        """Next-token logits of the batch under each intervention, and the receipts of each, verified.

        Args:
            max_cells: how many edited versions run together at most.
            keep: what is kept of each intervention instead, from its number and its logits as in `reads`.

        Returns:
            Tensor of shape cell x batch x vocab, or cell x what is kept; and receipts by cell.

        Raises:
            UsageError: an intervention does not fit the model or the batch.
            TooLargeError: one does not fit into the budget.
            ReceiptError: one did not take effect.
        """
        if not self.provable(interventions):
            return self._by_reference(interventions, keep)
        interventions = [with_answers(self.vlm, self.encoded, each, self.answered) for each in interventions]
        made = self.plans(interventions)
        places = [self.place(each, meant) for each, meant in zip(made, interventions, strict=True)]
        return self.carry_out(places, max_cells=max_cells, keep=keep)

    def plans(self, interventions: Sequence[Intervention], *, generating: bool = False) -> list[Plan]:
        """The concrete edits of each intervention, all states that they take read.

        Args:
            generating: whether there will be generated tokens to edit.
        """
        self._read_ahead(interventions)
        return [plan(self.vlm, self.encoded, each, self._read, generating=generating) for each in interventions]

    def place(self, made: Plan, intervention: Intervention) -> Branch:
        """Where the version with these edits leaves the clean pass."""
        return branch_of(self.clean, made, intervention, self._encoded)

    @property
    def held(self) -> PerDevice:
        """Bytes of the passes and states that are kept, on each device."""
        states = [value for key, (_, value) in self.states.items() if key[0] not in self.known]
        n_passes = len({id(clean) for _, clean in self.known.values()})
        return n_passes * pass_bytes(self.size) + self.size.shares.of([*states, *self.tower])

    def carry_out(
        self,
        places: list[Branch],
        *,
        max_cells: int = MAX_CELLS,
        keep: Keep | None = None,
        listen: Listen | None = None,
        beside: Bytes = 0,
    ) -> tuple[Tensor, list[tuple[Receipt, ...]]]:
        """As `answers`, of versions whose places are known.

        Args:
            listen: is given the keys and values that each block makes of some versions: their numbers, the wave, keys
                and values.
            beside: bytes that something else takes meanwhile.
        """
        if not self.tower and needs_tower(self.vlm, places):
            self.tower = tower_outputs(self.vlm, self.encoded)
        held = self.held + beside + kept_bytes(self.size, len(places) * (keep is None))
        made, _ = waves(self.size, places, held=held, budget=self.limit, max_cells=max_cells)
        kept = Kept(len(places), keep or next_token, listen)
        proofs: list[tuple[Receipt, ...]] = [()] * len(places)
        for numbers in made:
            self._run(numbers, places, kept, proofs)
        assert kept.found is not None, "there is an intervention"
        return kept.found, proofs

    def _run(self, numbers: list[int], places: list[Branch], kept: "Kept", proofs: list[tuple[Receipt, ...]]) -> None:
        """Runs some cells together, or in halves when memory does not suffice after all."""
        done = False
        try:
            cells = self._cells([places[number] for number in numbers])
            listen = None if kept.listen is None else functools.partial(kept.listen, numbers)
            wave = Wave(self.vlm, self.clean, cells, cells[0].start, cells[0].before, listen)
            for place, logits in wave.run():
                number, receipts = numbers[place], wave.receipts[place]
                if receipts and not any(receipt.reaches for receipt in receipts):
                    # What provably cannot reach the answer leaves it alone; other batch sizes would only round
                    # otherwise.
                    logits = self.clean.reads
                moved = (logits - self.clean.reads).abs().max().item()
                proofs[number] = tuple(dataclasses.replace(receipt, pass_readout_change=moved) for receipt in receipts)
                verify(proofs[number])
                kept.take(number, logits)
            done = True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._out_of_memory(numbers, error)
        if not done:
            middle = len(numbers) // 2
            for half in (numbers[:middle], numbers[middle:]):
                self._run(half, places, kept, proofs)

    def _out_of_memory(self, numbers: list[int], error: Exception) -> None:
        """Frees what can be freed; raises when a single cell did not fit."""
        # That of all GPUs; where none was used there is nothing to be freed.
        torch.cuda.empty_cache()
        if len(numbers) == 1:
            raise TooLargeError(
                f"one edited version of {len(self.encoded)} example(s) of {self.encoded.n_pos} tokens does not fit "
                "into memory; fewer examples at a time, a smaller budget (`memory`, or --memory of the command) or a "
                "smaller data type may"
            ) from error

    def provable(self, interventions: Sequence[Intervention]) -> bool:
        """Whether cut edges can be proved here: not where attention is more than a softmax of scaled scores."""
        cuts = any(
            isinstance(part, AttentionEdit) and part.stream == "llm" for each in interventions for part in each.flat()
        )
        return not cuts or all(block.plain for block in self.clean.blocks)

    def _by_reference(
        self, interventions: Sequence[Intervention], keep: Keep | None
    ) -> tuple[Tensor, list[tuple[Receipt, ...]]]:
        warnings.warn(
            f"{self.vlm.name}: attention that is no plain softmax; its edits run through the reference, one by one",
            stacklevel=3,
        )
        return Reference(self.vlm, self.encoded).answers(interventions, keep=keep)

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
        for key, (source, sites) in sources_of(interventions, self.encoded).items():
            missing = {site for site in sites if (key, site) not in self.states}
            if missing and recorded(missing, self.clean.n_added):
                # One recorded pass gives all residual states, and keys and values besides.
                clean = self._clean_of(source)
                for site in missing:
                    layer = site.depth + (site.name == "llm.resid_post")
                    self.states[key, site] = (source, clean.hidden(layer))
            elif missing:
                values = read_side_by_side(self.vlm, self._encoded(source), sorted(missing, key=str))
                self.states |= {(key, site): (source, value) for site, value in values.items()}

    def _read(self, source: Source, sites: tuple[Site, ...]) -> Activations:
        return Activations({site: self.states[id(source), site][1] for site in sites}, self._encoded(source))

    def _clean_of(self, source: Source) -> RecordedPass:
        key = id(source)
        if key not in self.known:
            self.known[key] = (source, record(self.vlm, self._encoded(source)))
        return self.known[key][1]

    # Cells

    def _cells(self, places: list[Branch]) -> list[Cell]:
        """The edited versions, ready to run; if their images are edited, tower and projector run for them here."""
        towers = [where.tower for where in places if where.tower is not None]
        if not towers:
            return [self._cell(where) for where in places]
        step, copies = copies_at_once(self.size, len(towers), self.encoded.n_pos), list[Copy]()
        for first in range(0, len(towers), step):
            copies += TowerPass(self.vlm, self.encoded, towers[first : first + step], self.tower).run()
        return [
            Cell(where.writes, where.cuts, 0, where.start, self.clean, copy.hidden, copy.added or None, copy.receipts)
            for where, copy in zip(places, copies, strict=True)
        ]

    def _cell(self, where: Branch) -> Cell:
        if where.donor is None or where.taken is None:
            return Cell(where.writes, where.cuts, where.entry, where.start, self.clean)
        donor = self.before(where)
        proof = self._taken_over(where.taken, where.writes[where.taken][0], donor)
        return Cell(where.left, where.cuts, where.entry, where.start, donor, receipts=(proof,))

    def before(self, where: Branch | None) -> RecordedPass:
        """The pass whose keys and values a version has before its start, once it has left the clean pass."""
        return self.clean if where is None or where.donor is None else self._clean_of(where.donor)

    def _taken_over(self, site: Site, write: Write, other: RecordedPass) -> WriteReceipt:
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
            pass_readout_change=0.0,
        )


ENGINES = {"fast": Engine, "trace": Reference}


def engine_of(vlm: "VLM", encoded: Encoded, name: str, *, budget: Bytes | None = None) -> Engine | Reference:
    """The engine of that name around a batch; the budget (in bytes, on each device) binds the fast one only.

    Raises:
        UsageError: there is no such engine.
        TooLargeError: the unedited pass does not fit into the budget.
    """
    if name not in ENGINES:
        raise UsageError(f"engine {name!r} is not known; use {' or '.join(ENGINES)}")
    return ENGINES[name](vlm, encoded, budget)
