"""One path patched in three passes, and the table of many senders for one receiver."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.data.pairs import Pairs, check_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.head_inputs import HeadInput, read_head_inputs, run_with_head_inputs
from vlm_mech.interventions.receipt import Receipt, add_up, summarise
from vlm_mech.interventions.specification import Activations, Intervention, Replace
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.path_patching.data import (
    Mlps,
    Receiver,
    Sender,
    as_receivers,
    as_senders,
    check_paths,
    elsewhere,
    n_blocks_before,
    path_edit,
)
from vlm_mech.methods.path_patching.figures import drawn
from vlm_mech.methods.path_patching.findings import findings
from vlm_mech.results import metrics
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.engine import engine_of

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

LEAD = Metric(
    "logit_diff", "logits", "how far the answer's first token is ahead of the counterfactual answer's", signed=True
)


@dataclass(frozen=True, eq=False)
class PathRun:
    """What a patched path gives: logits batch x pos x vocab, what each receiver was given, and the receipts.

    `received` are states batch x pos x d_model of a residual stream, and batch x head x pos x d_head of inputs of heads
    (by group where heads share keys and values).
    """

    logits: Float[Tensor, "batch pos vocab"]
    received: dict[Receiver, Tensor]
    receipts: tuple[Receipt, ...]

    @property
    def last(self) -> Float[Tensor, "batch vocab"]:
        """Logits of the next token after the prompt."""
        return self.logits[:, -1]


def path_patch(
    vlm: "VLM",
    prompts: Encoded | Sequence[Prompt],
    donor: Encoded | Sequence[Prompt],
    senders: Sender | Sequence[Sender],
    receivers: Receiver | Sequence[Receiver],
    *,
    mlps: Mlps = "recompute",
    span: Span = "all",
    at: Span = "all",
) -> PathRun:
    """Path patching (Goldowsky-Dill et al. 2023; Wang et al. 2023): what senders tell receivers directly.

    Three passes: (a) both inputs are run; (b) the prompts again with the senders' outputs of the donor, *all other
    heads* of the blocks between held at the prompts' own, in which what receivers are given is kept; (c) the prompts
    again with nothing but these inputs of the receivers replaced.

    Args:
        donor: prompts whose tokens stand at the same positions, such as those with the counterfactual picture.
        senders: one head or several, which send together.
        receivers: the input of a block or the end of the last (`Site`), or queries, keys and values of heads.
        mlps: "recompute" lets MLPs between answer to the senders, "freeze" holds them too: the direct way alone.
        span: positions at which senders send.
        at: positions at which receivers receive.

    Raises:
        UsageError: no path leads from a sender to the receivers, or the donor's prompts are laid out otherwise.
        ReceiptError: an edit did not take effect.
    """
    check_decoder(vlm, "path_patch")
    own, other = (each if isinstance(each, Encoded) else vlm.encode(list(each)) for each in (prompts, donor))
    if own.answers is not None or other.answers is not None:
        raise UsageError("paths are patched in prompts; these have answers after them")
    return _Paths(vlm, own, other, mlps, span, at).patched(as_senders(senders), as_receivers(vlm, receivers))


@dataclass(eq=False)
class _Paths:
    """Paths over one batch; states of both inputs are read once."""

    vlm: "VLM"
    encoded: Encoded
    donor: Encoded
    mlps: Mlps
    span: Span
    at: Span
    known: dict[str, Activations] = dataclasses.field(default_factory=dict)

    def states(self, stop: int) -> tuple[Activations, Activations]:
        """Heads' and MLPs' outputs of both inputs before a block."""
        sites = [Site(f"llm.{point}", layer) for layer in range(stop) for point in ("head_out", "mlp_out")]
        for name, each in (("own", self.encoded), ("donor", self.donor)):
            if name not in self.known or not set(sites) <= set(self.known[name].values):
                self.known[name] = read(self.vlm, each, sites)
        return self.known["own"], self.known["donor"]

    def opened(self, senders: Sequence[Sender], stop: int) -> Intervention:
        """The edit that opens the paths from some senders alone."""
        own, donor = self.states(stop)
        return path_edit(senders, stop, own=own, donor=donor, span=self.span, mlps=self.mlps)

    def patched(self, senders: Sequence[Sender], receivers: tuple[Receiver, ...]) -> PathRun:
        """The three passes, the first of which is shared by all paths."""
        check_paths(self.vlm, senders, receivers)
        edit = self.opened(senders, n_blocks_before(receivers))
        heads = [each for each in receivers if isinstance(each, HeadInput)]
        if heads:
            found = read_head_inputs(self.vlm, self.encoded, heads, edit)
            logits, receipts = run_with_head_inputs(self.vlm, self.encoded, found, self.encoded.cells(self.at))
            return PathRun(logits, dict(found), receipts)
        (site,) = (each for each in receivers if isinstance(each, Site))
        states = read(self.vlm, self.encoded, site, edit)
        done = run(self.vlm, self.encoded, Replace(site, self.at, source=states))
        return PathRun(done.logits, {site: states[site]}, done.receipts)

    def in_one_pass(self, senders: Sequence[Sender], site: Site) -> Intervention:
        """The edit that does in one pass what three do where the receiver is a residual stream.

        What is not received is put back at the receiver, and nothing is held after it.
        """
        edit, left = self.opened(senders, n_blocks_before([site])), elsewhere(self.encoded, self.at)
        if left is None:
            return edit
        return edit & Replace(site, left, source=read(self.vlm, self.encoded, site))


def path_patching(
    vlm: "VLM",
    pairs: Pairs,
    receivers: Receiver | Sequence[Receiver],
    *,
    senders: Sequence[Sender] = (),
    mlps: Mlps = "recompute",
    span: Span = "all",
    at: Span = "all",
    batch: int = 8,
    engine: str = "fast",
) -> Result:
    """The path from each of many heads to the same receivers on every pair, sent by the counterfactual.

    Where the receiver is a residual stream, all senders run together in the sweep engine (what is received is put into
    the very pass that sends); queries, keys and values of heads take two passes a sender.

    Args:
        receivers: as for `path_patch`.
        senders: heads, one path each; all heads before the receivers by default.
        mlps, span, at: as for `path_patch`.
        batch: pairs per forward pass.
        engine: `fast`, or `trace` for one whole pass a sender; for residual streams.

    Returns:
        A row per pair, `layer` and `head` of the sender, with `logit_diff` between the two answers' first tokens and
        that of the unedited run next to it.

    Raises:
        UsageError: as for `path_patch`, or both answers of a pair begin with the same token.
    """
    check_decoder(vlm, "path_patching")
    check_pairs(pairs, "path_patching")
    if batch < 1:
        raise UsageError(f"batch is {batch}; at least 1 is needed")
    chosen = as_receivers(vlm, receivers)
    layers, heads = range(n_blocks_before(chosen)), range(vlm.n_heads("llm"))
    listed = as_senders(senders or [Sender(layer, head) for layer in layers for head in heads])
    check_paths(vlm, listed, chosen)
    how = {"mlps": mlps, "span": span, "at": at}
    parts = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    done = [_of_batch(vlm, some, listed, chosen, how, engine) for some in parts]
    table = pd.concat([rows for rows, _ in done], ignore_index=True)
    provenance = {"model": vlm.identity(), "engine": engine, "receipts": add_up([notes for _, notes in done])}
    provenance |= {"receivers": [str(each) for each in chosen], "mlps": mlps, PLOT: drawn_by(drawn)}
    result = Result("path_patching", table, ("layer", "head"), (LEAD,), provenance=provenance)
    return dataclasses.replace(result, findings=findings(result))


def _of_batch(
    vlm: "VLM", pairs: Pairs, senders: Sequence[Sender], receivers: tuple[Receiver, ...], how: Any, engine: str
) -> tuple[pd.DataFrame, dict[str, float | int]]:
    encoded = vlm.encode(pairs.base)
    paths = _Paths(vlm, encoded, vlm.encode(pairs.counterfactual), **how)
    ids = [vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer)]
    if isinstance(receivers[0], Site):
        made, site = engine_of(vlm, encoded, engine), receivers[0]
        logits, proofs = made.answers([paths.in_one_pass([each], site) for each in senders])
        clean = made.baseline
    else:
        runs = [paths.patched([each], receivers) for each in senders]
        logits, proofs = torch.stack([each.last for each in runs]), [each.receipts for each in runs]
        clean = run(vlm, encoded).last
    baseline = metrics.logit_diff(clean, *ids).tolist()
    rows = [
        {
            "example": pair.id,
            "layer": sender.layer,
            "head": sender.head,
            LEAD.name: value,
            f"{LEAD.name}_baseline": before,
        }
        for sender, each in zip(senders, logits, strict=True)
        for pair, value, before in zip(pairs, metrics.logit_diff(each, *ids).tolist(), baseline, strict=True)
    ]
    return pd.DataFrame(rows), summarise([receipt for proof in proofs for receipt in proof])
