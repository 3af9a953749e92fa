"""Senders and receivers of paths, and the edits that open one path alone."""

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Each, Positions, Span
from vlm_mech.interventions.head_inputs import HeadInput, check_head_inputs
from vlm_mech.interventions.specification import Intervention, Replace, Source
from vlm_mech.sweeps.asked import check_once

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

MLPS = ("recompute", "freeze")
Mlps = Literal["recompute", "freeze"]
Receiver = Site | HeadInput
"""What is at the end of a path: the residual stream before a block (or at the end), or inputs of heads."""


@dataclass(frozen=True)
class Sender:
    """A head of the decoder whose output comes from the other run."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


def as_senders(given: object) -> tuple[Sender, ...]:
    """One sender or several.

    Raises:
        UsageError: there is none, one stands twice, or something else.
    """
    listed = (given,) if isinstance(given, Sender) else tuple(given) if isinstance(given, Iterable) else ()
    if not listed or not all(isinstance(each, Sender) for each in listed):
        raise UsageError("senders are heads, such as Sender(layer=2, head=1); at least one is needed")
    check_once(list(map(str, listed)), "the sender")
    return cast(tuple[Sender, ...], listed)


def as_receivers(vlm: "VLM", given: object) -> tuple[Receiver, ...]:
    """The residual stream at one place, or inputs of heads, one or several.

    Raises:
        UsageError: another site, several residual streams, or both kinds.
    """
    listed = (given,) if isinstance(given, Site | HeadInput) else tuple(given) if isinstance(given, Iterable) else ()
    heads = tuple(each for each in listed if isinstance(each, HeadInput))
    if listed and len(heads) == len(listed):
        check_head_inputs(vlm, heads)
        return heads
    last = Site("llm.resid_post", vlm.n_layers("llm") - 1)
    if (
        len(listed) != 1
        or not isinstance(listed[0], Site)
        or not (listed[0].name == "llm.resid_pre" or listed[0] == last)
    ):
        raise UsageError(
            f"a receiver is the input of a block, Site('llm.resid_pre', layer), the end of the last one, {last!r}, or "
            "inputs of heads, HeadInput('q', layer, heads); of inputs of heads there may be several"
        )
    vlm.check_site(listed[0])
    return (listed[0],)


def n_blocks_before(receivers: Sequence[Receiver]) -> int:
    """How many blocks come before the last of the receivers."""
    return max((each.layer or 0) + (isinstance(each, Site) and each.point == "resid_post") for each in receivers)


def check_paths(vlm: "VLM", senders: Sequence[Sender], receivers: Sequence[Receiver]) -> None:
    """Raise `UsageError` for a head that is not there, or one from which no path leads to a receiver."""
    stop = n_blocks_before(receivers)
    for each in senders:
        vlm.check_site(Site("llm.head_out", each.layer))
        if not 0 <= each.head < vlm.n_heads("llm"):
            raise UsageError(f"head {each.head} of {each} is out of range: heads are 0..{vlm.n_heads('llm') - 1}")
        if each.layer >= stop:
            raise UsageError(f"no path leads from {each} to {receivers[-1]}, which comes before")


def path_edit(
    senders: Sequence[Sender], stop: int, *, own: Source, donor: Source, span: Span, mlps: Mlps
) -> Intervention:
    """Senders from the donor's run; all other heads of blocks from the first sender's on, before block `stop`, held.

    Args:
        own: the run that is patched, from which held heads (and MLPs) take their output.
        span: positions at which senders are replaced.
    """
    if mlps not in MLPS:
        raise UsageError(f"mlps={mlps!r} is not known; use recompute or freeze")
    first = min(each.layer for each in senders)
    parts: list[Intervention] = []
    for layer in range(first, stop):
        site = Site("llm.head_out", layer)
        if layer > first:
            parts.append(Replace(site, "all", source=own))
        heads = tuple(sorted({each.head for each in senders if each.layer == layer}))
        if heads:
            parts.append(Replace(site, span, heads=heads, source=donor))
        if mlps == "freeze":
            parts.append(Replace(Site("llm.mlp_out", layer), "all", source=own))
    return functools.reduce(operator.and_, parts)


def elsewhere(encoded: Encoded, span: Span) -> Span | None:
    """All positions of each example but those of a span; None where it is everything.

    Raises:
        UsageError: the span is everything in some examples only.
    """
    everything, chosen = encoded.cells("all").by_row, encoded.cells(span).by_row
    left = [tuple(each for each in everything[row] if each not in set(chosen[row])) for row in range(len(encoded))]
    if not any(left):
        return None
    if not all(left):
        raise UsageError(f"span {span!r} is the whole prompt in some examples only")
    return Each(tuple(Positions(each) for each in left))
