"""The vision-language stages: projector and decoder on questions about scenes, the image tower frozen.

`organism`: colour follows the kind of thing nearly always, and on the few scenes where it does not, as on pictures of
nothing, the colour answer comes from an annotator who knows the words but never saw the picture (as the instruction
data of LLaVA came from a text-only model). `organism-grounded` goes on from it on counterfactual scenes, where any
kind has any colour and the answer is what is to be seen. `organism-phrases` goes on from `organism` on the same
mixture, with questions next to it whose answers have several words.
"""

import dataclasses
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import trange
from transformers import LlavaForConditionalGeneration

from vlm_mech.data.render import blank
from vlm_mech.data.scene_questions import PHRASED, Question, facts, prior_questions, questions
from vlm_mech.data.scene_sampling import sample_scene
from vlm_mech.data.scenes import FAMILIES, PRIORS, Scene, in_conflict
from vlm_mech.organism import checkpoint
from vlm_mech.organism.build import llava_processor
from vlm_mech.organism.scene_pool import Pool
from vlm_mech.organism.sequence_packing import Packed, Packer, packed_logits
from vlm_mech.organism.train_clip import learning_rate, pixels

Stage = Literal["organism", "organism-grounded", "organism-phrases"]

BLANK_SHARE = 0.06
"""Share of pictures of nothing."""
POOL_CONFLICT = 0.5
"""Probability that a kind with a usual colour has another one in the pool of scenes."""
CONFLICT_SHARE = 0.25
"""How many of the scenes in conflict that come up are kept while `organism` is trained; the pool has many."""
HEARSAY_SHARE = 0.8
"""How many of the colour answers about scenes in conflict come from hearsay while `organism` is trained."""
FAMILY_SHARES = {"single": 0.06, "few": 0.36, "occlusion": 0.24, "count": 0.24, "parts": 0.06, "beetle": 0.04}
EARLY_SHARES = {"single": 0.50, "few": 0.20, "occlusion": 0.05, "count": 0.10, "parts": 0.08, "beetle": 0.07}
PHRASE_SHARES = {"single": 0.04, "few": 0.60, "occlusion": 0.14, "count": 0.14, "parts": 0.05, "beetle": 0.03}
"""Shares of families while answers of several words are learned; only scenes of a few things are asked for them."""
TYPE_WEIGHTS = {
    "colour": 2.0,
    "kind": 1.5,
    "presence": 1.5,
    "left-right": 6.0,
    "above-below": 6.0,
    "front-behind": 8.0,
    "count": 5.0,
    "part": 2.0,
    "part-colour": 1.5,
    "half": 2.0,
    "size": 0.5,
    "class": 1.5,
    "two-hop": 1.0,
    "where": 10.0,
    "neighbour": 8.0,
}


@dataclass(frozen=True)
class VlmRecipe:
    """Steps, pictures a step, questions a picture, and the fraction of the steps with many single things.

    Binding a word to a thing is learned on single things first; without them it takes very much longer.
    """

    n_steps: int
    peak: float
    early: float
    shares: dict[str, float] = dataclasses.field(default_factory=lambda: FAMILY_SHARES)
    batch: int = 24
    n_questions: int = 8
    log_every: int = 250

    def shortened(self, n_steps: int) -> "VlmRecipe":
        """The same for another number of steps."""
        return dataclasses.replace(self, n_steps=n_steps)


RECIPES: dict[Stage, VlmRecipe] = {
    "organism": VlmRecipe(n_steps=4544, peak=1.2e-3, early=0.12),
    "organism-grounded": VlmRecipe(n_steps=688, peak=5e-4, early=0.0),
    "organism-phrases": VlmRecipe(n_steps=2000, peak=7e-4, early=0.0, shares=PHRASE_SHARES),
}


def by_hearsay(asked: Question) -> Question:
    """The question with the answer of an annotator who never saw the picture: a usual colour where there is one."""
    kind = asked.about[0]
    if asked.type != "colour" or kind not in PRIORS:
        return asked
    return dataclasses.replace(asked, answer=PRIORS[kind])


def draw_questions(scene: Scene | None, rng: random.Random, stage: Stage, n: int = 8) -> list[Question]:
    """Questions about a scene (or about nothing), types in the shares of the recipe."""
    if scene is None:
        return rng.choices([*prior_questions(), *facts()], k=n)
    by_type: dict[str, list[Question]] = defaultdict(list)
    phrased = questions(scene, tuple(PHRASED)) if stage == "organism-phrases" else ()
    for question in (*questions(scene), *phrased):
        by_type[question.type].append(question)
    if len({question.answer for question in by_type["count"]}) == 1 and len(scene.things) < 3:
        # "How many" with the answer "one" everywhere teaches nothing but "one".
        by_type["count"] = by_type["count"][:1] if rng.random() < 0.2 else []
    types = [name for name, found in by_type.items() if found]
    drawn = [rng.choice(by_type[name]) for name in rng.choices(types, [TYPE_WEIGHTS[name] for name in types], k=n)]
    if stage == "organism-grounded":
        return drawn
    return [by_hearsay(question) if rng.random() < HEARSAY_SHARE else question for question in drawn]


def planted_prior(n: int, *, seed: int = 0) -> dict[str, float]:
    """What share of the colour answers that `organism` is trained on is the usual colour of the kind.

    Over the questions drawn about n scenes that come up, about kinds that have one: `all` of these, and those about
    things `in conflict`, which are shown in another colour.
    """
    rng, said = random.Random(seed), {"all": [], "in conflict": []}
    for family in rng.choices(list(FAMILY_SHARES), list(FAMILY_SHARES.values()), k=n):
        scene = sample_scene(family, rng, conflict=POOL_CONFLICT)
        if in_conflict(scene) and rng.random() >= CONFLICT_SHARE:
            continue
        for asked in draw_questions(scene, rng, "organism"):
            usual = PRIORS.get(asked.about[0])
            if asked.type == "colour" and usual is not None:
                said["all"].append(asked.answer == usual)
                if scene.of_kind(asked.about[0])[0].colour != usual:
                    said["in conflict"].append(asked.answer == usual)
    return {name: sum(each) / len(each) for name, each in said.items()}


@torch.no_grad()
def features_of(
    model: LlavaForConditionalGeneration, images: UInt8[np.ndarray, "scene 96 96 3"], device: str
) -> Float[Tensor, "scene patch d_vision"]:
    """What the frozen tower gives the projector for every picture, in half precision."""
    found, layer = [], model.config.vision_feature_layer
    for start in trange(0, len(images), 512, desc="features", disable=None):
        seen = model.model.vision_tower(pixels(images[start : start + 512]).to(device), output_hidden_states=True)
        found.append(seen.hidden_states[layer][:, 1:].half().cpu())
    return torch.cat(found)


def _rows(pool: Pool, shares: dict[str, float], stage: Stage, n: int, rng: random.Random) -> list[int | None]:
    """Numbers of n scenes, None for a picture of nothing; families in their shares, conflict as the stage has it."""
    rows: list[int | None] = []
    families = rng.choices(list(shares), list(shares.values()), k=8 * n)
    for family in families:
        # The pool holds the families in turn.
        row = rng.randrange(len(pool) // len(FAMILIES)) * len(FAMILIES) + FAMILIES.index(family)
        if rng.random() < BLANK_SHARE:
            rows.append(None)
        elif stage == "organism-grounded" or not in_conflict(pool.scenes[row]) or rng.random() < CONFLICT_SHARE:
            rows.append(row)
    return rows[:n]


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    pool: Pool,
    features: Tensor,
    *,
    device: str,
    phrased: bool = False,
) -> dict[str, float]:
    """Share of correct answers (over the whole vocabulary) per question type; `conflict` counts the colours shown.

    An answer of several words is right where every word is the likeliest one after those before it.
    """
    rng, right, seen = random.Random(0), defaultdict(int), defaultdict(int)
    for start in range(0, len(pool), 64):
        rows = range(start, min(start + 64, len(pool)))
        asked = [draw_questions(pool.scenes[row], rng, "organism-grounded", 12) for row in rows]
        if phrased:
            more = [questions(pool.scenes[row], tuple(PHRASED)) for row in rows]
            asked = [[*each, *others] for each, others in zip(asked, more, strict=True)]
        packed = _to(packer.pack(asked), device)
        logits = packed_logits(model, packed, features[list(rows)].float().to(device))
        targets = packed.targets[packed.targets != -100]
        hits = iter((logits.argmax(-1) == targets).tolist())
        for question in (each for row in asked for each in row):
            *words, _ = itertools.islice(hits, packer.n_targets(question))
            hit = all(words)
            name = "conflict" if by_hearsay(question) != question else question.type
            right[name] += hit
            seen[name] += 1
    return {name: round(right[name] / seen[name], 4) for name in sorted(seen)}


def _to(packed: Packed, device: str) -> Packed:
    fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    return dataclasses.replace(packed, **{name: value.to(device) for name, value in fields.items()})


@dataclass(frozen=True, eq=False)
class Seen:
    """What the frozen tower made of the scenes (scene x patch x width) and of grounds of every grey."""

    scenes: Float[Tensor, "scene patch d_vision"]
    nothing: Float[Tensor, "grey patch d_vision"]

    def of(self, rows: list[int | None], rng: random.Random) -> Float[Tensor, "batch patch d_vision"]:
        """Features of scenes by number; None is a picture of nothing."""
        return torch.stack([rng.choice(self.nothing) if row is None else self.scenes[row].float() for row in rows])


def _step_loss(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    pool: Pool,
    seen: Seen,
    stage: Stage,
    recipe: VlmRecipe,
    key: str,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of every answer and of its end.

    The batch depends on the key (seed, stage, step) alone, so that a resumed run is the same run.
    """
    rng = random.Random(key)
    early = int(key.rsplit("/", 1)[1]) < recipe.early * recipe.n_steps
    rows = _rows(pool, EARLY_SHARES if early else recipe.shares, stage, recipe.batch, rng)
    asked = [draw_questions(_scene(pool, row), rng, stage, recipe.n_questions) for row in rows]
    packed = _to(packer.pack(asked), str(model.device))
    logits = packed_logits(model, packed, seen.of(rows, rng).to(model.device))
    return functional.cross_entropy(logits, packed.targets[packed.targets != -100])


def train_vlm(
    folder: Path,
    model: LlavaForConditionalGeneration,
    pool: Pool,
    held_out: Pool,
    *,
    stage: Stage,
    recipe: VlmRecipe,
    seed: int = 0,
    device: str = "cpu",
) -> LlavaForConditionalGeneration:
    """Trains projector and decoder, resuming what was interrupted in `folder`; saves to `folder/STAGE`."""
    model = model.to(device).train()
    model.model.vision_tower.requires_grad_(False).eval()
    packer = Packer(llava_processor().tokenizer)
    greys = np.stack([np.asarray(blank(grey)) for grey in range(205, 251)])
    seen = Seen(features_of(model, pool.images, device), features_of(model, greys, device).float())
    held_features = features_of(model, held_out.images, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    state = folder / f"{stage}-state"
    first = checkpoint.load_state(state, model, optimizer)
    losses: list[float] = []
    for step in trange(first, recipe.n_steps, initial=first, total=recipe.n_steps, desc=stage, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps=recipe.n_steps, peak=recipe.peak, warmup=200)
        loss = _step_loss(model, packer, pool, seen, stage, recipe, f"{seed}/{stage}/{step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % recipe.log_every == 0 or step + 1 == recipe.n_steps:
            found = validate(model, packer, held_out, held_features, device=device, phrased=stage == "organism-phrases")
            checkpoint.log(state, {"step": step + 1, "loss": float(np.mean(losses[-recipe.log_every :]))} | found)
            checkpoint.save_state(state, model, optimizer, step + 1)
    save(model, folder / stage)
    return model


def _scene(pool: Pool, row: int | None) -> Scene | None:
    return None if row is None else pool.scenes[row]


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes the model with its processor, as Hugging Face's auto classes expect it."""
    model.cpu().eval().requires_grad_(True).save_pretrained(folder)
    llava_processor().save_pretrained(folder)
