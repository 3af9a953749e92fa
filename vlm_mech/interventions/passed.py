"""What passes give: `Run`, the logits of one, and `Generation`, the answers of many."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.errors import UsageError, shortened
from vlm_mech.inputs.as_html import N_SHOWN, escaped, picture, tabled, titled
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.receipt import Receipt

N_WORDS = 3
"""Next tokens that a notebook shows of a prompt."""


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass: its logits, the batch, and the receipts of what was done.

    Logits are batch x pos x vocab, those of a `DualEncoder` the similarities of images x texts.
    """

    logits: Float[Tensor, "batch pos vocab"] | Float[Tensor, "image text"]
    encoded: Encoded | DualEncoded
    receipts: tuple[Receipt, ...] = ()

    def __repr__(self) -> str:
        size, n = " x ".join(map(str, self.logits.shape)), len(self.receipts)
        return f"Run(logits {size}, {n} receipt{'' if n == 1 else 's'}; {self.encoded!r})"

    def _repr_html_(self) -> str:
        if not isinstance(self.encoded, Encoded):
            return f"<code>{escaped(repr(self))}</code>"
        decode, rows = self.encoded.vlm.tokenizer.decode, []
        for prompt, logits in list(zip(self.encoded.prompts, self.last, strict=True))[:N_SHOWN]:
            best = logits.float().softmax(-1).topk(min(N_WORDS, len(logits)))
            words = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            next_tokens = ", ".join(f"{decode([token])!r} {share:.2f}" for share, token in words)
            rows.append(("".join(map(picture, prompt.images)), escaped(prompt.question), escaped(next_tokens)))
        told = f"logits {' x '.join(map(str, self.logits.shape))}; {len(self.receipts)} receipts"
        head = ("shown", "question", "likeliest next tokens")
        return titled("Run", told, tabled(head, rows, n_more=len(self.encoded) - N_SHOWN))

    @property
    def last(self) -> Float[Tensor, "batch vocab"]:
        """Logits of the next token after the prompt.

        Raises:
            UsageError: the model is a contrastive one, which has none.
        """
        if self.logits.ndim == 2:
            raise UsageError("similarities of images and texts have no last token; use run(...).logits")
        return self.reads[:, 0]

    @property
    def reads(self) -> Float[Tensor, "batch read vocab"]:
        """Logits at the prompt's last position and, where an answer follows, at the tokens of it that are given.

        They predict the answer's tokens one after another.
        """
        if self.logits.ndim == 2:
            raise UsageError("similarities of images and texts predict no token; use run(...).logits")
        assert isinstance(self.encoded, Encoded), "only prompts have logits by position"
        return self.logits[:, self.encoded.n_prompt - 1 :]

    @property
    def readout(self) -> Tensor:
        """What interventions are judged by: the logits that predict the answer, or all similarities."""
        return self.logits if self.logits.ndim == 2 else self.reads


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated answers: texts without special tokens, ids answer x new, and the receipts.

    There may be several answers a prompt, one after the other; `prompts` has the number of each answer's prompt.
    `settings` are those in force: the most new tokens, and all that are not neutral. `output` is what `generate` itself
    returned where more than ids was asked for (`return_dict_in_generate=True`).
    """

    texts: tuple[str, ...]
    ids: Int[Tensor, "answer new"]
    receipts: tuple[Receipt, ...] = ()
    prompts: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    def __repr__(self) -> str:
        return f"Generation({len(self.texts)} answers, {len(self.receipts)} receipts: {shortened(repr(self.texts))})"
