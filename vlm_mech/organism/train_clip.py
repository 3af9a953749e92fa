"""The contrastive stage: image tower and text tower on captioned scenes.

Linear heads read from each patch token of the layer that LLaVA uses what the patch shows (name, colour, depth, species)
and where the centre of the thing is. The image tower first learns these alone, in many small steps, then all of it
learns them together with the contrastive loss. Contrast alone, this briefly, leaves a tower this small with too little
of what is where. The heads are dropped; the released model is a plain `CLIPModel`.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import trange
from transformers import CLIPModel

from vlm_mech.data.scene_questions import caption
from vlm_mech.data.scenes import FAMILIES, SIZE
from vlm_mech.organism import checkpoint
from vlm_mech.organism.build import WIDTH, clip_processor, new_clip, tokenizer
from vlm_mech.organism.scene_pool import LABELS, Pool

DENSE_WEIGHT = 1.0
CENTRE_WEIGHT = 5.0
"""Of the squared error of centres, in half pictures. Without it the tower forgets where a patch is."""
FAMILY_SHARES = [0.4 if family == "occlusion" else 0.12 for family in FAMILIES]
"""Shares of the scene families: which of two things is in front takes longest to see."""
COMMON_WEIGHTS = {
    "name": {"ground": 0.1},
    "colour": {"ground": 0.1},
    "depth": {"ground": 0.1, "alone": 0.2},
    "species": {"none": 0.1},
}
"""Values of labels that most patches have, and how much less than the others they count."""


@dataclass(frozen=True)
class ClipRecipe:
    """Steps and pictures a step: first for the tower with its heads alone, then together with the contrast."""

    n_tower_steps: int = 6500
    n_steps: int = 800
    tower_batch: int = 32
    batch: int = 96
    log_every: int = 200
    seed: int = 0


class ClipWithHeads(nn.Module):
    """The contrastive model and the heads that read patches while it is trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.clip = new_clip(seed=seed)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in LABELS.items()})
        self.centre = nn.Linear(WIDTH, 2)


def pixels(images: np.ndarray) -> Float[Tensor, "batch 3 96 96"]:
    """Pictures as the processor would give them (checked against it in the tests)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def learning_rate(step: int, *, n_steps: int, peak: float, warmup: int = 100, floor: float = 0.05) -> float:
    """Linear warm-up, then cosine to `floor` times the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _patches(model: ClipWithHeads, images: Float[Tensor, "batch 3 96 96"]) -> Float[Tensor, "batch patch width"]:
    """Patch tokens of the layer below the last."""
    return model.clip.vision_model(pixel_values=images, output_hidden_states=True).hidden_states[-2][:, 1:]


def _forward(model: ClipWithHeads, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity logits image x caption, and the patch tokens of the layer below the last."""
    words = tokenizer(closing=True)(captions, padding=True, return_tensors="pt").to(images.device)
    clip = model.clip
    seen = clip.vision_model(pixel_values=images, output_hidden_states=True)
    told = clip.text_model(**words)
    image = functional.normalize(clip.visual_projection(seen.pooler_output), dim=-1)
    text = functional.normalize(clip.text_projection(told.pooler_output), dim=-1)
    return clip.logit_scale.exp().clamp(max=100) * image @ text.T, seen.hidden_states[-2][:, 1:], image


def _contrastive(logits: Tensor, captions: list[str]) -> Tensor:
    """Cross-entropy both ways; the same caption twice in a batch is right for both pictures."""
    same = torch.tensor([[one == other for other in captions] for one in captions], device=logits.device).float()
    target = same / same.sum(-1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def _dense(model: ClipWithHeads, patches: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    losses = []
    for index, name in enumerate(LABELS):
        found = model.heads[name](patches).flatten(0, 1)
        weight = torch.tensor([COMMON_WEIGHTS[name].get(value, 1.0) for value in LABELS[name]], device=found.device)
        losses.append(functional.cross_entropy(found, labels[..., index].flatten(), weight))
    error = (model.centre(patches) - centres).square().mean(-1)
    shown = torch.where(labels[..., 0] > 0, 1.0, 0.1)
    return torch.stack(losses).mean() + CENTRE_WEIGHT * (error * shown).sum() / shown.sum()


def _batch(pool: Pool, rows: np.ndarray, rng: random.Random, device: str) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Pictures, captions, labels of patches, and centres from -1 to 1."""
    captions = [caption(pool.scenes[row], rng) for row in rows]
    labels = torch.from_numpy(pool.labels[rows].astype(np.int64))
    centres = torch.from_numpy(pool.centres[rows]).float() * 2 / SIZE - 1
    return pixels(pool.images[rows]).to(device), captions, labels.to(device), centres.to(device)


@torch.no_grad()
def validate(model: ClipWithHeads, pool: Pool, *, device: str, n: int = 512) -> dict[str, float]:
    """Retrieval among 128, and accuracy of each dense head and mean error in pixels on patches that show something."""
    errors: list[Tensor] = []
    rng, hits, right, seen = random.Random(0), [], dict.fromkeys(LABELS, 0.0), dict.fromkeys(LABELS, 0.0)
    for start in range(0, min(n, len(pool)), 128):
        rows = np.arange(start, min(start + 128, len(pool)))
        images, captions, labels, centres = _batch(pool, rows, rng, device)
        logits, patches, _ = _forward(model, images, captions)
        best = logits.argmax(-1).tolist()
        errors.append((model.centre(patches) - centres).abs()[labels[..., 0] > 0] * SIZE / 2)
        hits += [captions[guess] == captions[row] for row, guess in enumerate(best)]
        for index, name in enumerate(LABELS):
            truth = labels[..., index]
            shown = truth > (1 if name == "depth" else 0)
            right[name] += (model.heads[name](patches).argmax(-1) == truth)[shown].sum().item()
            seen[name] += shown.sum().item()
    found = {"retrieval": float(np.mean(hits)), "centre error": torch.cat(errors).mean().item()}
    return found | {name: right[name] / max(1, seen[name]) for name in LABELS}


def _loss(model: ClipWithHeads, pool: Pool, step: int, recipe: ClipRecipe, device: str) -> dict[str, Tensor]:
    """The losses of one step. The batch depends on the step alone, so that a resumed run is the same run."""
    alone = step < recipe.n_tower_steps
    rng, batch = np.random.default_rng((recipe.seed, step)), recipe.tower_batch if alone else recipe.batch
    # The pool holds the families in turn.
    families = rng.choice(len(FAMILIES), batch, p=FAMILY_SHARES)
    rows = rng.integers(0, len(pool) // len(FAMILIES), batch) * len(FAMILIES) + families
    images, captions, labels, centres = _batch(pool, rows, random.Random(f"{recipe.seed}/{step}"), device)
    if alone:
        return {"dense": _dense(model, _patches(model, images), labels, centres)}
    logits, patches, _ = _forward(model, images, captions)
    return {
        "contrastive": _contrastive(logits, captions),
        "dense": DENSE_WEIGHT * _dense(model, patches, labels, centres),
    }


def _rate(step: int, recipe: ClipRecipe) -> float:
    if step < recipe.n_tower_steps:
        return learning_rate(step, n_steps=recipe.n_tower_steps, peak=2e-3, floor=0.25)
    return learning_rate(step - recipe.n_tower_steps, n_steps=recipe.n_steps, peak=1e-3)


def train_clip(folder: Path, pool: Pool, held_out: Pool, recipe: ClipRecipe, *, device: str = "cpu") -> CLIPModel:
    """Trains the contrastive model, resuming what was interrupted in `folder`; saves it to `folder/clip`."""
    model = ClipWithHeads(recipe.seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    first = checkpoint.load_state(folder / "clip-state", model, optimizer)
    total = recipe.n_tower_steps + recipe.n_steps
    for step in trange(first, total, initial=first, total=total, desc="clip", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, recipe)
        losses = _loss(model, pool, step, recipe, device)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % recipe.log_every == 0 or step + 1 == total:
            row = {"step": step + 1} | {name: loss.item() for name, loss in losses.items()}
            checkpoint.log(folder / "clip-state", row | validate(model, held_out, device=device))
            checkpoint.save_state(folder / "clip-state", model, optimizer, step + 1)
    model.clip.cpu().eval().save_pretrained(folder / "clip")
    clip_processor().save_pretrained(folder / "clip")
    return model.clip
