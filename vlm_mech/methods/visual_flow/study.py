"""How what is seen gets to the answer: swaps, knockouts and the lens on the same examples, as the rows of one `Result`.

Every method asks something else of a layer: whether states there decide the answer (swap), whether attention there is
needed for it (knockout), which answer the residual stream prefers (lens). The probes that say what could be read there
are in `probes.py`, what follows from all of them in `claims.py`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd

from vlm_mech.interventions.receipt import add_up, summarise
from vlm_mech.methods.knockout.data import EDGE, Scan
from vlm_mech.methods.knockout.study import knock_out, plan_knockout
from vlm_mech.methods.layer_swap.study import compared_by, plan_swap, swap_states
from vlm_mech.methods.lens.leads import INPUT, depth_sites, leads_of
from vlm_mech.methods.visual_flow.data import LAST, WHOLE, Cases, spans
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.measures import Comparison, comparison
from vlm_mech.sweeps.schedule import SweepPlan

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("method", "span", "stream", "layer")
PROBE, SHUFFLED = "probe", "probe of shuffled labels"
SWAP, KNOCKOUT, CONTROL, LENS = "swap", "knockout", "knockout of as many random edges", "lens"

ACCURACY = Metric(
    "accuracy",
    "share",
    "probe: share of examples whose answer it finds most probable; a tie is wrong; baseline: 1 / classes",
)
P_TRUE = Metric("p_true", "probability", "the probe's probability of the answer; baseline: 1 / classes")
P_RIVAL = Metric("p_rival", "probability", "the probe's probability of the rival; baseline: 1 / classes")


def metrics_of(name: Comparison = "logit_diff") -> tuple[Metric, ...]:
    """The metrics of a map whose answers are compared so; the second is that of the two images' answers."""
    what, unit = compared_by(name), comparison(name, (), ()).metric.unit
    ends = "0 = own run, 1 = the run the states come from"
    of = f"{what} of the answer minus that of the other image's"
    lens = f"{what} of the answer minus that of its rival; baseline: in the decoder's input"
    return (
        Metric("recovered", "fraction", f"patching: shift of the {what} difference towards the other image's; {ends}"),
        Metric(name, unit, f"swap and knockout: {of}, after the edit; baseline: without it", signed=True),
        Metric("lead", unit, f"lens where the answer is foretold: {lens}", signed=True),
        ACCURACY,
        P_TRUE,
        P_RIVAL,
    )


METRICS = metrics_of()


def difference_of(result: Result) -> Comparison:
    """How the answers of a map were compared."""
    names = {metric.name for metric in result.metrics}
    return next(name for name in get_args(Comparison) if name in names)


def said_in(result: Result) -> str:
    """The tokens at which the answers of a map are said (see `data.said_at`)."""
    return WHOLE if WHOLE in set(result.table["span"]) else LAST


def flow(
    vlm: "VLM",
    cases: Cases,
    scan: Scan,
    *,
    measure: Comparison = "logit_diff",
    seed: int = 0,
    engine: str = "fast",
    memory: int | str | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Swap, knockout and lens on one batch of examples, those answered wrongly included.

    States of the other image are swapped into the run on the image, from one place on (noising).

    Args:
        scan: see `flow_scan`.
        measure: how two answers are compared (see `measures.comparison`).
        seed: draws the controls of the knockouts.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".

    Returns:
        The table with one row for each example and cell of `AXES`, and the summary of all receipts.
    """
    how: dict[str, Any] = {"only_correct": False, "measure": measure, "engine": engine, "memory": memory}
    swaps = depth_sites(vlm), spans(cases.said)
    swapped, receipts = swap_states(vlm, cases.pairs, *swaps, directions=("noising",), **how)
    cut, cut_receipts = knock_out(vlm, cases.pairs, scan, seed=seed, **how)
    tables = [_of_swap(swapped), _of_knockout(cut, measure), _of_lens(vlm, cases, measure)]
    table = pd.concat(tables, ignore_index=True)
    groups = {pair.id: pair.group or pair.id for pair in cases.pairs}
    table = table.assign(group=table["example"].map(groups), skipped=table["skipped"].fillna(""))
    return as_rows(table, measure), add_up([summarise(receipts), cut_receipts])


def as_rows(table: pd.DataFrame, measure: Comparison = "logit_diff") -> pd.DataFrame:
    """The columns of a map's result in order; what a method does not measure is missing."""
    names = [name for metric in metrics_of(measure) for name in (metric.name, f"{metric.name}_baseline")]
    missing = {name: np.nan for name in names if name not in table}
    return pd.DataFrame(table.assign(**missing)[["example", "group", *AXES, *names, "skipped"]])


def _of_swap(table: pd.DataFrame) -> pd.DataFrame:
    # The decoder's input comes before the output of block 0, and both are said to be of layer 0.
    first = table.groupby(["example", "span", "layer"]).cumcount() == 0
    layer = table["layer"].where(~(first & (table["layer"] == 0)), INPUT)
    return table.assign(method=SWAP, stream="llm", layer=layer).drop(columns=["direction", "flip", "flip_baseline"])


def _of_knockout(table: pd.DataFrame, measure: Comparison) -> pd.DataFrame:
    method = np.where(table["cut"] == EDGE, KNOCKOUT, CONTROL)
    kept = table[["example", "edge", "layer", measure, f"{measure}_baseline", "skipped"]]
    found = kept.assign(method=method, stream="llm").rename(columns={"edge": "span"})
    # Whether a share of the answer's probability can be given does not matter to a difference of answers.
    return found.assign(skipped=found["skipped"].where(found[measure].isna(), ""))


def _of_lens(vlm: "VLM", cases: Cases, measure: Comparison) -> pd.DataFrame:
    """The lead of the answer where its tokens are predicted, read from one clean pass."""
    leads = leads_of(vlm, cases.pairs, cases.rivals, measure)
    names = [pair.id for pair in cases.pairs]
    tables = [
        pd.DataFrame({"example": names, "layer": INPUT + depth, "lead": lead, "lead_baseline": leads[0]})
        for depth, lead in enumerate(leads)
    ]
    return pd.concat(tables, ignore_index=True).assign(method=LENS, span=cases.said, stream="llm", skipped="")


def plan_flow(
    vlm: "VLM",
    cases: Cases,
    scan: Scan,
    *,
    measure: Comparison = "logit_diff",
    batch: int = 32,
    seed: int = 0,
    memory: int | str | None = None,
) -> SweepPlan:
    """What swaps and knockouts over all examples will need; probes and lens are small beside them.

    Raises:
        TooLargeError: a single edited version of a single example does not fit into the memory.
    """
    how: dict[str, Any] = {"measure": measure, "batch": batch, "memory": memory}
    swaps = plan_swap(vlm, cases.pairs, depth_sites(vlm), spans(cases.said), directions=("noising",), **how)
    cuts = plan_knockout(vlm, cases.pairs, scan, seed=seed, **how)
    return dataclasses.replace(
        max(swaps, cuts, key=lambda plan: plan.peak_bytes).with_peaks(swaps.peaks, cuts.peaks),
        n_cells=swaps.n_cells + cuts.n_cells,
        flops=swaps.flops + cuts.flops,
        forwards=swaps.forwards + cuts.forwards,
    )
