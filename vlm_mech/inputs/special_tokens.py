"""Special tokens: when a tokenizer puts them around a text, what follows a text, and which a user's text must not hold.

A chat template may write the token that begins a text (BOS) itself. A text that begins with it gets no special tokens
from the tokenizer; every other one gets what the tokenizer adds. That is the rule of transformers'
`processor.apply_chat_template(..., tokenize=True)`, kept here for prompts, raw texts, answers and class names alike.

What a user writes is text: `<|im_end|>` in a question would end the user's turn, and `<image>` call for another image.
"""

from collections.abc import Sequence
from typing import Any

from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import Attached


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
    """The tokens of what follows a prompt's text, after a space or `Attached`; None if it changes the text's own."""
    # A tokenizer warns of lengths that the model may have positions for.
    before = tokenized(tokenizer, text, verbose=False)["input_ids"]
    space = "" if text[-1].isspace() or isinstance(more, Attached) else " "
    after = tokenized(tokenizer, f"{text}{space}{more.strip()}", verbose=False)["input_ids"]
    return tuple(after[len(before) :]) if after[: len(before)] == before else None


def special_tokens(processor: Any) -> tuple[str, ...]:
    """Every token with which text could pass for structure: special ones, marks of the chat template, image places.

    Tokens of one or two characters, and words, are text like any other, whatever a tokenizer calls them.
    """
    template = str(getattr(processor, "chat_template", None) or "")
    found = {str(getattr(processor, f"{name}_token", None) or "") for name in ("image", "boi", "eoi", "video", "audio")}
    for tokenizer in (processor.tokenizer, getattr(processor, "qformer_tokenizer", None)):
        if tokenizer is not None:
            added = tokenizer.added_tokens_decoder.values()
            found |= {token.content for token in added if token.special or token.content in template}
            found |= set(tokenizer.all_special_tokens)
    return tuple(sorted(token for token in found if len(token.strip()) > 2 and not token.strip().isalnum()))


def check_plain(model: Any, text: str, what: str, *, ask: str = "Prompt(..., special_tokens=True)") -> None:
    """Raise `UsageError` when a user's text holds a special token, as it is written or as the tokenizer reads it.

    Args:
        model: the `VLM` or `DualEncoder` that is to read the text.
        what: what the text is, for the message.
        ask: how its special tokens could be asked for.
    """
    tokenizer = model.tokenizer
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    made = set(tokenizer.convert_ids_to_tokens(ids)) - {tokenizer.unk_token}
    found = [token for token in model.special_tokens if token in text or token in made]
    if found:
        first = min(found, key=lambda token: text.find(token) % (len(text) + 1))
        shown = text if len(text) < 80 else f"{text[:77]}..."
        raise UsageError(
            f"{what} {shown!r} holds {first!r}, which is not text to {model.name} but a special token: take it out, or "
            f"ask for it with {ask}"
        )


def unknown_word(tokenizer: Any, text: str) -> str | None:
    """The first part of a text that becomes the unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return None
    if not tokenizer.is_fast:
        # These give no offsets: each word alone.
        words = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in text.split()}
        return next((word for word, ids in words.items() if unknown in ids), None)
    made = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    found = (span for number, span in zip(made["input_ids"], made["offset_mapping"], strict=True) if number == unknown)
    return next((text[start:end] for start, end in found), None)


def check_known(model: Any, texts: Sequence[str], what: str) -> None:
    """Raises `UsageError` when a text holds a word that the model's tokenizer does not know."""
    for text in texts:
        word = unknown_word(model.tokenizer, text)
        if word is not None:
            raise UsageError(f"{what} {text!r} holds {word!r}, which {model.name} has no token for")
