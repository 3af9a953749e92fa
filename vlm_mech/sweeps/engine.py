"""The fast path of a sweep: from interventions to cells, and from cells to waves that share what they can.

What it computes equals `trace.run` once per intervention; `sweep` checks that on a sample of every sweep.
"""

import dataclasses
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
from vlm_mech.interventions.plan import Write, plan
from vlm_mech.interventions.receipt import Receipt, WriteReceipt, verify
from vlm_mech.interventions.specification import Activations, Intervention, Knockout, Source
from vlm_mech.interventions.trace import Run, edited_embeddings, read, run
from vlm_mech.sweeps.branching import Branch, branch_of
from vlm_mech.sweeps.cost import Sizes, answer_bytes, pass_bytes, sizes
from vlm_mech.sweeps.memory import default_budget, is_out_of_memory
from vlm_mech.sweeps.recorded_pass import RecordedPass, record
from vlm_mech.sweeps.replay import Cell, Wave
from vlm_mech.sweeps.schedule import MAX_CELLS, check_pass, recorded, sources_of, waves

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AFTER_THE_LAST = "after the last attention nothing flows from these positions to the last one"


@dataclass(eq=False)
class Engine:
    """RecordedPass passes and states read so far for one batch, shared by all its edited versions.

    `budget` is how many bytes they may take at their peak, the model itself not counted; `limit` is that or the
    default.

    Raises:
        TooLargeError: not even the unedited pass fits.
    """

    vlm: "VLM"
    encoded: Encoded
    budget: int | None = None
    limit: int = field(init=False)
    size: Sizes = field(init=False)
    clean: RecordedPass = field(init=False)
    known: dict[int, tuple[object, RecordedPass]] = field(default_factory=dict)
    states: dict[tuple[int, Site], tuple[object, Tensor]] = field(default_factory=dict)
    encodings: dict[int, tuple[object, Encoded]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.limit = default_budget(self.vlm.device) if self.budget is None else self.budget
        self.size = sizes(self.vlm, self.encoded)
        check_pass(self.size, self.limit)
        self.clean = record(self.vlm, self.encoded)
        self.known[id(self.encoded)] = (self.encoded, self.clean)

    @property
    def baseline(self) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of the unedited run."""
        return self.clean.logits

    def lend(self, other: "Engine") -> None:
        """Takes the clean pass of another batch, so that states from it need no pass of their own."""
        self.known[id(other.encoded)] = (other.encoded, other.clean)

    def answers(
        self, interventions: Sequence[Intervention], *, max_cells: int = MAX_CELLS
    ) -> tuple[Float[Tensor, "cell batch vocab"], list[tuple[Receipt, ...]]]:
        """Next-token logits of the batch under each intervention, and the receipts of each, verified.

        Args:
            max_cells: how many edited versions run together at most.

        Raises:
            UsageError: an intervention does not fit the model or the batch.
            TooLargeError: one does not fit into the budget.
            ReceiptError: one did not take effect.
        """
        if not self.provable(interventions):
            return self._by_reference(interventions)
        self._read_ahead(interventions)
        places = [branch_of(self.clean, plan(self.vlm, self.encoded, each, self._read), each, self._encoded)
                  for each in interventions]  # fmt: skip
        own = sum(value.nbytes for key, (_, value) in self.states.items() if key[0] not in self.known)
        held = len(self.known) * pass_bytes(self.size) + own + len(places) * answer_bytes(self.size)
        made, _ = waves(self.size, places, held=held, budget=self.limit, max_cells=max_cells)
        found = torch.empty(
            len(places), *self.clean.logits.shape, dtype=self.clean.logits.dtype, device=self.vlm.device
        )
        proofs: list[tuple[Receipt, ...]] = [()] * len(places)
        for numbers in made:
            self._run(numbers, places, found, proofs)
        return found, proofs

    def _run(
        self,
        numbers: list[int],
        places: list[Branch],
        found: Float[Tensor, "cell batch vocab"],
        proofs: list[tuple[Receipt, ...]],
    ) -> None:
        """Runs some cells together, or in halves when memory does not suffice after all."""
        try:
            cells = [self._cell(places[number]) for number in numbers]
            wave = Wave(self.vlm, self.clean, cells, cells[0].start, cells[0].before)
            answers = list(zip(numbers, *wave.run(), strict=True))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._out_of_memory(numbers, error)
            answers = []
        if not answers:
            middle = len(numbers) // 2
            for half in (numbers[:middle], numbers[middle:]):
                self._run(half, places, found, proofs)
        for number, logits, receipts in answers:
            if receipts and not any(receipt.reaches for receipt in receipts):
                # What provably cannot reach the answer leaves it alone; other batch sizes would only round otherwise.
                logits = self.clean.logits
            moved = (logits - self.clean.logits).abs().max().item()
            found[number] = logits
            proofs[number] = tuple(dataclasses.replace(receipt, pass_readout_change=moved) for receipt in receipts)
            verify(proofs[number])

    def _out_of_memory(self, numbers: list[int], error: Exception) -> None:
        """Frees what can be freed; raises when a single cell did not fit."""
        if self.vlm.device.type == "cuda":
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
        for key, (source, sites) in sources_of(interventions, self.encoded).items():
            missing = {site for site in sites if (key, site) not in self.states}
            if missing and recorded(missing, self.clean.n_added):
                # One recorded pass gives all residual states, and keys and values besides.
                clean = self._clean_of(source)
                for site in missing:
                    layer = site.depth + (site.name == "llm.resid_post")
                    self.states[key, site] = (source, clean.hidden(layer))
            elif missing:
                values = read(self.vlm, self._encoded(source), sorted(missing, key=str)).values
                self.states |= {(key, site): (source, value) for site, value in values.items()}

    def _read(self, source: Source, sites: tuple[Site, ...]) -> Activations:
        return Activations({site: self.states[id(source), site][1] for site in sites}, self._encoded(source))

    def _clean_of(self, source: Source) -> RecordedPass:
        key = id(source)
        if key not in self.known:
            self.known[key] = (source, record(self.vlm, self._encoded(source)))
        return self.known[key][1]

    # Cells

    def _cell(self, where: Branch) -> Cell:
        """The edited version, ready to run; if its image is edited, tower and projector run for it here."""
        if where.tower is not None:
            hidden, added, receipts = edited_embeddings(self.vlm, self.encoded, where.tower)
            return Cell(where.writes, where.cuts, 0, where.start, self.clean, hidden, added or None, receipts)
        if where.donor is None or where.taken is None:
            return Cell(where.writes, where.cuts, where.entry, where.start, self.clean)
        donor = self._clean_of(where.donor)
        proof = self._taken_over(where.taken, where.writes[where.taken][0], donor)
        return Cell(where.left, where.cuts, where.entry, where.start, donor, receipts=(proof,))

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


@dataclass(eq=False)
class Reference:
    """The same answers by one whole traced forward pass for each intervention."""

    vlm: "VLM"
    encoded: Encoded
    budget: int | None = None
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


def engine_of(vlm: "VLM", encoded: Encoded, name: str, *, budget: int | None = None) -> Engine | Reference:
    """The engine of that name around a batch; the budget (in bytes) binds the fast one only.

    Raises:
        UsageError: there is no such engine.
        TooLargeError: the unedited pass does not fit into the budget.
    """
    if name not in ENGINES:
        raise UsageError(f"engine {name!r} is not known; {' or '.join(ENGINES)} is")
    return ENGINES[name](vlm, encoded, budget)
