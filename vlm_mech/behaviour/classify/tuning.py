"""Fine-tuning on class names: the projector (with the Q-Former before it) alone, or with LoRA on the decoder.

After arXiv 2405.18415.
LoRA is peft's; afterwards it is merged into the weights, so that the model is an ordinary one again. The model is
changed in place. What is trained is moved in float32 whatever the model's data type.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import trange

from vlm_mech.behaviour.answering.class_name_scores import Ids, Names, names_after
from vlm_mech.behaviour.classify.checkpoint import keep, projector_of
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
    """What is trained and how: AdamW, warm-up, cosine (or a constant rate after it).

    `projector` is the projector, and the Q-Former before it where the family has one; `lora` adds adapters in every
    linear map of the decoder's blocks. The paper: 2e-5 for the projector, 2e-4 for the decoder, batch 64, rank 128,
    alpha 256, warm-up .03, 50 epochs.

    `lora_rate` is the peak rate of the adapters (that of the projector by default), `alpha` twice the rank by default.
    With `epochs` every picture is seen once an epoch, and `n_steps` does not count. Of a batch `micro` pictures are in
    memory at a time (0: all); the loss is that of the batch either way. `keep` says whether the weights of the end are
    kept, or those of the epoch with the lowest validation loss (the paper's).
    """

    what: What
    n_steps: int = 200
    rate: float = 1e-3
    batch: int = 16
    rank: int = 8
    warmup: float = 0.03
    seed: int = 0
    lora_rate: float | None = None
    alpha: float | None = None
    epochs: int = 0
    micro: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    decay: float = 0.0
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.batch < 1 or self.rank < 1 or self.rate <= 0:
            raise UsageError(f"{self}: steps, batch and rank must be at least 1 and the rate above 0")
        more = (1 if self.lora_rate is None else self.lora_rate, 1 if self.alpha is None else self.alpha)
        if min(more) <= 0 or min(self.epochs, self.micro, self.decay) < 0 or not 0 <= self.warmup < 1:
            raise UsageError(
                f"{self}: the adapters' rate and alpha must be above 0, epochs, micro-batch and decay not below 0, and "
                "the warm-up a share below 1"
            )
        if self.keep == "best" and not self.epochs:
            raise UsageError("choosing the best epoch needs --tune-epochs")

    def of(self, n: int) -> "Tuning":
        """The same with the number of steps that its epochs have on n pictures."""
        return replace(self, n_steps=self.epochs * math.ceil(n / self.batch)) if self.epochs else self

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then half a cosine down to zero, or the same on."""
        rise = max(1, round(self.warmup * self.n_steps))
        if step < rise:
            return self.rate * (step + 1) / rise
        if self.schedule == "constant":
            return self.rate
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.n_steps - rise)))

    def drawn(self, train: Sequence[Labelled], step: int) -> list[Labelled]:
        """The pictures of a step, which depend on seed and step alone: drawn anew, or the next of the epoch's order."""
        if not self.epochs:
            return random.Random(f"{self.seed}/{step}").sample(list(train), min(self.batch, len(train)))
        epoch, at = divmod(step, self.n_steps // self.epochs)
        order = random.Random(f"{self.seed}/epoch {epoch}").sample(list(train), len(train))
        return order[at * self.batch : (at + 1) * self.batch]


def tune(
    vlm: "VLM",
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    asked: Asked,
    tuning: Tuning,
    *,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Trains the model in place to answer the question with the class name and an end; what it was and the losses.

    `n_moved` counts the trained numbers that are others than before, as the model keeps them.

    Args:
        asked: the question about a picture.
        folder: where what was trained is written (`checkpoint`).

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
    tuning = tuning.of(len(train))
    before = _mean_loss(vlm, validation, asked, names, tuning)
    frozen = {parameter: parameter.requires_grad for parameter in vlm.model.parameters()}
    vlm.model.requires_grad_(False)
    adapted = _adapted(vlm, tuning) if tuning.what == "lora" else None
    between = projector_of(vlm)
    for parameter in between.values():
        parameter.requires_grad_(True)
    trained = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
    loaded = [parameter.detach().clone() for parameter in trained]
    own = {id(parameter) for parameter in between.values()}
    factor = 1.0 if tuning.lora_rate is None else tuning.lora_rate / tuning.rate
    factors = [1.0 if id(parameter) in own else factor for parameter in trained]
    losses, epochs = _descend(vlm, (train, validation), asked, names, (trained, factors), tuning)
    moved = [(now.detach() != then).sum().item() for now, then in zip(trained, loaded, strict=True)]
    if folder is not None:
        keep(vlm, adapted, between, folder)
    if adapted is not None:
        adapted.merge_and_unload()
    for parameter, needed in frozen.items():
        parameter.requires_grad_(needed)
    with_queries = " and Q-Former" if vlm.family.resampler else ""
    return {
        "what": f"projector{with_queries}{' and LoRA on the decoder' if adapted is not None else ''}",
        "n_trained": sum(parameter.numel() for parameter in trained),
        "n_moved": int(sum(moved)),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation_loss_before": before,
        "validation_loss_after": _mean_loss(vlm, validation, asked, names, tuning),
    } | ({"epochs": epochs} if epochs else {})


def _adapted(vlm: "VLM", tuning: Tuning) -> Any:
    """The model with adapters in every linear layer of the decoder's blocks."""
    from peft import LoraConfig, get_peft_model

    blocks = vlm.model.get_submodule(vlm.family.llm.path)
    paths = [
        f"{vlm.family.llm.path}.{name}" for name, module in blocks.named_modules() if isinstance(module, nn.Linear)
    ]
    torch.manual_seed(tuning.seed)
    alpha = 2 * tuning.rank if tuning.alpha is None else tuning.alpha
    config = LoraConfig(r=tuning.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=paths)
    return get_peft_model(vlm.model, config, autocast_adapter_dtype=True)


def _descend(
    vlm: "VLM",
    data: tuple[Sequence[Labelled], Sequence[Labelled]],
    asked: Asked,
    names: Names,
    trained: tuple[Sequence[nn.Parameter], Sequence[float]],
    tuning: Tuning,
) -> tuple[list[float], list[float]]:
    """The loss of every step, and the validation loss of every epoch; the parameters end as `keep` says.

    Args:
        data: pictures to train on, and to choose the epoch by.
        trained: the parameters, and what their rates are multiplied by.
    """
    descent = Descent(trained[0], dtype=vlm.dtype, rate=tuning.rate, weight_decay=tuning.decay, factors=trained[1])
    losses: list[float] = []
    epochs: list[float] = []
    best: list[Tensor] = []
    for step in trange(tuning.n_steps, desc=f"tuning ({tuning.what})", disable=None):
        some = tuning.drawn(data[0], step)
        parts = _parts(vlm, some, asked, names, tuning.micro)
        if len(parts) > 1:
            losses.append(descent.step_over(parts, rate=tuning.rate_at(step)))
        else:
            with torch.enable_grad():
                loss = parts[0]()
            if not bool(torch.isfinite(loss)):
                raise WorkError(f"the loss is {loss.item()} at step {step}; a smaller --tune-rate may hold")
            descent.step(loss, rate=tuning.rate_at(step))
            losses.append(loss.item())
        if tuning.epochs and (step + 1) % (tuning.n_steps // tuning.epochs) == 0:
            epochs.append(_mean_loss(vlm, data[1], asked, names, tuning))
            if tuning.keep == "best" and epochs[-1] == min(epochs):
                best = [parameter.detach().cpu().clone() for parameter in trained[0]]
    descent.forget_gradients()
    with torch.no_grad():
        for parameter, value in zip(trained[0], best, strict=False):
            parameter.copy_(value)
    return losses, epochs


def _parts(
    vlm: "VLM", some: Sequence[Labelled], asked: Asked, names: Names, micro: int
) -> list[Callable[[], Float[Tensor, ""]]]:
    """The loss of a batch in parts that add up to it: the mean over their tokens times their share of all tokens."""
    if not micro or micro >= len(some):
        return [lambda: _loss(vlm, some, asked, names)]
    lots = [some[start : start + micro] for start in range(0, len(some), micro)]
    counts = [sum(len(names.ids[names.names.index(each.label)]) + 1 for each in lot) for lot in lots]
    shares = [count / sum(counts) for count in counts]
    return [
        lambda lot=lot, share=share: _loss(vlm, lot, asked, names) * share
        for lot, share in zip(lots, shares, strict=True)
    ]


@torch.no_grad()
def _mean_loss(vlm: "VLM", examples: Sequence[Labelled], asked: Asked, names: Names, tuning: Tuning) -> float:
    batch = tuning.micro or tuning.batch
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
