"""How what is seen gets to the answer: swaps, knockouts and the lens on the same examples, as the rows of one `Result`.

Every method asks something else of a layer: whether states there decide the answer (swap), whether attention there is
needed for it (knockout), which answer the residual stream prefers (lens). The probes that say what could be read there
are in `probes.py`, what follows from all of them in `claims.py`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.interventions.receipt import add_up, summarise
from vlm_mech.methods.knockout.data import EDGE, Scan
from vlm_mech.methods.knockout.study import knock_out, plan_knockout
from vlm_mech.methods.layer_swap.study import plan_swap, swap_states
from vlm_mech.methods.visual_flow.data import SPANS, Cases
from vlm_mech.results import metrics
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.sweeps.schedule import SweepPlan

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("method", "span", "stream", "layer")
PROBE, SHUFFLED = "probe", "probe of shuffled labels"
SWAP, KNOCKOUT, CONTROL, LENS = "swap", "knockout", "knockout of as many random edges", "lens"
INPUT = -1
"""Layer that stands for what the decoder receives; other layers of swap, probe and lens are outputs of blocks."""

RECOVERED = Metric(
    "recovered",
    "fraction",
    "swap: how far the logit difference goes to that of the other image; 0 = own run, 1 = the run the states come from",
)
LOGIT_DIFF = Metric(
    "logit_diff",
    "logits",
    "swap and knockout: logit of the answer less that of the other image's, after the edit; baseline: without it",
    signed=True,
)
LEAD = Metric(
    "lead",
    "logits",
    "lens at the last token: logit of the answer less that of its rival; baseline: in the decoder's input",
    signed=True,
)
ACCURACY = Metric(
    "accuracy",
    "share",
    "probe: share of examples whose answer it finds most probable; a tie is wrong; baseline: 1 / classes",
)
P_TRUE = Metric("p_true", "probability", "the probe's probability of the answer; baseline: 1 / classes")
P_RIVAL = Metric("p_rival", "probability", "the probe's probability of the rival; baseline: 1 / classes")
METRICS = (RECOVERED, LOGIT_DIFF, LEAD, ACCURACY, P_TRUE, P_RIVAL)


def swapped_sites(vlm: "VLM") -> list[Site]:
    """The decoder's input, and the output of each of its blocks."""
    return [Site("llm.resid_pre", 0), *(Site("llm.resid_post", layer) for layer in vlm.llm_layers)]


def flow(
    vlm: "VLM",
    cases: Cases,
    scan: Scan,
    *,
    seed: int = 0,
    engine: str = "fast",
    memory: int | str | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Swap, knockout and lens on one batch of examples, those answered wrongly included.

    States of the other image are swapped into the run on the image, from one place on (noising).

    Args:
        scan: see `flow_scan`.
        seed: draws the controls of the knockouts.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".

    Returns:
        The table with one row for each example and cell of `AXES`, and the summary of all receipts.
    """
    how = {"only_correct": False, "engine": engine, "memory": memory}
    swapped, receipts = swap_states(vlm, cases.pairs, swapped_sites(vlm), SPANS, directions=("noising",), **how)
    cut, cut_receipts = knock_out(vlm, cases.pairs, scan, seed=seed, **how)
    table = pd.concat([_of_swap(swapped), _of_knockout(cut), _of_lens(vlm, cases)], ignore_index=True)
    groups = {pair.id: pair.group or pair.id for pair in cases.pairs}
    table = table.assign(group=table["example"].map(groups), skipped=table["skipped"].fillna(""))
    return as_rows(table), add_up([summarise(receipts), cut_receipts])


def as_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of a map's result in order; what a method does not measure is missing."""
    names = [name for metric in METRICS for name in (metric.name, f"{metric.name}_baseline")]
    missing = {name: np.nan for name in names if name not in table}
    return pd.DataFrame(table.assign(**missing)[["example", "group", *AXES, *names, "skipped"]])


def _of_swap(table: pd.DataFrame) -> pd.DataFrame:
    # The decoder's input comes before the output of block 0, and both are said to be of layer 0.
    first = table.groupby(["example", "span", "layer"]).cumcount() == 0
    layer = table["layer"].where(~(first & (table["layer"] == 0)), INPUT)
    return table.assign(method=SWAP, stream="llm", layer=layer).drop(columns=["direction", "flip", "flip_baseline"])


def _of_knockout(table: pd.DataFrame) -> pd.DataFrame:
    method = np.where(table["cut"] == EDGE, KNOCKOUT, CONTROL)
    kept = table[["example", "edge", "layer", "logit_diff", "logit_diff_baseline", "skipped"]]
    found = kept.assign(method=method, stream="llm").rename(columns={"edge": "span"})
    # Whether a share of the answer's probability can be given does not matter to a difference of logits.
    return found.assign(skipped=found["skipped"].where(found["logit_diff"].isna(), ""))


def _of_lens(vlm: "VLM", cases: Cases) -> pd.DataFrame:
    """The lead of the answer at the last token, read from one clean pass."""
    clean = record(vlm, vlm.encode(cases.pairs.base))
    rivals = [cases.pairs.written(each) for each in cases.rivals]
    ids = [vlm.answer_ids(clean.encoded, each) for each in (cases.pairs.answer, rivals)]
    with torch.no_grad():
        leads = [
            # Planted models may have a rival that is the answer; pairs of a user were checked (`data.fitting`).
            metrics.logit_diff(vlm.readout(clean.hidden(depth)[:, -1]), *ids, apart=False).double().cpu().numpy()
            for depth in range(len(clean.blocks) + 1)
        ]
    names = [pair.id for pair in cases.pairs]
    tables = [
        pd.DataFrame({"example": names, "layer": INPUT + depth, "lead": lead, "lead_baseline": leads[0]})
        for depth, lead in enumerate(leads)
    ]
    return pd.concat(tables, ignore_index=True).assign(method=LENS, span="last", stream="llm", skipped="")


def plan_flow(
    vlm: "VLM", cases: Cases, scan: Scan, *, batch: int = 32, seed: int = 0, memory: int | str | None = None
) -> SweepPlan:
    """What swaps and knockouts over all examples will need; probes and lens are small beside them.

    Raises:
        TooLargeError: a single edited version of a single example does not fit into the memory.
    """
    how: dict[str, Any] = {"batch": batch, "memory": memory}
    swaps = plan_swap(vlm, cases.pairs, swapped_sites(vlm), SPANS, directions=("noising",), **how)
    cuts = plan_knockout(vlm, cases.pairs, scan, seed=seed, **how)
    return dataclasses.replace(
        max(swaps, cuts, key=lambda plan: plan.peak_bytes),
        n_cells=swaps.n_cells + cuts.n_cells,
        flops=swaps.flops + cuts.flops,
        forwards=swaps.forwards + cuts.forwards,
    )
