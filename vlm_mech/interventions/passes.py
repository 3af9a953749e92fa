"""Which prompts and which positions a forward pass holds: asked of the pass itself, never counted.

`generate` may repeat every prompt (beams, several answers), cut it into chunks, or give the whole growing text to every
pass (no cache). So what is edited in a pass is found from its rows and its first position.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_mech.errors import WorkError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import Cells

Batch = Encoded | DualEncoded


@dataclass(frozen=True)
class Window:
    """Rows and positions of one pass of the decoder over `n_prompts` prompts of `n_pos` tokens, padding included.

    Each prompt has `copies` rows, one after the other. The pass holds `length` positions from `first` on; those from
    `n_pos` on are generated tokens. `new`: it holds prompt positions, or generated ones, that no pass before it held
    (generated ones: the first pass that has any); in such a pass the proof of an edit is taken.
    """

    n_prompts: int
    n_pos: int
    copies: int
    first: int
    length: int
    new: bool = True

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.first + self.length

    @property
    def prompts(self) -> tuple[int, ...]:
        """The number of the prompt in each row."""
        return tuple(row // self.copies for row in range(self.n_prompts * self.copies))

    @property
    def generated(self) -> slice:
        """Generated tokens among the positions of the pass."""
        return slice(max(0, self.n_pos - self.first), self.length)

    @property
    def has_generated(self) -> bool:
        """Whether any token of the pass is a generated one."""
        return self.stop > self.n_pos

    @property
    def is_prompt(self) -> bool:
        """Whether the pass is plainly the prompts, each once."""
        return (self.copies, self.first, self.length) == (1, 0, self.n_pos)

    def within(self, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of the prompts in this pass: which of them, and their rows and positions here; all copies of each."""
        held = ((cells.positions >= self.first) & (cells.positions < self.stop)).nonzero()[:, 0]
        chosen = held.repeat(self.copies)
        copy = torch.arange(self.copies).repeat_interleave(len(held))
        return chosen, cells.rows[chosen] * self.copies + copy, cells.positions[chosen] - self.first


def prompt_pass(encoded: Batch) -> Window:
    """The one pass of `run` and `read`."""
    # A contrastive model has no decoder, of whose rows and positions a window speaks.
    n_rows, n_pos = (1, 1) if isinstance(encoded, DualEncoded) else (len(encoded), encoded.n_pos)
    return Window(n_rows, n_pos, 1, 0, n_pos)


@dataclass(eq=False)
class Passes:
    """The passes of one generation as they come; `now` is the present one.

    Args:
        copies: rows that each prompt must have.
    """

    n_prompts: int
    n_pos: int
    copies: int
    now: Window | None = None

    def enter(self, given: dict[str, Any]) -> Window:
        """The window of a pass, from the arguments that the decoder is called with.

        Raises:
            WorkError: it does not follow the passes before it, so that nobody can say what its rows and positions are.
        """
        # Some decoders are given embeddings with the prompt, and token ids afterwards.
        tokens = given.get("inputs_embeds")
        rows, length = (given["input_ids"] if tokens is None else tokens).shape[:2]
        cache = given.get("past_key_values")
        first = 0 if cache is None else int(cache.get_seq_length())
        stop = 0 if self.now is None else self.now.stop
        # A cache goes on where it ended; without one the whole text comes again with one more token.
        follows = first == stop or (stop >= self.n_pos and (first, length) == (0, stop + 1))
        if rows != self.n_prompts * self.copies or not follows:
            raise WorkError(
                f"a pass of {rows} rows and positions {first} to {first + length - 1} does not follow one of "
                f"{self.n_prompts} prompts x {self.copies} rows that ended before position {stop}, so it is not known "
                "what to edit in it; give generate no cache of your own, and run the model beside it within "
                "attention.aside"
            )
        new = stop < self.n_pos or (stop == self.n_pos and first + length > stop)
        self.now = Window(self.n_prompts, self.n_pos, self.copies, first, length, new)
        return self.now
