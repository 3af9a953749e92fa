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
from vlm_mech.data.derived_pairs import turned
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.specification import (
    Activations,
    AttentionEdit,
    Intervention,
    Knockout,
    Replace,
    StateEdit,
)
from vlm_mech.interventions.trace import read, run
from vlm_mech.results.claim import Claim, Gate
from vlm_mech.results.manifold import NEIGHBOURS, Natural

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

MANIFOLD = "natural states"
STRANGE = 95.0
"""Percentile of natural states beyond which the median state under an edit is flagged."""

KEPT = 0.5
"""Share of an effect that must be left when strange states are projected onto natural ones."""

HALF = 0.5
"""Share of the way to the other picture's answer that an edit must not go of which a claim denies that it does."""


@dataclasses.dataclass(frozen=True)
class ClaimEdit:
    """The edit of a claim, where more than the edit is to be said of it.

    `turned`: the counterfactual picture is asked about, so that the edit is that of the pairs turned. `denied`: the
    claim says that the edit does not go half of the way to the other picture's answer.
    """

    intervention: Intervention
    turned: bool = False
    denied: bool = False


EditOf = Callable[[Claim, "Pairs"], "Intervention | ClaimEdit | str | None"]
"""What a claim's edit is for some pairs, or why it has none; None where nothing is edited.

Where it is of turned pairs, it is asked for again with the pairs turned.
"""
NO_EDIT = "nothing is edited"


def on_manifold(
    claims: Sequence[Claim], vlm: "VLM", pairs: "Pairs", edit_of: EditOf, *, batch: int = 32
) -> tuple[Claim, ...]:
    """The claims with a gate: are the last token's states after each block, from the edited one on, natural ones?

    Natural are those of both pictures of all other pairs. A claim fails where the median over examples of the distance
    to the nearest natural state, or of the residual off the neighbourhood's principal components, lies beyond the
    `STRANGE` percentile of natural states after some block, and less than `KEPT` of the edit's effect is left when the
    states after the first such block, or after the first of those where they are strangest, are projected onto the
    neighbourhood: what it does needs states that no input leads to. Strange states whose effect survives are told of
    too. A claim that denies an effect fails where the edit,
    projected so, goes `HALF` of the way to the other picture's answer.

    Edits that are the same are carried out once, however many claims have them.

    Args:
        pairs: some examples; about thirty are enough.
        edit_of: makes the edit of a claim.
        batch: pairs per forward pass.

    Raises:
        UsageError: the edit, or an answer, does not fit the pairs.
    """
    if 2 * (len(pairs) - 1) < NEIGHBOURS or any(pair.made for pair in pairs):
        gate = Gate(MANIFOLD, None, f"not tried: {NEIGHBOURS} natural states of other pairs are needed")
        return tuple(dataclasses.replace(claim, gates=(*claim.gates, gate)) for claim in claims)
    models: dict[bool, _Model] = {}

    def model(other_side: bool) -> _Model:
        if other_side not in models:
            faced = turned(pairs) if other_side else pairs
            batches = [faced[start : start + batch] for start in range(0, len(faced), batch)]
            models[other_side] = _Model(vlm, faced, batches)
        return models[other_side]

    known: dict[Any, Gate] = {}
    found = []
    for claim in claims:
        asked = edit_of(claim, pairs)
        if asked is None or isinstance(asked, str):
            gate = Gate(MANIFOLD, None, f"not tried: {asked or NO_EDIT}")
        else:
            told = asked if isinstance(asked, ClaimEdit) else ClaimEdit(asked)
            key = (told.turned, told.denied, _key(told.intervention))
            if key not in known:
                known[key] = _gate(model(told.turned), lambda some, claim=claim: _bare(edit_of(claim, some)), told)
            gate = known[key]
        found.append(dataclasses.replace(claim, gates=(*claim.gates, gate)))
    return tuple(found)


def _bare(asked: "Intervention | ClaimEdit | str | None") -> Intervention:
    edit = asked.intervention if isinstance(asked, ClaimEdit) else asked
    assert isinstance(edit, Intervention), "what there is for all pairs there is for some"
    return edit


def _key(edit: Intervention) -> Any:
    """Tells edits of the same pairs apart; edits of other kinds than cuts and swaps with prompts are all different."""
    keys: list[Any] = []
    for each in edit.flat():
        if isinstance(each, Knockout):
            keys.append(("cut", each.query, each.key, each.each_layer, each.heads, each.stream, each.keep_self))
        elif isinstance(each, Replace) and isinstance(each.source, list | tuple):
            shown = tuple((*prompt.said, *map(id, prompt.images)) for prompt in each.source)
            where = (each.sites, each.source_sites, each.span, each.source_span)
            keys.append(("swap", *where, each.heads, id(each.subspace), shown))
        else:
            keys.append(("other", id(each), each))
    return tuple(keys)


Edit = Callable[["Pairs"], Intervention]
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

    @property
    def owners(self) -> Any:
        return np.arange(len(self.pairs))

    @functools.cached_property
    def clean(self) -> dict[Site, Any]:
        """States of the last token without any edit."""
        return self.states(self.sites)

    @functools.cached_property
    def natural(self) -> dict[Site, Natural]:
        """States of the last token of both pictures of all pairs, without any edit."""
        one, other = self.clean, self.states(self.sites, of="counterfactual")
        owners = np.tile(self.owners, 2)
        return {site: Natural(np.concatenate([one[site], other[site]]), owners) for site in self.sites}

    def states(self, sites: Sequence[Site], edit: Edit | None = None, of: str = "base") -> dict[Site, Any]:
        """The states of the last position, which is the prompt's last token: batches are padded on the left."""
        found: dict[Site, list[Any]] = {site: [] for site in sites}
        for some in self.batches:
            read_now = read(self.vlm, getattr(some, of), sites, None if edit is None else edit(some))
            for site in sites:
                found[site].append(read_now[site][:, -1].float().cpu().numpy())
        return {site: np.concatenate(each) for site, each in found.items()}

    def projected(self, site: Site, states: Any) -> Any:
        """States of all pairs, put among natural ones of other pairs."""
        return self.natural[site].projected(states, self.owners)

    @functools.cached_property
    def unedited(self) -> float:
        """The lead without any edit."""
        return self.lead()

    @functools.cached_property
    def way(self) -> float:
        """How far the lead changes when the other picture is shown."""
        return self.lead(of="counterfactual") - self.unedited

    @functools.cached_property
    def put(self) -> dict[Site, float]:
        """Leads with unedited states put among natural ones, by site, as they are asked for."""
        return {}

    def lead_put(self, site: Site) -> float:
        """The lead when the unedited states of a site are put among natural ones."""
        if site not in self.put:
            self.put[site] = self.lead(put=(site, self.projected(site, self.clean[site])))
        return self.put[site]

    def lead(self, edit: Edit | None = None, put: tuple[Site, Any] | None = None, of: str = "base") -> float:
        """The mean logit difference of the answers' first tokens, where these differ; NaN where none do.

        Args:
            put: a site, and the states that the last tokens of all pairs get there after the edit.
            of: the picture that is shown; the answers stay those of the pairs' first.
        """
        leads, start = [], 0
        for some in self.batches:
            encoded, rows = self.vlm.encode(getattr(some, of)), torch.arange(len(some))
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
    """The first layer of the decoder that an edit changes."""
    found: list[int] = []
    for each in edit.flat():
        if isinstance(each, AttentionEdit):
            found.append(each.first_layer)
        elif isinstance(each, StateEdit):
            found += [site.layer or 0 if site.stream == "llm" else 0 for site in each.sites]
    return min(found, default=0)


def _gate(model: _Model, edit: Edit, asked: ClaimEdit) -> Gate:
    sites = [site for site in model.sites if (site.layer or 0) >= _first(asked.intervention)]
    states = model.states(sites, edit)
    told = {site: model.natural[site].strangeness(each, model.owners) for site, each in states.items()}
    medians = {site: (float(np.median(each.distance)), float(np.median(each.residual))) for site, each in told.items()}
    shares = {str(site.layer): float(each.beyond(STRANGE).mean()) for site, each in told.items()}
    strange = [site for site in sites if max(medians[site]) > STRANGE]
    worst = max(medians.values(), key=max)
    says = f"half of the last token's states lie farther from natural ones than {max(worst):.0f} % of these from others"
    says += f" ({100 * max(shares.values()):.0f} % of examples beyond the {STRANGE:.0f}th percentile)"
    kept: dict[str, Any] = {"percentiles": {str(site.layer): each for site, each in medians.items()}, "beyond": shares}
    if not strange:
        return Gate(MANIFOLD, True, says, kept)
    # Where they just leave, a projection changes little of what they have left for further on.
    strangest = max(strange, key=lambda site: max(medians[site]))
    moved = {
        site: moved_when_projected(model, edit, site, states[site]) for site in dict.fromkeys((strange[0], strangest))
    }
    if any(map(math.isnan, moved.values())):
        return Gate(MANIFOLD, None, f"{says}; the answers share a token, so the remaining effect is unknown", kept)
    whole = model.way if asked.denied else model.lead(edit) - model.unedited
    each = {str(site.layer): value / whole if abs(whole) > 0 else float("inf") for site, value in moved.items()}
    at, share = (max if asked.denied else min)(each.items(), key=lambda one: one[1])
    says += f"; put among their natural neighbours after block {at}, "
    if asked.denied:
        says += f"the edit goes {100 * share:.0f} % of the way to the other image's answer"
        return Gate(MANIFOLD, share < HALF, says, kept | {"way_gone_when_projected": each})
    says += f"{100 * share:.0f} % of the effect is left"
    return Gate(MANIFOLD, share >= KEPT, says, kept | {"effect_left_when_projected": each})


def moved_when_projected(model: _Model, edit: Edit, site: Site, states: Any) -> float:
    """The edit's effect on the difference of the answers' first tokens, in logits, with projected states at a site.

    A projected state is a mixture of other examples' and lowers the lead by itself, so that the effect left is counted
    from a run whose unedited states are projected as well. NaN where the answers begin with the same tokens in all
    pairs.

    Args:
        states: of the last tokens at the site under the edit.
    """
    return model.lead(edit, (site, model.projected(site, states))) - model.lead_put(site)


def share_left(model: _Model, edit: Edit, site: Site, states: Any) -> float:
    """The share of the edit's effect that `moved_when_projected` leaves."""
    return moved_when_projected(model, edit, site, states) / (model.lead(edit) - model.unedited)
