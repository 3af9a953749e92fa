"""Special tokens: when a tokenizer puts them around a text, and what of a text becomes tokens after it.

A chat template may write the token that begins a text (BOS) itself. A text that begins with it gets no special tokens
from the tokenizer; every other one gets what the tokenizer adds. That is the rule of transformers'
`processor.apply_chat_template(..., tokenize=True)`, kept here for prompts, raw texts, answers and class names alike.
"""

from collections.abc import Sequence
from typing import Any

from vlm_mech.errors import UsageError


def begins_with_bos(tokenizer: Any, text: str) -> bool:
    """Whether a text has the token that begins it already, so that the tokenizer must not add it again."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def added_to(tokenizer: Any, texts: Sequence[str]) -> dict[str, bool]:
    """Options for a tokenizer or processor with which the texts get each special token once.

    Raises:
        UsageError: some of the texts begin with BOS and some do not: one call cannot serve both.
    """
    begun = [begins_with_bos(tokenizer, text) for text in texts]
    if any(begun) and not all(begun):
        bare = begun.index(False)
        raise UsageError(
            f"prompt {begun.index(True)} begins with {tokenizer.bos_token!r}, prompt {bare} does not: {texts[bare]!r}; "
            "encode them apart"
        )
    return {"add_special_tokens": False} if all(begun) else {}


def tokenized(tokenizer: Any, text: str, **options: Any) -> Any:
    """What the tokenizer makes of a whole prompt's text, with each special token once."""
    return tokenizer(text, **added_to(tokenizer, [text]), **options)


def ids_after(tokenizer: Any, text: str, more: str) -> tuple[int, ...] | None:
    """The tokens of what follows a prompt's text after a space; None if it changes the text's own tokens."""
    before = tokenized(tokenizer, text)["input_ids"]
    space = "" if text[-1].isspace() else " "
    after = tokenized(tokenizer, f"{text}{space}{more.strip()}")["input_ids"]
    return tuple(after[len(before) :]) if after[: len(before)] == before else None
