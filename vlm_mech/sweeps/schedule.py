"""Which edited versions run together, so that a sweep stays within its budget of memory; and what it will need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from vlm_mech.architectures.site import Site
from vlm_mech.errors import TooLargeError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.answered import Given, with_answers
from vlm_mech.interventions.plan import ReadStates, plan, prompts_of
from vlm_mech.interventions.specification import Activations, Intervention, Replace, Source
from vlm_mech.sweeps.branching import RESIDUAL, Branch, branch_of, outline, tower_blocks
from vlm_mech.sweeps.cost import (
    Sizes,
    answer_bytes,
    in_block,
    pass_bytes,
    pass_flops,
    pass_peak,
    reading_flops,
    recording_flops,
    sizes,
    tower_bytes,
    wave_bytes,
    wave_flops,
)
from vlm_mech.sweeps.memory import readable

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

    `forwards` is the work in plain forward passes over the same examples; a loop over cells needs one a cell.
    """

    n_cells: int
    n_examples: int
    batch: int
    cells_at_once: int
    peak_bytes: int
    budget: int
    flops: int
    forwards: float

    def __str__(self) -> str:
        return (
            f"{self.n_cells} cells x {self.n_examples} examples, {self.batch} examples and up to {self.cells_at_once} "
            f"cells at once: {self.flops / 1e12:.3g} TFLOP, as much as {self.forwards:.3g} plain forwards (a loop over "
            f"cells: {round(self.in_a_loop)}); peak {readable(self.peak_bytes)} of {readable(self.budget)}"
        )

    @property
    def in_a_loop(self) -> float:
        """Plain forward passes of a loop over cells, the unedited run among them."""
        return self.n_cells + 1

    def over(self, n_examples: int) -> "SweepPlan":
        """The plan for more examples like these, batch after batch."""
        return replace(self, n_examples=n_examples, flops=self.flops * n_examples // self.n_examples)


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
    for part in (part for each in interventions for part in each.flat()):
        source = getattr(part, "source", None) if isinstance(part, Replace) else getattr(part, "reference", None)
        if source is None and getattr(part, "to", "zero") != "zero":
            source = prompts_of(encoded)
        if source is not None and not isinstance(source, Activations):
            wanted.setdefault(id(source), (source, set()))[1].update(part.sites)
    return wanted


def recorded(sites: set[Site], n_added: int) -> bool:
    """Whether states of these sites come with a recorded pass, keys and values besides."""
    return all(site.name in RESIDUAL and (site.point == "resid_pre" or site.depth >= n_added) for site in sites)


def waves(
    size: Sizes, places: Sequence[Branch], *, held: int, budget: int, max_cells: int
) -> tuple[list[list[int]], int]:
    """Numbers of the cells that run together, and the bytes at the peak.

    Args:
        held: bytes of what is kept all the while.

    Raises:
        TooLargeError: a single cell does not fit into the budget.
    """
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for number, each in enumerate(places):
        groups.setdefault((id(each.donor), each.start, each.tower is not None), []).append(number)
    made, peak = [], held
    for (_, start, own), numbers in groups.items():
        numbers.sort(key=lambda number: _entry(size, places[number]))
        cut = any(places[number].cuts for number in numbers)
        kinds = {"cut": cut, "written": any(places[number].left for number in numbers), "own": own}
        needs = [
            held + wave_bytes(size, n_cells, size.n_pos - start, **kinds)
            for n_cells in range(1, min(max_cells, len(numbers)) + 1)
        ]
        fitting = sum(MARGIN[size.device] * each <= budget for each in needs)
        if not fitting:
            raise TooLargeError(
                f"one edited version of {size.batch} example(s) of {size.n_pos} tokens needs "
                f"{readable(MARGIN[size.device] * needs[0])}; the budget is {readable(budget)}"
            )
        # Waves of equal size rather than full ones and a rest.
        n_waves = -(-len(numbers) // fitting)
        length = -(-len(numbers) // n_waves)
        made += [numbers[at : at + length] for at in range(0, len(numbers), length)]
        peak = max(peak, needs[length - 1])
    return made, peak


def _entry(size: Sizes, place: Branch) -> tuple[int, int]:
    """Where a version leaves the clean pass, in the decoder and in the tower."""
    if place.tower is None or size.tower is None:
        return place.entry, 0
    return place.entry, tower_blocks(place.tower, size.tower.depth).start


def check_pass(size: Sizes, budget: int, *, n_passes: int = 1) -> None:
    """Raise `TooLargeError` when the unedited passes alone do not fit into the budget."""
    needed = MARGIN[size.device] * (pass_peak(size) + (n_passes - 1) * pass_bytes(size))
    if needed > budget:
        raise TooLargeError(
            f"{n_passes} unedited pass(es) over {size.batch} example(s) of {size.n_pos} tokens need "
            f"{readable(needed)}; the budget is {readable(budget)}"
        )


def forecast(
    vlm: "VLM",
    encoded: Encoded,
    interventions: Sequence[Intervention],
    *,
    budget: int,
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
    states = sum(_state_bytes(size, site) for sites in others.values() for site in sites)
    logits = len(places) * answer_bytes(size) if keeps_logits else 0
    tower = size.tower if needs_tower(vlm, places) else None
    held = (1 + len(kept)) * pass_bytes(size) + states + logits + (tower.recorded_bytes if tower else 0)
    made, peak = waves(size, places, held=held, budget=budget, max_cells=max_cells)
    reading = max((held + _reading(size, sites) for sites in others.values()), default=0)
    plain, aside = pass_flops(size), sum(reading_flops(size, sites) for sites in others.values())
    flops = (1 + len(kept)) * plain + aside + (recording_flops(tower) if tower else 0)
    flops += sum(wave_flops(size, [places[number] for number in numbers]) for numbers in made)
    return SweepPlan(
        n_cells=len(places),
        n_examples=len(encoded),
        batch=len(encoded),
        cells_at_once=max(len(numbers) for numbers in made),
        peak_bytes=max(peak, reading, pass_peak(size) + len(kept) * pass_bytes(size)),
        budget=budget,
        flops=flops,
        forwards=flops / plain,
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


def _reading(size: Sizes, sites: set[Site]) -> int:
    """Bytes at the peak of a pass in which states are read."""
    if all(site.stream != "llm" for site in sites):
        return tower_bytes(size, 1)
    return in_block(size, 1, size.n_pos, joined=True)


def _state_bytes(size: Sizes, site: Site) -> int:
    """About the bytes of what is read at a site."""
    return size.stream if site.stream == "llm" or size.tower is None else size.tower.stream


def _nothing(encoded: Encoded, site: Site) -> torch.Tensor:
    """A stand-in for states that have not been read; it takes no room."""
    if site.place == "llm":
        rows, positions = len(encoded), encoded.n_pos
    else:
        cells = encoded.cells("all" if site.place == "vision" else "image", place=site.place)
        rows, positions = int(cells.rows.max()) + 1, int(cells.positions.max()) + 1
    return torch.zeros(()).expand(rows, positions, 1)
