"""How answers are generated: settings that are in force, and those under which edits cannot be placed."""

import functools
import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.passes import Passes
from vlm_mech.interventions.plan import Plan

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What a generation config says of the vocabulary, which is no choice of how to decode."""
SETTINGS = ("neutral", "checkpoint")
ONLY_IN = {
    "do_sample": ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    "num_beams": ("length_penalty", "early_stopping"),
}
"""Settings that do nothing unless another one is on."""
MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


@functools.cache
def neutral() -> dict[str, Any]:
    """Settings under which the next token's distribution is the model's own, greedy unless sampling is asked for.

    A checkpoint's generation config fills in whatever is not set (transformers), so every one is set here. Unlike
    transformers' defaults, sampling draws from all tokens (no `top_k`).
    """
    from transformers import GenerationConfig

    blank = GenerationConfig()
    left = (*TOKENS, "transformers_version", "max_new_tokens")
    names = [name for name in vars(blank) if not name.startswith("_") and name not in left]
    defaults = blank._get_default_generation_params()
    return {name: defaults.get(name) for name in names} | {"do_sample": False, "top_k": None, "max_length": None}


def decoding_options(options: dict[str, Any], *, settings: str, max_new_tokens: int) -> dict[str, Any]:
    """What `generate` is called with: neutral settings or the checkpoint's, and over them what is asked for.

    Raises:
        UsageError: settings that are not known, or not of their kind, or that would do nothing.
    """
    if settings not in SETTINGS:
        raise UsageError(f"settings={settings!r} is not known; use {' or '.join(SETTINGS)}")
    options = dict(options)
    config = options.pop("generation_config", None)
    asked = {"max_new_tokens": max_new_tokens, **_held(config), **options}
    _check_kinds(asked)
    if settings == "neutral":
        _check_in_force(asked)
    # A compiled pass would leave the edits out.
    return {**(neutral() if settings == "neutral" else {}), **asked, "disable_compile": True}


def _held(config: Any) -> dict[str, Any]:
    """The settings of a generation config that are set."""
    from transformers import GenerationConfig

    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise UsageError(f"generation_config is a {type(config).__name__}; a GenerationConfig is needed, or options")
    return {
        name: value for name, value in config.to_dict().items() if value is not None and name != "transformers_version"
    }


def _check_kinds(asked: dict[str, Any]) -> None:
    """What transformers takes without a word, or would stumble over later."""
    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
        value = asked.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise UsageError(f"{name}={value!r:.40} is given to generate; it must be a whole number of at least 1")
    for name in ("logits_processor", "stopping_criteria"):
        if not isinstance(asked.get(name) or [], list):
            raise UsageError(f"{name} is a {type(asked[name]).__name__}; a list of them is needed")
    if asked.get("max_length") is not None:
        raise UsageError("max_length counts the prompt too, and max_new_tokens goes before it; give max_new_tokens")
    if asked.get("stop_strings") is not None and asked.get("tokenizer") is None:
        raise UsageError("stop_strings also need tokenizer=vlm.tokenizer")


def _check_in_force(asked: dict[str, Any]) -> None:
    """Refuse what would be ignored, such as a temperature where nothing is drawn."""
    plain = neutral()
    for name in _idle(asked):
        # The neutral value, or transformers' own, says nothing.
        if asked.get(name) not in (None, plain[name], *((50,) if name == "top_k" else ())):
            need = "do_sample=True" if name in ONLY_IN["do_sample"] else "num_beams above 1"
            raise UsageError(f"{name}={asked[name]!r} does nothing without {need}; give both or none")


def _idle(held: dict[str, Any]) -> tuple[str, ...]:
    """Settings that do nothing beside those that are held."""
    sampled, beams = bool(held.get("do_sample")), (held.get("num_beams") or 1) > 1
    return (*(() if sampled else ONLY_IN["do_sample"]), *(() if beams else ONLY_IN["num_beams"]))


def settings_of(config: Any) -> dict[str, Any]:
    """The settings in force: the greatest number of new tokens, and all that are not neutral."""
    held, plain = config.to_dict(), neutral() | {"disable_compile": True}
    # Of two limits the one on new tokens holds.
    idle = _idle(held)
    ends = "max_length" if held.get("max_new_tokens") is not None else ""
    left = (*TOKENS, "transformers_version", ends)
    return {
        name: value
        for name, value in held.items()
        if value is not None
        and name not in (*left, *idle)
        and not name.startswith("_")
        # What is off may be False, 0 or nothing.
        and (value or None) != (plain.get(name) or None)
    }


def set_aside(vlm: TracedModel) -> dict[str, Any]:
    """What the checkpoint's own generation config would change of neutral settings, for provenance."""
    config = getattr(vlm.model, "generation_config", None)
    return {} if config is None else settings_of(config)


def check_generation(
    vlm: TracedModel, encoded: Encoded, made: Plan, options: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """How many rows each prompt has in the passes of `generate` with these options, and the settings in force.

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
        raise UsageError("guidance_scale runs the model outside the traced passes; leave it out")
    _check_chunks(vlm, encoded, config)
    copies = max(config.num_beams, config.num_return_sequences)
    at_tower = [site for site in made.writes if site.stream != "llm"] or [cut for cut in made.cuts if cut[0] != "llm"]
    once = "mm_encoder_outputs" in inspect.signature(vlm.model.forward).parameters
    if at_tower and not once and (copies > 1 or not config.use_cache):
        raise UsageError(f"{vlm.name} runs its tower in every pass; edit it with use_cache=True and one row a prompt")
    return copies, settings_of(config)


def in_force(vlm: TracedModel, options: dict[str, Any]) -> Any:
    """The generation config that `generate` makes of these options.

    Raises:
        UsageError: an option has a value that transformers refuses.
    """
    others = set(inspect.signature(vlm.model.generate).parameters)
    settings = {name: value for name, value in options.items() if name not in others}
    try:
        return vlm.model._prepare_generation_config(None, **settings)[0]
    except ValueError as error:
        raise UsageError(f"generate refuses its options: {error}") from error


@contextmanager
def told(passes: Passes) -> Iterator[None]:
    """Within the block, what transformers says of options before the first pass is told as a fault of these."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ImportError, AssertionError) as error:
        within = any(frame.name == "_call_impl" for frame in traceback.extract_tb(error.__traceback__))
        if isinstance(error, UsageError) or within or passes.now is not None:
            raise
        raise UsageError(f"generate refuses its options: {' '.join(str(error).split()):.300}") from error


def _check_chunks(vlm: TracedModel, encoded: Encoded, config: Any) -> None:
    size = config.prefill_chunk_size
    if size is None or size >= encoded.n_pos:
        return
    # Where tokens see later ones, a prompt in chunks gives other answers, edited or not.
    if "token_type_ids" in encoded.inputs or vlm.family.queries_first:
        raise UsageError(
            f"{vlm.name} cannot take its prompt in chunks (prefill_chunk_size={size}): its images are read as a whole"
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
