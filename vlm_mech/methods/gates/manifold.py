"""Whether an edit leaves the states that come after it among natural ones, and whether its effect needs them to leave.

After arXiv 2511.04638: an edit may move a model into states that no input leads to, and wake what natural states never
do. Such claims are flagged, not hidden.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.specification import Activations, Intervention, Knockout, Replace, StateEdit
from vlm_mech.interventions.trace import read, run
from vlm_mech.results.claim import Claim, Gate
from vlm_mech.results.manifold import NEIGHBOURS, Strangeness, strangeness

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

MANIFOLD = "natural states"
STRANGE = 95.0
"""Percentile of natural states beyond which the median state under an edit is flagged."""

KEPT = 0.5
"""Share of an effect that must be left when strange states are projected onto natural ones."""

EditOf = Callable[[Claim, "Pairs"], Intervention | None]
"""What a claim's edit is for some pairs; None where it has none that can be made by name."""


def on_manifold(claims: Sequence[Claim], vlm: "VLM", pairs: "Pairs", edit_of: EditOf) -> tuple[Claim, ...]:
    """The claims with a gate: are the last token's states after each block, from the edited one on, natural ones?

    Natural are those of both pictures of all other pairs. A claim fails where the median over examples of the distance
    to the nearest natural state, or of the residual off the neighbourhood's principal components, lies beyond the
    `STRANGE` percentile of natural states after some block, and less than `KEPT` of the edit's effect is left when the
    states after the first such block are projected onto the neighbourhood: what it does needs states that no input
    leads to. Strange states whose effect survives are told of too.

    Args:
        pairs: some examples; about thirty are enough.
        edit_of: makes the edit of a claim.
    """
    if 2 * (len(pairs) - 1) < NEIGHBOURS or any(pair.made for pair in pairs):
        gate = Gate(MANIFOLD, None, f"not tried: {NEIGHBOURS} natural states of other pairs are needed")
        return tuple(dataclasses.replace(claim, gates=(*claim.gates, gate)) for claim in claims)
    sites = [Site("llm.resid_post", layer) for layer in vlm.llm_layers]
    encoded, other = vlm.encode(pairs.base), vlm.encode(pairs.counterfactual)
    natural = {
        site: np.concatenate([_last(states, site) for states in (read(vlm, encoded, sites), read(vlm, other, sites))])
        for site in sites
    }
    found = []
    for claim in claims:
        edit = edit_of(claim, pairs)
        gate = Gate(MANIFOLD, None, "not tried: nothing is edited, or tokens that differ from picture to picture")
        if edit is not None:
            gate = _gate(vlm, pairs, encoded, natural, edit)
        found.append(dataclasses.replace(claim, gates=(*claim.gates, gate)))
    return tuple(found)


def _first(edit: Intervention) -> int:
    """The first layer that an edit changes."""
    found: list[int] = []
    for each in edit.flat():
        if isinstance(each, Knockout):
            found += each.each_layer
        elif isinstance(each, StateEdit):
            found += [site.layer or 0 for site in each.sites]
    return min(found, default=0)


def _last(states: Activations, site: Site) -> np.ndarray:
    """The states of the last position, which is the prompt's last token: batches are padded on the left."""
    return states[site][:, -1].float().cpu().numpy()


def _gate(vlm: "VLM", pairs: "Pairs", encoded: Encoded, natural: dict[Site, np.ndarray], edit: Intervention) -> Gate:
    sites = [site for site in natural if (site.layer or 0) >= _first(edit)]
    edited, numbers = read(vlm, encoded, sites, edit), np.arange(len(pairs))
    told: dict[Site, Strangeness] = {}
    for site in sites:
        told[site] = strangeness(_last(edited, site), natural[site], numbers, np.tile(numbers, 2))
    medians = {site: (float(np.median(each.distance)), float(np.median(each.residual))) for site, each in told.items()}
    strange = [site for site in sites if max(medians[site]) > STRANGE]
    worst = max(medians.values(), key=max)
    says = f"half of the last token's states lie farther from natural ones than {max(worst):.0f} % of these from others"
    kept: dict[str, Any] = {"percentiles": {str(site.layer): each for site, each in medians.items()}}
    if strange:
        share = _share_left(vlm, pairs, encoded, edit, strange[0], told[strange[0]], natural[strange[0]])
        kept["effect_left_when_projected"] = share
        says += f"; put among their natural neighbours after the first such block, {100 * share:.0f} % of the effect"
        says += " is left"
    else:
        share = 1.0
    return Gate(MANIFOLD, not strange or share >= KEPT, says, kept)


def _share_left(
    vlm: "VLM",
    pairs: "Pairs",
    encoded: Encoded,
    edit: Intervention,
    site: Site,
    found: Strangeness,
    natural: np.ndarray,
) -> float:
    """The share of the edit's effect on the answers' first tokens that is left with projected states at a site.

    A projected state is a mixture of other examples' and lowers the lead by itself, so that the effect left is counted
    from a run whose unedited states are projected as well.
    """
    numbers = np.arange(len(pairs))
    clean = read(vlm, encoded, [site])
    usual = strangeness(_last(clean, site), natural, numbers, np.tile(numbers, 2))
    own, rival = (vlm.answer_ids(encoded, answers) for answers in (pairs.answer, pairs.counterfactual_answer))

    def put(states: np.ndarray) -> Replace:
        values = clean[site].clone()
        values[:, -1] = torch.from_numpy(states).to(values)
        return Replace(site, "last", source=Activations({site: values}, encoded))

    def lead(intervention: Intervention | None) -> float:
        logits, rows = run(vlm, encoded, intervention).last.float(), torch.arange(len(pairs))
        return float((logits[rows, own] - logits[rows, rival]).mean())

    effect = lead(edit) - lead(None)
    return (lead(edit & put(found.projected)) - lead(put(usual.projected))) / effect
