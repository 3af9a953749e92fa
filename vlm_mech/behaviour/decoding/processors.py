"""Contrastive decoding: answers in which what the picture says counts for more than what would be said without it.

M3ID (arXiv 2403.14003) and VCD (github.com/DAMO-NLP-SG/VCD) as logits processors for any
`model.generate(logits_processor=[...])`. Each runs the same model a second time, on inputs and with a cache of its own,
fed the tokens that `generate` chooses.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from vlm_mech.behaviour.answering.without_image import without_images
from vlm_mech.behaviour.decoding.first_pass import FirstPass
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.attention import aside
from vlm_mech.interventions.generating import decoding_options, in_force, new_ids, settings_of
from vlm_mech.interventions.trace import Generation

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

ALPHA, RATE, START = 0.6, 0.15, 1
"""alpha and lambda of arXiv 2411.05195; where its t begins was not found, and 1 is ours."""
STRENGTH, CUTOFF, NOISE_STEP = 1.0, 0.1, 500
"""a, b and the step of diffusion in VCD's evaluation."""
N_NOISE_STEPS = 1000
MOST_EXPONENT = 60.0
"""Weights of M3ID stop at e^60: they grow without end in t, and beyond this float32 does not hold the products."""


# Formulas


def m3id(
    seen: Float[Tensor, "batch vocab"],
    unseen: Float[Tensor, "batch vocab"],
    *,
    alpha: float = ALPHA,
    rate: float = RATE,
    t: int = START,
) -> Float[Tensor, "batch vocab"]:
    """`l_c + 1[max l_c < log alpha] (exp(lambda t) - 1) (l_c - l_u)`, with log-softmax taken of both (M3ID).

    Args:
        seen: logits with the picture; a token ruled out (-inf) stays so.
        unseen: logits without it.
        rate: lambda of the paper.
    """
    with_image, without = log_softmax(seen.float(), -1), log_softmax(unseen.float(), -1)
    weight = math.expm1(min(rate * t, MOST_EXPONENT))
    unsure = with_image.max(-1, keepdim=True).values < (math.log(alpha) if alpha else -math.inf)
    corrected = with_image + weight * (with_image - without)
    return torch.where(unsure & with_image.isfinite(), corrected, with_image)


def vcd(
    seen: Float[Tensor, "batch vocab"],
    noised: Float[Tensor, "batch vocab"],
    *,
    strength: float = STRENGTH,
    cutoff: float = CUTOFF,
) -> Float[Tensor, "batch vocab"]:
    """`(1 + a) l(v) - a l(v')`, and -inf for tokens with `l(v) < log b + max l(v)` (VCD).

    Args:
        seen: logits with the picture; a token ruled out (-inf) stays so.
        noised: logits with the diffused picture.
        strength: a of the paper.
        cutoff: b of the paper; 0 keeps every token.
    """
    seen, noised = seen.float(), noised.float()
    least = seen.max(-1, keepdim=True).values + (math.log(cutoff) if cutoff else -math.inf)
    return ((1 + strength) * seen - strength * noised).masked_fill(seen < least, -math.inf)


def hellinger(one: Float[Tensor, "batch vocab"], other: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch"]:
    """`|| sqrt(P) - sqrt(Q) ||_2 / sqrt(2)` of the distributions of two sets of logits, 0 to 1 (M3ID)."""
    first, second = (log_softmax(each.float(), -1).div(2).exp() for each in (one, other))
    return (first - second).norm(dim=-1) / math.sqrt(2)


def kept_share(step: int) -> float:
    """abar_t: the share of the variance that is still the picture's after steps 0 to `step` of VCD's diffusion.

    `beta_t = sigmoid(linspace(-6, 6, 1000)) (5e-3 - 1e-5) + 1e-5` (VCD); that steps count from 0 is ours.

    Raises:
        UsageError: the step is none of 0 to 999.
    """
    if not 0 <= step < N_NOISE_STEPS:
        raise UsageError(f"noise step {step} is out of range; one of 0 to {N_NOISE_STEPS - 1} is needed")
    beta = 1 / (1 + np.exp(-np.linspace(-6, 6, N_NOISE_STEPS))) * (5e-3 - 1e-5) + 1e-5
    return float(np.cumprod(1 - beta)[step])


def seeds_of(names: Sequence[str], seed: int) -> list[int]:
    """A seed for each example from its name and the seed of the run, so that batches do not matter."""
    digests = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names]
    return [int.from_bytes(digest[:6], "big") for digest in digests]


def noised(pixels: Float[Tensor, "*shape"], *, step: int = NOISE_STEP, seed: int) -> Float[Tensor, "*shape"]:
    """Forward diffusion: `sqrt(abar_t) x + sqrt(1 - abar_t) e`, with normal noise from the seed alone."""
    keep = kept_share(step)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels.device)
    return (math.sqrt(keep) * pixels.float() + math.sqrt(1 - keep) * noise).to(pixels.dtype)


def diffused(vlm: "VLM", encoded: Encoded, *, step: int = NOISE_STEP, seeds: Sequence[int]) -> Float[Tensor, "..."]:
    """The batch's preprocessed pixels, each example's `noised` by its own seed as if it were alone; padding stays.

    Raises:
        UsageError: no pictures, another number of seeds than prompts, a step out of range, or a processor that
            batches pixels in a way in which those of an example cannot be found.
    """
    if "pixel_values" not in encoded.inputs:
        raise UsageError("the prompts have no image, so there is nothing to diffuse")
    _check_seeds(seeds, encoded)
    found, start = encoded.inputs["pixel_values"].clone(), 0
    for prompt, seed in zip(encoded.prompts, seeds, strict=True):
        alone = vlm.encode(prompt).inputs["pixel_values"]
        place = (slice(start, start + len(alone)), *(slice(size) for size in alone.shape[1:]))
        if not torch.equal(found[place], alone):
            raise UsageError(f"{vlm.name}: the pixels of {prompt.question!r} are not found in those of its batch")
        found[place] = noised(alone, step=step, seed=seed)
        start += len(alone)
    return found


def _check_seeds(seeds: Sequence[int], encoded: Encoded) -> None:
    if len(seeds) != len(encoded):
        raise UsageError(f"{len(seeds)} seed(s) for {len(encoded)} prompts; one for each is needed")


class Branch:
    """The model run beside `generate` on other inputs, with a cache of its own, fed the tokens that `generate` chose.

    `n_new` is the number of tokens fed so far. A call with the prompt alone begins anew, from a copy of what the
    prompt's pass left the first time.
    """

    def __init__(self, vlm: "VLM", encoded: Encoded, inputs: dict[str, Tensor]) -> None:
        self.n_new = 0
        self._first = FirstPass()
        self._vlm, self._encoded, self._inputs = vlm, encoded, inputs
        self.needed_inputs = vlm.needed_inputs
        # Families with rotary positions in three dimensions keep an offset of the latest prompt in the model.
        self._with_offsets = [module for module in vlm.model.modules() if hasattr(module, "rope_deltas")]
        self._ids = inputs["input_ids"]
        self._options: dict[str, Any] = {}

    def follow(self, input_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """Logits of the next token in this branch, where `generate` has come to `input_ids`.

        Raises:
            UsageError: these are not the prompts that the branch was made for with the next token each; beams,
                several answers a prompt and assisted generation are refused so.
        """
        self._check(input_ids)
        if input_ids.shape[1] == self._encoded.n_pos:
            self._begin()
            return self._forward(first=True)
        self._ids = torch.cat([self._ids, input_ids[:, -1:]], 1)
        self.n_new += 1
        return self._forward(first=False)

    def _check(self, input_ids: Int[Tensor, "batch pos"]) -> None:
        prompts = self._encoded.inputs["input_ids"]
        if len(input_ids) != len(prompts):
            raise UsageError(
                f"{len(input_ids)} rows are generated for {len(prompts)} prompts; contrastive decoding takes no beams "
                "(num_beams=1) and one answer a prompt (num_return_sequences=1)"
            )
        n_pos = self._encoded.n_pos
        if input_ids.shape[1] not in (n_pos, n_pos + self.n_new + 1) or not torch.equal(input_ids[:, :n_pos], prompts):
            raise UsageError(
                f"{input_ids.shape[1]} tokens a row, which are not the {n_pos} of the prompts that this processor was "
                f"made for and {self.n_new + 1} more; give generate the same batch, and no assistant model"
            )

    def _begin(self) -> None:
        model, inputs = self._vlm.model, self._inputs
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.n_new, self._ids = 0, inputs["input_ids"]
        self._options = {name: value for name, value in inputs.items() if name not in ("input_ids", "position_ids")}
        self._options |= {"past_key_values": cache, "use_cache": True}
        if model._supports_logits_to_keep():
            self._options["logits_to_keep"] = 1
        with self._own_offsets():
            # As `generate` counts them: padding on the left has no position.
            positions = model._prepare_position_ids_for_generation(self._ids, dict(self._options))
        self._options["position_ids"] = positions

    def _forward(self, *, first: bool) -> Float[Tensor, "batch vocab"]:
        model, length = self._vlm.model, None if first else 1
        inputs = model.prepare_inputs_for_generation(
            self._ids, next_sequence_length=length, is_first_iteration=first, **self._options
        )
        inputs |= {name: self._inputs[name] for name in self.needed_inputs} | {"return_dict": True}
        with torch.no_grad(), self._own_offsets(), aside(self._vlm):
            outputs = self._first.of(model, model, **inputs) if first else model(**inputs)
        self._options = model._update_model_kwargs_for_generation(outputs, self._options)
        return outputs.logits[:, -1].float()

    @contextlib.contextmanager
    def _own_offsets(self) -> Iterator[None]:
        """What the model keeps of the branch of `generate` is put back afterwards."""
        kept = [module.rope_deltas for module in self._with_offsets]
        try:
            yield
        finally:
            for module, offsets in zip(self._with_offsets, kept, strict=True):
                module.rope_deltas = offsets


def unseen_branch(vlm: "VLM", encoded: Encoded) -> Branch:
    """The same prompts without their pictures.

    Raises:
        UsageError: prompts without pictures, or a model that cannot run without one.
    """
    return Branch(vlm, encoded, without_images(vlm, encoded).inputs)


def noised_branch(vlm: "VLM", encoded: Encoded, *, step: int = NOISE_STEP, seeds: Sequence[int]) -> Branch:
    """The same prompts with diffused pictures (see `diffused`)."""
    return Branch(vlm, encoded, encoded.inputs | {"pixel_values": diffused(vlm, encoded, step=step, seeds=seeds)})


# Processors


class M3ID(LogitsProcessor):
    """Corrects towards what the picture adds to the text alone, the more the longer the answer (M3ID).

    Use: `model.generate(**encoded.generation_inputs, logits_processor=LogitsProcessorList([M3ID(vlm, encoded)]))`.

    Args:
        alpha: the first branch is corrected where its best token has less than this probability.
        rate: lambda; a token's weight is `exp(lambda t) - 1`.
        start: t of the first token; with 0 it is never corrected.
        branch: of another one about the same prompts, which spares its pass over them.

    Raises:
        UsageError: a value out of range, prompts without pictures, or a model that cannot run without one.
    """

    def __init__(
        self,
        vlm: "VLM",
        encoded: Encoded,
        *,
        alpha: float = ALPHA,
        rate: float = RATE,
        start: int = START,
        branch: Branch | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha is {alpha}; a probability from 0 to 1 is needed")
        if not 0 <= rate < math.inf:
            raise UsageError(f"lambda is {rate}; it must be 0 or more")
        if start < 0:
            raise UsageError(f"t begins at {start}; it must be 0 or more")
        self.alpha, self.rate, self.start = alpha, rate, start
        self.branch = branch or unseen_branch(vlm, encoded)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The corrected log-probabilities, batch x vocab."""
        unseen = self.branch.follow(input_ids)
        return m3id(scores, unseen, alpha=self.alpha, rate=self.rate, t=self.start + self.branch.n_new)


class VCD(LogitsProcessor):
    """Corrects away from what a diffused picture gives, among tokens that the clear one allows (VCD).

    The paper samples from what comes out: `generate(do_sample=True)`, or `Drawn` after it; without, it is greedy.

    Args:
        strength: a.
        cutoff: b; tokens with less than b times the best one's probability are ruled out.
        step: of the diffusion, 0 to 999.
        seeds: of the noise, one for each prompt.
        branch: of another one with the same prompts, seeds and step, which spares its pass.

    Raises:
        UsageError: a value out of range, or prompts without pictures.
    """

    def __init__(
        self,
        vlm: "VLM",
        encoded: Encoded,
        *,
        seeds: Sequence[int],
        strength: float = STRENGTH,
        cutoff: float = CUTOFF,
        step: int = NOISE_STEP,
        branch: Branch | None = None,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise UsageError(f"a is {strength}; it must be 0 or more")
        if not 0 <= cutoff <= 1:
            raise UsageError(f"b is {cutoff}; a share from 0 to 1 is needed")
        self.strength, self.cutoff = strength, cutoff
        self.branch = branch or noised_branch(vlm, encoded, step=step, seeds=seeds)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The corrected logits, batch x vocab, -inf where a token is ruled out."""
        return vcd(scores, self.branch.follow(input_ids), strength=self.strength, cutoff=self.cutoff)


class Dependency(LogitsProcessor):
    """Leaves the scores alone and keeps PDM, how far the next token depends on the picture, of every step.

    `steps` holds the Hellinger distance to the text alone, one tensor of the batch for each token (M3ID).

    Raises:
        UsageError: prompts without pictures, or a model that cannot run without one.
    """

    def __init__(self, vlm: "VLM", encoded: Encoded, *, branch: Branch | None = None) -> None:
        self.branch = branch or unseen_branch(vlm, encoded)
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they came."""
        unseen = self.branch.follow(input_ids)
        self.steps = [*(self.steps if self.branch.n_new else []), hellinger(scores, unseen)]
        return scores


class Drawn(LogitsProcessor):
    """Adds Gumbel noise, so that the highest score is a draw from the softmax, by seeds of each example's own.

    For `do_sample=False`, as the last processor; unlike `do_sample=True` it does not depend on the batch.
    """

    def __init__(self, encoded: Encoded, *, seeds: Sequence[int]) -> None:
        _check_seeds(seeds, encoded)
        self.seeds, self._n_pos = tuple(seeds), encoded.n_pos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with noise, batch x vocab."""
        step = input_ids.shape[1] - self._n_pos
        noise = [np.random.default_rng([seed, step]).gumbel(size=scores.shape[1]) for seed in self.seeds]
        return scores + torch.from_numpy(np.stack(noise)).to(scores)


def decode(
    vlm: "VLM",
    encoded: Encoded,
    processors: Sequence[LogitsProcessor] = (),
    *,
    max_new_tokens: int = 16,
    settings: str = "neutral",
    first: FirstPass | None = None,
    **options: Any,
) -> Generation:
    """Answers of the plain model through these processors in turn, greedy unless `options` of `generate` say otherwise.

    Settings of the checkpoint are left out as by `trace.generate`.

    Args:
        first: the pass over the same prompts, which several calls share; by default each makes its own.

    Raises:
        UsageError: beams, other prompts than the processors were made for, or an answer that outgrows the decoder's
            positions.
    """
    encoded.check_room(max_new_tokens)
    options = decoding_options(options, settings=settings, max_new_tokens=max_new_tokens)
    used = settings_of(in_force(vlm, options))
    with torch.no_grad(), vlm.passing(), (first or FirstPass(most_bytes=0)).in_generate(vlm.model):
        result = vlm.model.generate(
            **encoded.generation_inputs, logits_processor=LogitsProcessorList(processors), **options
        )
    ids = new_ids(result, encoded)
    texts = vlm.processor.batch_decode(ids, skip_special_tokens=True)
    prompts = tuple(row * len(encoded) // len(ids) for row in range(len(ids)))
    output = None if isinstance(result, Tensor) else result
    return Generation(tuple(text.strip() for text in texts), ids, (), prompts, used, output)
