"""Greedy answers of a vision-language model to questions about pictures, as the embedded models are measured by."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_mech.data.scene_questions import Question, questions
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import PRIORS, Scene, Split, in_conflict

if TYPE_CHECKING:
    from PIL.Image import Image

GREYS = range(205, 251, 2)
"""Grey levels of the pictures of nothing."""
LONGEST = 8
"""Tokens that an answer may have; a model that goes on longer has not ended it."""


@dataclass(frozen=True)
class Example:
    """A picture with a question, and the answer that is counted."""

    image: "Image"
    question: str
    wanted: str


def conflicts(n: int, *, seed: int, split: Split = "test") -> list[tuple[Scene, Question]]:
    """Scenes of a split with the colour question about a thing that is not in its usual colour."""
    found: list[tuple[Scene, Question]] = []
    for scene in sample_scenes(100 * n, seed=seed, split=split, families=("single", "few"), conflict=0.5):
        for asked in questions(scene, ("colour",)) if in_conflict(scene) else ():
            if asked.answer != PRIORS.get(asked.about[0], asked.answer) and len(found) < n:
                found.append((scene, asked))
                break
        if len(found) == n:
            break
    return found


def answers(model, processor, examples: list[Example], *, batch: int = 128) -> list[str]:
    """Greedy answers of a vision-language model, in one word or more, through its chat template."""
    found: list[str] = []
    # What is generated goes on from the last token: padding has to come first.
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(examples), batch):
        rows = examples[start : start + batch]
        content = [[{"type": "image"}, {"type": "text", "text": row.question}] for row in rows]
        chats = [[{"role": "user", "content": parts}] for parts in content]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = processor(images=[row.image for row in rows], text=texts, padding=True, return_tensors="pt")
        made = model.generate(**inputs.to(model.device), max_new_tokens=LONGEST, do_sample=False)
        told = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [answer.strip() for answer in told]
    return found
