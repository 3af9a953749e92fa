"""Attribution patching: what patching any state would do, estimated for all of them from one gradient, and re-checked.

The estimate of an exchange is its first-order effect: the gradient of the measure at the run that is patched, times
the difference of the two runs' states, summed over a span (Nanda 2023, "Attribution patching"; Syed et al. 2023,
arXiv 2310.10348). Two forward passes and one backward pass serve every site, span and head of a batch. It is a screen:
saturated softmaxes and norms, and effects that cancel, make it wrong. So the largest cells, and a random sample of the
others, are always patched in truth (`sweep`), and the result says how well the two agree.
"""

import dataclasses
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site, listed_sites
from vlm_mech.architectures.traced_model import check_decoder, check_gradients
from vlm_mech.architectures.weights import untrained
from vlm_mech.data.pairs import DIRECTIONS, Pairs, check_pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.span import Span, listed
from vlm_mech.interventions.plan import plan
from vlm_mech.interventions.specification import Activations, Replace
from vlm_mech.interventions.trace import read
from vlm_mech.methods.attribution.agreement import NUMBERS, agreement_of
from vlm_mech.methods.attribution.claims import ASKED, LOGARITHMIC, UNEDITED, edit_of, pool, removed_of
from vlm_mech.methods.attribution.data import (
    TOP_OF_HALF,
    Cell,
    cells_of,
    check,
    check_touched,
    chosen_cells,
    exchanged,
    top_cells,
)
from vlm_mech.methods.attribution.figures import drawn
from vlm_mech.methods.attribution.findings import agreement_told, findings
from vlm_mech.methods.attribution.gradient import Pass, forward, gradient
from vlm_mech.methods.gates.gated import Measured, Options, gated
from vlm_mech.methods.gates.shuffled import following
from vlm_mech.results.claim import Claim
from vlm_mech.results.claiming import halves, parted_like
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT, Plotted
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.measures import Measure
from vlm_mech.sweeps.readings import Readings, readings_of
from vlm_mech.sweeps.sweep import Point, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True, eq=False)
class Attribution(Plotted):
    """A screen of all cells, the cells that were patched in truth, and how well the two agree.

    `screen` has an `estimate` and the `distance` of the two runs' states for each pair and cell. `checked` has the true
    `effect` beside both, and what the measure is `unedited`; its column `chosen` says whether a cell is one of the
    `top` (by the estimates of all pairs), of the `random` sample of the rest, or neither and yet among the largest on
    the half of the pairs that declares claims (`top of half`). `asked` are all cells of the largest estimates on that
    half: what is claimed is claimed of them. `agreement` has a row for each direction and kind of cells, `random` and
    `top` (a selected set: its correlation says nothing about the other cells). Its columns, taken over means of
    examples: n cells; Spearman's `correlation` of estimate and effect with a 95 % bootstrap over examples, and `p` over
    cells; `n_signed` cells with an effect, `n_same_sign` of them; `slope` of estimate on effect; the correlation of
    sizes `absolute`, and of distance with size of effect (`absolute_control`); largest and median size of the true
    effects.
    """

    screen: Result
    checked: Result
    agreement: pd.DataFrame

    def _drawn(self) -> Result:
        return self.checked

    @property
    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences made from the numbers; those that name layers or heads are claims."""
        return self.checked.findings

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What was declared on half of the pairs and tested on the other half, of true effects; `checked` has them."""
        return self.checked.claims


def attribute(
    vlm: "VLM",
    pairs: Pairs,
    sites: Site | Sequence[Site],
    spans: Span | Sequence[Span],
    measure: Measure,
    *,
    heads: bool = False,
    directions: str | Sequence[str] = DIRECTIONS,
    top_k: int = 10,
    n_random: int = 10,
    steps: int = 1,
    engine: str = "fast",
    batch: int = 8,
    seed: int = 0,
    gates: Literal["none", "quick", "all"] = "quick",
    null: int = 5,
) -> Attribution:
    """Estimated effects of exchanging every site's states between the two images of each pair, re-checked.

    Both directions change the same measure: `noising` puts states of the counterfactual into the run on the image,
    `denoising` states of the image into the run on the counterfactual. Every pair counts, also those that the model
    answers wrongly: leave them out beforehand.

    Args:
        sites: where; all with layers, or none.
        measure: a differentiable one, such as `logit_diff`, `logprob_diff` and `prob`.
        heads: one cell for each head; all sites must then be `head_out`.
        top_k: cells of each direction, largest mean estimate first, whose true effect is measured.
        n_random: cells drawn from the rest whose true effect is measured, so that misses can be seen.
        steps: 1 takes the gradient at the run itself (attribution patching). With more it is averaged over that many
            points on the straight line between the embeddings of the two runs (middles of equal pieces; after
            integrated gradients, Sundararajan et al. 2017), at as many forward and backward passes.
        engine: how true effects are measured (see `sweep`).
        batch: pairs that run together.
        seed: of the random sample, of the halves in which pairs are parted for claims, and of what gates draw.
        gates: ways in which claims could be lost: "none" but the half of the pairs that did not choose them; "quick":
            resamples of the pairs too; "all": an attribution of models with shuffled weights, and of shuffled answers,
            whether states after an exchange are natural ones, and other ways to remove what it exchanges.
        null: models with shuffled weights, and shuffles of the answers, that "all" compares with.

    Raises:
        UsageError: a site, span or number that does not fit, gates that are not known, or a measure that cannot be
            differentiated.
        WorkError: a gradient is NaN.
    """
    check_decoder(vlm, "attribute")
    check_gradients("attribute")
    check_pairs(pairs, "attribute")
    several = spans if isinstance(spans, list | tuple) else (spans,)
    spots, directions = cells_of(vlm, listed_sites(sites, "attribute"), several, heads), listed(directions)
    check(pairs, measure, directions, {"top_k": top_k, "n_random": n_random, "steps": steps, "batch": batch})
    asked = Options(gates, null, seed, batch)
    plan = _Plan(spots, directions, top_k, n_random, steps, engine, batch, seed)
    began = time.perf_counter()
    table = _screened(vlm, pairs, measure, plan)
    halfway = time.perf_counter()
    about: dict[str, Any] = {"model": vlm.identity(), "data": pairs.described}
    screen = _laid_out("attribution patching", table, plan, measure, about)
    parts = halves(screen, seed=seed)
    choosing = set() if parts is None else set(parts[0].table["example"])
    found, proofs = _rechecked(vlm, pairs, measure, plan, table, choosing)
    seconds = {"screen": halfway - began, "check": time.perf_counter() - halfway}
    about |= {"seconds": seconds, "sweeps": proofs}
    checked = _laid_out("attribution patching, re-checked", found, plan, measure, about)
    if parts is not None:
        ways = (edit_of(spots), removed_of(spots) if _compares(measure, pairs) else None)
        again, of = _again(vlm, pairs, measure, plan), parted_like(checked, parts)
        claims = gated(asked, vlm, pairs, checked, pool, again, *ways, parts=of, at_once=True)
        checked = dataclasses.replace(checked, claims=claims)
    agreement = agreement_of(checked)
    screen = dataclasses.replace(screen, provenance=about, findings=agreement_told(checked, agreement))
    told = checked.provenance | {PLOT: drawn_by(drawn)}
    checked = dataclasses.replace(checked, findings=findings(checked, agreement), provenance=told)
    return Attribution(screen, checked, agreement)


@dataclass(frozen=True)
class _Plan:
    """What an attribution is made of: its cells, and the options of `attribute`."""

    spots: list[Cell]
    directions: tuple[str, ...]
    top_k: int
    n_random: int
    steps: int
    engine: str
    batch: int
    seed: int


def _laid_out(name: str, table: pd.DataFrame, plan: _Plan, measure: Measure, about: dict[str, Any]) -> Result:
    """Numbers of cells as a result; those that were patched in truth have an effect."""
    axes = ("direction", *plan.spots[0].axes)
    of = f"change of {measure.metric.name} when the states are exchanged"
    metrics = [
        Metric("effect", measure.metric.unit, f"true {of}", signed=True),
        Metric("estimate", measure.metric.unit, f"estimated {of}", signed=True),
        Metric("distance", "norm", "distance of the two runs' states over the span"),
    ]
    metrics = tuple(metric for metric in metrics if metric.name in table)
    config = {"measure": measure.metric.name, "steps": plan.steps}
    return Result(name, _placed(table, plan), axes, metrics, config, about)


def _placed(table: pd.DataFrame, plan: _Plan) -> pd.DataFrame:
    """The rows with the places of their cells, and a baseline of 0 for each number."""
    places = pd.DataFrame([spot.axes for spot in plan.spots]).rename_axis("cell").reset_index()
    placed = table.merge(places, on="cell").drop(columns="cell")
    return placed.assign(**{f"{name}_baseline": 0.0 for name in NUMBERS if name in placed})


def _compares(measure: Measure, pairs: Pairs) -> bool:
    """Whether a measure compares the two answers of each pair, in logits or nats, as other ways of removal are told."""
    both = [list(pairs.answer), list(pairs.counterfactual_answer)]
    return measure.metric.unit in LOGARITHMIC and [list(each) for each in measure.answers] == both


def _again(vlm: "VLM", pairs: Pairs, measure: Measure, plan: _Plan) -> Measured:
    """The same attribution of another model, or of the pairs with other answers: cells chosen anew, on all pairs."""
    answers_for = following(pairs, list(zip(*measure.answers, strict=True)) or [()] * len(pairs))

    def measured(model: "VLM", some: Pairs) -> pd.DataFrame:
        if model is vlm and not measure.answers:
            raise UsageError(f"{measure.metric.name} asks about no answers that could be shuffled")
        own = dataclasses.replace(measure, answers=tuple(map(list, zip(*answers_for(some), strict=True))))
        chosen = dataclasses.replace(plan, n_random=0)
        table = _screened(model, some, own, chosen)
        return _placed(_rechecked(model, some, own, chosen, table, {pair.id for pair in some})[0], chosen)

    return measured


def _of(measure: Measure, rows: slice) -> Measure:
    return dataclasses.replace(measure, answers=tuple(answers[rows] for answers in measure.answers))


# The screen


def _screened(vlm: "VLM", pairs: Pairs, measure: Measure, plan: _Plan) -> pd.DataFrame:
    """Estimates and distances of every cell for all pairs."""
    rows = [slice(first, first + plan.batch) for first in range(0, len(pairs), plan.batch)]
    tables = [_screen(vlm, pairs[each], plan.spots, _of(measure, each), plan.directions, plan.steps) for each in rows]
    return pd.concat(tables, ignore_index=True)


def _screen(
    vlm: "VLM", pairs: Pairs, spots: list[Cell], measure: Measure, directions: Sequence[str], steps: int
) -> pd.DataFrame:
    """Estimates and distances of every cell for one batch of pairs."""
    sites = list(dict.fromkeys(spot.site for spot in spots))
    read = [readings_of(vlm, vlm.encode(prompts), [measure]) for prompts in (pairs.base, pairs.counterfactual)]
    check_touched(pairs, read[0], spots)
    about = {"example": [pair.id for pair in pairs], "group": [pair.group or pair.id for pair in pairs]}
    tables = []
    with untrained(vlm.model):
        # Only a run whose own gradient is wanted needs a graph.
        tracked = [steps == 1 and direction in directions for direction in DIRECTIONS]
        sides = [forward(vlm, each.encoded, sites, track=track) for each, track in zip(read, tracked, strict=True)]
        for direction in directions:
            own, donor = sides if direction == "noising" else sides[::-1]
            slopes = _slopes(vlm, own, donor, sites, read[0] if direction == "noising" else read[1], steps)
            numbers = _cells(vlm, own, donor, slopes, spots)
            tables += [
                pd.DataFrame(about | {"direction": direction, "cell": cell, "estimate": estimate, "distance": distance})
                for cell, (estimate, distance) in enumerate(numbers)
            ]
    return pd.concat(tables, ignore_index=True)


def _cells(
    vlm: "VLM", own: Pass, donor: Pass, slopes: dict[Site, Tensor], spots: list[Cell]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Estimate and distance of each cell, by example."""
    done: dict[tuple[Site, Span], tuple[np.ndarray, np.ndarray]] = {}
    numbers = []
    for spot in spots:
        place, split = (spot.site, spot.span), spot.head is not None
        if place not in done:
            n_heads = vlm.n_heads(spot.site.stream) if split else 1
            done[place] = _products(vlm, own, donor, slopes[spot.site], spot, n_heads)
        estimate, distance = done[place]
        numbers.append((estimate[:, spot.head or 0], distance[:, spot.head or 0]))
    return numbers


def _products(
    vlm: "VLM", own: Pass, donor: Pass, slope: Tensor, spot: Cell, n_heads: int
) -> tuple[Float[np.ndarray, "example head"], Float[np.ndarray, "example head"]]:
    """Gradient times difference of states, and the norm of the difference, over the span of each example."""
    # The very write that the true patching makes, so that both mean the same positions and refuse the same things.
    exchange = Replace(spot.site, spot.span, source=Activations(donor.held, donor.encoded))
    writes = plan(vlm, own.encoded, exchange, lambda source, sites: read(vlm, source, sites)).writes
    (write,) = writes[spot.site]
    rows, positions = (index.to(slope.device) for index in (write.placed.rows, write.placed.positions))
    states, slope = own.held[spot.site][rows, positions], slope[rows, positions].float()
    change = (write.change(states) - states).float()
    if slope.isnan().any():
        raise WorkError(f"the gradient at {spot.site} is NaN at span {spot.span!r}")
    numbers = []
    for each in (slope * change, change.square()):
        by_head = rearrange(each, "cell (head width) -> cell head width", head=n_heads).sum(-1).double().cpu()
        numbers.append(torch.stack([piece.sum(0) for piece in by_head.split(write.placed.counts)]).numpy())
    return numbers[0], np.sqrt(numbers[1])


def _slopes(
    vlm: "VLM", own: Pass, donor: Pass, sites: Sequence[Site], read: Readings, steps: int
) -> dict[Site, Tensor]:
    """Gradient of each example's measure at each site, at the run itself or averaged on the way to the other."""
    if steps == 1:
        return gradient(own, read)
    total: dict[Site, Tensor] = {}
    for step in range(steps):
        share = (step + 0.5) / steps
        start = [
            [one + share * (other - one) for one, other in zip(mine.start, theirs.start, strict=True)]
            for mine, theirs in zip(own.texts, donor.texts, strict=True)
        ]
        found = gradient(forward(vlm, read.encoded, sites, track=True, start=start), read)
        total = {site: slope / steps + total.get(site, 0.0) for site, slope in found.items()}
    return total


# The re-check


def _rechecked(
    vlm: "VLM", pairs: Pairs, measure: Measure, plan: _Plan, table: pd.DataFrame, choosing: Collection[str]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """True effects of the chosen cells beside the estimates, and by direction the provenance of the sweeps.

    Args:
        table: of the screen.
        choosing: examples whose estimates choose the cells that claims are about.
    """
    checks, proofs = [], {}
    for direction in plan.directions:
        own = table[table["direction"] == direction]
        asked = top_cells(own[own["example"].isin(choosing)], plan.top_k)
        chosen = chosen_cells(own, plan.top_k, plan.n_random, plan.seed)
        chosen |= {cell: TOP_OF_HALF for cell in asked if cell not in chosen}
        data = pairs if direction == "noising" else exchanged(pairs)
        options = {"engine": plan.engine, "batch": plan.batch, "seed": plan.seed}
        found, proofs[direction] = _true_effects(vlm, data, plan.spots, chosen, measure, options)
        checks.append(found.assign(direction=direction, **{ASKED: found["cell"].isin(asked)}))
    return pd.concat(checks, ignore_index=True).merge(table, on=["example", "group", "direction", "cell"]), proofs


def _true_effects(
    vlm: "VLM", data: Pairs, spots: list[Cell], chosen: dict[int, str], measure: Measure, options: dict[str, Any]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What patching the chosen cells does to the measure, a row a pair and cell, and the provenance of the sweep."""
    source = data.counterfactual

    def exchange(point: Point) -> Replace:
        spot = spots[point.cell]
        return Replace(spot.site, spot.span, heads=None if spot.head is None else (spot.head,), source=source)

    result = sweep(vlm, data, [Point((("cell", cell),)) for cell in chosen], exchange, measure, **options)
    name, table = measure.metric.name, result.table
    limit = 64 * torch.finfo(vlm.dtype).eps * max(1.0, float(table[f"{name}_baseline"].abs().max()))
    effect = table[name] - table[f"{name}_baseline"]
    # The engines compute in other batches, so that what changes nothing differs by rounding; it has no sign or rank.
    effect = effect.where(effect.abs() > limit, 0.0)
    found = table[["example", "group", "cell"]].assign(effect=effect, chosen=table["cell"].map(chosen))
    found[UNEDITED] = table[f"{name}_baseline"]
    about = {key: value for key, value in result.provenance.items() if key != "model"}
    return found, about | {"rounding": limit}
