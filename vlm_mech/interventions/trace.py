"""The reference semantics: read sites, run interventions, generate - each in one nnsight trace.

This is the only file that opens a trace of its own. Work inside a trace is a list of steps sorted by when their tensor
appears in the forward pass, because nnsight gives values in that order only.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site, listed_sites
from vlm_mech.architectures.traced_model import TracedModel, check_decoder
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.interventions.attention import Cutting, cutting
from vlm_mech.interventions.batches import in_batches, joined, lengthened, padded
from vlm_mech.interventions.foreign_hooks import hooks_at
from vlm_mech.interventions.generating import check_generation, decoding_options, new_ids, told
from vlm_mech.interventions.open_traces import alone, refuse_open_trace
from vlm_mech.interventions.passed import Generation, Run
from vlm_mech.interventions.passes import Batch, Passes, prompt_pass
from vlm_mech.interventions.plan import Plan, plan
from vlm_mech.interventions.receipt import Receipt, ReceiptError, verify
from vlm_mech.interventions.specification import Activations, Intervention
from vlm_mech.interventions.timeline import Step, read_site_step, steps_of
from vlm_mech.interventions.verification import Proofs, receipts_of

Prompts = Prompt | Sequence[Prompt] | Encoded | DualEncoded
"""What a pass is over; a `DualEncoder` takes only what its `encode` made."""


def _as_encoded(vlm: TracedModel, prompts: Prompts, n_new: int = 0) -> Batch:
    """The prompts as a batch that has room for so many tokens after each."""
    refuse_open_trace(vlm)
    dual = vlm.is_contrastive
    if isinstance(prompts, DualEncoded if dual else Encoded):
        encoded = prompts
    elif dual or isinstance(prompts, DualEncoded):
        needed = "a batch made by encode(images, texts)" if dual else "prompts or a batch made of them"
        raise UsageError(f"{vlm.name} takes {needed}, not {type(prompts).__name__}")
    else:
        encoded = vlm.encode(prompts)
    if isinstance(encoded, Encoded):
        encoded.check_room(n_new)
        if encoded.answers is not None and encoded.answers.side_by_side:
            raise UsageError("these prompts are followed by several answers each; a pass is run over one")
    return encoded


def read(
    vlm: TracedModel,
    prompts: Prompts,
    sites: Site | Sequence[Site],
    intervention: Intervention | None = None,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Activations:
    """The states at the sites, each rows x pos x width.

    Args:
        intervention: what to do during the pass; states at an edited site are read after the edit.
        batch_size: prompts a forward pass; all in one by default. States are the same but for rounding, 0 at padding.
            `extract` keeps those of spans in files, which takes less memory.
        progress: whether a bar tells how many passes are done; by default in notebooks and terminals.

    Raises:
        UsageError: a layer out of range, or a vision site for prompts without images.
        ReceiptError: the intervention did not take effect.
        WorkError: a state is NaN.
    """
    chosen = listed_sites(sites, "read")
    if (parts := in_batches(vlm, prompts, intervention, batch_size, progress, "read")) is not None:
        done, whole = [read(vlm, some, chosen, edit) for some, edit in parts], vlm.encode(prompts)
        return Activations({site: joined(site, [each[site] for each in done], whole) for site in set(chosen)}, whole)
    encoded = _as_encoded(vlm, prompts)
    wanted = sorted(set(chosen), key=lambda site: site.order)
    for site in wanted:
        vlm.check_site(site)
        if site.stream != "llm" and "pixel_values" not in encoded.inputs:
            raise UsageError(f"{site} needs an image, but the prompts have none")
        if hooks := hooks_at(vlm, site):
            warnings.warn(f"{site} is read before {hooks} may change the states", stacklevel=2)
    values: dict[Site, Tensor] = {}
    reads = [read_site_step(vlm, encoded, site, values) for site in wanted]
    if intervention is None:
        _forward(vlm, encoded, reads, {}, stop=True)
    else:
        made = plan(vlm, encoded, intervention, lambda source, sites: read(vlm, source, sites))
        proofs, cuts = Proofs(vlm, encoded, made), cuttings_of(vlm, encoded, made)
        _forward(vlm, encoded, steps_of(vlm, encoded, made, proofs.seen) + reads, cuts, stop=False)
        proofs.take(prompt_pass(encoded))
        _proved(proofs, cuts, 0.0)
    for site, states in values.items():
        if states.isnan().any():
            raise WorkError(f"NaN activations at {site}")
    return Activations(values, encoded)


def _forward(
    vlm: TracedModel, encoded: Batch, steps: list[Step], cuts: dict[torch.nn.Module, Cutting], *, stop: bool
) -> Tensor | None:
    """The logits of one pass with the steps done in it; `stop`: nothing is computed after the last step."""
    out: dict[str, Tensor] = {}
    ordered, window = sorted(steps, key=lambda step: step.key), prompt_pass(encoded)

    def execute(tracer: Any) -> None:
        for step in ordered:
            step.act(window)
        if stop:
            tracer.stop()
        else:
            # nnsight sends inputs to the first weight of the model, and accelerate logits to where the inputs are.
            out["logits"] = getattr(vlm.nn.output, vlm.family.readout).to(vlm.device)

    # A single pass needs no cache of keys and values.
    options = {} if vlm.is_contrastive else {"use_cache": False}
    with torch.no_grad(), alone(vlm), cutting(cuts):
        with vlm.nn.trace(**encoded.inputs, **options) as tracer:
            execute(tracer)
    return out.get("logits")


def run(
    vlm: TracedModel,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    baseline: Run | None = None,
    apart: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Run:
    """A forward pass with the intervention, its logits and a verified receipt for every part of it.

    Args:
        batch_size: prompts a forward pass; all in one by default. Logits are the same but for rounding, 0 at padding;
            each pass has receipts of its own.
        progress: whether a bar tells how many passes are done; by default in notebooks and terminals.
        baseline: the unedited run of the same batch, if at hand; it is made when an intervention is given without it.
        apart: measure for each receipt what its edit alone does to the read-out, in one more pass each; the receipts
            have it as `own_readout_change`, beside the change by the whole pass.

    Raises:
        UsageError: the intervention does not fit the model or the batch.
        ReceiptError: it did not take effect.
        WorkError: the logits are NaN.
    """
    if (parts := in_batches(vlm, prompts, intervention, batch_size, progress, "run")) is not None:
        if baseline is not None:
            raise UsageError("a baseline is of one pass; with batch_size leave it out, and each pass makes its own")
        done, whole = [run(vlm, some, edit, apart=apart) for some, edit in parts], vlm.encode(prompts)
        receipts = tuple(receipt for each in done for receipt in each.receipts)
        return Run(padded([each.logits for each in done], whole.n_pos), whole, receipts)
    encoded = _as_encoded(vlm, prompts)
    made = plan(vlm, encoded, intervention, lambda source, sites: read(vlm, source, sites))
    if baseline is not None:
        _check_baseline(baseline, encoded)
    logits, proofs, cuts = _edited(vlm, encoded, made)
    made_run = Run(logits, encoded)
    if made_run.readout.isnan().any():
        what = " & ".join(type(part).__name__ for part in intervention.flat()) if intervention else ""
        raise WorkError(f"NaN logits{what and ' after '}{what}: the activations are broken")
    if intervention is None:
        return made_run
    baseline = baseline or run(vlm, encoded)
    moved = (made_run.readout - baseline.readout).abs().max().item()
    receipts = _proved(proofs, cuts, moved)
    if apart:
        alone = [Run(_edited(vlm, encoded, part)[0], encoded).readout for part in made.apart()]
        own = [(readout - baseline.readout).abs().max().item() for readout in alone]
        pairs = zip(receipts, own, strict=True)
        receipts = tuple(dataclasses.replace(receipt, own_readout_change=change) for receipt, change in pairs)
    return Run(logits, encoded, receipts)


def _check_baseline(baseline: Any, encoded: Batch) -> None:
    """The change that a receipt tells is that against the plain run of the same prompts."""
    if not isinstance(baseline, Run):
        raise UsageError(f"a baseline is what run(vlm, prompts) gives, not a {type(baseline).__name__}")
    if baseline.receipts:
        raise UsageError("the baseline is an edited run; give the run of the same prompts without an intervention")
    own, other = encoded.inputs, baseline.encoded.inputs
    if own.keys() != other.keys() or not all(torch.equal(own[name], other[name]) for name in own):
        raise UsageError("the baseline is a run of other prompts; give that of the prompts that are edited")


def _edited(vlm: TracedModel, encoded: Batch, made: Plan) -> tuple[Tensor, Proofs, dict[torch.nn.Module, Cutting]]:
    """The logits of one pass with all edits of a plan, and what proves them."""
    proofs, cuts = Proofs(vlm, encoded, made), cuttings_of(vlm, encoded, made)
    logits = _forward(vlm, encoded, steps_of(vlm, encoded, made, proofs.seen), cuts, stop=False)
    assert logits is not None, "the pass runs to its end"
    proofs.take(prompt_pass(encoded))
    return logits, proofs, cuts


def carry_out(
    vlm: TracedModel, encoded: Batch, made: Plan, sites: Sequence[Site] = (), *, to_the_end: bool = True
) -> tuple[dict[Site, Tensor], Tensor | None, tuple[Receipt, ...]]:
    """One pass with all edits of a plan, however many: states at the sites, logits, and the receipts, unverified.

    Args:
        to_the_end: otherwise nothing is computed after the last edit and the last of the sites, and there are no
            logits; every cut layer has to lie before.
    """
    proofs, cuts, states = Proofs(vlm, encoded, made), cuttings_of(vlm, encoded, made), dict[Site, Tensor]()
    reads = [read_site_step(vlm, encoded, site, states) for site in sites]
    steps = [*steps_of(vlm, encoded, made, proofs.seen), *reads]
    logits = _forward(vlm, encoded, steps, cuts, stop=not to_the_end)
    proofs.take(prompt_pass(encoded))
    return states, logits, receipts_of(proofs, list(cuts.values()), 0.0)


def generate(
    vlm: TracedModel,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 16,
    settings: str = "neutral",
    batch_size: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Generation:
    """Generated answers with the intervention in force, greedy unless `options` for `generate` say otherwise.

    Nothing is taken from the generation config of the checkpoint (repetition penalty, beams, sampling) but what its
    tokens mean; `settings="checkpoint"` takes it all. The settings in force are kept with the answers.

    Edits act by position, whatever the passes hold: on the prompt's positions wherever these are computed, on those of
    the span `generated` wherever a generated token is; on every row of a prompt (beams, several answers).

    Args:
        batch_size: prompts that are answered together; all by default. Greedy answers are the same.
        progress: whether a bar tells how many batches are done; by default in notebooks and terminals.

    Raises:
        UsageError: as for `run`, or prompt and `max_new_tokens` outgrow the decoder's positions.
        ReceiptError: the intervention did not take effect.
    """
    check_decoder(vlm, "generate")
    if (parts := in_batches(vlm, prompts, intervention, batch_size, progress, "generate")) is not None:
        how = options | {"max_new_tokens": max_new_tokens, "settings": settings}
        return _one_after_another(vlm, [(len(some), generate(vlm, some, edit, **how)) for some, edit in parts])
    options = decoding_options(options, settings=settings, max_new_tokens=max_new_tokens)
    encoded = _as_encoded(vlm, prompts, options["max_new_tokens"])
    if encoded.answers is not None:
        raise UsageError("these prompts have answers already; generate takes prompts alone")
    made = plan(vlm, encoded, intervention, lambda source, sites: read(vlm, source, sites), generating=True)
    copies, used = check_generation(vlm, encoded, made, options)
    passes, proofs = Passes(len(encoded), encoded.n_pos, copies), Proofs(vlm, encoded, made)
    cuts = cuttings_of(vlm, encoded, made, passes)
    with cutting(cuts):
        result, first = _generated(vlm, encoded, proofs, passes, options)
    ids = new_ids(result, encoded)
    prompts_of = tuple(row * len(encoded) // len(ids) for row in range(len(ids)))
    made_texts = tuple(text.strip() for text in vlm.processor.batch_decode(ids, skip_special_tokens=True))
    generation = Generation(made_texts, ids, (), prompts_of, used, None if isinstance(result, Tensor) else result)
    if intervention is None:
        return generation
    nothing = Proofs(vlm, encoded, Plan({}, {}))
    again = Passes(len(encoded), encoded.n_pos, copies)
    _, unedited = _generated(vlm, encoded, nothing, again, options | {"max_new_tokens": 1})
    moved = (first - unedited).abs().max().item()
    return dataclasses.replace(generation, receipts=_proved(proofs, cuts, moved))


def _one_after_another(vlm: TracedModel, done: Sequence[tuple[int, Generation]]) -> Generation:
    """The answers of several batches, each with its number of prompts, as those of one."""
    if any(each.output is not None for _, each in done):
        raise UsageError("return_dict_in_generate gives what one batch gave; leave batch_size out")
    filler = vlm.tokenizer.pad_token_id
    texts, receipts, prompts, first = [], [], [], 0
    for n, each in done:
        texts, receipts = [*texts, *each.texts], [*receipts, *each.receipts]
        prompts, first = [*prompts, *(first + number for number in each.prompts)], first + n
    ids = lengthened([each.ids for _, each in done], 0 if filler is None else filler)
    return Generation(tuple(texts), ids, tuple(receipts), tuple(prompts), done[0][1].settings)


def _generated(
    vlm: TracedModel, encoded: Batch, proofs: Proofs, passes: Passes, options: dict[str, Any]
) -> tuple[Any, Float[Tensor, "row vocab"]]:
    """What `generate` returns, and the logits of the first new token of each row."""
    first: dict[str, Tensor] = {}
    steps = steps_of(vlm, encoded, proofs.made, proofs.seen)
    before, within = ([step for step in steps if step.in_decoder == place] for place in (False, True))

    def look() -> None:
        for step in before:
            step.act(prompt_pass(encoded))

    def go_on() -> None:
        window = passes.enter(vlm.envoy(vlm.family.decoder).inputs[1])
        for step in within:
            step.act(window)
        if window.stop >= encoded.n_pos and not first:
            first["logits"] = vlm.envoy(vlm.family.head).output[:, -1]
        if window.new:
            proofs.take(window)

    with torch.no_grad(), alone(vlm), told(passes), warnings.catch_warnings():
        # An answer may end before the limit; the open loop over passes then ends early, which nnsight remarks upon.
        warnings.filterwarnings("ignore", message="(?s).*was never reached")
        with vlm.nn.generate(**options) as tracer:
            with tracer.invoke(**encoded.generation_inputs):
                look()
            with tracer.invoke():
                for _ in tracer.iter[:]:
                    go_on()
            with tracer.invoke():
                result = tracer.result.save()
    return result, first["logits"]


def cuttings_of(
    vlm: TracedModel, encoded: Batch, made: Plan, passes: Passes | None = None
) -> dict[torch.nn.Module, Cutting]:
    """The attention modules whose edges are cut, in the order of the plan.

    Args:
        passes: the passes of a generation, where it is one.
    """
    modules = {}
    for (stream, layer), cuts in made.cuts.items():
        blocks = vlm.blocks(stream)
        module = vlm.model.get_submodule(f"{blocks.path}.{layer}.{blocks.attention}")
        shape, known = encoded.shape(stream), passes if stream == "llm" else None
        modules[module] = Cutting(cuts, vlm.backend_of(stream), *shape, known)
    return modules


def _proved(proofs: Proofs, cuts: dict[torch.nn.Module, Cutting], moved: float) -> tuple[Receipt, ...]:
    receipts = receipts_of(proofs, list(cuts.values()), moved)
    try:
        verify(receipts)
    except ReceiptError as error:
        hooks = [hooks_at(proofs.vlm, site) for site in proofs.made.writes]
        if not any(hooks):
            raise
        raise ReceiptError(f"{error}: {'; '.join(filter(None, hooks))} may change the states; remove it") from error
    return receipts
