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

from vlm_mech.attention import audited
from vlm_mech.edit import Plan, plan
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.intervene import Activations, Intervention
from vlm_mech.prompt import Encoded, Prompt
from vlm_mech.proof import receipts_of
from vlm_mech.receipt import Receipt, verify
from vlm_mech.site import Site
from vlm_mech.step import Seen, Step, steps_of

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


def read(vlm: "VLM", prompts: Prompts, sites: Site | Sequence[Site]) -> Activations:
    """The states at the sites in one unedited forward pass, each batch x pos x width.

    Raises:
        UsageError: a layer out of range, or a vision site for prompts without images.
        WorkError: a state is NaN.
    """
    encoded = _as_encoded(vlm, prompts)
    wanted = sorted({sites} if isinstance(sites, Site) else set(sites), key=lambda site: site.order)
    for site in wanted:
        vlm.check_site(site)
        if site.stream != "llm" and "pixel_values" not in encoded.inputs:
            raise UsageError(f"{site} needs an image, but the prompts have none")
    values: dict[Site, Tensor] = {}

    def collect() -> None:
        for site in wanted:
            values[site] = vlm.site(site.name, site.layer).output.detach().clone()

    with torch.no_grad(), _in_order(vlm):
        with vlm.nn.trace(**encoded.inputs):
            collect()
    for site, states in values.items():
        if states.isnan().any():
            raise WorkError(f"NaN activations at {site}")
    return Activations(values, encoded)


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
    seen, out = Seen(), {}
    steps = steps_of(vlm, made, seen)

    def execute() -> None:
        for step in steps:
            step.act(True)
        out["logits"] = vlm.nn.output.logits

    with torch.no_grad(), _in_order(vlm), audited(_audit(vlm, made)) as calls:
        with vlm.nn.trace(**encoded.inputs):
            execute()
    logits = out["logits"]
    if logits[:, -1].isnan().any():
        raise WorkError(
            f"NaN logits{' after ' + str(intervention) if intervention else ''}: the activations are broken"
        )
    if intervention is None:
        return Run(logits, encoded)
    baseline = baseline or run(vlm, encoded)
    moved = (logits[:, -1] - baseline.last).abs().max().item()
    return Run(logits, encoded, _proved(vlm, encoded, made, seen, calls, moved))


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
    steps = steps_of(vlm, made, seen)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
    with audited(_audit(vlm, made)) as calls:
        ids, first = _generated(vlm, encoded, steps, options)
    texts = tuple(text.strip() for text in vlm.processor.batch_decode(ids, skip_special_tokens=True))
    if intervention is None:
        return Generation(texts, ids)
    _, unedited = _generated(vlm, encoded, [], options | {"max_new_tokens": 1})
    moved = (first - unedited).abs().max().item()
    return Generation(texts, ids, _proved(vlm, encoded, made, seen, calls, moved))


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
            with tracer.invoke(**encoded.inputs):
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


def _audit(vlm: "VLM", made: Plan) -> dict[torch.nn.Module, tuple[str, int]]:
    """The attention modules whose edges are cut."""
    modules = {}
    for stream, layer in made.cuts:
        blocks = vlm.blocks(stream)
        modules[vlm.model.get_submodule(f"{blocks.path}.{layer}.{blocks.attention}")] = (stream, layer)
    return modules


def _proved(
    vlm: "VLM", encoded: Encoded, made: Plan, seen: Seen, calls: dict[Any, Any], moved: float
) -> tuple[Receipt, ...]:
    receipts = receipts_of(vlm, encoded, made, seen, calls, moved)
    verify(receipts)
    return receipts
