"""Counterfactual states: run a question on one image with the hidden states of its counterfactual.

An interchange of residual states between two images (activation patching with the image as the thing changed); not the
exchange of blocks between checkpoints.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.data.nouns import ITEMS, PAIRS, Nouns
from vlm_mech.data.pairs import DIRECTIONS, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.receipt import Receipt
from vlm_mech.interventions.specification import Replace
from vlm_mech.results import metrics
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.asked import check_once
from vlm_mech.sweeps.cost import pass_bytes, sizes
from vlm_mech.sweeps.engine import Engine, engine_of
from vlm_mech.sweeps.generated_answers import GeneratedPart, generated, with_generated
from vlm_mech.sweeps.generation_cost import generation_cost
from vlm_mech.sweeps.measures import Comparison, comparison, said
from vlm_mech.sweeps.readings import NOTHING_BEFORE, Readings, readings_of, without_trivial_places
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.schedule import SweepPlan, forecast, in_halves, recorded
from vlm_mech.sweeps.shares import Bytes, budget_of

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

ANSWER = "answer"
OF_THE_PATCHED = "of the patched run's own answer less that of the other image's"
LOGIT_DIFF = Metric("logit_diff", "logits", f"logit {OF_THE_PATCHED}", signed=True)
FLIP = Metric("flip", "share", "share of examples in which the other image's answer is preferred")
OF_ITEMS = "of the right answer less that of a wrong one (in denoising the reverse)"
"""What is compared of single items: of the picture that was made for one no answer is known to be right."""
FLIP_OF_ITEMS = dataclasses.replace(FLIP, description="share of examples in which the second of these is preferred")

WRONG, WRONG_ALONE = "not answered right on both images", "not answered right"
"""Why a pair is left out, and a single item, whose counterfactual picture has no answer known to be right."""


def recovered_of(what: str) -> Metric:
    """The recovered fraction of a difference between two answers, called `what`."""
    ends = "0 = the answer of the run that is patched, 1 = that of the run the states come from"
    return Metric("recovered", "fraction", f"normalised {what} difference: {ends}")


def no_gap(what: str) -> str:
    """Why a pair has no recovered fraction of such a difference."""
    return f"{what} differences of the two images are less than {metrics.MIN_GAP} apart"


def compared_by(name: Comparison) -> str:
    """What is compared, in words."""
    return {"logit_diff": "logit", "logprob_diff": "log-probability"}.get(name, "log-probability per token")


def metrics_of(name: Comparison = "logit_diff", nouns: Nouns = PAIRS) -> tuple[Metric, ...]:
    """The metrics of a swap whose answers are compared so.

    Args:
        nouns: what is swapped between: the pictures of pairs, or of items and those made for them.
    """
    measure = comparison(name, (), ()).metric
    told, flip = (OF_ITEMS, FLIP_OF_ITEMS) if nouns is ITEMS else (OF_THE_PATCHED, FLIP)
    of = Metric(name, measure.unit, f"{compared_by(name)} {told}", signed=True)
    return recovered_of(compared_by(name)), of, flip


RECOVERED = recovered_of("logit")
METRICS = metrics_of()
NO_GAP = no_gap("logit")


def swap_states(
    vlm: "VLM",
    pairs: Pairs,
    sites: Sequence[Site],
    spans: Sequence[str],
    *,
    directions: Sequence[str] = DIRECTIONS,
    only_correct: bool = True,
    measure: Comparison = "logit_diff",
    part: GeneratedPart | None = None,
    engine: str = "fast",
    memory: int | str | None = None,
) -> tuple[pd.DataFrame, list[Receipt]]:
    """Every site and span swapped in both directions for one batch of pairs.

    `noising` runs the image with states of its counterfactual, `denoising` the counterfactual with states of the
    image. Pairs that the model answers wrongly on either side (see `measures.said`) are skipped unless `only_correct`
    is off; a recovered fraction whose denominator is below `metrics.MIN_GAP` is skipped as well, and so is a
    swap of an answer's tokens alone where none comes before what is read. Of single items (`data.examples`) the answer
    to the picture alone must be right. Skipped values are NaN, with the reason in
    `skipped`.

    Args:
        spans: several joined by + are swapped together, as in `last+answer`; of the span `answer`, which are an
            answer's tokens after the prompt, states are taken from a run with the same answer after it.
        measure: how the two answers of a pair are compared (see `measures.comparison`).
        part: cells in which answers are generated too: the columns `text` and `says` (own, other or neither) of these
            rows, and `text_baseline` and `says_baseline` of the run that is patched.
        engine: `fast` computes only what can change; `trace` runs a whole forward pass for each cell (the reference).
        memory: bytes it may take beyond the model, such as "2GiB"; the pairs are halved where they do not fit.

    Returns:
        The table with one row per pair, direction, site and span, and the receipts of all swaps.
    """
    _check_asked(spans, directions)
    budget = budget_of(vlm, memory)

    def swapped(rows: slice) -> tuple[pd.DataFrame, list[Receipt]]:
        how: dict[str, Any] = {"only_correct": only_correct, "measure": measure, "part": part}
        how |= {"engine": engine, "budget": budget}
        return _swapped(vlm, pairs[rows], sites, spans, directions, **how)

    at_most = None
    if memory is not None and engine == "fast":
        how: dict[str, Any] = {"directions": directions, "measure": measure, "part": part, "memory": memory}
        plan = plan_swap(vlm, pairs, sites, spans, batch=len(pairs), **how)
        at_most = plan.batch
    done = in_halves(slice(0, len(pairs)), swapped, at_most=at_most)
    return pd.concat([table for table, _ in done], ignore_index=True), [each for _, proofs in done for each in proofs]


def _check_asked(spans: Sequence[str], directions: Sequence[str]) -> None:
    check_once(list(map(str, spans)), "the span")
    check_once(directions, "the direction")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise UsageError(f"direction {direction!r} is not known; one of {', '.join(DIRECTIONS)} is")


def plan_swap(
    vlm: "VLM",
    pairs: Pairs,
    sites: Sequence[Site],
    spans: Sequence[str],
    *,
    directions: Sequence[str] = DIRECTIONS,
    measure: Comparison = "logit_diff",
    part: GeneratedPart | None = None,
    batch: int = 32,
    memory: int | str | None = None,
) -> SweepPlan:
    """What `swap_states` over all pairs, `batch` at a time, will need; nothing is run.

    Args:
        part: cells in which answers are generated too; the plan is a `SpokenPlan` then.

    Raises:
        TooLargeError: a single swap of a single pair does not fit into the memory, or what is generated for it.
        UsageError: answers can be generated in no cell.
    """
    _check_asked(spans, directions)
    budget = budget_of(vlm, memory)

    def of(rows: slice) -> SweepPlan:
        patched, donor = (each.encoded for each in _read(vlm, pairs[rows], measure))
        edits = [Replace(site, joined(span), source=donor.before or donor) for site in sites for span in spans]
        one = forecast(vlm, patched, edits, budget=budget, keeps_logits=False)
        # Both directions share their two unedited passes.
        passes = 2 / one.forwards * one.flops
        flops = int(passes + len(directions) * (one.flops - passes))
        forwards = one.forwards * flops / one.flops
        plan = dataclasses.replace(one, n_cells=one.n_cells * len(directions), flops=flops, forwards=forwards)
        return plan if part is None else _with_generated(vlm, plan, (patched, donor), directions, sites, spans, part)

    return in_halves(slice(0, min(batch, len(pairs))), of)[0].over(len(pairs))


def _with_generated(
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
    drawn, (patched, donor) = _drawn(directions, sites, spans, part), (each.before or each for each in sides)
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


def _drawn(
    directions: Sequence[str], sites: Sequence[Site], spans: Sequence[str], part: GeneratedPart | None
) -> frozenset[int]:
    """Numbers of the cells in which answers are generated, in the order of the table."""
    if part is None:
        return frozenset()
    every = [span for _ in directions for _ in sites for span in spans]
    # There are no states of the other run to put at what is generated.
    return part.of([number for number, span in enumerate(every) if ANSWER not in span.split("+")])


def _read(vlm: "VLM", pairs: Pairs, name: Comparison) -> list[Readings]:
    """For each side of the pairs what is read of it: both differences of the answers, and whether each is said."""
    own, other = pairs.answer, pairs.counterfactual_answer
    measures = [comparison(name, own, other), comparison(name, other, own), said(own), said(other)]
    return [readings_of(vlm, vlm.encode(prompts), measures) for prompts in (pairs.base, pairs.counterfactual)]


def _swapped(
    vlm: "VLM",
    pairs: Pairs,
    sites: Sequence[Site],
    spans: Sequence[str],
    directions: Sequence[str],
    *,
    only_correct: bool,
    measure: Comparison,
    part: GeneratedPart | None,
    engine: str,
    budget: Bytes,
) -> tuple[pd.DataFrame, list[Receipt]]:
    read = _read(vlm, pairs, measure)
    sides = [engine_of(vlm, each.encoded, engine, budget=budget) for each in read]
    right = read[0].value(2, sides[0].reads).bool()
    if pairs.made is None:
        right &= read[1].value(3, sides[1].reads).bool()
    usable = right if only_correct else torch.ones_like(right)
    tables, receipts = [], []
    drawn = _drawn(directions, sites, spans, part)
    for direction in directions:
        # On the image's side the first difference is that of its own answer, on the other side the second.
        own = 0 if direction == "noising" else 1
        patched, donor = sides if direction == "noising" else sides[::-1]
        patched.lend(donor)
        cells = [(site, span) for site in sites for span in spans]
        edits = [Replace(site, joined(span), source=donor.encoded.before or donor.encoded) for site, span in cells]
        # Both sides have the same answers after them.
        before, target = (read[own].value(own, each.reads) for each in (patched, donor))
        kept, proofs = patched.answers(edits, keep=lambda _, logits, own=own: read[own].value(own, logits))
        spoken = {} if part is None else _generated(patched, pairs, direction, edits, drawn, len(tables), part)
        for (site, span), edit, after, proof in zip(cells, edits, kept, proofs, strict=True):
            why = WRONG if pairs.made is None else WRONG_ALONE
            table = _scored(before, target, after, usable, measure, read[own].untouched(edit)[own], why)
            if len(tables) in spoken:
                table = table.join(spoken[len(tables)])
            place: dict[str, Any] = {"point": site.point} if site.layer is None else {"layer": site.layer}
            place |= {f"{measure}{ending}": told for ending, told in read[own].each[own].places.items()}
            tables.append(table.assign(span=span, **place, example=[pair.id for pair in pairs], direction=direction))
            receipts += proof
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat(tables, ignore_index=True)
    table = without_trivial_places(table, [measure])
    return table.assign(group=table["example"].map(groups)), receipts


def _generated(
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


def _scored(
    before: torch.Tensor,
    target: torch.Tensor,
    after: torch.Tensor,
    usable: torch.Tensor,
    name: Comparison,
    untouched: torch.Tensor,
    wrong: str,
) -> pd.DataFrame:
    """The metrics of one swap, a row a pair, from the differences of the answers in the three runs."""
    fraction = metrics.recovered(after, before, target)
    skipped = [no_gap(compared_by(name)) if missing else "" for missing in fraction.isnan().tolist()]
    skipped = [NOTHING_BEFORE if no else reason for reason, no in zip(skipped, untouched.tolist(), strict=True)]
    skipped = [reason if use else wrong for reason, use in zip(skipped, usable.tolist(), strict=True)]
    usable = usable & ~untouched.to(usable.device)
    columns = {
        "recovered": fraction,
        "recovered_baseline": torch.zeros_like(fraction).where(~fraction.isnan(), float("nan")),
        name: after,
        f"{name}_baseline": before,
        "flip": (after < 0).float(),
        "flip_baseline": (before < 0).float(),
    }
    missing = torch.full_like(fraction, float("nan"))
    table = pd.DataFrame({name: value.where(usable, missing).double().cpu().numpy() for name, value in columns.items()})
    return table.assign(skipped=skipped)
