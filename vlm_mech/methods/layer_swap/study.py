"""Counterfactual states: run a question on one image with the hidden states of its counterfactual.

An interchange of residual states between two images (activation patching with the image as the thing changed); not the
exchange of blocks between checkpoints.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import DIRECTIONS, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.interventions.receipt import Receipt
from vlm_mech.interventions.specification import Replace
from vlm_mech.results import metrics
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.asked import check_once
from vlm_mech.sweeps.engine import engine_of
from vlm_mech.sweeps.memory import budget_of
from vlm_mech.sweeps.schedule import SweepPlan, forecast, in_halves

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

RECOVERED = Metric(
    "recovered",
    "fraction",
    "normalised logit difference: 0 = the answer of the run that is patched, 1 = that of the run the states come from",
)
LOGIT_DIFF = Metric(
    "logit_diff", "logits", "logit of the patched run's own answer less that of the other image's", signed=True
)
FLIP = Metric("flip", "share", "share of examples in which the other image's answer is preferred")
METRICS = (RECOVERED, LOGIT_DIFF, FLIP)

WRONG = "not answered right on both images"
NO_GAP = f"logit differences of the two images are less than {metrics.MIN_GAP} apart"


def swap_states(
    vlm: "VLM",
    pairs: Pairs,
    sites: Sequence[Site],
    spans: Sequence[str],
    *,
    directions: Sequence[str] = DIRECTIONS,
    only_correct: bool = True,
    engine: str = "fast",
    memory: int | str | None = None,
) -> tuple[pd.DataFrame, list[Receipt]]:
    """Every site and span swapped in both directions for one batch of pairs.

    `noising` runs the image with states of its counterfactual, `denoising` the counterfactual with states of the
    image. Pairs that the model answers wrongly on either side are skipped unless `only_correct` is off; a recovered
    fraction whose denominator is below `metrics.MIN_GAP` logits is skipped as well. Skipped values are NaN, with the
    reason in `skipped`.

    Args:
        engine: `fast` computes only what can change; `trace` runs a whole forward pass for each cell (the reference).
        memory: bytes it may take beyond the model, such as "2GiB"; the pairs are halved where they do not fit.

    Returns:
        The table with one row per pair, direction, site and span, and the receipts of all swaps.
    """
    _check_asked(spans, directions)
    budget = budget_of(vlm.device, memory)

    def swapped(rows: slice) -> tuple[pd.DataFrame, list[Receipt]]:
        some = pairs[rows]
        return _swapped(vlm, some, sites, spans, directions, only_correct=only_correct, engine=engine, budget=budget)

    at_most = None
    if memory is not None and engine == "fast":
        plan = plan_swap(vlm, pairs, sites, spans, directions=directions, batch=len(pairs), memory=memory)
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
    batch: int = 32,
    memory: int | str | None = None,
) -> SweepPlan:
    """What `swap_states` over all pairs, `batch` at a time, will need; nothing is run.

    Raises:
        TooLargeError: a single swap of a single pair does not fit into the memory.
    """
    _check_asked(spans, directions)
    budget = budget_of(vlm.device, memory)

    def of(rows: slice) -> SweepPlan:
        patched, donor = (vlm.encode(prompts[rows]) for prompts in (pairs.base, pairs.counterfactual))
        edits = [Replace(site, span, source=donor) for site in sites for span in spans]
        one = forecast(vlm, patched, edits, budget=budget)
        # Both directions share their two unedited passes.
        passes = 2 / one.forwards * one.flops
        flops = int(passes + len(directions) * (one.flops - passes))
        forwards = one.forwards * flops / one.flops
        return dataclasses.replace(one, n_cells=one.n_cells * len(directions), flops=flops, forwards=forwards)

    return in_halves(slice(0, min(batch, len(pairs))), of)[0].over(len(pairs))


def _swapped(
    vlm: "VLM",
    pairs: Pairs,
    sites: Sequence[Site],
    spans: Sequence[str],
    directions: Sequence[str],
    *,
    only_correct: bool,
    engine: str,
    budget: int,
) -> tuple[pd.DataFrame, list[Receipt]]:
    both = (pairs.base, pairs.counterfactual)
    sides = [engine_of(vlm, vlm.encode(prompts), engine, budget=budget) for prompts in both]
    ids = vlm.answer_ids(sides[0].encoded, pairs.answer)
    others = vlm.answer_ids(sides[1].encoded, pairs.counterfactual_answer)
    metrics.check_apart(ids, others)
    right = metrics.correct(sides[0].baseline, ids) & metrics.correct(sides[1].baseline, others)
    usable = right if only_correct else torch.ones_like(right)
    tables, receipts = [], []
    for direction in directions:
        forward = direction == "noising"
        patched, donor = sides if forward else sides[::-1]
        own, other = (ids, others) if forward else (others, ids)
        patched.lend(donor)
        cells = [(site, span) for site in sites for span in spans]
        edits = [Replace(site, span, source=donor.encoded) for site, span in cells]
        logits, proofs = patched.answers(edits)
        for (site, span), edited, proof in zip(cells, logits, proofs, strict=True):
            table = _scored(patched.baseline, donor.baseline, edited, own, other, usable)
            place = {"point": site.point} if site.layer is None else {"layer": site.layer}
            tables.append(table.assign(span=span, **place, example=[pair.id for pair in pairs], direction=direction))
            receipts += proof
    groups = {pair.id: pair.group or pair.id for pair in pairs}
    table = pd.concat(tables, ignore_index=True)
    return table.assign(group=table["example"].map(groups)), receipts


def _scored(
    before_logits: torch.Tensor,
    target_logits: torch.Tensor,
    edited: torch.Tensor,
    own: torch.Tensor,
    other: torch.Tensor,
    usable: torch.Tensor,
) -> pd.DataFrame:
    """The metrics of one swap, a row a pair."""
    before, target, after = (metrics.logit_diff(each, own, other) for each in (before_logits, target_logits, edited))
    fraction = metrics.recovered(after, before, target)
    skipped = [NO_GAP if missing else "" for missing in fraction.isnan().tolist()]
    skipped = [reason if use else WRONG for reason, use in zip(skipped, usable.tolist(), strict=True)]
    columns = {
        "recovered": fraction,
        "recovered_baseline": torch.zeros_like(fraction).where(~fraction.isnan(), float("nan")),
        "logit_diff": after,
        "logit_diff_baseline": before,
        "flip": metrics.flip(edited, own, other).float(),
        "flip_baseline": metrics.flip(before_logits, own, other).float(),
    }
    missing = torch.full_like(fraction, float("nan"))
    table = pd.DataFrame({name: value.where(usable, missing).double().cpu().numpy() for name, value in columns.items()})
    return table.assign(skipped=skipped)
