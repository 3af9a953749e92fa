"""Edits of runs in conflict, by layer: states of other runs put in their place by span, and heads set to zero.

After the patching of arXiv 2604.09364 (spans, share of flips) and the exchange of questions of arXiv 2606.28273 (last
token alone). Both directions, the two ways to count a flip, and the controls are ours.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.interventions.receipt import Receipt
from vlm_mech.interventions.specification import Ablate, Intervention, Replace
from vlm_mech.interventions.trace import read
from vlm_mech.methods.arbitration_page.data import (
    CONFLICT,
    NO_HEAD,
    PRIOR_QUESTION,
    RUNS,
    SIDES,
    SPANS,
    Cases,
    Scan,
    spans_of,
)
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL
from vlm_mech.methods.layer_swap.study import plan_swap
from vlm_mech.sweeps.engine import Engine, engine_of
from vlm_mech.sweeps.measures import comparison, said
from vlm_mech.sweeps.readings import Readings, readings_of
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.schedule import SweepPlan
from vlm_mech.sweeps.shares import budget_of

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

ZERO, OTHERS = "zero", "zero, other heads of its layer"
"""Whose states an ablated head gets; and the mean over other heads, which is what a random head of the layer does."""
OTHER_QUESTION = "other question"
"""States of the same picture under the other question: what is seen, or what is usual."""
Place = dict[str, Any]


class _Run:
    """One run of a batch: how its answers are compared, and the engine around it."""

    def __init__(self, vlm: "VLM", cases: Cases, prompts: Sequence[Prompt], engine: str, memory: Any) -> None:
        both = cases.pairs.answer, cases.pairs.counterfactual_answer
        measures = [comparison("logit_diff", *both), *(said(answers) for answers in both)]
        self.read: Readings = readings_of(vlm, vlm.encode(list(prompts)), measures)
        self.engine: Engine | Reference = engine_of(vlm, self.read.encoded, engine, budget=budget_of(vlm, memory))

    @functools.cached_property
    def before(self) -> np.ndarray:
        """What is `told` without edits."""
        return self.told(self.reads).cpu().numpy()

    @property
    def source(self) -> Encoded:
        """What states of this run are taken from."""
        return self.read.encoded.before or self.read.encoded

    @property
    def reads(self) -> Tensor:
        """Its logits without edits."""
        return self.engine.reads

    def told(self, logits: Tensor) -> Tensor:
        """By example: shown answer less prior, whether greedy decoding gives either, and the first token said."""
        lead, shown, prior = (self.read.value(number, logits).double() for number in range(3))
        return torch.stack([lead, shown, prior, logits[:, 0].argmax(-1).to(lead)], 1)

    def under(self, edits: Sequence[Intervention], donor: Tensor | None) -> tuple[np.ndarray, list[Receipt]]:
        """By edit and example what is `told`, and how far the logits lie from a donor's."""

        def keep(_: int, logits: Tensor) -> Tensor:
            apart = logits[:, 0] - (self.reads if donor is None else donor)[:, 0]
            return torch.cat([self.told(logits), apart.abs().amax(-1, keepdim=True).double()], 1)

        kept, proofs = self.engine.answers(edits, keep=keep)
        return kept.cpu().numpy(), [each for proof in proofs for each in proof]


def outcomes_of(before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """What became of examples, from what is told of them (lead, says shown, says prior, first token) without an edit
    and with one.

    `flip` compares two answers alone; a tie is for the prior. `restored` is NaN but of examples that preferred the
    prior, `taken` but of those that preferred the shown answer: whether greedy decoding over all words then says the
    other one.
    """
    won, now = before[:, 0] > 0, after[:, 0] > 0
    restored, taken = np.where(won, np.nan, after[:, 1]), np.where(won, after[:, 2], np.nan)
    turned = (before[:, 3] != after[:, 3]).astype(float)
    return {"flip": (won != now).astype(float), "restored": restored, "taken": taken, "turned": turned}


def _rows(
    cases: Cases, place: Place, run: _Run, found: np.ndarray, said_by: np.ndarray | None, kept: np.ndarray
) -> pd.DataFrame:
    """The rows of one edit; `kept` says which examples have a value."""
    before = run.before
    columns: dict[str, Any] = outcomes_of(before, found)
    columns |= {f"{name}_baseline": np.zeros(len(before)) for name in tuple(columns)}
    if said_by is not None:
        columns |= {"as_donor": (found[:, 3] == said_by).astype(float)}
        columns |= {"as_donor_baseline": (before[:, 3] == said_by).astype(float)}
    columns |= {"lead": found[:, 0], "lead_baseline": before[:, 0]}
    values = {name: np.where(kept, value, np.nan) for name, value in columns.items()}
    return pd.DataFrame({"example": [pair.id for pair in cases.pairs], **place, **values})


def patch_rows(
    vlm: "VLM", cases: Cases, scan: Scan, *, engine: str = "fast", memory: int | str | None = None
) -> tuple[pd.DataFrame, list[Receipt], float]:
    """Each run with the states of others after each block, by span.

    Args:
        scan: whose states besides those of the other picture.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model.

    Returns:
        A row an example, run, donor, span and layer; receipts; and by how much the logits differ at most from the
        donor's where all tokens are replaced.
    """
    tables, receipts, furthest = [], [], 0.0
    sites = [Site("llm.resid_post", layer) for layer in vlm.llm_layers]
    runs = {name: _Run(vlm, cases, cases.prompts(name), engine, memory) for name in RUNS}
    for name, run in runs.items():
        spans = spans_of(vlm, cases.prompts(name))
        every = np.ones(len(cases), bool)
        other = next(each for each in RUNS if each != name)
        lent: dict[str, tuple[_Run, np.ndarray]] = {COUNTERFACTUAL: (runs[other], every)}
        donors = scan.donors
        for control in () if donors is None else donors.names:
            found = [] if donors is None else donors.of(control, SIDES[name], cases.pairs)
            prompts = [
                mine if each is None else each.prompt for each, mine in zip(found, cases.prompts(other), strict=True)
            ]
            lent[control] = _Run(vlm, cases, prompts, engine, memory), np.array([each is not None for each in found])
        for donor, (states, kept) in lent.items():
            cells = [(site, span) for site in sites for span in SPANS if donor == COUNTERFACTUAL or span != "all"]
            edits = [Replace(site, spans[span], source=states.source) for site, span in cells]
            values, proofs = run.under(edits, states.reads)
            said_by = states.reads[:, 0].argmax(-1).cpu().numpy()
            receipts += proofs
            for (site, span), value in zip(cells, values, strict=True):
                furthest = max(furthest, float(value[:, 4].max())) if span == "all" else furthest
                place = {"run": name, "donor": donor, "span": span, "layer": site.layer, "head": NO_HEAD}
                tables.append(_rows(cases, place, run, value, said_by, kept))
    if cases.prior_questions:
        more, proofs = _questions(vlm, cases, engine, memory)
        tables, receipts = [*tables, *more], receipts + proofs
    return pd.concat(tables, ignore_index=True), receipts, furthest


def _questions(vlm: "VLM", cases: Cases, engine: str, memory: Any) -> tuple[list[pd.DataFrame], list[Receipt]]:
    """The last token's states exchanged between both questions about the picture in conflict."""
    sites, tables, receipts = [Site("llm.resid_post", layer) for layer in vlm.llm_layers], [], []
    every = np.ones(len(cases), bool)
    runs = {name: _Run(vlm, cases, cases.prompts(name), engine, memory) for name in (CONFLICT, PRIOR_QUESTION)}
    for name, run in runs.items():
        states = next(each for other, each in runs.items() if other != name)
        taken = read(vlm, states.source, sites)
        edits = [Replace(site, "last", source=taken) for site in sites]
        values, proofs = run.under(edits, states.reads)
        said_by = states.reads[:, 0].argmax(-1).cpu().numpy()
        receipts += proofs
        for site, value in zip(sites, values, strict=True):
            place = {"run": name, "donor": OTHER_QUESTION, "span": "last", "layer": site.layer, "head": NO_HEAD}
            tables.append(_rows(cases, place, run, value, said_by, every))
    return tables, receipts


def plan_patches(
    vlm: "VLM", cases: Cases, scan: Scan, *, batch: int = 32, memory: int | str | None = None
) -> SweepPlan:
    """What `patch_rows` over all pairs will need, `batch` at a time; other tokens than image tokens are left out.

    Raises:
        TooLargeError: a single patch of a single pair does not fit into the memory.
    """
    sites = [Site("llm.resid_post", layer) for layer in vlm.llm_layers]
    spans = [span for span in SPANS if span != "text"]
    return plan_swap(vlm, cases.pairs, sites, spans, n_controls=len(scan.names) - 1, batch=batch, memory=memory)


def zeroed_heads(
    vlm: "VLM", cases: Cases, *, engine: str = "fast", memory: int | str | None = None
) -> tuple[pd.DataFrame, list[Receipt]]:
    """The run in conflict with one head's output at the last token set to zero, each in turn.

    Returns:
        A row an example and head, those of `OTHERS` with the mean over the other heads of its layer; and receipts.
    """
    run, n_heads = _Run(vlm, cases, cases.prompts(CONFLICT), engine, memory), vlm.n_heads("llm")
    heads = [(layer, head) for layer in vlm.llm_layers for head in range(n_heads)]
    edits = [Ablate(Site("llm.head_out", layer), "last", heads=(head,)) for layer, head in heads]
    values, receipts = run.under(edits, None)
    at, kept = {"run": CONFLICT, "donor": ZERO, "span": "last"}, np.ones(len(cases), bool)
    tables = [
        _rows(cases, at | {"layer": layer, "head": head}, run, value, None, kept)
        for (layer, head), value in zip(heads, values, strict=True)
    ]
    table = pd.concat(tables, ignore_index=True)
    return pd.concat([table, *(_others(table) if n_heads > 1 else ())], ignore_index=True), receipts


def _others(table: pd.DataFrame) -> list[pd.DataFrame]:
    found = table.copy()
    for name in ("flip", "restored", "taken", "turned", "lead"):
        by = table.groupby(["example", "layer"], sort=False)[name]
        n, whole = (by.transform(how).to_numpy(dtype=float) for how in ("size", "sum"))
        values = table[name].to_numpy(dtype=float)
        found[name] = np.where(np.isnan(values), np.nan, (whole - values) / (n - 1))
    return [found.assign(donor=OTHERS)]
