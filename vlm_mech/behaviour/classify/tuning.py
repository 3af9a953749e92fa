"""Fine-tuning on class names: the projector alone, or with LoRA on the decoder (after arXiv 2405.18415).

LoRA is peft's; afterwards it is merged into the weights, so that the model is an ordinary one again. The model is
changed in place. What is trained is moved in float32 whatever the model's data type.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from vlm_mech.behaviour.answering.class_name_scores import Ids, Names, names_after
from vlm_mech.behaviour.master_weights import Descent
from vlm_mech.data.image_classes import Labelled
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.image import ImageLike
from vlm_mech.inputs.prompt import Encoded, Prompt

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

What = Literal["projector", "lora"]
Asked = Callable[[ImageLike], Prompt]
IGNORED = -100


@dataclass(frozen=True)
class Tuning:
    """What is trained and how: AdamW without decay, warm-up, cosine. The paper's rate for 7B models is 2e-5."""

    what: What
    n_steps: int = 200
    rate: float = 1e-3
    batch: int = 16
    rank: int = 8
    warmup: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.batch < 1 or self.rank < 1 or self.rate <= 0:
            raise UsageError(f"{self}: steps, batch and rank must be at least 1 and the rate above 0")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then half a cosine down to zero."""
        rise = max(1, round(self.warmup * self.n_steps))
        if step < rise:
            return self.rate * (step + 1) / rise
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.n_steps - rise)))


def tune(
    vlm: "VLM", train: Sequence[Labelled], validation: Sequence[Labelled], asked: Asked, tuning: Tuning
) -> dict[str, Any]:
    """Trains the model in place to answer the question with the class name and an end; what it was and the losses.

    `n_moved` counts the trained numbers that are others than before, as the model keeps them.

    Args:
        asked: the question about a picture.

    Raises:
        UsageError: peft is not installed, or the tokenizer has no end token.
        WorkError: the loss is not finite.
    """
    if vlm.tokenizer.eos_token_id is None:
        raise UsageError(f"{vlm.name} has no end-of-text token to end an answer with")
    if tuning.what == "lora" and find_spec("peft") is None:
        raise UsageError("--tune lora needs peft, which is not installed: pip install peft")
    labels = sorted({each.label for each in (*train, *validation)})
    names = names_after(vlm, [asked(train[0].image)], labels)
    before = _mean_loss(vlm, validation, asked, names, tuning.batch)
    frozen = {parameter: parameter.requires_grad for parameter in vlm.model.parameters()}
    vlm.model.requires_grad_(False)
    adapted = _adapted(vlm, tuning) if tuning.what == "lora" else None
    vlm.model.get_submodule(vlm.family.projector).requires_grad_(True)
    trained = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
    loaded = [parameter.detach().clone() for parameter in trained]
    losses = _descend(vlm, train, asked, names, trained, tuning)
    moved = [(now.detach() != then).sum().item() for now, then in zip(trained, loaded, strict=True)]
    if adapted is not None:
        adapted.merge_and_unload()
    for parameter, needed in frozen.items():
        parameter.requires_grad_(needed)
    return {
        "what": "projector and LoRA on the decoder" if adapted is not None else "projector",
        "n_trained": sum(parameter.numel() for parameter in trained),
        "n_moved": int(sum(moved)),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation_loss_before": before,
        "validation_loss_after": _mean_loss(vlm, validation, asked, names, tuning.batch),
    }


def _adapted(vlm: "VLM", tuning: Tuning) -> Any:
    """The model with adapters in every linear layer of the decoder's blocks."""
    from peft import LoraConfig, get_peft_model

    blocks = vlm.model.get_submodule(vlm.family.llm.path)
    paths = [
        f"{vlm.family.llm.path}.{name}" for name, module in blocks.named_modules() if isinstance(module, nn.Linear)
    ]
    torch.manual_seed(tuning.seed)
    config = LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, lora_dropout=0.0, target_modules=paths)
    return get_peft_model(vlm.model, config, autocast_adapter_dtype=True)


def _descend(
    vlm: "VLM",
    train: Sequence[Labelled],
    asked: Asked,
    names: Names,
    trained: Sequence[nn.Parameter],
    tuning: Tuning,
) -> list[float]:
    """The loss of every step. A step's pictures depend on seed and step alone."""
    descent = Descent(trained, dtype=vlm.dtype, rate=tuning.rate)
    losses: list[float] = []
    for step in trange(tuning.n_steps, desc=f"tuning ({tuning.what})", disable=None):
        some = random.Random(f"{tuning.seed}/{step}").sample(list(train), min(tuning.batch, len(train)))
        with torch.enable_grad():
            loss = _loss(vlm, some, asked, names)
        if not bool(torch.isfinite(loss)):
            raise WorkError(f"the loss is {loss.item()} at step {step}; a smaller --tune-rate may hold")
        descent.step(loss, rate=tuning.rate_at(step))
        losses.append(loss.item())
    descent.forget_gradients()
    return losses


@torch.no_grad()
def _mean_loss(vlm: "VLM", examples: Sequence[Labelled], asked: Asked, names: Names, batch: int) -> float:
    lots = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    return sum(_loss(vlm, some, asked, names).item() * len(some) for some in lots) / len(examples)


def _loss(vlm: "VLM", some: Sequence[Labelled], asked: Asked, names: Names) -> Float[Tensor, ""]:
    """Mean cross-entropy of the answers' tokens and their ends."""
    encoded = vlm.encode([asked(each.image) for each in some])
    end = vlm.tokenizer.eos_token_id
    inputs, targets = with_answers(vlm, encoded, [(*names.ids[names.names.index(each.label)], end) for each in some])
    logits = getattr(vlm.model(**inputs, use_cache=False), vlm.family.readout)[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED)


def with_answers(
    vlm: "VLM", encoded: Encoded, answers: Sequence[Ids]
) -> tuple[dict[str, Tensor], Int[Tensor, "batch pos"]]:
    """The prompts with their answers after them, padded on the right, and the tokens to be predicted (-100: none).

    Raises:
        UsageError: prompt and answer outgrow the decoder's positions.
    """
    width = max(len(ids) for ids in answers)
    encoded.check_room(width)
    device = encoded.inputs["input_ids"].device
    ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in answers], device=device)
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in answers], device=device)
    # Where the prompt is read both ways, 1 marks what comes after it; elsewhere the kinds mark images.
    kind = int(vlm.family.both_ways == "prefix")
    given = {"input_ids": ids, "attention_mask": mask}
    inputs = dict(encoded.inputs)
    for name, value in encoded.inputs.items():
        if name == "position_ids":
            more = value[..., -1:] + 1 + torch.arange(width, device=device)
        elif name in given:
            more = given[name]
        elif name.endswith("token_type_ids"):
            more = torch.full_like(ids, kind)
        else:
            continue
        inputs[name] = torch.cat([value, more.to(value.dtype)], -1)
    targets = torch.full_like(inputs["input_ids"], IGNORED)
    targets[:, -width:] = ids.masked_fill(mask == 0, IGNORED)
    return inputs, targets
