"""The contrastive stage: image tower and text tower on captioned scenes.

Beside the contrastive loss, linear heads read from each patch token of the layer that LLaVA uses what the patch shows
(name, colour, depth, species). Without such dense supervision a tower this small, trained this briefly, keeps too
little of where things are. The heads are dropped; the released model is a plain `CLIPModel`.
"""

import math
import random
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange
from transformers import CLIPModel

from vlm_mech.data.questions import caption
from vlm_mech.organism import checkpoint
from vlm_mech.organism.build import WIDTH, clip_processor, new_clip, tokenizer
from vlm_mech.organism.pool import LABELS, Pool, make_pool

DENSE_WEIGHT = 1.0


class ClipWithHeads(nn.Module):
    """The contrastive model and the heads that read patches while it is trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.clip = new_clip(seed=seed)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in LABELS.items()})


def pixels(images: np.ndarray) -> Float[Tensor, "batch 3 96 96"]:
    """Pictures as the processor would give them (checked against it in the tests)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def learning_rate(step: int, *, n_steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


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


def _dense(model: ClipWithHeads, patches: Tensor, labels: Tensor) -> Tensor:
    losses = []
    for index, name in enumerate(LABELS):
        found = model.heads[name](patches).flatten(0, 1)
        # Most patches show the ground; they count a tenth.
        weight = torch.ones(found.shape[-1], device=found.device)
        weight[0] = 0.1
        losses.append(functional.cross_entropy(found, labels[..., index].flatten(), weight))
    return torch.stack(losses).mean()


def _batch(pool: Pool, rows: np.ndarray, rng: random.Random, device: str) -> tuple[Tensor, list[str], Tensor]:
    captions = [caption(pool.scenes[row], rng) for row in rows]
    return pixels(pool.images[rows]).to(device), captions, torch.from_numpy(pool.labels[rows].astype(np.int64)).to(device)


@torch.no_grad()
def validate(model: ClipWithHeads, pool: Pool, *, device: str, n: int = 512) -> dict[str, float]:
    """Retrieval among 128 and accuracy of each dense head on patches that show something."""
    rng, hits, right, seen = random.Random(0), [], dict.fromkeys(LABELS, 0.0), dict.fromkeys(LABELS, 0.0)
    for start in range(0, n, 128):
        images, captions, labels = _batch(pool, np.arange(start, start + 128), rng, device)
        logits, patches, _ = _forward(model, images, captions)
        best = logits.argmax(-1).tolist()
        hits += [captions[guess] == captions[row] for row, guess in enumerate(best)]
        for index, name in enumerate(LABELS):
            truth = labels[..., index]
            shown = truth > 0
            right[name] += (model.heads[name](patches).argmax(-1) == truth)[shown].sum().item()
            seen[name] += shown.sum().item()
    return {"retrieval": float(np.mean(hits))} | {name: right[name] / seen[name] for name in LABELS}


def train_clip(
    folder: Path, *, n_steps: int, n_scenes: int, batch: int = 192, peak: float = 1e-3, seed: int = 0, device: str = "cpu"
) -> CLIPModel:
    """Trains the contrastive model, resuming from `folder` when a run there was interrupted; saves it to `folder/clip`."""
    pool = make_pool(folder / "scenes", n_scenes, seed=seed, split="train", conflict=0.5)
    held_out = make_pool(folder / "scenes", 512, seed=seed, split="validation", conflict=0.5)
    model = ClipWithHeads(seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    first = checkpoint.load_state(folder / "clip-state", model, optimizer)
    for step in trange(first, n_steps, initial=first, total=n_steps, desc="clip", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps=n_steps, peak=peak)
        # The batch depends on the step alone, so that a resumed run is the same run.
        rows = np.random.default_rng((seed, step)).integers(0, len(pool), batch)
        images, captions, labels = _batch(pool, rows, random.Random(f"{seed}/{step}"), device)
        logits, patches, _ = _forward(model, images, captions)
        contrastive = _contrastive(logits, captions)
        dense = _dense(model, patches, labels)
        optimizer.zero_grad(set_to_none=True)
        (contrastive + DENSE_WEIGHT * dense).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == n_steps:
            row = {"step": step + 1, "contrastive": contrastive.item(), "dense": dense.item()}
            checkpoint.log(folder / "clip-state", row | validate(model, held_out, device=device))
            checkpoint.save_state(folder / "clip-state", model, optimizer, step + 1)
    model.clip.cpu().eval().save_pretrained(folder / "clip")
    clip_processor().save_pretrained(folder / "clip")
    return model.clip
