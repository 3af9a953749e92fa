"""Tuning a model to look: LoRA on its decoder, on pictures whose true answer is not always the usual one.

After arXiv 2606.06890, which tunes a decoder with GRPO and LoRA; its data, reward, rank and number of steps were
not found and are ours. What a step draws and samples depends on the seed and the step alone, so that a killed tuning
goes on to the same bytes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm_mech.behaviour.answering.class_name_scores import Ids, names_after
from vlm_mech.behaviour.classify.tuning import IGNORED, Tuning, with_answers
from vlm_mech.behaviour.debias.adapter import STATE, History, keep_state, taken_up, trained_of
from vlm_mech.behaviour.debias.losses import advantages, cross_entropy, grpo_loss, k3, n_equal
from vlm_mech.behaviour.master_weights import Descent
from vlm_mech.data.derived_pairs import checked
from vlm_mech.data.fitting import askable
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.reading import says
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.interventions.trace import generate
from vlm_mech.methods.weight_swap.blocks import switched

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Objective = Literal["supervised", "reward"]


@dataclass(frozen=True)
class Recipe:
    """How a model is tuned. `batch` counts pairs, each with both its pictures; the last row is for rewards alone."""

    objective: Objective
    n_steps: int = 40
    rate: float = 2e-3
    batch: int = 2
    rank: int = 8
    seed: int = 0
    max_new_tokens: int = 4
    group: int = 8
    n_inner: int = 1
    clip: float = 0.2
    beta: float = 0.02
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (
            ("n_steps", 1), ("batch", 1), ("rank", 1), ("max_new_tokens", 1), ("group", 2), ("n_inner", 1)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; at least {least} is needed")
        for name in ("rate", "clip", "temperature"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.beta < 0:
            raise UsageError(f"beta is {self.beta}; it must be 0 or more")


@dataclass(frozen=True)
class Lesson:
    """A prompt and its true answer."""

    prompt: Prompt
    truth: str


def lessons_of(pairs: Pairs, recipe: Recipe, step: int) -> list[Lesson]:
    """Both pictures of the pairs of a step, drawn by the seed and the step alone; of single items their own."""
    drawn = random.Random(f"{recipe.seed}/{step}").sample(list(pairs), min(recipe.batch, len(pairs)))
    found = []
    for pair in drawn:
        found.append(Lesson(pair.base, pair.answer))
        if pair.made is None:
            found.append(Lesson(pair.counterfactual, pair.counterfactual_answer))
    return found


# Answers and their probabilities


def token_log_probs(
    vlm: "VLM", encoded: Encoded, answers: Sequence[Ids], *, temperature: float = 1.0
) -> tuple[Float[Tensor, "row new"], Bool[Tensor, "row new"]]:
    """Log-probabilities of the tokens of one answer after each prompt, in nats, and which positions hold one.

    Prompts are padded on the left and answers on the right; a row's numbers do not depend on the others.

    Args:
        temperature: what logits are divided by.
    """
    inputs, targets = with_answers(vlm, encoded, answers)
    width = max(len(ids) for ids in answers)
    logits = getattr(vlm.model(**inputs, use_cache=False), vlm.family.readout)[:, -width - 1 : -1]
    wanted = targets[:, -width:]
    mask = wanted != IGNORED
    spread = (logits.float() / temperature).log_softmax(-1)
    return spread.gather(-1, wanted.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0.0), mask


def end_tokens(vlm: "VLM") -> set[int]:
    """The tokens that end an answer."""
    told = vlm.model.generation_config.eos_token_id
    found = {told} if isinstance(told, int) else set(told or ())
    return found | ({vlm.tokenizer.eos_token_id} - {None})


def trimmed(ids: Int[Tensor, "row new"], ends: set[int]) -> list[Ids]:
    """Generated tokens of each row to its end, and with it; all of them where it was not reached."""
    found = []
    for row in ids.tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        found.append(tuple(row[: stop + 1]))
    return found


def usual_end(vlm: "VLM", prompts: Sequence[Prompt], *, max_new_tokens: int) -> int | None:
    """The token with which the model itself most often ends its answers to these; None if it ends none in time."""
    ends = end_tokens(vlm)
    made = trimmed(generate(vlm, prompts, max_new_tokens=max_new_tokens).ids, ends)
    last = [ids[-1] for ids in made if ids[-1] in ends]
    return max(sorted(set(last)), key=last.count) if last else None


def true_tokens(vlm: "VLM", lessons: Sequence[Lesson], end: int | None) -> list[Ids]:
    """The tokens of the true answers, with that end after them if there is one.

    Raises:
        UsageError: an answer that cannot follow its prompt as tokens of its own.
    """
    first = {(*each.prompt.said, each.truth): each for each in lessons}
    last = () if end is None else (end,)
    known = {key: (*names_after(vlm, [each.prompt], [each.truth]).ids[0], *last) for key, each in first.items()}
    return [known[*each.prompt.said, each.truth] for each in lessons]


def usable(vlm: "VLM", pairs: Pairs, *, max_new_tokens: int) -> Pairs:
    """The pairs whose prompts fit, with a true answer that can follow and is no longer than answers may be.

    The others move to `refused` with the reason.

    Raises:
        UsageError: none is left.
    """

    def check(pair: Pair) -> None:
        truth = pairs.written(pair.answer)
        ids = true_tokens(vlm, [Lesson(pair.base, truth)], None)[0]
        if len(ids) > max_new_tokens:
            raise UsageError(f"answer {truth!r} has {len(ids)} tokens; max_new_tokens is {max_new_tokens}")

    return checked(askable(vlm, pairs, n_new=max_new_tokens), check, "can be tuned on")


@dataclass(frozen=True, eq=False)
class Samples:
    """A group of sampled answers to each prompt, row by row, and their rewards."""

    encoded: Encoded
    answers: list[Ids]
    rewards: Float[Tensor, "prompt group"]


def sampled(vlm: "VLM", lessons: Sequence[Lesson], recipe: Recipe, step: int) -> Samples:
    """Answers drawn from the model as it is, by the seed and the step alone; reward 1 for what says the truth, else 0.

    An answer must say the truth and nothing else (`reading.says`): naming every colour earns nothing. Tokens that stand
    for pictures are never drawn, as no answer can hold them.
    """
    many = [lesson for lesson in lessons for _ in range(recipe.group)]
    encoded = vlm.encode([each.prompt for each in many])
    pictures = [getattr(vlm.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    options: dict[str, Any] = {"do_sample": True, "temperature": recipe.temperature, "top_k": 0, "top_p": 1.0}
    options["suppress_tokens"] = [token for token in pictures if token is not None]
    with torch.random.fork_rng():
        torch.manual_seed(random.Random(f"{recipe.seed}/{step}/answers").getrandbits(60))
        made = generate(vlm, encoded, max_new_tokens=recipe.max_new_tokens, **options)
    hits = [says(text, each.truth) for text, each in zip(made.texts, many, strict=True)]
    rewards = torch.tensor(hits, dtype=torch.float32, device=vlm.device).view(len(lessons), recipe.group)
    return Samples(encoded, trimmed(made.ids, end_tokens(vlm)), rewards)


# Steps


def supervised_step(vlm: "VLM", lessons: Sequence[Lesson], end: int | None, descent: Descent) -> dict[str, Any]:
    """One step down the cross-entropy of the true answers; what it says of itself."""
    encoded = vlm.encode([each.prompt for each in lessons])
    with torch.enable_grad():
        loss = cross_entropy(*token_log_probs(vlm, encoded, true_tokens(vlm, lessons, end)))
    _descend(loss, descent)
    return {"loss": loss.item()}


def reward_step(
    vlm: "VLM", lessons: Sequence[Lesson], recipe: Recipe, step: int, descent: Descent, *, n_sides: int = 2
) -> dict[str, Any]:
    """The inner steps on one draw of answers; what they say of themselves.

    Groups whose rewards are all equal have no advantage: only the divergence from the base model moves them.

    Args:
        n_sides: pictures of an example; that in conflict comes first.
    """
    drawn = sampled(vlm, lessons, recipe, step)
    advantage = advantages(drawn.rewards).flatten()
    given: dict[str, Any] = {"temperature": recipe.temperature}
    with torch.no_grad(), switched([vlm.model], on=False):
        base, mask = token_log_probs(vlm, drawn.encoded, drawn.answers, **given)
    seen: list[Tensor] = []
    losses: list[float] = []
    for _ in range(recipe.n_inner):
        with torch.enable_grad():
            now, _ = token_log_probs(vlm, drawn.encoded, drawn.answers, **given)
            seen.append(now.detach())
            # What sampled the answers is the model of the first inner step.
            loss = grpo_loss(now, seen[0], base, advantage, mask, clip=recipe.clip, beta=recipe.beta)
        _descend(loss, descent)
        losses.append(loss.item())
    told = {"loss": losses[0], "reward": drawn.rewards.mean().item(), "n_groups": len(lessons)}
    told |= {"n_equal": n_equal(drawn.rewards), "kl": (k3(seen[0], base).sum() / mask.sum()).item()}
    return told | {"reward_conflict": drawn.rewards[::n_sides].mean().item()}


def _descend(loss: Float[Tensor, ""], descent: Descent) -> None:
    if not bool(torch.isfinite(loss)):
        raise WorkError(f"the loss is {loss.item()}; a smaller --rate may hold")
    descent.step(loss)


def train(
    vlm: "VLM",
    adapter: Any,
    pairs: Pairs,
    recipe: Recipe,
    *,
    folder: Path,
    every: int,
    validate: Callable[[], dict[str, Any]],
    progress: Callable[[Sequence[int], str], Iterator[int]],
) -> History:
    """Tunes the adapter in place, or goes on with a tuning that was killed; one entry a step.

    After every `every` steps and the last one the entry has what `validate` says, and the folder gets the adapter as
    it is then and all that is needed to go on (`STATE`).

    Args:
        pairs: the pictures asked about come first in each pair, in conflict; their counterfactuals are usual.

    Raises:
        WorkError: the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = trained_of(adapter)
    # The adapter is in float32 itself (see `with_adapter`), so that checkpoints hold what is moved.
    descent = Descent(named.values(), dtype=vlm.dtype, rate=recipe.rate)
    adam = descent.adam
    end, history = _beginning(vlm, pairs, recipe), taken_up(named, adam, folder / STATE)
    pace = Tuning("lora", n_steps=recipe.n_steps, rate=recipe.rate, batch=recipe.batch, rank=recipe.rank)
    for step in progress(range(len(history), recipe.n_steps), "tuning"):
        lessons = lessons_of(pairs, recipe, step)
        adam.param_groups[0]["lr"] = pace.rate_at(step)
        if recipe.objective == "supervised":
            told = supervised_step(vlm, lessons, end, descent)
        else:
            told = reward_step(vlm, lessons, recipe, step, descent, n_sides=1 if pairs.made else 2)
        history.append({"step": step + 1, **told})
        if (step + 1) % every == 0 or step + 1 == recipe.n_steps:
            history[-1] |= validate()
            keep_state(named, adam, history, folder)
    return history


def _beginning(vlm: "VLM", pairs: Pairs, recipe: Recipe) -> int | None:
    """How the base ends its answers to some of the pairs; the same whether or not training has begun."""
    prompts = [each.prompt for each in lessons_of(pairs, recipe, 0)]
    with switched([vlm.model], on=False):
        return usual_end(vlm, prompts, max_new_tokens=recipe.max_new_tokens)
