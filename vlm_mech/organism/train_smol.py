"""Teaches a real language model to see: `python -m vlm_mech.organism.train_smol --out DIR`.

The decoder of `smollm2` gets the frozen image tower of the embedded models. First the projector alone is fitted, so
that each patch's state is close to the decoder's own embeddings of the words for what the patch shows; then projector
and LoRA (arXiv 2106.09685) are trained on packed questions about generated scenes. Kinds with a usual colour come in
all colours alike and their colour is never asked: what the model says of it is seen, or its own language prior. A run
that was interrupted goes on from its last checkpoint in DIR. It leaves DIR/organism-smol/adapter.safetensors and
DIR/state/log.jsonl.
"""

import copy
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import trange

from vlm_mech.data.scene_questions import Question, questions
from vlm_mech.data.scenes import PRIORS, Scene
from vlm_mech.errors import one_line_errors
from vlm_mech.models.language_models import smollm2_folder as decoder_folder
from vlm_mech.models.taught_eye import ADAPTER, ORGANISM_SMOL
from vlm_mech.models.taught_eye import SCALE as SCALE_NOTE
from vlm_mech.organism import checkpoint
from vlm_mech.organism.build import N_PATCHES
from vlm_mech.organism.scene_pool import INKS, NAMES, Pool, make_pool
from vlm_mech.organism.sequence_packing import Packed, Packer, Turn, packed_logits
from vlm_mech.organism.text_anchor import SCALE, Lora, anchor_texts, divergence
from vlm_mech.organism.train_clip import learning_rate
from vlm_mech.organism.train_vlm import features_of
from vlm_mech.runs.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, ProcessorMixin

FAMILIES = ("single", "few", "count")
TYPE_WEIGHTS = {"colour": 1.5, "kind": 2.0, "presence": 3.0, "left-right": 4.0, "count": 3.0}
"""Types of question, and how often each is asked where a scene allows it."""
ANY_COLOUR = 7 / 8
"""Probability that a kind with a usual colour has another one: all eight colours come alike."""
ONE_THING = 1 / 6
"""Share of pictures with one thing alone, about which little is to be learned."""
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of every block that get an adapter."""


@dataclass(frozen=True)
class SmolConfig:
    """How to train the eye."""

    out: Path
    """Folder for scenes, checkpoints, log and the adapter."""
    steps: int = 320
    """Steps of projector and LoRA; the learning rate falls until then."""
    stop: int | None = None
    """Stop after that many of the steps, to go on later."""
    peak: float = 1e-3
    """Highest learning rate of these."""
    batch: int = 12
    """Pictures a step."""
    n_questions: int = 8
    """Questions a picture."""
    fit_steps: int = 3000
    """Steps in which the projector alone is fitted to word embeddings."""
    n_texts: int = 6
    """Texts a step, without pictures, on which the model is held to what the decoder says without LoRA."""
    anchor: float = 1.0
    """Weight of the divergence from that in the loss."""
    n_scenes: int = 20000
    """Scenes to train on."""
    n_held_out: int = 192
    """Scenes (validation split) that the log of accuracies is measured on."""
    log_every: int = 50
    """Steps between checkpoints, each with a line of the log."""
    seed: int = 0
    """Which scenes, first weights and batches."""
    start: Path | None = None
    """An adapter to go on from: the projector is fitted to its own output, and to where each patch lies."""
    dtype: str = "float32"
    """In what the decoder computes: bfloat16 or float32. What is trained is kept in float32."""
    threads: int | None = None
    """Threads for PyTorch; its own choice by default."""


def with_lora(model: "LlavaForConditionalGeneration", *, seed: int) -> None:
    """Puts adapters at every block's matrices; they and the projector are all that is trained."""
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in model.model.language_model.layers:
            for part in (block.self_attn, block.mlp):
                for name in LAYERS:
                    if hasattr(part, name):
                        setattr(part, name, Lora(getattr(part, name)))
    model.model.multi_modal_projector.float().requires_grad_(True)


def turn_of(processor: "ProcessorMixin") -> Turn:
    """How the chat template puts a question about one picture, the picture's tokens written out."""
    mark = "QUESTION"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": mark}]}]
    text = str(processor.apply_chat_template(chat, add_generation_prompt=True))
    before, between = text.replace("<image>", "<image>" * N_PATCHES).split(mark)
    return Turn(before, between, str(processor.tokenizer.eos_token))


def draw_questions(scene: Scene, rng: random.Random, n: int) -> list[Question]:
    """Questions about a scene, types in the shares of `TYPE_WEIGHTS`; none of the colour of a kind with a usual one."""
    by_type: dict[str, list[Question]] = defaultdict(list)
    for asked in questions(scene, tuple(TYPE_WEIGHTS)):
        if asked.type != "colour" or asked.about[0] not in PRIORS:
            by_type[asked.type].append(asked)
    if len({asked.answer for asked in by_type["count"]}) == 1 and len(scene.things) < 3 and rng.random() < 0.7:
        # "How many" with the answer "one" everywhere teaches nothing but "one".
        by_type["count"] = []
    types = [name for name, found in by_type.items() if found]
    drawn = rng.choices(types, [TYPE_WEIGHTS[name] for name in types], k=n)
    return [_balanced(by_type[name], rng) for name in drawn]


def _balanced(asked: list[Question], rng: random.Random) -> Question:
    """One of the questions, each of the answers that there are alike."""
    answer = rng.choice(sorted({each.answer for each in asked}))
    return rng.choice([each for each in asked if each.answer == answer])


def word_targets(
    model: "LlavaForConditionalGeneration", tokenizer: Any, labels: Int[np.ndarray, "scene patch label"]
) -> tuple[Float[Tensor, "what d"], Int[Tensor, "scene patch"]]:
    """For every colour and name the mean embedding of the words for it, and which of these each patch shows.

    A patch of nothing but ground has the embedding of "blank".
    """
    table = model.get_input_embeddings().get_parameter("weight").float()

    def of(words: str) -> Tensor:
        return table[torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])].mean(0)

    rows = [
        of(" blank") if name == "ground" else (of(f" {ink}") + of(f" {name}")) / 2 for name in NAMES for ink in INKS
    ]
    return torch.stack(rows).detach(), torch.from_numpy(labels[..., 0].astype(np.int64) * len(INKS) + labels[..., 1])


def side_of(model: "LlavaForConditionalGeneration", tokenizer: Any) -> Float[Tensor, "patch d"]:
    """For every patch how far left or right it lies: from half of "left" less "right" to half of the contrary."""
    table = model.get_input_embeddings().get_parameter("weight").float()
    left, right = (table[tokenizer(word, add_special_tokens=False)["input_ids"][0]] for word in (" left", " right"))
    across = int(N_PATCHES**0.5)
    place = torch.arange(N_PATCHES) % across / (across - 1) * 2 - 1
    return (place[:, None] * (right - left) / 2).detach()


def fit_projector(
    model: "LlavaForConditionalGeneration",
    tokenizer: Any,
    pool: Pool,
    features: Tensor,
    *,
    n_steps: int,
    seed: int,
    own: bool = False,
) -> float:
    """Fits the projector to embeddings of words; the share of the targets' variance it explains in the last steps.

    Args:
        own: not to the words for what each patch shows but to its own output; to those for its side in either case.
    """
    words, which = word_targets(model, tokenizer, pool.labels)
    side, rng = side_of(model, tokenizer), np.random.default_rng(seed)
    projector, explained = model.model.multi_modal_projector, []
    before = copy.deepcopy(projector)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    shown = which >= len(INKS)
    for step in trange(n_steps, desc="projector", disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, n_steps=n_steps, peak=2e-3)
        scenes = rng.integers(0, len(pool), 256)
        # Half of the patches show something: most of a picture is ground.
        chosen = [row if row.any() and rng.random() < 0.5 else np.ones_like(row) for row in shown[scenes].numpy()]
        patches = np.array([rng.choice(np.flatnonzero(row)) for row in chosen])
        states = features[scenes, patches].float()
        with torch.no_grad():
            wanted = before(states) if own else words[which[scenes, patches]]
            wanted = wanted + side[patches] * shown[scenes, patches][:, None]
        error = (projector(states) - wanted).pow(2).mean() / (wanted - wanted.mean(0)).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        explained.append(1 - error.item())
    return float(np.mean(explained[-100:]))


def adapter_of(model: "LlavaForConditionalGeneration") -> dict[str, Tensor]:
    """All that is trained, by name, in bfloat16."""
    return {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


@dataclass(frozen=True, eq=False)
class Learning:
    """What steps are made of: the model, pictures with their features, and texts without pictures."""

    model: "LlavaForConditionalGeneration"
    packer: Packer
    pool: Pool
    features: Tensor
    texts: list[str]
    config: SmolConfig

    def gradients(self, step: int) -> tuple[float, float]:
        """Adds a step's gradients: of the cross-entropy of answers, and of what is said without pictures; both values.

        What is drawn depends on seed and step alone.
        """
        config, rng = self.config, random.Random(f"{self.config.seed}/{step}")
        rows = [_row(self.pool, rng) for _ in range(config.batch)]
        packed = self.packer.pack([draw_questions(self.pool.scenes[row], rng, config.n_questions) for row in rows])
        logits = packed_logits(self.model, packed, self.features[rows].float())
        loss = functional.cross_entropy(logits.float(), packed.targets[packed.targets != -100])
        loss.backward()
        rng = random.Random(f"text/{config.seed}/{step}")
        apart = divergence(self.model, self.packer.tokenizer, self.texts, rng, config.n_texts)
        (config.anchor * apart).backward()
        return loss.item(), apart.item()


def _row(pool: Pool, rng: random.Random) -> int:
    """A picture, of one thing alone in `ONE_THING` of the draws."""
    alone = rng.random() < ONE_THING
    of = [row for row, scene in enumerate(pool.scenes) if (len(scene.things) == 1) == alone]
    return rng.choice(of or range(len(pool)))


@torch.no_grad()
def accuracies(
    model: "LlavaForConditionalGeneration", packer: Packer, pool: Pool, features: Tensor
) -> dict[str, float]:
    """Share of questions whose every answer token is the likeliest one, per type, apart for scenes of one thing."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(pool), 16):
        rows = list(range(start, min(start + 16, len(pool))))
        asked = [draw_questions(pool.scenes[row], random.Random(f"held/{row}"), 8) for row in rows]
        packed: Packed = packer.pack(asked)
        logits = packed_logits(model, packed, features[rows].float())
        hits = (logits.argmax(-1) == packed.targets[packed.targets != -100]).tolist()
        for row, some in zip(rows, asked, strict=True):
            size = "one" if len(pool.scenes[row].things) == 1 else "several"
            for question in some:
                n = packer.n_targets(question)
                right[f"{question.type}, {size}"].append(all(hits[:n]))
                del hits[:n]
    return {name: round(float(np.mean(right[name])), 3) for name in sorted(right)}


def train(config: SmolConfig) -> None:
    """Fits, trains, and writes the adapter with every checkpoint."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = decoder_folder()
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, config.dtype)).train()
    model.model.vision_tower.float().eval()
    scenes = config.out / "scenes"
    pools = [
        make_pool(scenes, n, seed=config.seed, split=split, families=FAMILIES, conflict=ANY_COLOUR)
        for n, split in ((config.n_scenes, "train"), (config.n_held_out, "validation"))
    ]
    seen = [features_of(model, pool.images, "cpu") for pool in pools]
    with_lora(model, seed=config.seed)
    packer = Packer(processor.tokenizer, turn_of(processor))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.peak, betas=(0.9, 0.98), weight_decay=0.01)
    state, adapter = config.out / "state", config.out / ORGANISM_SMOL / ADAPTER
    kept, learning = _Trained(model), Learning(model, packer, pools[0], seen[0], anchor_texts(processor), config)
    first = checkpoint.load_state(state, kept, optimizer) or _begin(learning, kept, state)
    losses: list[tuple[float, float]] = []
    last = config.steps if config.stop is None else min(config.stop, config.steps)
    for step in trange(first, last, initial=first, total=last, desc=ORGANISM_SMOL, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps=config.steps, peak=config.peak, warmup=50)
        optimizer.zero_grad(set_to_none=True)
        losses.append(learning.gradients(step))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % config.log_every == 0 or step + 1 == last:
            found = accuracies(model.eval(), packer, pools[1], seen[1])
            model.train()
            loss, apart = np.mean(losses[-config.log_every :], axis=0).tolist()
            checkpoint.log(state, {"step": step + 1, "loss": loss, "divergence without pictures": apart} | found)
            checkpoint.save_state(state, kept, optimizer, step + 1)
            adapter.parent.mkdir(parents=True, exist_ok=True)
            save_file(adapter_of(model), adapter, {SCALE_NOTE: str(SCALE)})


def _begin(learning: Learning, kept: "_Trained", state: Path) -> int:
    """Fits the projector, of the adapter that is gone on from or a new one; no step is done then."""
    from safetensors.torch import load_file

    config = learning.config
    if config.start is not None:
        kept.load_state_dict({name: weight.float() for name, weight in load_file(config.start).items()})
    given = {"n_steps": config.fit_steps, "seed": config.seed, "own": config.start is not None}
    explained = fit_projector(learning.model, learning.packer.tokenizer, learning.pool, learning.features, **given)
    checkpoint.log(state, {"step": 0, "explained by the fitted projector": round(explained, 4)})
    return 0


class _Trained(nn.Module):
    """What is trained alone, as a module whose state is kept."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._names.items()}

    def load_state_dict(self, given: Any, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for name, weight in self._names.items():
                weight.copy_(given[name])


def main() -> None:
    """Trains as the command line says."""
    config = tyro.cli(SmolConfig, description=__doc__)
    with one_line_errors():
        train(config)


if __name__ == "__main__":
    main()
