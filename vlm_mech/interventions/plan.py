"""Interventions made concrete for one batch: which cells of which tensor get which values, which edges are cut.

Everything that can be wrong with an intervention is found here, before the model runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Cells, in_order
from vlm_mech.interventions.answered import of_generated, split_generated, with_answers
from vlm_mech.interventions.attention_plan import Cut, check_heads, cuts_of, kinds_of
from vlm_mech.interventions.passes import Batch, Window
from vlm_mech.interventions.specification import (
    Ablate,
    AttentionEdit,
    Intervention,
    Replace,
    StateEdit,
    as_intervention,
)
from vlm_mech.interventions.state_plan import ReadStates, change_of, source_of, subspace_of


@dataclass(frozen=True, eq=False)
class Write:
    """An edit of one site: `change` maps the states at `cells` (cell x width) to new ones.

    Its second argument says which of the cells they are, in which order, if not plainly all. `cells` is None when only
    generated positions are edited; `generated` says whether those are edited too.
    """

    what: str
    site: Site
    cells: Cells | None
    heads: tuple[int, ...] | None
    n_heads: int
    change: Callable[..., Tensor]
    generated: bool

    @property
    def placed(self) -> Cells:
        """The cells in the prompt; none where only generated tokens are edited."""
        nowhere = torch.empty(0, dtype=torch.long)
        return Cells(nowhere, nowhere, ()) if self.cells is None else self.cells

    def acts(self, window: Window | None) -> bool:
        """Whether anything is edited in a pass of the decoder; None is the pass of a tower."""
        if window is None or window.is_prompt:
            return self.cells is not None
        return (self.generated and window.has_generated) or len(window.within(self.placed)[0]) > 0

    def apply(self, states: Float[Tensor, "rows pos width"], window: Window | None = None) -> Tensor:
        """A new tensor with the edit made; the tensor given stays as it is.

        Args:
            window: what rows and positions the states have; by default those of the cells.
        """
        states = states.clone()
        if window is None or window.is_prompt:
            chosen, rows, positions = None, self.placed.rows, self.placed.positions
        else:
            chosen, rows, positions = window.within(self.placed)
        if len(rows):
            rows, positions = rows.to(states.device), positions.to(states.device)
            states[rows, positions] = self._changed(states[rows, positions], chosen)
        if window is not None and self.generated and window.has_generated:
            new = states[:, window.generated]
            states[:, window.generated] = self._changed(new.flatten(0, 1)).view_as(new)
        return states

    def _changed(self, states: Float[Tensor, "cell width"], chosen: Tensor | None = None) -> Tensor:
        new = self.change(states, chosen).to(states.dtype)
        if self.heads is None:
            return new
        split = rearrange(states, "cell (head d_head) -> cell head d_head", head=self.n_heads).clone()
        new = rearrange(new, "cell (head d_head) -> cell head d_head", head=self.n_heads)
        split[:, list(self.heads)] = new[:, list(self.heads)]
        return rearrange(split, "cell head d_head -> cell (head d_head)")


@dataclass(frozen=True, eq=False)
class Plan:
    """All writes by site, in the order given, and all cuts by (stream, layer)."""

    writes: dict[Site, list[Write]]
    cuts: dict[tuple[str, int], list[Cut]]

    def apart(self) -> "list[Plan]":
        """A plan for each edited site and each layer's cut or reweighed edges alone, in the order of their receipts."""
        sites = sorted(self.writes, key=lambda site: site.order)
        cuts = [(layer, each) for layer in sorted(self.cuts) for each in kinds_of(self.cuts[layer]) if each]
        return [Plan({site: self.writes[site]}, {}) for site in sites] + [
            Plan({}, {layer: each}) for layer, each in cuts
        ]


def plan(
    vlm: TracedModel, encoded: Batch, intervention: Intervention | None, read: ReadStates, *, generating: bool = False
) -> Plan:
    """The concrete edits of an intervention on this batch.

    Args:
        read: reads states of a batch, for sources and references given as prompts.
        generating: whether there will be generated tokens to edit.

    Raises:
        UsageError: a layer or head out of range, an empty span, a source of another length or with NaN, an attention
            back end that takes no mask.
    """
    made = Plan({}, {})
    given = None if intervention is None else with_answers(vlm, encoded, as_intervention(intervention))
    for part in () if given is None else given.flat():
        if generating:
            part = of_generated(part)
        if isinstance(part, AttentionEdit):
            for cut in cuts_of(vlm, encoded, part, generating=generating):
                made.cuts.setdefault((cut.stream, cut.layer), []).append(cut)
        elif isinstance(part, StateEdit):
            for write in _writes(vlm, encoded, part, read):
                made.writes.setdefault(write.site, []).append(write)
        else:
            raise UsageError(f"{type(part).__name__} is not an intervention; Replace and Knockout are, for example")
    edits = [each for several in (*made.writes.values(), *made.cuts.values()) for each in several]
    if not generating and any(each.generated for each in edits):
        raise UsageError("generated tokens are edited by generate alone; a pass over prompts has none")
    return made


def _writes(vlm: TracedModel, encoded: Batch, part: StateEdit, read: ReadStates) -> list[Write]:
    span, generated = split_generated(part.span)
    if generated and (isinstance(part, Replace) or (isinstance(part, Ablate) and part.to == "resample")):
        raise UsageError(f"{type(part).__name__} has no states to put at generated tokens; use Ablate or Steer there")
    part.check(vlm)
    for site in part.sites:
        if generated and site.stream != "llm":
            raise UsageError(f"generated tokens do not pass through {site}")
        check_heads(part.heads, vlm.n_heads(site.stream), str(site))
    source = source_of(vlm, part, encoded, read)
    subspace = subspace_of(vlm, part)
    writes = []
    for site, other in zip(part.sites, part.source_sites, strict=True):
        ordered = isinstance(part, Replace) and part.source_span is not None and in_order(part.span, part.source_span)
        cells = None if span is None else encoded.cells(span, place=site.place, ordered=ordered)
        change = change_of(vlm, part, (site, other), cells, encoded, source, subspace)
        n_heads = vlm.n_heads(site.stream)
        writes.append(Write(type(part).__name__, site, cells, part.heads, n_heads, change, generated))
    return writes
