"""What a lens reads: states at sites and spans of a batch, and the tokens that words stand for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.following import check_parting
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Each, Span
from vlm_mech.interventions.specification import Activations
from vlm_mech.interventions.trace import read

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

SITES = ("projector.out", "llm.resid_pre", "llm.resid_post")
MOST_LOGITS = 2**24
"""Logits that are held at once: 64 MiB."""


# Words


@dataclass(frozen=True)
class Label:
    """A word as the tokens it may be read as: each of `ids` alone stands for it.

    `whole` is False where no way of writing the word is one token; then the id is that of its first token.
    """

    word: str
    ids: tuple[int, ...]
    whole: bool = True


def label_of(vlm: "VLM", word: str, *, first_token: bool = False) -> Label:
    """The tokens a word may be read as: of " tail", "tail", " Tail" and "tails" those that are one token.

    Args:
        first_token: whether a word that is several tokens however it is written may stand for its first one.

    Raises:
        UsageError: the word is nothing, unknown to the tokenizer, or several tokens.
    """
    bare = word.strip()
    if not bare:
        raise UsageError(f"word {word!r} is not a token")
    unknown = vlm.tokenizer.unk_token_id
    running = _continued(vlm, bare)
    written = [running, _ids(vlm, bare), _continued(vlm, bare[:1].upper() + bare[1:]), _ids(vlm, bare + "s")]
    single = tuple(dict.fromkeys(ids[0] for ids in written if len(ids) == 1 and ids[0] != unknown))
    if single:
        return Label(word, single)
    if not running or unknown in running:
        raise UsageError(f"word {word!r} is not in the model's vocabulary")
    if not first_token:
        tokens = vlm.tokenizer.convert_ids_to_tokens(running)
        raise UsageError(f"word {word!r} is {len(tokens)} tokens ({tokens}); first_token=True takes the first")
    return Label(word, running[:1], whole=False)


def labels_apart(vlm: "VLM", one: str, other: str) -> tuple[Label, Label]:
    """Two words as they are distinguished: each as `label_of` has it, of such that begin with the same tokens the
    token where they part.

    Raises:
        UsageError: as for `label_of` with first tokens, or words one of which begins the other.
    """
    both = label_of(vlm, one, first_token=True), label_of(vlm, other, first_token=True)
    if both[0].whole or both[1].whole or both[0].ids != both[1].ids:
        return both
    tokens = [_continued(vlm, word.strip()) for word in (one, other)]
    at = check_parting(*tokens, (one, other))
    first, second = (
        Label(f"{word} (not {rest})", ids[at : at + 1], whole=False)
        for word, rest, ids in ((one, other, tokens[0]), (other, one, tokens[1]))
    )
    return first, second


def _ids(vlm: "VLM", text: str) -> tuple[int, ...]:
    return tuple(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _continued(vlm: "VLM", word: str) -> tuple[int, ...]:
    """Tokens of the word after a space in running text; a text that begins with a space may get a token for it."""
    before = _ids(vlm, "a")
    after = _ids(vlm, f"a {word}")
    if after[: len(before)] != before:
        raise UsageError(f"word {word!r} changes the token before it, so it has no tokens of its own")
    return after[len(before) :]


# What is read


def unnamed(vlm: "VLM") -> dict[str, str | None]:
    """The model's identity without the name it was loaded by, which may be a folder that moved."""
    return {name: value for name, value in vlm.identity().items() if name != "name"}


@dataclass(frozen=True)
class Token:
    """One token of one prompt, `position` counted without padding; image tokens that are patches have their cell."""

    example: int
    position: int
    text: str
    image: int | None = None
    view: int | None = None
    row: int | None = None
    column: int | None = None


# States


def states_of(
    vlm: "VLM", prompts: Sequence[Prompt], sites: Sequence[Site], span: Span, *, batch_size: int
) -> Iterator[tuple[list[Token], dict[Site, Tensor]]]:
    """Batch by batch the tokens of a span, and at each site their states, token x d_model."""
    if isinstance(span, Each) and len(span.spans) != len(prompts):
        raise UsageError(f"Each gives {len(span.spans)} spans for {len(prompts)} prompts")
    for start in range(0, len(prompts), batch_size):
        encoded = vlm.encode(prompts[start : start + batch_size])
        tokens, places = token_positions(encoded, sites, _of_batch(span, start, len(encoded)), start)
        yield tokens, gathered(read(vlm, encoded, sites), places)


TokenPositions = dict[Site, list[tuple[int, int]]]
"""For each site the (row, position) of every token in its tensor."""


def token_positions(
    encoded: Encoded, sites: Sequence[Site], span: Span, first: int
) -> tuple[list[Token], TokenPositions]:
    """The tokens of a span, examples counted from `first`, and where each site holds them.

    Raises:
        UsageError: the span has no token, as that of answers of one token, or one that `projector.out` does not hold.
    """
    cells = encoded.cells(span)
    if not len(cells):
        raise UsageError(f"span {span!r} has no token here: of answers of one token the model is given none")
    where = list(zip(cells.rows.tolist(), cells.positions.tolist(), strict=True))
    known = [_image_tokens(encoded, example) for example in range(len(encoded))]
    tokens = [_token(encoded, known, first, *at) for at in where]
    given = [known[row][position][1] if position in known[row] else None for row, position in where]
    return tokens, {site: _given(site, given, span) if site.name == "projector.out" else where for site in sites}


def gathered(states: Activations, places: TokenPositions) -> dict[Site, Tensor]:
    chosen = {site: torch.tensor(found).T for site, found in places.items()}
    return {site: states[site][rows, positions] for site, (rows, positions) in chosen.items()}


def _of_batch(span: Span, start: int, length: int) -> Span:
    if isinstance(span, Each):
        return Each(span.spans[start : start + length])
    return tuple(_of_batch(part, start, length) for part in span) if isinstance(span, tuple) else span


def _given(site: Site, found: Sequence[tuple[int, int] | None], span: Span) -> list[tuple[int, int]]:
    held = [cell for cell in found if cell is not None]
    if len(held) < len(found):
        raise UsageError(
            f"span {span!r} has {len(found) - len(held)} token(s) that {site} does not hold one by one; it holds image "
            "tokens only: read llm.resid_pre 0, which is what the decoder receives"
        )
    return held


def _image_tokens(encoded: Encoded, example: int) -> dict[int, tuple[dict[str, int], tuple[int, int] | None]]:
    """Position of each image token -> its image and patch cell, and its (row, position) in the projector's output."""
    found: dict[int, tuple[dict[str, int], tuple[int, int] | None]] = {}
    for number, picture in enumerate(encoded.rows[example].images):
        layout = picture.layout
        # Learned queries stand in the prompt in the order in which the projector gave them.
        given = layout.given.tolist() if not layout.views else [None] * len(picture.positions)
        for position, cell in zip(picture.positions, given, strict=True):
            found[position] = {"image": number}, cell and (cell[0], cell[1])
        for index, view in enumerate(layout.views):
            for order, (slot, (row, position)) in enumerate(zip(view.slots, view.given.tolist(), strict=True)):
                at = {"image": number, "view": index, "row": order // view.grid[1], "column": order % view.grid[1]}
                found[picture.positions[slot]] = at, (row, position) if row >= 0 else None
    return found


def _token(encoded: Encoded, known: Sequence[dict[int, Any]], first: int, example: int, position: int) -> Token:
    row = encoded.rows[example]
    if encoded.answers is not None and position >= encoded.n_prompt:
        number = encoded.answers.depth[position] - encoded.n_prompt + len(row.present)
        token = encoded.vlm.tokenizer.convert_ids_to_tokens(int(encoded.inputs["input_ids"][example, position]))
        return Token(first + example, number, token)
    place = known[example][position][0] if position in known[example] else {}
    return Token(first + example, row.present.index(position), row.tokens[position], **place)
