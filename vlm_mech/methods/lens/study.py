"""Across which layers the answer's lead over a rival rises and falls, and from which depth on one of the two leads."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.methods.gates.gated import Measured, Options, gated
from vlm_mech.methods.gates.shuffled import following
from vlm_mech.methods.lens.claims import LEAD, STEP, pool
from vlm_mech.methods.lens.figures import drawn
from vlm_mech.methods.lens.findings import findings
from vlm_mech.methods.lens.leads import INPUT, depth_sites, leads_of
from vlm_mech.methods.lens.tuned_lens import TunedLens, retrained
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.asked import check_call

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

OTHER_IMAGE, OTHER_TEXT, GIVEN = "the other image's answer", "the other text's answer", "the given rival"
"""What the answer is compared with, in words."""
NOTHING_BEFORE = "nothing comes before the decoder's input"


def lens_lead(
    vlm: "VLM",
    pairs: Pairs,
    *,
    against: Literal["counterfactual"] | Sequence[str] = "counterfactual",
    tuned: TunedLens | None = None,
    batch: int = 32,
    gates: Literal["none", "quick", "all"] = "quick",
    null: int = 5,
    seed: int = 0,
) -> Result:
    """By how much the lens lets each pair's answer lead a rival, by depth, and what can be claimed of layers from it.

    The logits of both are read where their tokens part, behind what they have in common, in one unedited pass over the
    first image of each pair. Every pair counts, also those that the model answers wrongly: leave them out beforehand.

    Args:
        against: `counterfactual` for the answer of the pair's other image, or a rival for each pair, such as the usual
            answer; a rival that is the answer itself has a lead of 0.
        tuned: translators of `llm.resid_pre` 0 and of each `llm.resid_post` but the last (`train_tuned_lens`), by which
            states are read; by default the logit lens.
        batch: pairs per forward pass.
        gates: robustness checks of claims: "none" but the half of the pairs that did not choose them; "quick":
            resamples of the pairs too; "all": the same of models with shuffled weights, and of shuffled answers.
        null: models with shuffled weights, and shuffles of the answers, that "all" compares with. A tuned lens is
            trained anew for each of these models, on its own training prompts; a file of one keeps none, so that the
            gate then says that it was not tried.
        seed: parts the pairs in halves, and draws what is random in the gates.

    Returns:
        A row per pair and `layer`, -1 for the decoder's input, others for the output of that block; `rival` says what
        the answer leads. Metrics, in logits: `lead` of the answer (baseline: in the decoder's input), and its `step`
        across the layer (missing at -1).
        `claims` has what holds of layers, `findings` says it.

    Raises:
        UsageError: no pair, two of one id, another number of rivals than pairs, answers that cannot be distinguished, a
            tuned lens that lacks a site or was made with these pictures or for another model, unknown gates, or a batch
            below 1.
    """
    check_call(vlm, pairs, "lens_lead", batch=(batch, 1))
    asked = Options(gates, null, seed, batch)
    rivals = _rivals(pairs, against)
    if tuned is not None:
        tuned.check(vlm, pairs.base, depth_sites(vlm), normed=True)
    starts = range(0, len(pairs), batch)
    over = (OTHER_TEXT if pairs.is_text else OTHER_IMAGE) if isinstance(against, str) else GIVEN
    tables = [_table(vlm, pairs[at : at + batch], rivals[at : at + batch], over, tuned) for at in starts]
    about: dict[str, Any] = {"model": vlm.identity(), "data": pairs.described, PLOT: drawn_by(drawn)}
    if tuned is not None:
        about["tuned_lens"] = {name: told for name, told in tuned.record.items() if name != "used"}
    config = {"lens": "logit lens" if tuned is None else "tuned lens"}
    table = pd.concat(tables, ignore_index=True)
    result = Result("lead in the lens", table, ("rival", "layer"), _metrics(over), config, about)
    claims = gated(asked, vlm, pairs, result, pool, _again(vlm, pairs, rivals, over, tuned))
    result = dataclasses.replace(result, claims=claims)
    return dataclasses.replace(result, findings=findings(result))


def _rivals(pairs: Pairs, against: Literal["counterfactual"] | Sequence[str]) -> list[str]:
    if isinstance(against, str):
        if against != "counterfactual":
            raise UsageError(f"against is {against!r}; 'counterfactual' or a list of answers, one a pair, is needed")
        return list(pairs.counterfactual_answer)
    if len(against) != len(pairs):
        raise UsageError(f"{len(against)} rivals are given for {len(pairs)} pairs; one for each is needed")
    return list(against)


def _metrics(over: str) -> tuple[Metric, Metric]:
    lead = f"logit of the answer minus that of {over}, as the lens reads them"
    return (
        Metric(LEAD, "logits", f"{lead}; baseline: in the decoder's input", signed=True, against="decoder's input"),
        Metric(STEP, "logits", "change of the lead across the layer", signed=True, against="no change"),
    )


def _table(vlm: "VLM", pairs: Pairs, rivals: Sequence[str], over: str, tuned: TunedLens | None) -> pd.DataFrame:
    """A row per pair and depth."""
    leads = np.stack(leads_of(vlm, pairs, rivals, tuned=tuned))
    steps = np.diff(leads, axis=0, prepend=np.nan)
    known = {"example": [pair.id for pair in pairs], "group": [pair.group or pair.id for pair in pairs]}
    rows = []
    for number, (lead, step) in enumerate(zip(leads, steps, strict=True)):
        layer = INPUT + number
        numbers = {LEAD: lead, f"{LEAD}_baseline": leads[0], STEP: step, f"{STEP}_baseline": 0.0}
        skipped = NOTHING_BEFORE if layer == INPUT else ""
        rows.append(pd.DataFrame(known | {"rival": over, "layer": layer} | numbers | {"skipped": skipped}))
    return pd.concat(rows, ignore_index=True)


def _again(vlm: "VLM", pairs: Pairs, rivals: Sequence[str], over: str, tuned: TunedLens | None) -> Measured:
    """Reads the same leads in another model, with a tuned lens of its own, or of the pairs with other answers."""
    rivals_for = following(pairs, rivals)
    made: list[tuple[VLM, TunedLens]] = []

    def measured(model: "VLM", some: Pairs) -> pd.DataFrame:
        own = tuned
        if tuned is not None and model is not vlm:
            if not made or made[0][0] is not model:
                made[:] = [(model, retrained(tuned, model))]
            own = made[0][1]
        return _table(model, some, rivals_for(some), over, own)

    return measured
