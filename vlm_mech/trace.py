"""The reference semantics: read sites, run interventions, generate - each in one nnsight trace.

This is the only file that opens a trace of its own. Work inside a trace is a list of steps sorted by when their tensor
appears in the forward pass, because nnsight gives values in that order only.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.attention import Cutting, cutting
from vlm_mech.edit import Plan, plan
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.intervene import Activations, Intervention
from vlm_mech.prompt import Encoded, Prompt
from vlm_mech.proof import receipts_of
from vlm_mech.receipt import Receipt, verify
from vlm_mech.site import Site
from vlm_mech.step import Seen, Step, read_site_step, steps_of

if TYPE_CHECKING:
    from vlm_mech.model import VLM

Prompts = Prompt | Sequence[Prompt] | Encoded


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass: logits batch x pos x vocab, the batch, and the receipts of what was done."""

    logits: Float[Tensor, "batch pos vocab"]
    encoded: Encoded
    receipts: tuple[Receipt, ...] = ()

    @property
    def last(self) -> Float[Tensor, "batch vocab"]:
        """Logits of the next token after the prompt."""
        return self.logits[:, -1]


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated answers: texts without special tokens, ids batch x new, and the receipts."""

    texts: tuple[str, ...]
    ids: Int[Tensor, "batch new"]
    receipts: tuple[Receipt, ...] = ()


def _as_encoded(vlm: "VLM", prompts: Prompts) -> Encoded:
    return prompts if isinstance(prompts, Encoded) else vlm.encode(prompts)


def read(
    vlm: "VLM", prompts: Prompts, sites: Site | Sequence[Site], intervention: Intervention | None = None
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
    vlm: "VLM", encoded: Encoded, steps: list[Step], cuts: dict[torch.nn.Module, Cutting], *, stop: bool
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
            out["logits"] = vlm.nn.output.logits

    with torch.no_grad(), _in_order(vlm), cutting(cuts):
        with vlm.nn.trace(**encoded.inputs) as tracer:
            execute(tracer)
    return out.get("logits")


def run(vlm: "VLM", prompts: Prompts, intervention: Intervention | None = None, *, baseline: Run | None = None) -> Run:
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
    if logits[:, -1].isnan().any():
        raise WorkError(
            f"NaN logits{' after ' + str(intervention) if intervention else ''}: the activations are broken"
        )
    if intervention is None:
        return Run(logits, encoded)
    baseline = baseline or run(vlm, encoded)
    moved = (logits[:, -1] - baseline.last).abs().max().item()
    return Run(logits, encoded, _proved(vlm, encoded, made, seen, cuts, moved))


def generate(
    vlm: "VLM", prompts: Prompts, intervention: Intervention | None = None, *, max_new_tokens: int = 16, **options: Any
) -> Generation:
    """Generated answers with the intervention in force, greedy unless `options` for `generate` say otherwise.

    Edits of prompt positions act in the pass over the prompt; those of the span `generated` in every later pass.

    Raises:
        UsageError: as for `run`.
        ReceiptError: the intervention did not take effect.
    """
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


def _generated(
    vlm: "VLM", encoded: Encoded, steps: list[Step], options: dict[str, Any]
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


@contextlib.contextmanager
def _in_order(vlm: "VLM") -> Iterator[None]:
    from nnsight.intervention.interleaver import OutOfOrderError

    try:
        yield
    except OutOfOrderError as error:
        raise WorkError(f"{vlm.name} does not compute its parts in the order of their names: {error}") from error


def _cuts(vlm: "VLM", encoded: Encoded, made: Plan) -> dict[torch.nn.Module, Cutting]:
    """The attention modules whose edges are cut."""
    modules = {}
    for (stream, layer), cuts in made.cuts.items():
        blocks = vlm.blocks(stream)
        module = vlm.model.get_submodule(f"{blocks.path}.{layer}.{blocks.attention}")
        modules[module] = Cutting(cuts, vlm.backend_of(stream), *encoded.shape(stream))
    return modules


def _proved(
    vlm: "VLM",
    encoded: Encoded,
    made: Plan,
    seen: Seen,
    cuts: dict[torch.nn.Module, Cutting],
    moved: float,
) -> tuple[Receipt, ...]:
    receipts = receipts_of(vlm, encoded, made, seen, list(cuts.values()), moved)
    verify(receipts)
    return receipts
