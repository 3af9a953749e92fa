"""Pictures with what training text says of them, to tune a contrastive model on (arXiv 2411.05195, ablations).

A caption is one answer of the conversation, drawn anew each time its picture is seen; a decoder in place of the text
tower reads all answers of it in a row. Where left and right stand in one of the paper's phrases, the same text with the
sides exchanged is a hard negative. Texts too long for a tower lose their last words.
"""

import bisect
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.behaviour.contrastive_tuning.batches import Drawn, Recipe, Texts, Variant
from vlm_mech.behaviour.contrastive_tuning.losses import batch_loss
from vlm_mech.behaviour.contrastive_tuning.training import (
    CHUNK,
    Tuned,
    decoder_states,
    embedded_texts,
    image_embeddings,
)
from vlm_mech.data.readers.llava import Entry
from vlm_mech.data.readers.registry import is_file
from vlm_mech.data.training_text import entries
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.special_tokens import check_known, check_plain

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

SIDE = re.compile(r"\b((?:on|to|at) the )(left|right)\b", re.IGNORECASE)
OTHER = {"left": "right", "right": "left"}


def other_sides(text: str) -> str | None:
    """The text with left and right exchanged where they stand in such a phrase; None where none does."""
    changed, n = SIDE.subn(lambda found: found[1] + _alike(OTHER[found[2].lower()], found[2]), text)
    return changed if n else None


def _alike(word: str, written: str) -> str:
    return word.upper() if written.isupper() else word.capitalize() if written[0].isupper() else word


@dataclass(frozen=True)
class Captioned:
    """A picture and the answers that were given about it."""

    id: str
    image: Any
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """All answers in a row."""
        return " ".join(self.answers)


@dataclass(frozen=True)
class Read:
    """The pictures with captions that are used, how many entries there are, and why others are not used."""

    used: tuple[Captioned, ...]
    n_entries: int
    left_out: dict[str, int]

    @property
    def told(self) -> str:
        """In words."""
        why = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items())
        return f"{len(self.used)} of {self.n_entries} entries{f' ({why})' if why else ''}"


def read_captions(
    sources: Sequence[str], encoder: "DualEncoder", *, sides: bool, n: int | None = None, seed: int = 0
) -> Read:
    """The entries of training text that have a picture and an answer that the model can be given.

    The text of those that are used is kept in memory, their pictures are not.

    Args:
        sides: keep only entries whose text has one of the phrases about left and right (`data.readers.llava.SIDES`).
        n: of these, drawn with the seed; all by default.

    Raises:
        UsageError: no training text, or no entry that can be used.
    """
    kept: list[Captioned] = []
    rng, left_out, n_entries, n_fit = random.Random(f"captions/{seed}"), Counter[str](), 0, 0
    for source in sources:
        for each in entries(source):
            n_entries += 1
            why = _unfit(encoder, each, sides)
            if why:
                left_out[why] += 1
                continue
            assert isinstance(each, Entry)
            n_fit += 1
            made = Captioned(each.id, each.image, tuple(" ".join(text.split()) for text in each.answers if text))
            # Of a stream n are kept at random (Vitter 1985, algorithm R).
            if n is None or len(kept) < n:
                kept.append(made)
            elif (place := rng.randrange(n_fit)) < n:
                kept[place] = made
    if not kept:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common(3))
        raise UsageError(f"no entry of {', '.join(sources)} can be tuned on: {why or 'there is none'}")
    if n_fit > len(kept):
        left_out["not drawn"] = n_fit - len(kept)
    return Read(tuple(kept), n_entries, dict(left_out))


def _unfit(encoder: "DualEncoder", each: Entry | Refused, sides: bool) -> str:
    """Why an entry is not used."""
    if isinstance(each, Refused):
        return "that cannot be read"
    if sides and not each.names_a_side:
        return "about neither left nor right"
    if each.image is None:
        return "without an image"
    if not any(each.answers):
        return "without an answer"
    if not is_file(Path(each.image)):
        return "whose image is not there"
    try:
        check_known(encoder, each.answers, "caption")
        for text in each.answers:
            check_plain(encoder, text, "caption")
    except UsageError:
        return "with a word or sign that the model has no token for"
    return ""


def shortened(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as many of its first words as fit; at least one."""
    if fits(text):
        return text
    words = text.split(" ")
    n = bisect.bisect_left(range(1, len(words)), True, key=lambda n: not fits(" ".join(words[:n])))
    return " ".join(words[: max(1, n)])


@dataclass(frozen=True, eq=False)
class Captions:
    """Pictures with captions as a source of batches; pictures are opened when they are needed.

    `states` are those of a decoder for all answers of each entry, `others` those with the sides exchanged (of entries
    that name none: of the same text).
    """

    encoder: "DualEncoder"
    entries: tuple[Captioned, ...]
    states: Float[Tensor, "entry d_model"] | None = None
    others: Float[Tensor, "entry d_model"] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def with_decoder(self, vlm: "VLM") -> "Captions":
        """The same with the states of a decoder."""

        def fits(text: str) -> bool:
            try:
                vlm.encode([Prompt(text)]).check_room(0)
            except UsageError:
                return False
            return True

        texts = [shortened(each.text, fits) for each in self.entries]
        others = [other_sides(text) or text for text in texts]
        states, changed = (decoder_states(vlm, some).to(self.encoder.device) for some in (texts, others))
        return replace(self, states=states, others=changed)

    def drawn(self, variant: Variant, recipe: Recipe, step: int, known: Tensor | None) -> Drawn:
        """Some pictures, an answer drawn for each, and the hard negatives of those that have one."""
        rng = np.random.default_rng((recipe.seed, step))
        rows = recipe.rows(len(self), recipe.batch, step, rng)
        some = [self.entries[row] for row in rows]
        told = [each.answers[rng.integers(len(each.answers))] for each in some]
        others = [other_sides(each.text if variant.decoder else text) for each, text in zip(some, told, strict=True)]
        have = [at for at, other in enumerate(others) if other is not None]
        if variant.decoder and self.states is not None and self.others is not None:
            texts, negatives = Texts({}, self.states[rows]), Texts({}, self.others[rows[have]])
        else:
            texts = self.texts(told)
            negatives = self.texts([other for other in others if other is not None]) if have else None
        hard = negatives if variant.objective == "negatives" and have else None
        kept = None if known is None else known[rows]
        return Drawn(lambda part: self.pixels([each.image for each in some[part]]), texts, hard, kept)

    def pixels(self, images: Sequence[Any]) -> Float[Tensor, "row channel height width"]:
        """Pictures as inputs of the image tower."""
        # Any text will do: the two towers do not meet.
        return self.encoder.encode(images, self._fitting([self.entries[0].answers[0]])).inputs["pixel_values"]

    def texts(self, texts: Sequence[str]) -> Texts:
        """Captions as inputs of the text tower."""
        inputs = self.encoder.encode([self.entries[0].image], self._fitting(texts)).inputs
        return Texts({name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs})

    def _fitting(self, texts: Sequence[str]) -> list[str]:
        tokenizer, most = self.encoder.tokenizer, self.encoder.n_positions
        return [
            shortened(text, lambda some: len(tokenizer(some, verbose=False)["input_ids"]) <= most) for text in texts
        ]

    def shuffled(self, how: str, *, seed: int) -> "Captions":
        """The pictures with the answers about others."""
        order = np.random.default_rng((seed, 7)).permutation(len(self))
        rows = np.empty(len(self), int)
        rows[order] = np.roll(order, 1)
        moved = tuple(
            replace(each, answers=self.entries[row].answers) for each, row in zip(self.entries, rows, strict=True)
        )
        states, others = (None if some is None else some[rows] for some in (self.states, self.others))
        return replace(self, entries=moved, states=states, others=others)

    def decoded_width(self) -> int | None:
        """Width of a decoder's states; None without them."""
        return None if self.states is None else self.states.shape[-1]

    @torch.no_grad()
    def embedded(self, tuned: Tuned) -> Float[Tensor, "entry d_embed"]:
        """Embeddings of all pictures, a few at a time."""
        images = [each.image for each in self.entries]
        parts = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
        return torch.cat([image_embeddings(tuned, self.pixels(some)) for some in parts])

    def first(self, n: int) -> "Captions":
        """The first n entries."""
        states, others = (None if some is None else some[:n] for some in (self.states, self.others))
        return replace(self, entries=self.entries[:n], states=states, others=others)

    @torch.no_grad()
    def asked(self, tuned: Tuned) -> tuple[float, float]:
        """Each picture with all answers about it in a row: the loss of all as one batch, and the share distinguished.

        A picture is distinguished if its own text is more like it than that of every other picture; a tie is wrong.
        """
        tuned.model.eval()
        images = self.embedded(tuned)
        whole = Texts({}, self.states) if tuned.head is not None else self.texts([each.text for each in self.entries])
        texts = embedded_texts(tuned, whole, CHUNK)
        cosines = (images.double() @ texts.double().T).cpu().numpy()
        own = cosines.diagonal().copy()
        np.fill_diagonal(cosines, -np.inf)
        return batch_loss(tuned.model, images, texts).item(), float((own > cosines.max(1)).mean())
