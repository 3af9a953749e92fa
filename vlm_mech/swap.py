"""Counterfactual states: run a question on one image with the hidden states of its counterfactual.

An interchange of residual states between two images (activation patching with the image as the thing changed); not the
exchange of blocks between checkpoints.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from PIL import Image

from vlm_mech import metrics
from vlm_mech.data.pairs import Pairs
from vlm_mech.engine import engine_of
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.image import load_image
from vlm_mech.intervene import Replace
from vlm_mech.memory import budget_of
from vlm_mech.receipt import Receipt
from vlm_mech.result import Metric, Result
from vlm_mech.schedule import SweepPlan, forecast, in_halves
from vlm_mech.site import PROJECTOR_POINTS, Site

if TYPE_CHECKING:
    from vlm_mech.model import VLM

Direction = Literal["noising", "denoising"]
DIRECTIONS: tuple[Direction, ...] = ("noising", "denoising")

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


def default_spans(vlm: "VLM", stream: str) -> tuple[str, ...]:
    """The spans a swap compares at the sites of a stream."""
    if stream == "llm":
        return ("image", "question", "last", "all")
    if stream == "projector":
        return ("image",)
    return ("image", "class", "all") if vlm.n_class_tokens else ("image",)


def swap_sites(vlm: "VLM", stream: str, point: str) -> list[Site]:
    """The sites that a swap visits: every layer of a tower at one point, or both ends of the projector."""
    if stream == "projector":
        return [Site(f"projector.{name}") for name in PROJECTOR_POINTS]
    return [Site(f"{stream}.{point}", layer) for layer in range(vlm.n_layers(stream))]


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
    _check_directions(directions)
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


def _check_directions(directions: Sequence[str]) -> None:
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
    _check_directions(directions)
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


def usable_share(result: Result, pairs: Pairs) -> str:
    """How many pairs count, in a sentence.

    Raises:
        WorkError: fewer than two pairs count, so that nothing can be said.
    """
    first = result.table.drop_duplicates("example")
    n_examples, n_wrong = len(first), int((first["skipped"] == WRONG).sum())
    n_close = int(result.table[result.table["skipped"] == NO_GAP]["example"].nunique())
    if n_examples - n_wrong < 2:
        raise WorkError(
            f"{n_examples - n_wrong} of {n_examples} pairs of {pairs.name} are answered right on both images; "
            "at least two are needed (--all keeps the others too)"
        )
    text = f"{n_examples - n_wrong} of {n_examples} pairs of {pairs.name} are used"
    text += f"; {n_wrong} are left out because they are {WRONG}" if n_wrong else ""
    text += f"; in {n_close} the {NO_GAP}, so that they have no recovered fraction" if n_close else ""
    return f"{text}."


def takeover(result: Result) -> tuple[str, ...]:
    """Where the image tokens stop mattering and the last token takes over, in sentences made from the numbers."""
    if "layer" not in result.axes:
        return ()
    n_fewest = int(result.summary("recovered")["n"].min())
    if n_fewest < 2:
        return (f"too few pairs have a recovered fraction to say where the answer turns ({n_fewest} in some cells).",)
    found = []
    spans = set(result.table["span"])
    for direction in result.table["direction"].drop_duplicates():
        where = {"direction": direction}
        if "image" in spans:
            found.append(f"{direction}: " + _image_sentence(result, where | {"span": "image"}))
        if "last" in spans:
            found.append(f"{direction}: " + _last_sentence(result, where | {"span": "last"}))
    return tuple(found)


def _image_sentence(result: Result, where: dict[str, str]) -> str:
    end = result.crossing(where, "layer", 0.5, rising=False, metric="recovered")
    if end["at"] is None:
        return "swapping the image tokens turns the answer at every layer."
    if end["at"] == 0:
        return f"swapping the image tokens does not turn the answer even at layer 0 (95 % interval {_interval(end)})."
    turns = f"from layer {end['at']} on, swapping the image tokens no longer turns the answer"
    return f"{turns} (95 % interval {_interval(end)})."


def _last_sentence(result: Result, where: dict[str, str]) -> str:
    start = result.crossing(where, "layer", 0.5, rising=True, metric="recovered")
    if start["at"] is None:
        return "swapping the last token alone turns the answer at no layer."
    turns = f"from layer {start['at']} on, swapping the last token alone turns the answer"
    return f"{turns} (95 % interval {_interval(start)})."


def _interval(crossing: dict[str, int | None]) -> str:
    low, high = (
        "beyond the last" if layer is None else f"layer {layer}" for layer in (crossing["low"], crossing["high"])
    )
    return f"{low} to {high}"


def pictures(pairs: Pairs, *, n: int = 4) -> tuple[tuple[str, Image.Image], ...]:
    """Both images of some pairs, with question and answer."""
    shown = []
    for pair in list(pairs)[:n]:
        for image, answer in ((pair.image, pair.answer), (pair.counterfactual_image, pair.counterfactual_answer)):
            shown.append((f"{pair.question} {answer}", load_image(image)))
    return tuple(shown)
