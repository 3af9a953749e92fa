"""The reference semantics: read sites, run interventions, generate - each in one nnsight trace.

This is the only file that opens a trace of its own. Work inside a trace is a list of steps sorted by when their tensor
appears in the forward pass, because nnsight gives values in that order only.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.interventions.attention import Cutting, cutting, own_attention
from vlm_mech.interventions.plan import Batch, Plan, plan
from vlm_mech.interventions.receipt import Receipt, verify
from vlm_mech.interventions.specification import Activations, Intervention
from vlm_mech.interventions.timeline import Seen, Step, decoder_inputs_key, read_site_step, steps_of
from vlm_mech.interventions.verification import receipts_of

Prompts = Prompt | Sequence[Prompt] | Encoded | DualEncoded
"""What a pass is over; a `DualEncoder` takes only what its `encode` made."""


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass: its logits, the batch, and the receipts of what was done.

    Logits are batch x pos x vocab, those of a `DualEncoder` the similarities of images x texts.
    """

    logits: Float[Tensor, "batch pos vocab"] | Float[Tensor, "image text"]
    encoded: Encoded | DualEncoded
    receipts: tuple[Receipt, ...] = ()

    @property
    def last(self) -> Float[Tensor, "batch vocab"]:
        """Logits of the next token after the prompt.

        Raises:
            UsageError: the model is a contrastive one, which has none.
        """
        if self.logits.ndim == 2:
            raise UsageError("similarities of images and texts have no last token; use run(...).logits")
        return self.logits[:, -1]

    @property
    def readout(self) -> Tensor:
        """What interventions are judged by: the last position's logits, or all similarities."""
        return self.logits if self.logits.ndim == 2 else self.last


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated answers: texts without special tokens, ids batch x new, and the receipts."""

    texts: tuple[str, ...]
    ids: Int[Tensor, "batch new"]
    receipts: tuple[Receipt, ...] = ()


def refuse_open_trace(vlm: TracedModel) -> None:
    """Raise `UsageError` within a trace of the model: what opens one of its own cannot run there."""
    if vlm.nn.interleaver.interleaving:
        raise UsageError(
            f"a trace of {vlm.name} is open; run, read, generate and sweep open one of their own, so call them before "
            "or after the `with` block"
        )


def _as_encoded(vlm: TracedModel, prompts: Prompts) -> Batch:
    refuse_open_trace(vlm)
    dual = vlm.is_contrastive
    if isinstance(prompts, DualEncoded if dual else Encoded):
        return prompts
    if dual or isinstance(prompts, DualEncoded):
        needed = "a batch made by encode(images, texts)" if dual else "prompts or a batch made of them"
        raise UsageError(f"{vlm.name} takes {needed}, not {type(prompts).__name__}")
    return vlm.encode(prompts)


def read(
    vlm: TracedModel, prompts: Prompts, sites: Site | Sequence[Site], intervention: Intervention | None = None
) -> Activations:
    """The states at the sites in one forward pass, each rows x pos x width.

    Args:
        intervention: what to do during the pass; states at an edited site are read after the edit.

    Raises:
        UsageError: a layer out of range, or a vision site for prompts without images.
        ReceiptError: the intervention did not take effect.
        WorkError: a state is NaN.
    """
    encoded = _as_encoded(vlm, prompts)
    wanted = sorted({sites} if isinstance(sites, Site) else set(sites), key=lambda site: site.order)
    for site in wanted:
        vlm.check_site(site)
        if site.stream != "llm" and "pixel_values" not in encoded.inputs:
            raise UsageError(f"{site} needs an image, but the prompts have none")
    values: dict[Site, Tensor] = {}
    reads = [read_site_step(vlm, encoded, site, values) for site in wanted]
    if intervention is None:
        _forward(vlm, encoded, reads, {}, stop=True)
    else:
        made = plan(vlm, encoded, intervention, lambda source, sites: read(vlm, source, sites))
        seen, cuts = Seen(), _cuts(vlm, encoded, made)
        _forward(vlm, encoded, steps_of(vlm, encoded, made, seen) + reads, cuts, stop=False)
        _proved(vlm, encoded, made, seen, cuts, 0.0)
    for site, states in values.items():
        if states.isnan().any():
            raise WorkError(f"NaN activations at {site}")
    return Activations(values, encoded)


def _forward(
    vlm: TracedModel, encoded: Batch, steps: list[Step], cuts: dict[torch.nn.Module, Cutting], *, stop: bool
) -> Tensor | None:
    """The logits of one pass with the steps done in it; `stop`: nothing is computed after the last step."""
    out: dict[str, Tensor] = {}
    ordered = sorted(steps, key=lambda step: step.key)

    def execute(tracer: Any) -> None:
        for step in ordered:
            step.act(True)
        if stop:
            tracer.stop()
        else:
            out["logits"] = getattr(vlm.nn.output, vlm.family.readout)

    # A single pass needs no cache of keys and values.
    options = {} if vlm.is_contrastive else {"use_cache": False}
    with torch.no_grad(), _in_order(vlm), cutting(cuts):
        with vlm.nn.trace(**encoded.inputs, **options) as tracer:
            execute(tracer)
    return out.get("logits")


def run(
    vlm: TracedModel, prompts: Prompts, intervention: Intervention | None = None, *, baseline: Run | None = None
) -> Run:
    """One forward pass with the intervention, its logits and a verified receipt for every part of it.

    Args:
        baseline: the unedited run of the same batch, if at hand; it is made when an intervention is given without it.

    Raises:
        UsageError: the intervention does not fit the model or the batch.
        ReceiptError: it did not take effect.
        WorkError: the logits are NaN.
    """
    encoded = _as_encoded(vlm, prompts)
    made = plan(vlm, encoded, intervention, lambda source, sites: read(vlm, source, sites))
    seen, cuts = Seen(), _cuts(vlm, encoded, made)
    logits = _forward(vlm, encoded, steps_of(vlm, encoded, made, seen), cuts, stop=False)
    made_run = Run(logits, encoded)
    if made_run.readout.isnan().any():
        raise WorkError(
            f"NaN logits{' after ' + str(intervention) if intervention else ''}: the activations are broken"
        )
    if intervention is None:
        return made_run
    baseline = baseline or run(vlm, encoded)
    moved = (made_run.readout - baseline.readout).abs().max().item()
    return Run(logits, encoded, _proved(vlm, encoded, made, seen, cuts, moved))


def generate(
    vlm: TracedModel,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 16,
    **options: Any,
) -> Generation:
    """Generated answers with the intervention in force, greedy unless `options` for `generate` say otherwise.

    Edits of prompt positions act in the pass over the prompt; those of the span `generated` in every later pass.

    Raises:
        UsageError: as for `run`.
        ReceiptError: the intervention did not take effect.
    """
    if vlm.is_contrastive:
        raise UsageError(f"{vlm.name} is a contrastive model, which generates nothing")
    encoded = _as_encoded(vlm, prompts)
    made = plan(vlm, encoded, intervention, lambda source, sites: read(vlm, source, sites))
    seen = Seen()
    steps = steps_of(vlm, encoded, made, seen)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
    cuts = _cuts(vlm, encoded, made)
    with cutting(cuts):
        ids, first = _generated(vlm, encoded, steps, options)
    texts = tuple(text.strip() for text in vlm.processor.batch_decode(ids, skip_special_tokens=True))
    if intervention is None:
        return Generation(texts, ids)
    _, unedited = _generated(vlm, encoded, [], options | {"max_new_tokens": 1})
    moved = (first - unedited).abs().max().item()
    return Generation(texts, ids, _proved(vlm, encoded, made, seen, cuts, moved))


@contextlib.contextmanager
def aside(vlm: TracedModel) -> Iterator[None]:
    """Within the block the model runs as if nobody traced it: no intervention acts, and no pass of it is counted.

    For what runs the model a second time while an answer is generated, such as a logits processor.
    """
    interleaver = vlm.nn.interleaver
    before = interleaver.interleaving
    interleaver.interleaving = False
    try:
        with own_attention():
            yield
    finally:
        interleaver.interleaving = before


def _generated(
    vlm: TracedModel, encoded: Batch, steps: list[Step], options: dict[str, Any]
) -> tuple[Int[Tensor, "batch new"], Float[Tensor, "batch vocab"]]:
    """New token ids, and the logits of the first of them."""
    first: dict[str, Tensor] = {}

    def execute(number: int) -> None:
        for step in steps:
            if number == 0 or step.decoding:
                step.act(number == 0)
        if number == 0:
            first["logits"] = vlm.envoy(vlm.family.head).output[:, -1]

    passes = slice(None) if any(step.decoding for step in steps) else slice(1)
    with torch.no_grad(), _in_order(vlm), warnings.catch_warnings():
        # An answer may end before the limit; the open loop over passes then ends early, which nnsight remarks upon.
        warnings.filterwarnings("ignore", message="(?s).*was never reached")
        with vlm.nn.generate(**options) as tracer:
            with tracer.invoke(**encoded.generation_inputs):
                for number in tracer.iter[passes]:
                    execute(number)
            with tracer.invoke():
                result = tracer.result.save()
    return result[:, encoded.n_pos :], first["logits"]


def edited_embeddings(
    vlm: TracedModel, encoded: Batch, made: Plan
) -> tuple[Float[Tensor, "batch pos d_model"], list[Tensor], tuple[Receipt, ...]]:
    """What the first decoder block receives when tower or projector are edited; no block of the decoder is run.

    Returns:
        The states, the features that the model adds after the first blocks (deepstack), and the receipts, unverified.
    """
    site = Site("llm.resid_pre", 0)
    seen, cuts, states, added = Seen(), _cuts(vlm, encoded, made), {}, []

    def keep(prompt: bool) -> None:
        added.extend(vlm.envoy(vlm.family.decoder).inputs[1]["deepstack_visual_embeds"])

    steps = [*steps_of(vlm, encoded, made, seen), read_site_step(vlm, encoded, site, states)]
    if vlm.taps:
        steps.append(Step(decoder_inputs_key(), keep, False))
    _forward(vlm, encoded, steps, cuts, stop=True)
    receipts = receipts_of(vlm, encoded, made, seen, list(cuts.values()), 0.0)
    return states[site], added, receipts


@contextlib.contextmanager
def _in_order(vlm: TracedModel) -> Iterator[None]:
    from nnsight.intervention.interleaver import OutOfOrderError

    try:
        yield
    except OutOfOrderError as error:
        raise WorkError(f"{vlm.name} does not compute its parts in the order of their names: {error}") from error


def _cuts(vlm: TracedModel, encoded: Batch, made: Plan) -> dict[torch.nn.Module, Cutting]:
    """The attention modules whose edges are cut."""
    modules = {}
    for (stream, layer), cuts in made.cuts.items():
        blocks = vlm.blocks(stream)
        module = vlm.model.get_submodule(f"{blocks.path}.{layer}.{blocks.attention}")
        modules[module] = Cutting(cuts, vlm.backend_of(stream), *encoded.shape(stream))
    return modules


def _proved(
    vlm: TracedModel,
    encoded: Batch,
    made: Plan,
    seen: Seen,
    cuts: dict[torch.nn.Module, Cutting],
    moved: float,
) -> tuple[Receipt, ...]:
    receipts = receipts_of(vlm, encoded, made, seen, list(cuts.values()), moved)
    verify(receipts)
    return receipts
