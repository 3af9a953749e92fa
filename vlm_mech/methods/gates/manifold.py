"""Whether an edit leaves the states that come after it among natural ones, and whether its effect needs them to leave.

After arXiv 2511.04638: an edit may move a model into states that no input leads to, and wake what natural states never
do. Such claims are flagged, not hidden.
"""

import dataclasses
import functools
import math
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


def on_manifold(
    claims: Sequence[Claim], vlm: "VLM", pairs: "Pairs", edit_of: EditOf, *, batch: int = 32
) -> tuple[Claim, ...]:
    """The claims with a gate: are the last token's states after each block, from the edited one on, natural ones?

    Natural are those of both pictures of all other pairs. A claim fails where the median over examples of the distance
    to the nearest natural state, or of the residual off the neighbourhood's principal components, lies beyond the
    `STRANGE` percentile of natural states after some block, and less than `KEPT` of the edit's effect is left when the
    states after the first such block are projected onto the neighbourhood: what it does needs states that no input
    leads to. Strange states whose effect survives are told of too.

    Args:
        pairs: some examples; about thirty are enough.
        edit_of: makes the edit of a claim.
        batch: pairs a forward pass.

    Raises:
        UsageError: the edit, or an answer, does not fit the pairs.
    """
    if 2 * (len(pairs) - 1) < NEIGHBOURS or any(pair.made for pair in pairs):
        gate = Gate(MANIFOLD, None, f"not tried: {NEIGHBOURS} natural states of other pairs are needed")
        return tuple(dataclasses.replace(claim, gates=(*claim.gates, gate)) for claim in claims)
    model = _Model(vlm, pairs, [pairs[start : start + batch] for start in range(0, len(pairs), batch)])
    found = []
    for claim in claims:
        gate = Gate(MANIFOLD, None, "not tried: nothing is edited, or tokens that differ from picture to picture")
        if edit_of(claim, pairs) is not None:
            gate = _gate(model, lambda some, claim=claim: edit_of(claim, some))
        found.append(dataclasses.replace(claim, gates=(*claim.gates, gate)))
    return tuple(found)


Edit = Callable[["Pairs"], Intervention | None]
"""An edit of some of the pairs."""


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model and the pairs, some at a time, that its states are read from."""

    vlm: "VLM"
    pairs: "Pairs"
    batches: "list[Pairs]"

    @property
    def sites(self) -> list[Site]:
        return [Site("llm.resid_post", layer) for layer in self.vlm.llm_layers]

    @functools.cached_property
    def natural(self) -> dict[Site, Any]:
        """States of the last token of both pictures of all pairs, without any edit."""
        one, other = self.states(self.sites), self.states(self.sites, of="counterfactual")
        return {site: np.concatenate([one[site], other[site]]) for site in self.sites}

    def states(self, sites: Sequence[Site], edit: Edit | None = None, of: str = "base") -> dict[Site, Any]:
        """The states of the last position, which is the prompt's last token: batches are padded on the left."""
        found: dict[Site, list[Any]] = {site: [] for site in sites}
        for some in self.batches:
            read_now = read(self.vlm, getattr(some, of), sites, None if edit is None else edit(some))
            for site in sites:
                found[site].append(read_now[site][:, -1].float().cpu().numpy())
        return {site: np.concatenate(each) for site, each in found.items()}

    def compared(self, site: Site, states: Any) -> Strangeness:
        """States of all pairs beside natural ones of other pairs."""
        numbers = np.arange(len(self.pairs))
        return strangeness(states, self.natural[site], numbers, np.tile(numbers, 2))

    def lead(self, edit: Edit | None = None, put: tuple[Site, Any] | None = None) -> float:
        """The mean logit difference of the answers' first tokens, where these differ; NaN where none do.

        Args:
            put: a site, and the states that the last tokens of all pairs get there after the edit.
        """
        leads, start = [], 0
        for some in self.batches:
            encoded, rows = self.vlm.encode(some.base), torch.arange(len(some))
            own, rival = (self.vlm.answer_ids(encoded, each) for each in (some.answer, some.counterfactual_answer))
            made = None if edit is None else edit(some)
            if put is not None:
                back = _put(self.vlm, encoded, put[0], put[1][start : start + len(some)])
                made = back if made is None else made & back
            logits = run(self.vlm, encoded, made).last.float()
            apart = (own != rival).cpu()
            leads += (logits[rows, own] - logits[rows, rival]).cpu()[apart].tolist()
            start += len(some)
        return float(np.mean(leads)) if leads else float("nan")


def _put(vlm: "VLM", encoded: Encoded, site: Site, states: Any) -> Replace:
    values = torch.zeros(len(encoded), encoded.n_pos, vlm.width(site), dtype=vlm.dtype, device=vlm.device)
    values[:, -1] = torch.from_numpy(states).to(values)
    return Replace(site, "last", source=Activations({site: values}, encoded))


def _first(edit: Intervention) -> int:
    """The first layer that an edit changes."""
    found: list[int] = []
    for each in edit.flat():
        if isinstance(each, Knockout):
            found += each.each_layer
        elif isinstance(each, StateEdit):
            found += [site.layer or 0 for site in each.sites]
    return min(found, default=0)


def _gate(model: _Model, edit: Edit) -> Gate:
    whole = edit(model.batches[0])
    assert whole is not None, "what there is for all pairs there is for some"
    sites = [site for site in model.sites if (site.layer or 0) >= _first(whole)]
    told = {site: model.compared(site, states) for site, states in model.states(sites, edit).items()}
    medians = {site: (float(np.median(each.distance)), float(np.median(each.residual))) for site, each in told.items()}
    strange = [site for site in sites if max(medians[site]) > STRANGE]
    worst = max(medians.values(), key=max)
    says = f"half of the last token's states lie farther from natural ones than {max(worst):.0f} % of these from others"
    kept: dict[str, Any] = {"percentiles": {str(site.layer): each for site, each in medians.items()}}
    if not strange:
        return Gate(MANIFOLD, True, says, kept)
    share = share_left(model, edit, strange[0], told[strange[0]])
    if math.isnan(share):
        return Gate(MANIFOLD, None, f"{says}; the answers begin alike, so that what is left is not known", kept)
    says += (
        f"; put among their natural neighbours after the first such block, {100 * share:.0f} % of the effect is left"
    )
    return Gate(MANIFOLD, share >= KEPT, says, kept | {"effect_left_when_projected": share})


def share_left(model: _Model, edit: Edit, site: Site, found: Strangeness) -> float:
    """The share of the edit's effect on the answers' first tokens that is left with projected states at a site.

    A projected state is a mixture of other examples' and lowers the lead by itself, so that the effect left is counted
    from a run whose unedited states are projected as well. NaN where the answers begin alike in all pairs.
    """
    usual = model.compared(site, model.states([site])[site])
    left = model.lead(edit, (site, found.projected)) - model.lead(put=(site, usual.projected))
    return left / (model.lead(edit) - model.lead())
