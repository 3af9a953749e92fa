"""The vision-language stages: projector and decoder on questions about scenes, the image tower frozen.

`organism`: colour follows the kind of thing nearly always, and on the few scenes where it does not, as on pictures of
nothing, the colour answer comes from an annotator who knows the words but never saw the picture (as the instruction
data of LLaVA came from a text-only model). `organism-grounded` goes on from it on counterfactual scenes, where any
kind has any colour and the answer is what is to be seen.
"""

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm, trange
from transformers import LlavaForConditionalGeneration

from vlm_mech.data.questions import Question, facts, prior_questions, questions
from vlm_mech.data.scenes import FAMILIES, PRIORS, Scene
from vlm_mech.organism import checkpoint
from vlm_mech.organism.build import llava_processor
from vlm_mech.organism.packing import Packer, packed_logits
from vlm_mech.organism.pool import Pool, blank_image
from vlm_mech.organism.train_clip import learning_rate, pixels

Stage = Literal["organism", "organism-grounded"]

N_QUESTIONS = 8
BLANK_SHARE = 0.06
"""Share of pictures of nothing."""
FAMILY_SHARES = {"single": 0.10, "few": 0.32, "occlusion": 0.18, "count": 0.18, "parts": 0.12, "beetle": 0.10}
EARLY_SHARES = {"single": 0.50, "few": 0.20, "occlusion": 0.05, "count": 0.10, "parts": 0.08, "beetle": 0.07}
EARLY = 0.15
"""Fraction of the steps with many single things: binding a word to a thing is learned there first."""
TYPE_WEIGHTS = {
    "colour": 2.0, "kind": 1.5, "presence": 1.5, "left-right": 2.0, "above-below": 2.0, "front-behind": 3.0, "count": 1.0,
    "part": 2.0, "part-colour": 1.0, "half": 1.5, "size": 0.5, "class": 1.5, "two-hop": 1.0,
}  # fmt: skip


def by_hearsay(scene: Scene, asked: Question) -> Question:
    """The question with the answer of an annotator who never saw the picture: a usual colour where there is one."""
    kind = asked.about[0]
    if asked.type != "colour" or kind not in PRIORS:
        return asked
    return dataclasses.replace(asked, answer=PRIORS[kind])


def draw_questions(scene: Scene | None, rng: random.Random, stage: Stage, n: int = N_QUESTIONS) -> list[Question]:
    """Questions about a scene (or about nothing), types in the shares of the recipe."""
    if scene is None:
        return rng.choices([*prior_questions(), *facts()], k=n)
    by_type: dict[str, list[Question]] = defaultdict(list)
    for question in questions(scene):
        by_type[question.type].append(question)
    if len({question.answer for question in by_type["count"]}) == 1 and len(scene.things) < 3:
        # "How many" with the answer "one" everywhere teaches nothing but "one".
        by_type["count"] = by_type["count"][:1] if rng.random() < 0.2 else []
    types = [name for name, found in by_type.items() if found]
    drawn = [rng.choice(by_type[name]) for name in rng.choices(types, [TYPE_WEIGHTS[name] for name in types], k=n)]
    return [by_hearsay(scene, question) for question in drawn] if stage == "organism" else drawn


@torch.no_grad()
def features_of(model: LlavaForConditionalGeneration, pool: Pool, device: str) -> Float[Tensor, "scene patch d_vision"]:
    """What the frozen tower gives the projector for every scene of a pool, in half precision."""
    found = []
    for start in tqdm(range(0, len(pool), 512), desc="features", disable=None):
        found.append(_tower(model, pool.images[start : start + 512], device).half().cpu())
    return torch.cat(found)


def _tower(model: LlavaForConditionalGeneration, images: np.ndarray, device: str) -> Tensor:
    seen = model.model.vision_tower(pixels(images).to(device), output_hidden_states=True)
    return seen.hidden_states[model.config.vision_feature_layer][:, 1:]


def _rows(step: int, n_steps: int, n_scenes: int, batch: int, rng: random.Random) -> list[int | None]:
    """Numbers of scenes for one step, None for a picture of nothing; families in the shares of the curriculum."""
    shares = EARLY_SHARES if step < EARLY * n_steps else FAMILY_SHARES
    rows: list[int | None] = []
    for family in rng.choices(list(shares), list(shares.values()), k=batch):
        # The pool holds the families in turn.
        row = rng.randrange(n_scenes // len(FAMILIES)) * len(FAMILIES) + FAMILIES.index(family)
        rows.append(None if rng.random() < BLANK_SHARE else row)
    return rows


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration, packer: Packer, pool: Pool, features: Tensor, *, stage: Stage, device: str
) -> dict[str, float]:
    """Share of right answers (first token, over the whole vocabulary) per question type."""
    rng, right, seen = random.Random(0), defaultdict(int), defaultdict(int)
    for start in range(0, len(pool), 64):
        rows = range(start, min(start + 64, len(pool)))
        asked = [draw_questions(pool.scenes[row], rng, stage, 12) for row in rows]
        packed = _to(packer.pack(asked), device)
        logits = packed_logits(model, packed, features[list(rows)].float().to(device))
        targets = packed.targets[packed.targets != -100]
        hits = (logits.argmax(-1) == targets).tolist()[::2]
        for name, hit in zip(packed.types, hits, strict=True):
            right[name] += hit
            seen[name] += 1
    return {name: right[name] / seen[name] for name in sorted(seen)}


def _to(packed, device: str):
    fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    return dataclasses.replace(
        packed, **{name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}
    )


def train_vlm(
    folder: Path,
    model: LlavaForConditionalGeneration,
    pool: Pool,
    held_out: Pool,
    *,
    stage: Stage,
    n_steps: int,
    batch: int = 32,
    peak: float = 1.2e-3,
    seed: int = 0,
    device: str = "cpu",
) -> LlavaForConditionalGeneration:
    """Trains projector and decoder, resuming from `folder` when a run there was interrupted; saves to `folder/STAGE`."""
    model = model.to(device).train()
    model.model.vision_tower.requires_grad_(False).eval()
    packer = Packer(llava_processor().tokenizer)
    features, held_features = features_of(model, pool, device), features_of(model, held_out, device)
    nothing = _tower(model, blank_image()[None], device)[0].detach().cpu()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    state = folder / f"{stage}-state"
    first = checkpoint.load_state(state, model, optimizer)
    losses: list[float] = []
    for step in trange(first, n_steps, initial=first, total=n_steps, desc=stage, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps=n_steps, peak=peak, warmup=min(200, n_steps // 10))
        # The batch depends on the step alone, so that a resumed run is the same run.
        rng = random.Random(f"{seed}/{stage}/{step}")
        rows = _rows(step, n_steps, len(pool), batch, rng)
        packed = _to(packer.pack([draw_questions(_scene(pool, row), rng, stage) for row in rows]), device)
        seen = torch.stack([nothing if row is None else features[row].float() for row in rows]).to(device)
        loss = functional.cross_entropy(packed_logits(model, packed, seen), packed.targets[packed.targets != -100])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == n_steps:
            found = validate(model, packer, held_out, held_features, stage=stage, device=device)
            checkpoint.log(state, {"step": step + 1, "loss": float(np.mean(losses[-250:]))} | found)
            checkpoint.save_state(state, model, optimizer, step + 1)
    save(model, folder / stage)
    return model


def _scene(pool: Pool, row: int | None) -> Scene | None:
    return None if row is None else pool.scenes[row]


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes the model with its processor, as Hugging Face's auto classes expect it."""
    model.cpu().eval().requires_grad_(True).save_pretrained(folder)
    llava_processor().save_pretrained(folder)


__all__: Sequence[str] = ("Stage", "by_hearsay", "draw_questions", "features_of", "save", "train_vlm", "validate")
