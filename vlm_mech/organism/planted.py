"""Planted models: LLaVAs whose weights are set by hand, so that the mechanism is known and every method can be graded.

    planted = plant(draw(3, "hard"))
    pairs = planted.pairs(64, seed=1)
    swap_states(planted.vlm, pairs, swap_sites(planted.vlm, "llm", "resid_pre"), ("image", "last"))
    planted.truth.of("read")            # which heads there are to be found, and their weights

They are ordinary Hugging Face models with a real processor, and pass the check made when any model is loaded.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.image import ImageLike, load_image
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Each, Patches
from vlm_mech.inputs.special_tokens import ids_after
from vlm_mech.interventions.specification import Intervention
from vlm_mech.models.vlm import VLM
from vlm_mech.organism import planted_layout, planted_weights
from vlm_mech.organism.build import image_processor, word_tokenizer
from vlm_mech.organism.planted_recipe import (
    ARTICLE,
    COLOURS,
    HALVES,
    OBJECTS,
    PLACES,
    Answer,
    Recipe,
    Truth,
    edges,
    says,
    units,
)
from vlm_mech.results import metrics
from vlm_mech.sweeps.engine import engine_of
from vlm_mech.sweeps.measures import Comparison, comparison
from vlm_mech.sweeps.readings import readings_of

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = ("user", "assistant", ":", "?", ".", ",", "what", "colour", "is", "the", "in", "picture", *OBJECTS, *COLOURS)
PIECES: dict[Answer, tuple[str, ...]] = {"word": (), "pieces": (*HALVES, *PLACES), "article": (ARTICLE,)}
"""Words of answers that are in no question and name no colour alone."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} "
    "{% elif message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT{% endif %}"
)
SIZE = planted_layout.SIDE * planted_layout.PATCH
N_CALIBRATION, N_ACCURACY = 512, 256
LARGEST_GAIN, TOLERANCE = 0.6, 0.02
_CALIBRATION_SEED, _ACCURACY_SEED = "calibration", "accuracy"


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted model, the recipe it was made from (calibrated where that was asked for), and what is to be found."""

    vlm: VLM
    recipe: Recipe
    truth: Truth

    def pairs(self, n: int, *, seed: int = 0, minimal: bool = True) -> Pairs:
        """Pictures and their counterfactuals, which differ in the colour alone; the same seed gives the same pairs.

        Neither colour is the object's prior one, so that a suppressed model's answer is a third.

        Args:
            minimal: off, the counterfactual has jitter and texture of its own, so that effects vary more.
        """
        return examples(self.recipe, n, seed=seed, minimal=minimal)

    def priors(self, pairs: Pairs) -> list[str]:
        """The answer that goes with each pair's object, whatever the picture shows."""
        return [prior_of(self.recipe, pair.question) for pair in pairs]


def coloured(pairs: Pairs) -> Each:
    """The span of the patches that carry the colour, pair by pair; found in the pixels."""
    return Each(tuple(Patches(coloured_cells(pair.image)) for pair in pairs))


def coloured_cells(image: ImageLike) -> tuple[tuple[int, int], ...]:
    """(row, column) of every patch whose mean is a colour and no grey."""
    means = _patch_means(image)
    strong = np.abs(means).max(axis=-1) > planted_layout.SATURATION / 2
    return tuple((int(row), int(column)) for row, column in np.argwhere(strong))


def _patch_means(image: ImageLike) -> Float[np.ndarray, "row column channel"]:
    pixels = np.asarray(load_image(image), dtype=float) / 127.5 - 1
    side, patch = planted_layout.SIDE, planted_layout.PATCH
    return pixels.reshape(side, patch, side, patch, 3).mean(axis=(1, 3))


def prior_of(recipe: Recipe, question: str) -> str:
    """The answer that the recipe plants for the object of a question."""
    found = [number for number, word in enumerate(OBJECTS) if f" {word}?" in question]
    if len(found) != 1:
        raise UsageError(f"question {question!r} asks for none of {', '.join(OBJECTS)}")
    return recipe.answers[recipe.priors[found[0]]]


def examples(recipe: Recipe, n: int, *, seed: int | str = 0, minimal: bool = True) -> Pairs:
    """Pairs as `Planted.pairs` gives them, without the model."""
    if n < 1:
        raise UsageError(f"n is {n}; at least one pair is needed")
    made = (_pair(recipe, number, f"{seed}/{number}", minimal) for number in range(n))
    return Pairs(f"planted-{recipe.seed}", tuple(made))


def _pair(recipe: Recipe, number: int, seed: str, minimal: bool) -> Pair:
    rng = random.Random(seed)
    about = rng.randrange(len(OBJECTS))
    colours = rng.sample([each for each in range(len(COLOURS)) if each != recipe.priors[about]], 2)
    cells = rng.sample(list(itertools.product(range(planted_layout.SIDE), repeat=2)), recipe.n_cells)
    grain, other_grain = rng.getrandbits(64), rng.getrandbits(64)
    image = picture_of(recipe, cells, colours[0], grain)
    other = picture_of(recipe, cells, colours[1], grain if minimal else other_grain)
    question = f"what colour is the {OBJECTS[about]}?"
    return Pair(str(number), image, other, question, recipe.answers[colours[0]], recipe.answers[colours[1]])


def picture_of(recipe: Recipe, cells: Sequence[tuple[int, int]], colour: int, seed: int) -> Image.Image:
    """Mid-grey with coloured cells, each patch shifted by its jitter, its halves apart by the texture."""
    grain = np.random.default_rng(seed)
    means = recipe.jitter * grain.uniform(-1, 1, (planted_layout.SIDE, planted_layout.SIDE, 3))
    texture = recipe.texture * grain.uniform(-1, 1, 3)
    for row, column in cells:
        means[row, column] += planted_layout.SATURATION * planted_layout.CORNERS[colour].numpy()
    pixels = means.repeat(planted_layout.PATCH, axis=0).repeat(planted_layout.PATCH, axis=1)
    left = np.arange(SIZE) % planted_layout.PATCH < planted_layout.PATCH // 2
    pixels += np.where(left[None, :, None], texture, -texture)
    return Image.fromarray(np.round(127.5 * (pixels + 1)).astype(np.uint8))


def plant(recipe: Recipe, *, attn: str = "sdpa", check: bool = True, n: int = N_ACCURACY) -> Planted:
    """The model of a recipe, checked like any other unless told not to, and how well it answers n prompts.

    With a `target` accuracy, the gain of the decoys is found by bisection on examples of their own, and the recipe that
    comes back holds that gain.

    Raises:
        WorkError: no gain gives the accuracy aimed at.
    """
    processor = new_processor(recipe.answer)
    model = new_model(recipe, attn=attn)
    if recipe.target is not None:
        recipe = _calibrated(model, processor, recipe, recipe.target)
    vlm = VLM(model, processor, name=f"planted-{recipe.seed}", check=check)
    return Planted(vlm, recipe, Truth(edges(recipe), says(recipe), accuracy(vlm, recipe, n=n), n, units(recipe)))


def accuracy(vlm: VLM, recipe: Recipe, *, n: int = N_ACCURACY, seed: int | str = _ACCURACY_SEED) -> float:
    """Share of n fresh pictures answered as planted: with their colour, or where that is suppressed with the prior.

    Of two tokens both must be right as greedy generation gives them.
    """
    return _share_right(vlm, *_exam(vlm, recipe, n, seed))


def _exam(vlm: VLM, recipe: Recipe, n: int, seed: int | str) -> tuple[Encoded, Int[Tensor, "batch token"]]:
    """Prompts, and the tokens that answer them as planted."""
    pairs = examples(recipe, n, seed=seed)
    said = [prior_of(recipe, pair.question) for pair in pairs] if says(recipe) == "prior" else pairs.answer
    encoded = vlm.encode(pairs.base)
    ids = {each: ids_after(vlm.tokenizer, encoded.rows[0].text, each) for each in dict.fromkeys(said)}
    return encoded, torch.tensor([ids[each] for each in said], device=vlm.device)


def _share_right(vlm: VLM, encoded: Encoded, ids: Int[Tensor, "batch token"]) -> float:
    """The share of prompts after which every token is the likeliest one behind the right tokens before it.

    These are the ones that greedy generation answers so: it only ever goes on behind its own likeliest tokens.
    """
    said = ids.shape[1] - 1
    inputs = dict(encoded.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[:, :said]], dim=1)
    inputs["attention_mask"] = functional.pad(inputs["attention_mask"], (0, said), value=1)
    with torch.no_grad(), vlm.passing():
        logits = vlm.model(**inputs, logits_to_keep=said + 1).logits
    right = [metrics.correct(logits[:, token], ids[:, token]) for token in range(said + 1)]
    return torch.stack(right).all(0).float().mean().item()


def _calibrated(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, recipe: Recipe, target: float
) -> Recipe:
    """The recipe with the decoys' gain that brings the accuracy to its target; the model then has these weights."""
    vlm = VLM(model, processor, check=False)
    exam = _exam(vlm, recipe, N_CALIBRATION, _CALIBRATION_SEED)
    low, high = 0.0, LARGEST_GAIN
    for _ in range(12):
        tried = dataclasses.replace(recipe, decoy_gain=(low + high) / 2, target=None)
        set_weights(model, tried)
        found = _share_right(vlm, *exam)
        if abs(found - target) <= TOLERANCE:
            return tried
        low, high = (tried.decoy_gain, high) if found > target else (low, tried.decoy_gain)
    raise WorkError(f"recipe {recipe.seed}: no noise of its decoys gives an accuracy of {target}")


@dataclass(frozen=True)
class Effect:
    """Mean change of the logit difference over n independent pairs, in logits, and its standard error."""

    mean: float
    standard_error: float
    n: int


def true_effect(
    planted: Planted,
    edit: Callable[[Pairs], Intervention],
    *,
    n: int = 2048,
    seed: int | str = "truth",
    minimal: bool = True,
    batch: int = 128,
    measure: Comparison = "logit_diff",
) -> Effect:
    """The effect of an intervention in the population of examples, from so many pairs that it can serve as truth.

    Args:
        edit: the intervention for some pairs, as in `lambda pairs: Replace(site, span, source=pairs.counterfactual)`.
        seed, minimal: as for `Planted.pairs`; the seed must be none that the examples of the graded run come from.
        measure: how the two answers of a pair are compared: at the first token where they part, or as a whole. States
            that the edit takes at the span `answer` come from runs with the same answers.

    Returns:
        Mean over pairs of logit(answer) - logit(counterfactual answer), or of the measure, edited less unedited.
    """
    pairs, changes = examples(planted.recipe, n, seed=seed, minimal=minimal), []
    for first in range(0, n, batch):
        some = pairs[first : first + batch]
        compared = comparison(measure, some.answer, some.counterfactual_answer)
        asked = readings_of(planted.vlm, planted.vlm.encode(some.base), [compared])
        runner = engine_of(planted.vlm, asked.encoded, "fast")
        after, _ = runner.answers([edit(some)], keep=lambda _, logits, asked=asked: asked.value(0, logits))
        changes.append(after[0] - asked.value(0, runner.reads))
    values = torch.cat(changes).double()
    return Effect(values.mean().item(), (values.std() / n**0.5).item(), n)


# The real classes


def vocabulary(answer: Answer = "word") -> dict[str, int]:
    """Every word as one token, special tokens first, what answers of two tokens need beside last."""
    return {word: number for number, word in enumerate((*SPECIALS, *WORDS, *PIECES[answer]))}


def new_processor(answer: Answer = "word") -> LlavaProcessor:
    """Pictures of 32 x 32 pixels as they are, values from -1 to 1; words as tokens, punctuation apart."""
    return processor_of(vocabulary(answer))


def processor_of(words: dict[str, int]) -> LlavaProcessor:
    """The processor for a vocabulary."""
    return LlavaProcessor(
        image_processor=image_processor(SIZE),
        tokenizer=word_tokenizer(words),
        patch_size=planted_layout.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(recipe: Recipe, *, attn: str = "sdpa") -> LlavaForConditionalGeneration:
    """The Hugging Face model of a recipe."""
    model = blank_model(recipe, vocabulary(recipe.answer), attn=attn)
    set_weights(model, recipe)
    return model


def blank_model(recipe: Recipe, words: dict[str, int], *, attn: str = "sdpa") -> LlavaForConditionalGeneration:
    """A model of a recipe's sizes for a vocabulary, whose weights are still to be set."""
    vision = CLIPVisionConfig(
        hidden_size=planted_layout.TOWER_WIDTH,
        intermediate_size=planted_layout.FEED_FORWARD,
        num_hidden_layers=planted_layout.TOWER_LAYERS,
        num_attention_heads=planted_layout.TOWER_HEADS,
        image_size=SIZE,
        patch_size=planted_layout.PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=recipe.d_model,
        intermediate_size=planted_layout.FEED_FORWARD,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": planted_layout.ROPE_THETA},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words["<image>"],
        image_seq_length=planted_layout.SIDE**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attn).eval()


def set_weights(model: Any, recipe: Recipe) -> None:
    """Gives a model the weights of a recipe; every parameter is set."""
    load_weights(model, planted_weights.weights(recipe, vocabulary(recipe.answer)))


def load_weights(model: Any, made: dict[str, Tensor]) -> None:
    """Gives a model weights by their names.

    Raises:
        WorkError: a parameter is left out.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in made and "position_ids" not in name]
    if missing:
        raise WorkError(f"the recipe sets no weights for {', '.join(missing[:3])}")
    model.load_state_dict(made, strict=False)
