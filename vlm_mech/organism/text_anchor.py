"""Texts without pictures on which the trained model should say what the decoder said before it was trained.

Held to the decoder's own distribution are facts of the training split, as texts and as questions about colours. None of
them names a kind with a usual colour: what is left of those colours' prior is what the decoder keeps of itself.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vlm_mech.data.facts import questions_of
from vlm_mech.data.scenes import PRIORS

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, ProcessorMixin

RANK, SCALE = 16, 2.0


class Lora(nn.Module):
    """A frozen linear map and a low-rank one beside it, whose second factor begins at 0."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = SCALE
        self.lora_A = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, states: Tensor) -> Tensor:
        """The frozen map's output plus the scaled low-rank one's, without the latter where the scale is 0."""
        if not self.scale:
            return self.linear(states)
        low = functional.linear(states, self.lora_A.to(states.dtype))
        return self.linear(states) + functional.linear(low, self.lora_B.to(states.dtype)) * self.scale


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The frozen model alone, for the block."""
    found = [part for part in model.modules() if isinstance(part, Lora)]
    for part in found:
        part.scale = 0.0
    try:
        yield
    finally:
        for part in found:
            part.scale = SCALE


def anchor_texts(processor: "ProcessorMixin") -> list[str]:
    """Facts of the training split as texts, and questions about their colours as the chat template puts them."""
    found = []
    for asked, (relation, subject, _) in questions_of("facts", "train").items():
        if any(kind in asked for kind in PRIORS):
            continue
        found.append(asked)
        if relation == "colours":
            chat = [{"role": "user", "content": [{"type": "text", "text": f"what colour is {subject}?"}]}]
            found.append(str(processor.apply_chat_template(chat, add_generation_prompt=True)))
    return sorted({*found})


def divergence(
    model: "LlavaForConditionalGeneration", tokenizer: Any, texts: list[str], rng: random.Random, n: int
) -> Float[Tensor, ""]:
    """KL divergence (nats a token) of what the model says from what the decoder alone says, over `n` of the texts."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rng.choices(texts, k=n)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])

    def said() -> Float[Tensor, "token vocab"]:
        states = model.model.language_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        return model.lm_head(states[real.bool()]).float().log_softmax(-1)

    with torch.no_grad(), without_lora(model):
        before = said()
    return functional.kl_div(said(), before, log_target=True, reduction="batchmean")
