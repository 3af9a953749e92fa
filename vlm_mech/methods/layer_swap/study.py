"""Counterfactual states: run a question on one image with the hidden states of its counterfactual.

An interchange of residual states between two images (activation patching with the image as the thing changed); not the
exchange of blocks between checkpoints.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.data.nouns import ITEMS, PAIRS, TEXTS, Nouns, nouns_of
from vlm_mech.data.pairs import DIRECTIONS, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.receipt import Receipt
from vlm_mech.interventions.specification import Replace
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL, DONOR, NO_DONOR, SAME, WRONG_DONOR, Donors
from vlm_mech.methods.layer_swap.spoken import drawn_cells, spoken_in, with_spoken
from vlm_mech.results import metrics
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.asked import check_once
from vlm_mech.sweeps.engine import Engine, engine_of
from vlm_mech.sweeps.generated_answers import GeneratedPart
from vlm_mech.sweeps.measures import Comparison, comparison, said
from vlm_mech.sweeps.readings import NOTHING_BEFORE, Readings, readings_of, without_trivial_places
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.schedule import SweepPlan, forecast, in_halves
from vlm_mech.sweeps.shares import Bytes, budget_of

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

OF_THE_PATCHED = "of the patched run's own answer minus that of the other image's"
LOGIT_DIFF = Metric("logit_diff", "logits", f"logit {OF_THE_PATCHED}", signed=True)
FLIP = Metric("flip", "share", "share of examples in which the other image's answer is preferred")
OF_ITEMS = "of the correct answer minus that of a wrong one (in denoising the reverse)"
"""What is compared of single items: of the picture that was made for one no answer is known to be right."""
OF_TEXTS = "of the patched run's own answer minus that of the other question's"
FLIP_OF_TEXTS = dataclasses.replace(FLIP, description="share of examples in which the other question's is preferred")
FLIP_OF_ITEMS = dataclasses.replace(FLIP, description="share of examples in which the second of these is preferred")

WRONG, WRONG_ALONE = "not answered correctly on both images", "not answered correctly"
WRONG_TEXTS = "not answered correctly on both questions"
"""Why a pair is left out, and a single item, whose counterfactual picture has no answer known to be right."""


def recovered_of(what: str) -> Metric:
    """The recovered fraction of a difference between two answers, called `what`."""
    ends = "0 = the answer of the run that is patched, 1 = that of the run the states come from"
    return Metric("recovered", "fraction", f"normalised {what} difference: {ends}")


def no_gap(what: str) -> str:
    """Why a pair has no recovered fraction of such a difference."""
    return f"{what} differences of the two runs are less than {metrics.MIN_GAP} apart"


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
    told, flip = (OF_TEXTS, FLIP_OF_TEXTS) if nouns is TEXTS else (told, flip)
    of = Metric(name, measure.unit, f"{compared_by(name)} {told}", signed=True)
    return recovered_of(compared_by(name)), of, flip


RECOVERED = recovered_of("logit")
METRICS = metrics_of()
NO_GAP = no_gap("logit")


def wrong_of(pairs: Pairs) -> str:
    """Why one of these pairs, or of these single items, is left out."""
    nouns = nouns_of(pairs)
    return WRONG_ALONE if nouns is ITEMS else WRONG_TEXTS if nouns is TEXTS else WRONG


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
    controls: Donors | None = None,
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
        controls: whose states are swapped in besides (see `controls.donors_of`): the column `donor` says whose they
            are, and rows of controls have the pair's own answers and fractions of its own gap; nothing is generated in
            them. Where the donor is missing, or is answered wrongly while `only_correct` is on, they are skipped.
        engine: `fast` computes only what can change; `trace` runs a whole forward pass for each cell (the reference).
        memory: bytes it may take beyond the model, such as "2GiB"; the pairs are halved where they do not fit.

    Returns:
        The table with one row per pair, direction, site and span (and donor), and the receipts of all swaps.
    """
    check_asked(spans, directions)
    budget = budget_of(vlm, memory)

    def swapped(rows: slice) -> tuple[pd.DataFrame, list[Receipt]]:
        how: dict[str, Any] = {"only_correct": only_correct, "measure": measure, "part": part}
        how |= {"controls": controls, "engine": engine, "budget": budget}
        return _swapped(vlm, pairs[rows], sites, spans, directions, **how)

    at_most = None
    if memory is not None and engine == "fast":
        how: dict[str, Any] = {"directions": directions, "measure": measure, "part": part, "memory": memory}
        plan = plan_swap(vlm, pairs, sites, spans, batch=len(pairs), **how)
        at_most = plan.batch
    done = in_halves(slice(0, len(pairs)), swapped, at_most=at_most)
    return pd.concat([table for table, _ in done], ignore_index=True), [each for _, proofs in done for each in proofs]


def check_asked(spans: Sequence[str], directions: Sequence[str]) -> None:
    """Raises `UsageError` for spans or directions that are named twice, and directions that are not known."""
    check_once(list(map(str, spans)), "the span")
    check_once(directions, "the direction")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise UsageError(f"direction {direction!r} is not known; use one of {', '.join(DIRECTIONS)}")


def plan_swap(
    vlm: "VLM",
    pairs: Pairs,
    sites: Sequence[Site],
    spans: Sequence[str],
    *,
    directions: Sequence[str] = DIRECTIONS,
    measure: Comparison = "logit_diff",
    part: GeneratedPart | None = None,
    n_controls: int = 0,
    batch: int = 32,
    memory: int | str | None = None,
) -> SweepPlan:
    """What `swap_states` over all pairs, `batch` at a time, will need; nothing is run.

    Args:
        part: cells in which answers are generated too; the plan is a `SpokenPlan` then.
        n_controls: donors of controls, each of which is swapped in everywhere.

    Raises:
        TooLargeError: a single swap of a single pair does not fit into the memory, or what is generated for it.
        UsageError: answers can be generated in no cell.
    """
    check_asked(spans, directions)
    budget = budget_of(vlm, memory)

    def of(rows: slice) -> SweepPlan:
        patched, donor = (each.encoded for each in _read(vlm, pairs[rows], measure))
        edits = [Replace(site, joined(span), source=donor.before or donor) for site in sites for span in spans]
        one = forecast(vlm, patched, edits, budget=budget, keeps_logits=False)
        # Both directions share their two unedited passes.
        passes = 2 / one.forwards * one.flops
        # Controls take one of what is patched in each direction, and one of the donors of each.
        more = (1 + n_controls) * passes / 2 if n_controls else 0
        flops = int(passes + len(directions) * ((1 + n_controls) * (one.flops - passes) + more))
        forwards = one.forwards * flops / one.flops
        n_cells = one.n_cells * len(directions) * (1 + n_controls)
        plan = dataclasses.replace(one, n_cells=n_cells, flops=flops, forwards=forwards)
        return plan if part is None else with_spoken(vlm, plan, (patched, donor), directions, sites, spans, part)

    return in_halves(slice(0, min(batch, len(pairs))), of)[0].over(len(pairs))


def _read(vlm: "VLM", pairs: Pairs, name: Comparison) -> list[Readings]:
    """For each side of the pairs what is read of it: both differences of the answers, and whether each is said."""
    return [_read_of(vlm, pairs, prompts, name) for prompts in (pairs.base, pairs.counterfactual)]


def _read_of(vlm: "VLM", pairs: Pairs, prompts: Sequence[Prompt], name: Comparison) -> Readings:
    """What is read of some prompts, one a pair, about the answers of the pairs."""
    own, other = pairs.answer, pairs.counterfactual_answer
    measures = [comparison(name, own, other), comparison(name, other, own), said(own), said(other)]
    return readings_of(vlm, vlm.encode(prompts), measures)


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
    controls: Donors | None,
    engine: str,
    budget: Bytes,
) -> tuple[pd.DataFrame, list[Receipt]]:
    read = _read(vlm, pairs, measure)
    sides = [engine_of(vlm, each.encoded, engine, budget=budget) for each in read]
    right = read[0].value(2, sides[0].reads).bool()
    if pairs.made is None:
        right &= read[1].value(3, sides[1].reads).bool()
    wrong = wrong_of(pairs)
    why = ["" if use or not only_correct else wrong for use in right.tolist()]
    tables, receipts, unedited = [], [], {}
    drawn, cells = drawn_cells(directions, sites, spans, part), [(site, span) for site in sites for span in spans]
    for direction in directions:
        own = _own(direction)
        patched, donor = sides[own], sides[1 - own]
        patched.lend(donor)
        edits = _edits(cells, donor)
        # Both sides have the same answers after them.
        before, target = unedited[direction] = [read[own].value(own, each.reads) for each in (patched, donor)]
        kept, proofs = patched.answers(edits, keep=lambda _, logits, own=own: read[own].value(own, logits))
        spoken = {} if part is None else spoken_in(patched, pairs, direction, edits, drawn, len(tables), part)
        for (site, span), edit, after, proof in zip(cells, edits, kept, proofs, strict=True):
            table = _scored(before, target, after, why, measure, read[own].untouched(edit)[own])
            if len(tables) in spoken:
                table = table.join(spoken[len(tables)])
            tables.append(_placed(table, pairs, direction, site, span, measure, read[own]))
            receipts += proof
    if controls is not None:
        tables = [table.assign(**{DONOR: COUNTERFACTUAL}) for table in tables]
        # The passes of both sides would stand in memory beside a control's.
        del sides, patched, donor, edits
        for direction in directions:
            how = (why, only_correct, measure, engine, budget)
            more, proofs = _controlled(vlm, pairs, cells, direction, controls, read, unedited[direction], *how)
            tables, receipts = tables + more, receipts + proofs
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat(tables, ignore_index=True)
    table = without_trivial_places(table, [measure])
    return table.assign(group=table["example"].map(groups)), receipts


def _own(direction: str) -> int:
    """Which side is patched, and which difference is that of its own answer: on the image's side the first."""
    return 0 if direction == "noising" else 1


def _edits(cells: Sequence[tuple[Site, str]], donor: Engine | Reference) -> list[Replace]:
    source = donor.encoded.before or donor.encoded
    return [Replace(site, joined(span), source=source) for site, span in cells]


def _placed(
    table: pd.DataFrame, pairs: Pairs, direction: str, site: Site, span: str, measure: Comparison, read: Readings
) -> pd.DataFrame:
    """The rows of one swap, a row a pair, with what tells them apart and where the answers are compared."""
    place: dict[str, Any] = {"point": site.point} if site.layer is None else {"layer": site.layer}
    place |= {f"{measure}{ending}": told for ending, told in read.each[_own(direction)].places.items()}
    return table.assign(span=span, **place, example=[pair.id for pair in pairs], direction=direction)


def _controlled(
    vlm: "VLM",
    pairs: Pairs,
    cells: Sequence[tuple[Site, str]],
    direction: str,
    controls: Donors,
    read: Sequence[Readings],
    unedited: Sequence[torch.Tensor],
    why: Sequence[str],
    only_correct: bool,
    measure: Comparison,
    engine: str,
    budget: Bytes,
) -> tuple[list[pd.DataFrame], list[Receipt]]:
    """Rows and receipts of every swap in one direction that takes the states of a control's donors.

    Args:
        read: what is read of both sides.
        unedited: the difference of the answers in the run that is patched, and in that of the pair's other side.
        why: for what reason a pair does not count; empty where it does.
    """
    tables, receipts, own = [], [], _own(direction)
    before, target = unedited
    side = engine_of(vlm, read[own].encoded, engine, budget=budget)
    for name in controls.names:
        found = controls.of(name, direction, pairs)
        # Pairs without a donor are given the states of their other side, and do not count.
        others = (pairs.counterfactual, pairs.base)[own]
        prompts = [other if each is None else each.prompt for each, other in zip(found, others, strict=True)]
        lent = _read_of(vlm, pairs, prompts, measure)
        # What one control lent is not kept beside the next one's.
        patched, donor = side.afresh(), engine_of(vlm, lent.encoded, engine, budget=budget)
        patched.lend(donor)
        right = lent.value(2 + (own if name == SAME else 1 - own), donor.reads).bool().tolist()
        wrong = ["" if use or not only_correct else WRONG_DONOR for use in right]
        missing = [NO_DONOR if each is None else "" for each in found]
        reasons = [one or two or three for one, two, three in zip(why, missing, wrong, strict=True)]
        edits = _edits(cells, donor)
        kept, proofs = patched.answers(edits, keep=lambda _, logits: read[own].value(own, logits))
        for (site, span), edit, after, proof in zip(cells, edits, kept, proofs, strict=True):
            table = _scored(before, target, after, reasons, measure, read[own].untouched(edit)[own])
            tables.append(_placed(table, pairs, direction, site, span, measure, read[own]).assign(**{DONOR: name}))
            receipts += proof
    return tables, receipts


def _scored(
    before: torch.Tensor,
    target: torch.Tensor,
    after: torch.Tensor,
    why: Sequence[str],
    name: Comparison,
    untouched: torch.Tensor,
) -> pd.DataFrame:
    """The metrics of one swap, a row a pair, from the differences of the answers in the three runs.

    Args:
        why: for what reason a pair does not count; empty where it does.
    """
    fraction = metrics.recovered(after, before, target)
    skipped = [no_gap(compared_by(name)) if missing else "" for missing in fraction.isnan().tolist()]
    skipped = [NOTHING_BEFORE if no else reason for reason, no in zip(skipped, untouched.tolist(), strict=True)]
    skipped = [left_out or reason for reason, left_out in zip(skipped, why, strict=True)]
    usable = torch.tensor([not left_out for left_out in why], device=fraction.device)
    usable &= ~untouched.to(usable.device)
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
