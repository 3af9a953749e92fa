"""What answers generated under many edits cost: which are decoded together, in how much memory; nothing is run."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm_mech.architectures.site import Site
from vlm_mech.errors import TooLargeError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.answered import of_generated
from vlm_mech.interventions.plan import Plan, plan
from vlm_mech.interventions.specification import Intervention, Together
from vlm_mech.sweeps.branching import Branch, branch_of, outline
from vlm_mech.sweeps.cost import (
    Sizes,
    decoding_bytes,
    decoding_flops,
    generation_flops,
    generation_peak,
    pass_flops,
    sizes,
    track_bytes,
    wave_flops,
)
from vlm_mech.sweeps.schedule import MAX_CELLS, shortage, sources_of, stand_ins, waves
from vlm_mech.sweeps.shares import Bytes, PerDevice

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Place = Branch | None
"""Where a version leaves the clean pass over the prompt; None where it does so with the first generated token."""


@dataclass(frozen=True, eq=False)
class GenerationCost:
    """Operations of what is generated under some edits and without one, in a loop over edits too, and peak bytes.

    `peaks` are those of each device of the model.
    """

    flops: int
    looped: int
    peaks: PerDevice

    @property
    def peak_bytes(self) -> int:
        """The largest of the peaks."""
        return int(self.peaks.max())


def generation_cost(
    vlm: "VLM",
    prompts: Encoded,
    interventions: Sequence[Intervention],
    n_new: int,
    *,
    held: Bytes,
    budget: Bytes,
    check: Sequence[int] = (),
) -> GenerationCost:
    """What `answers_under` these edits, and without one, will cost once the clean pass is there.

    Args:
        prompts: the batch, without answers.
        held: bytes of what is kept meanwhile.
        check: numbers of the edits under which the reference generates too.

    Raises:
        TooLargeError: the budget is too small for one of them.
    """
    size, places = sizes(vlm, prompts), [None, *planned_places(vlm, prompts, interventions)]
    how, flops = {"held": held, "budget": budget}, 0
    peaks = [reference_peak(size, n_new, **how) if check else held + 0 * size.shares.inputs]
    for numbers in parts_of(size, places, n_new, **how):
        chosen = [places[number] for number in numbers]
        branches = [place for place in chosen if place is not None]
        own = held + sum(track_bytes(size, start_of(place, size.n_pos), n_new) for place in chosen)
        made, _ = waves(size, branches, held=own, budget=budget, max_cells=MAX_CELLS)
        flops += sum(wave_flops(size, [branches[number] for number in wave]) for wave in made)
        flops += decoding_flops(size, len(chosen), n_new)
        peaks.append(peak_of(size, chosen, n_new, **how))
    # What an edit does is held against the first token of the same prompts without it.
    loop = [generation_flops(size, n_new) + pass_flops(size) + _reading(size, prompts, each) for each in interventions]
    looped = sum(loop) + generation_flops(size, n_new)
    return GenerationCost(flops + sum(loop[number] for number in check), looped, np.maximum.reduce(peaks))


def _reading(size: Sizes, prompts: Encoded, intervention: Intervention) -> int:
    """Operations of the passes, each as far as it is needed, in which the reference reads states for an edit."""
    sources = sources_of([intervention], prompts).values()
    return sum(_part_of_pass(size, max(sites, key=lambda site: site.order)) for _, sites in sources)


def _part_of_pass(size: Sizes, site: Site) -> int:
    """Operations of a pass that ends where the states of a site are there."""
    n_blocks = 0 if site.stream != "llm" or site.layer is None else site.layer + (site.point != "resid_pre")
    return pass_flops(dataclasses.replace(size, n_layers=n_blocks, n_vocab=0))


def meant_of(intervention: Intervention | None) -> Intervention:
    """The intervention with `answer` taken for what is generated."""
    return Together(() if intervention is None else tuple(of_generated(each) for each in intervention.flat()))


def place_of(made: Plan, meant: Intervention, place: Callable[[Plan, Intervention], Branch]) -> Place:
    """Where a version leaves the clean pass over the prompt, as `place` says of what is done to the prompt."""
    cuts = {where: [cut for cut in each if cut.queries] for where, each in made.cuts.items()}
    of_prompt = Plan(made.writes, {where: each for where, each in cuts.items() if each})
    return place(of_prompt, meant) if of_prompt.writes or of_prompt.cuts else None


def planned_places(vlm: "VLM", prompts: Encoded, interventions: Sequence[Intervention]) -> list[Place]:
    """Where versions will leave the clean pass over the prompts; nothing is run."""
    before, (encoded_of, unread) = outline(vlm, prompts), stand_ins(vlm, prompts)
    meant = [meant_of(each) for each in interventions]
    made = [plan(vlm, prompts, each, unread, generating=True) for each in meant]
    return [
        place_of(each, what, lambda *given: branch_of(before, *given, encoded_of))
        for each, what in zip(made, meant, strict=True)
    ]


def start_of(place: Place, n_pos: int) -> int:
    """The first position of the prompt that a version has of its own; the number of positions if none."""
    return n_pos if place is None else place.start


def parts_of(size: Sizes, places: Sequence[Place], n_new: int, *, held: Bytes, budget: Bytes) -> list[list[int]]:
    """Numbers of the versions that are decoded together, as many as fit into the budget.

    Args:
        size: of the prompts alone.
        held: bytes of what is kept all the while.

    Raises:
        TooLargeError: one version does not fit.
    """

    def parted(numbers: list[int]) -> list[list[int]]:
        try:
            peak = peak_of(size, [places[number] for number in numbers], n_new, held=held, budget=budget)
            _check_fits(size, peak, budget)
            return [numbers]
        except TooLargeError:
            if len(numbers) == 1:
                raise
        middle = len(numbers) // 2
        return parted(numbers[:middle]) + parted(numbers[middle:])

    return parted(list(range(len(places)))) if places else []


def _check_fits(size: Sizes, peak: PerDevice, budget: Bytes) -> None:
    lacks = shortage(size, peak, budget, told=" with the answers that are generated")
    if lacks:
        raise TooLargeError(f"{size.batch} example(s) need {lacks}")


def reference_peak(size: Sizes, n_new: int, *, held: Bytes, budget: Bytes) -> PerDevice:
    """Bytes at the peak of a generation by the reference.

    Raises:
        TooLargeError: it does not fit into the budget.
    """
    peak = held + generation_peak(size, n_new)
    _check_fits(size, peak, budget)
    return peak


def peak_of(size: Sizes, places: Sequence[Place], n_new: int, *, held: Bytes, budget: Bytes) -> PerDevice:
    """Bytes at the peak of versions that are decoded together, from their way through the prompt on.

    Raises:
        TooLargeError: one of them does not fit into the budget.
    """
    starts = [start_of(place, size.n_pos) for place in places]
    own = sum(track_bytes(size, start, n_new) for start in starts)
    peak = held + own + decoding_bytes(size, starts, n_new)
    branches = [place for place in places if place is not None]
    if not branches:
        return peak
    _, of_waves = waves(size, branches, held=held + own, budget=budget, max_cells=MAX_CELLS)
    return np.maximum(peak, of_waves)
