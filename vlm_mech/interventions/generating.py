"""How answers are generated: settings that are in force, and those under which edits cannot be placed."""

import inspect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.plan import Plan

MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


def check_generation(vlm: TracedModel, encoded: Encoded, made: Plan, options: dict[str, Any]) -> int:
    """How many rows each prompt has in the passes of `generate` with these options.

    Raises:
        UsageError: the options are wrong, or with them it is not known what to edit in a pass.
    """
    given = [name for name in ("inputs", "inputs_embeds", "past_key_values", *encoded.inputs) if name in options]
    if given:
        raise UsageError(f"{given[0]!r} is given by the prompts, not as an option of generate")
    config = in_force(vlm, options)
    mode = str(config.get_generation_mode(options.get("assistant_model")).value)
    if mode not in MODES or options.get("custom_generate") is not None:
        named = "custom_generate" if mode in MODES else mode
        raise UsageError(f"generate with {named} is not supported; {', '.join(MODES)} are")
    if config.guidance_scale not in (None, 1):
        raise UsageError("guidance_scale runs the model beside the traced passes; leave it out")
    _check_chunks(vlm, encoded, config)
    copies = max(config.num_beams, config.num_return_sequences)
    at_tower = [site for site in made.writes if site.stream != "llm"] or [cut for cut in made.cuts if cut[0] != "llm"]
    once = "mm_encoder_outputs" in inspect.signature(vlm.model.forward).parameters
    if at_tower and not once and (copies > 1 or not config.use_cache):
        raise UsageError(f"{vlm.name} runs its tower in every pass; edit it with use_cache=True and one row a prompt")
    return copies


def in_force(vlm: TracedModel, options: dict[str, Any]) -> Any:
    """The generation config that `generate` makes of these options.

    Raises:
        UsageError: an option has a value that transformers refuses.
    """
    others = set(inspect.signature(vlm.model.generate).parameters)
    settings = {name: value for name, value in options.items() if name not in others}
    try:
        return vlm.model._prepare_generation_config(options.get("generation_config"), **settings)[0]
    except ValueError as error:
        raise UsageError(f"generate refuses its options: {error}") from error


def _check_chunks(vlm: TracedModel, encoded: Encoded, config: Any) -> None:
    size = config.prefill_chunk_size
    if size is None or size >= encoded.n_pos:
        return
    # Where tokens see later ones, a prompt in chunks gives other answers, edited or not.
    if "token_type_ids" in encoded.inputs or vlm.family.queries_first:
        raise UsageError(
            f"{vlm.name} cannot take its prompt in chunks (prefill_chunk_size={size}): its pictures are read as a whole"
        )


def new_ids(result: Any, encoded: Encoded) -> Int[Tensor, "answer new"]:
    """The generated tokens of what `generate` returned.

    Raises:
        WorkError: the rows do not begin with the prompts, each as often as every other and one after another.
    """
    sequences = result if isinstance(result, Tensor) else result.sequences
    asked = encoded.inputs["input_ids"]
    times = len(sequences) // len(asked)
    if not torch.equal(sequences[:, : encoded.n_pos], asked.repeat_interleave(times, 0).to(sequences.device)):
        raise WorkError("generate did not return the prompts in their order, each with its answers")
    return sequences[:, encoded.n_pos :]
