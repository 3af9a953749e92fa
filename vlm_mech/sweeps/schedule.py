"""Which edited versions run together, so that a sweep stays within its budget of memory; and what it will need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.errors import TooLargeError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.answered import Given, with_answers
from vlm_mech.interventions.plan import plan
from vlm_mech.interventions.specification import Ablate, Activations, Intervention, Replace, Source, StateEdit
from vlm_mech.interventions.state_plan import ReadStates, prompts_of
from vlm_mech.sweeps.branching import RESIDUAL, Branch, branch_of, outline, tower_blocks
from vlm_mech.sweeps.cost import (
    Sizes,
    in_block,
    kept_bytes,
    pass_bytes,
    pass_flops,
    pass_peak,
    reading_flops,
    recorded_bytes,
    recording_flops,
    sizes,
    state_bytes,
    tower_bytes,
    wave_bytes,
    wave_flops,
)
from vlm_mech.sweeps.memory import readable
from vlm_mech.sweeps.shares import Bytes, PerDevice

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

T = TypeVar("T")

MARGIN = {"cuda": 1.1, "cpu": 1.5}
"""Predictions are taken by this much higher when they are held against a budget.

A GPU's allocator packs tensors well; on a CPU the process holds up to half as much again as its tensors do.
"""
MAX_CELLS = 64
"""Edited versions that run together at most; more are no faster on a CPU."""


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will need: `flops` in all, `peak_bytes` beyond the model, and how it is cut to fit `budget`.

    On a model spread over several devices `by_device` has the peak and the budget of each, by name; `peak_bytes` and
    `budget` are those of the one that is fullest. `forwards` is the work in plain forward passes over the same
    examples; a loop over cells needs one a cell.
    """

    n_cells: int
    n_examples: int
    batch: int
    cells_at_once: int
    peak_bytes: int
    budget: int
    flops: int
    forwards: float
    by_device: tuple[tuple[str, int, int], ...] = ()

    def __str__(self) -> str:
        peaks = self.by_device or (("", self.peak_bytes, self.budget),)
        told = (f"{readable(peak)} of {readable(budget)}{name and ' on '}{name}" for name, peak, budget in peaks)
        return (
            f"{self.n_cells} cells x {self.n_examples} examples, {self.batch} examples and up to {self.cells_at_once} "
            f"cells together: {self.flops / 1e12:.3g} TFLOP, as much as {self.forwards:.3g} plain forwards (a loop "
            f"over cells: {round(self.in_a_loop)}); peak {', '.join(told)}"
        )

    @property
    def peaks(self) -> PerDevice:
        """Bytes at the peak of each device."""
        return np.array([peak for _, peak, _ in self.by_device] or [self.peak_bytes])

    @property
    def budgets(self) -> PerDevice:
        """The budget of each device."""
        return np.array([budget for *_, budget in self.by_device] or [self.budget])

    def with_peaks(self, *others: PerDevice) -> "SweepPlan":
        """The same plan with the largest of its own and of other peaks of each device."""
        devices = [name for name, *_ in self.by_device]
        return replace(self, **told_by_device(devices, np.maximum.reduce([self.peaks, *others]), self.budgets))

    @property
    def in_a_loop(self) -> float:
        """Plain forward passes of a loop over cells, the unedited run among them."""
        return self.n_cells + 1

    def over(self, n_examples: int) -> "SweepPlan":
        """The plan for more examples like these, batch after batch."""
        return replace(self, n_examples=n_examples, flops=self.flops * n_examples // self.n_examples)


def told_by_device(devices: Sequence[str], peaks: PerDevice, budget: Bytes) -> dict[str, Any]:
    """What a plan tells of peaks and budgets."""
    budgets = np.broadcast_to(budget, peaks.shape)
    fullest = int((peaks / budgets).argmax())
    by_device = tuple(zip(devices, peaks.tolist(), budgets.tolist(), strict=True)) if len(peaks) > 1 else ()
    return {"peak_bytes": int(peaks[fullest]), "budget": int(budgets[fullest]), "by_device": by_device}


def shortage(size: Sizes, peaks: PerDevice, budget: Bytes, *, told: str = "") -> str:
    """What is needed, and what there is, on the device that lacks most; nothing where all fit.

    Args:
        told: more to be said of the need.
    """
    needed, budgets = MARGIN[size.device] * peaks, np.broadcast_to(budget, peaks.shape)
    if (needed <= budgets).all():
        return ""
    worst = int((needed / budgets).argmax())
    where = f" on {size.shares.devices[worst]}" if len(peaks) > 1 else ""
    return f"{readable(float(needed[worst]))}{where}{told}; the budget is {readable(int(budgets[worst]))}"


def in_halves(rows: slice, do: Callable[[slice], T], *, at_most: int | None = None) -> list[T]:
    """What `do` gives for the rows: all at once, or in halves where they do not fit into memory.

    Args:
        at_most: rows to begin with; all unless given.

    Raises:
        TooLargeError: a single row does not fit.
    """
    length = rows.stop - rows.start
    try:
        if at_most is None or length <= at_most:
            return [do(rows)]
    except TooLargeError:
        if length < 2:
            raise
    middle = (rows.start + rows.stop) // 2
    halves = (slice(rows.start, middle), slice(middle, rows.stop))
    return [each for half in halves for each in in_halves(half, do, at_most=at_most)]


def sources_of(
    interventions: Sequence[Intervention], encoded: Encoded
) -> dict[int, tuple[Encoded | Sequence, set[Site]]]:
    """What has to be run besides the batch, and the sites that are read there, by identity of the source."""
    wanted: dict[int, tuple[Encoded | Sequence, set[Site]]] = {}
    for part in (part for each in interventions for part in each.flat() if isinstance(part, StateEdit)):
        if isinstance(part, Replace):
            source = encoded if part.source is None else part.source
        elif isinstance(part, Ablate) and part.to != "zero":
            source = prompts_of(encoded) if part.reference is None else part.reference
        else:
            continue
        if not isinstance(source, Activations):
            wanted.setdefault(id(source), (source, set()))[1].update(part.source_sites)
    return wanted


def recorded(sites: set[Site], n_added: int) -> bool:
    """Whether states of these sites come with a recorded pass, keys and values besides."""
    return all(site.name in RESIDUAL and (site.point == "resid_pre" or site.depth >= n_added) for site in sites)


def waves(
    size: Sizes, places: Sequence[Branch], *, held: Bytes, budget: Bytes, max_cells: int
) -> tuple[list[list[int]], PerDevice]:
    """Numbers of the cells that run together, and the bytes at the peak of each device.

    Args:
        held: bytes of what is kept all the while.

    Raises:
        TooLargeError: a single cell does not fit into the budget.
    """
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for number, each in enumerate(places):
        groups.setdefault((id(each.donor), each.start, each.tower is not None), []).append(number)
    made, peak = [], held + 0 * size.shares.inputs
    for (_, start, own), numbers in groups.items():
        numbers.sort(key=lambda number: _entry(size, places[number]))
        cut = max(places[number].score_copies for number in numbers)
        kinds = {"cut": cut, "written": any(places[number].left for number in numbers), "own": own}
        # Of so many cells that follow each other the first have the most blocks before them.
        entries = [places[number].entry for number in numbers]
        needs = [
            held + wave_bytes(size, entries[:n_cells], size.n_pos - start, **kinds)
            for n_cells in range(1, min(max_cells, len(numbers)) + 1)
        ]
        fitting = sum(not shortage(size, each, budget) for each in needs)
        if not fitting:
            lacks = shortage(size, needs[0], budget)
            raise TooLargeError(f"one edited version of {size.batch} example(s) of {size.n_pos} tokens needs {lacks}")
        # Waves of equal size rather than full ones and a rest.
        n_waves = -(-len(numbers) // fitting)
        length = -(-len(numbers) // n_waves)
        made += [numbers[at : at + length] for at in range(0, len(numbers), length)]
        peak = np.maximum(peak, needs[length - 1])
    return made, peak


def _entry(size: Sizes, place: Branch) -> tuple[int, int]:
    """Where a version leaves the clean pass, in the decoder and in the tower."""
    if place.tower is None or size.tower is None:
        return place.entry, 0
    return place.entry, tower_blocks(place.tower, size.tower.depth).start


def check_pass(size: Sizes, budget: Bytes, *, n_passes: int = 1) -> None:
    """Raise `TooLargeError` when the unedited passes alone do not fit into the budget."""
    lacks = shortage(size, pass_peak(size) + (n_passes - 1) * pass_bytes(size), budget)
    if lacks:
        raise TooLargeError(
            f"{n_passes} unedited pass(es) over {size.batch} example(s) of {size.n_pos} tokens need {lacks}"
        )


def forecast(
    vlm: "VLM",
    encoded: Encoded,
    interventions: Sequence[Intervention],
    *,
    budget: Bytes,
    max_cells: int = MAX_CELLS,
    keeps_logits: bool = True,
) -> SweepPlan:
    """What these edited versions of a batch will need; nothing is run.

    Args:
        keeps_logits: whether the next token's logits of all versions are kept, instead of a few numbers.

    Raises:
        TooLargeError: the budget is too small for one of them.
        UsageError: an intervention does not fit the model or the batch.
    """
    given: Given = {}
    interventions = [with_answers(vlm, encoded, each, given) for each in interventions]
    size, before = sizes(vlm, encoded), outline(vlm, encoded)
    own = {id(encoded), id(prompts_of(encoded))}
    encoded_of, unread = stand_ins(vlm, encoded)
    sources = sources_of(interventions, encoded)
    places = [branch_of(before, plan(vlm, encoded, each, unread), each, encoded_of) for each in interventions]
    kept = {key for key, (_, sites) in sources.items() if recorded(sites, before.n_added)} - own
    # States that no recorded pass has are read in a pass of their own.
    others = {key: sites for key, (_, sites) in sources.items() if not recorded(sites, before.n_added)}
    check_pass(size, budget, n_passes=1 + len(kept))
    states = sum(state_bytes(size, site) for sites in others.values() for site in sites)
    tower = size.tower if needs_tower(vlm, places) else None
    held = (1 + len(kept)) * pass_bytes(size) + states + kept_bytes(size, len(places) * keeps_logits)
    held = held + (recorded_bytes(size) if tower else 0)
    made, peak = waves(size, places, held=held, budget=budget, max_cells=max_cells)
    peaks = [peak, pass_peak(size) + len(kept) * pass_bytes(size)]
    peaks += [held + _reading(size, sites) for sites in others.values()]
    plain, aside = pass_flops(size), sum(reading_flops(size, sites) for sites in others.values())
    flops = (1 + len(kept)) * plain + aside + (recording_flops(tower) if tower else 0)
    flops += sum(wave_flops(size, [places[number] for number in numbers]) for numbers in made)
    return SweepPlan(
        n_cells=len(places),
        n_examples=len(encoded),
        batch=len(encoded),
        cells_at_once=max(len(numbers) for numbers in made),
        flops=flops,
        forwards=flops / plain,
        **told_by_device(size.shares.devices, np.maximum.reduce(peaks), budget),
    )


def stand_ins(vlm: "VLM", encoded: Encoded) -> tuple[Callable[[Source], Encoded], ReadStates]:
    """What encodes the sources of edits of a batch, and what stands in for states that are read of them."""
    encodings: dict[int, Encoded] = {id(each): each for each in (encoded, encoded.before) if each is not None}

    def encoded_of(source: Source) -> Encoded:
        if not isinstance(source, Encoded) and id(source) not in encodings:
            encodings[id(source)] = vlm.encode(list(source))
        return source if isinstance(source, Encoded) else encodings[id(source)]

    def unread(source: Source, sites: tuple[Site, ...]) -> Activations:
        batch = encoded_of(source)
        return Activations({site: _nothing(batch, site) for site in sites}, batch)

    return encoded_of, unread


def needs_tower(vlm: "VLM", places: Sequence[Branch]) -> bool:
    """Whether any version goes on from what blocks of the tower give in the clean pass."""
    return any(tower_blocks(each.tower, vlm.vision_depth).start for each in places if each.tower is not None)


def _reading(size: Sizes, sites: set[Site]) -> PerDevice:
    """Bytes at the peak of a pass in which states are read."""
    if all(site.stream != "llm" for site in sites):
        return tower_bytes(size, 1)
    return in_block(size, 1, size.n_pos, joined=True)


def _nothing(encoded: Encoded, site: Site) -> torch.Tensor:
    """A stand-in for states that have not been read; it takes no room."""
    if site.place == "llm":
        rows, positions = len(encoded), encoded.n_pos
    else:
        cells = encoded.cells("all" if site.place == "vision" else "image", place=site.place)
        rows, positions = int(cells.rows.max()) + 1, int(cells.positions.max()) + 1
    return torch.zeros(()).expand(rows, positions, 1)
