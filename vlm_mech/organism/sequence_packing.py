"""Many questions about one picture in one sequence, each of them exactly the single-turn prompt of inference.

The questions of a picture are branches that share the prefix up to the image tokens: a branch attends to the prefix and
to itself, and its positions go on from the prefix. So no answer can leak into the next question.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from vlm_mech.data.scene_questions import Question
from vlm_mech.organism.build import N_PATCHES

PREFIX = "USER: " + "<image>" * N_PATCHES


@dataclass(frozen=True)
class Turn:
    """The text of a prompt before its question, between question and answer, and after the answer.

    The tokens of a prompt must be those of its pieces one after the other (`Packer` checks every question).
    """

    before: str
    between: str
    end: str


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch of pictures with their questions.

    `ids` and `positions` are batch x pos; `mask` says which position may attend to which; `targets` holds the token to
    predict at a position, -100 where none is: for each question the tokens of its answer and the end.
    """

    ids: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch 1 pos pos"]
    targets: Int[Tensor, "batch pos"]


class Packer:
    """Turns questions into branches; keeps the tokens of every question it has seen.

    Args:
        turn: how a question is put; by default as to the embedded models.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn: Turn | None = None) -> None:
        self.tokenizer = tokenizer
        self.turn = turn or Turn(PREFIX, " ASSISTANT:", str(tokenizer.eos_token))
        self.prefix: list[int] = tokenizer(self.turn.before)["input_ids"]
        self._branches: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def branch(self, question: Question) -> tuple[list[int], list[int]]:
        """Token ids of the question with its answer, and the target at each position.

        Raises:
            ValueError: the tokens of the whole prompt are others.
        """
        key = (question.text, question.answer)
        if key not in self._branches:
            asked = self._ids(f"{question.text}{self.turn.between}")
            answer = self._ids(question.answer)
            (end,) = self._ids(self.turn.end)
            text = f"{self.turn.before}{question.text}{self.turn.between}"
            if self.tokenizer(text)["input_ids"] != self.prefix + asked:
                raise ValueError(f"the tokens of {question.text!r} in its prompt are not those of its pieces")
            self._branches[key] = (asked + answer, [-100] * (len(asked) - 1) + answer + [end])
        return self._branches[key]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def n_targets(self, question: Question) -> int:
        """How many tokens are predicted for a question: those of its answer, and the end."""
        return sum(target != -100 for target in self.branch(question)[1])

    def pack(self, asked: Sequence[Sequence[Question]]) -> Packed:
        """One row per picture, all of its questions in it, padded on the right."""
        rows = []
        for questions in asked:
            ids, targets, positions = list(self.prefix), [-100] * len(self.prefix), list(range(len(self.prefix)))
            branches = [0] * len(self.prefix)
            for number, question in enumerate(questions, 1):
                branch, wanted = self.branch(question)
                ids += branch
                targets += wanted
                positions += range(len(self.prefix), len(self.prefix) + len(branch))
                branches += [number] * len(branch)
            rows.append((ids, positions, targets, branches))
        width = max(len(row[0]) for row in rows)
        fill = (self.tokenizer.pad_token_id, 0, -100, -1)
        ids, positions, targets, branches = (
            torch.tensor([row[part] + [fill[part]] * (width - len(row[part])) for row in rows]) for part in range(4)
        )
        same = branches[:, :, None] == branches[:, None, :]
        visible = (same | (branches[:, None, :] == 0)) & torch.ones(width, width, dtype=torch.bool).tril()
        return Packed(ids, positions, visible[:, None], targets)


def packed_logits(
    model: LlavaForConditionalGeneration, packed: Packed, features: Float[Tensor, "batch patch d_vision"]
) -> Float[Tensor, "answer vocab"]:
    """Logits at every position that has a target, in reading order.

    Args:
        features: what the image tower gives the projector for each picture.
    """
    embedded = model.get_input_embeddings()(packed.ids)
    image = packed.ids == model.config.image_token_id
    projected = model.model.multi_modal_projector(features).to(embedded.dtype)
    embedded = embedded.masked_scatter(image[..., None], projected)
    states = model.model.language_model(
        inputs_embeds=embedded, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(states[packed.targets != -100])
