"""An edit of its own in each example of a batch, so that one pass answers many questions."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.inputs.span import Cells
from vlm_mech.interventions.attention_plan import Cut
from vlm_mech.interventions.passes import Batch
from vlm_mech.interventions.plan import Plan, Write, plan
from vlm_mech.interventions.specification import Intervention
from vlm_mech.interventions.state_plan import ReadStates


def plan_by_example(vlm: TracedModel, encoded: Batch, edits: Sequence[Intervention | None], read: ReadStates) -> Plan:
    """A plan in which each example of the batch has its own intervention, or none.

    Args:
        read: reads states of a batch, for sources and references given as prompts.

    Raises:
        UsageError: as for `plan`.
    """
    made = Plan({}, {})
    for example, edit in enumerate(edits):
        own = plan(vlm, encoded, edit, read)
        for site, writes in own.writes.items():
            made.writes.setdefault(site, []).extend(_write_in(write, example) for write in writes)
        for where, cuts in own.cuts.items():
            held = _of_example(encoded.cells("all", place=where[0]), example).by_row
            made.cuts.setdefault(where, []).extend(_cut_in(cut, held) for cut in cuts)
    return made


def _cut_in(cut: Cut, held: Mapping[int, Sequence[int]]) -> Cut:
    """The cut at queries of an example; some towers have all pictures in one row, so that positions distinguish
    them."""
    own = {row: set(positions) for row, positions in held.items()}
    queries = {row: tuple(each for each in at if each in own[row]) for row, at in cut.queries.items() if row in own}
    return dataclasses.replace(cut, queries=queries, named=None)


def _of_example(cells: Cells, example: int) -> Cells:
    chosen = _numbers(cells, example)
    counts = tuple(count if number == example else 0 for number, count in enumerate(cells.counts))
    return Cells(cells.rows[chosen], cells.positions[chosen], counts)


def _numbers(cells: Cells, example: int) -> Tensor:
    """Which of the cells belong to an example: they stand one example after the other."""
    start = sum(cells.counts[:example])
    return torch.arange(start, start + cells.counts[example])


def _write_in(write: Write, example: int) -> Write:
    if write.cells is None:
        return write
    return dataclasses.replace(
        write, cells=_of_example(write.cells, example), change=_Chosen(write, _numbers(write.cells, example))
    )


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The change of a write at some of its cells."""

    write: Write
    cells: Tensor

    def __call__(self, old: Tensor, chosen: Tensor | None = None) -> Tensor:
        return self.write.change(old, self.cells if chosen is None else self.cells[chosen])
