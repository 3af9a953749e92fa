"""Cells of a swap in which answers are generated too: which these are, what is said there, and what that takes."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Replace
from vlm_mech.sweeps.cost import pass_bytes, sizes
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.generated_answers import GeneratedPart, generated, with_generated
from vlm_mech.sweeps.generation_cost import generation_cost
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.schedule import SweepPlan, recorded

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

ANSWER = "answer"


def with_spoken(
    vlm: "VLM",
    plan: SweepPlan,
    sides: Sequence[Encoded],
    directions: Sequence[str],
    sites: Sequence[Site],
    spans: Sequence[str],
    part: GeneratedPart,
) -> SweepPlan:
    """The plan of a batch with what is generated for it, while both unedited passes are kept.

    Args:
        sides: what is patched, and whose states it is given; both directions cost alike.

    Raises:
        TooLargeError: it does not fit into the memory.
    """
    drawn, (patched, donor) = drawn_cells(directions, sites, spans, part), (each.before or each for each in sides)
    size, checked = sizes(vlm, patched), part.checked(sorted(drawn))
    own = () if recorded(set(sites), len(vlm.taps)) else sites
    states = sum(size.shares.at(site) * size.stream for site in own)
    how = {"held": 2 * pass_bytes(size) + states, "budget": plan.budgets}
    cells = [(site, span) for _ in directions for site in sites for span in spans]
    costs = []
    for numbers in _by_direction(drawn, directions, len(sites) * len(spans)).values():
        edits = [Replace(site, joined(span), source=donor) for site, span in (cells[number] for number in numbers)]
        check = [at for at, number in enumerate(numbers) if number in checked]
        costs.append(generation_cost(vlm, patched, edits, part.max_new_tokens, check=check, **how))
    return with_generated(plan, costs, part, n_cells=len(drawn))


def _by_direction(drawn: Collection[int], directions: Sequence[str], n_cells: int) -> dict[str, list[int]]:
    """Numbers of the drawn cells of each direction that has any, where each direction has so many cells."""
    of = {direction: range(at * n_cells, (at + 1) * n_cells) for at, direction in enumerate(directions)}
    found = {direction: [number for number in numbers if number in drawn] for direction, numbers in of.items()}
    return {direction: numbers for direction, numbers in found.items() if numbers}


def drawn_cells(
    directions: Sequence[str], sites: Sequence[Site], spans: Sequence[str], part: GeneratedPart | None
) -> frozenset[int]:
    """Numbers of the cells in which answers are generated, in the order of the table."""
    if part is None:
        return frozenset()
    every = [span for _ in directions for _ in sites for span in spans]
    # There are no states of the other run to put at what is generated.
    return part.of([number for number, span in enumerate(every) if ANSWER not in span.split("+")])


def spoken_in(
    engine: Engine | Reference,
    pairs: Pairs,
    direction: str,
    edits: Sequence[Replace],
    drawn: Collection[int],
    first: int,
    part: GeneratedPart,
) -> dict[int, pd.DataFrame]:
    """What is said in drawn cells and without a swap, and whose answer that is, by number of the cell a row a pair.

    Args:
        edits: of the cells of the direction, which are numbered from `first` on.
    """
    chosen = [number for number in sorted(drawn) if 0 <= number - first < len(edits)]
    if not chosen:
        return {}
    both = [(pair.answer, pair.counterfactual_answer)[:: 1 if direction == "noising" else -1] for pair in pairs]
    checked = part.checked(sorted(drawn))
    check = [at for at, number in enumerate(chosen) if number in checked]
    how = {"max_new_tokens": part.max_new_tokens, "check": check}
    tables = generated(engine, [edits[number - first] for number in chosen], both, **how)
    return dict(zip(chosen, tables, strict=True))
