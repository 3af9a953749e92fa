"""Logit lens: what the final norm and the head would read from the residual stream at any layer and token.

After nostalgebraist (2020), "interpreting GPT: the logit lens": `softmax(W_U norm(h))`. States are `resid_pre`,
`resid_post` or `projector.out`, never Hugging Face's `hidden_states`, whose last entry is already normed; so the norm
is applied exactly once, and at the last `resid_post` the lens is the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm_mech.edit import check_site
from vlm_mech.errors import UsageError
from vlm_mech.intervene import Activations
from vlm_mech.prompt import Encoded, Prompt
from vlm_mech.readout import Readout, readout_of
from vlm_mech.site import Site
from vlm_mech.span import Each, Span
from vlm_mech.trace import read

if TYPE_CHECKING:
    import pandas as pd

    from vlm_mech.model import VLM
    from vlm_mech.tuned_lens import TunedLens

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
        raise UsageError(f"word {word!r} is no token")
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


@dataclass(frozen=True, eq=False)
class Lens:
    """What every token's state says at every site.

    `logits` and `log_probabilities` are those of a word's likeliest token; `ranks` counts it 1 when it is best, and
    tokens of an equal logit that do not stand for the word count as better. `full` holds all logits if they were asked
    for. `texts` are the words behind `top_ids`.
    """

    prompts: tuple[Prompt, ...]
    sites: tuple[Site, ...]
    tokens: tuple[Token, ...]
    labels: tuple[Label, ...]
    logits: Float[Tensor, "site token word"]
    log_probabilities: Float[Tensor, "site token word"]
    ranks: Int[Tensor, "site token word"]
    top_ids: Int[Tensor, "site token best"]
    top_probabilities: Float[Tensor, "site token best"]
    texts: dict[int, str]
    full: Float[Tensor, "site token vocab"] | None = None

    def site(self, site: Site) -> int:
        """Number of a site."""
        if site not in self.sites:
            raise UsageError(f"{site} was not read; this lens has {', '.join(map(str, self.sites))}")
        return self.sites.index(site)

    def word(self, word: str) -> int:
        """Number of a word that was asked for."""
        words = [label.word for label in self.labels]
        if word not in words:
            raise UsageError(f"word {word!r} was not asked for; this lens has {', '.join(words) or 'no words'}")
        return words.index(word)

    def rank(self, word: str) -> Int[Tensor, "site token"]:
        """Rank of a word at every site and token, 1 for the best."""
        return self.ranks[:, :, self.word(word)]

    def reciprocal_rank(self, word: str) -> Float[Tensor, "site token"]:
        """One over the rank."""
        return 1.0 / self.rank(word)

    def hit(self, word: str, k: int) -> Bool[Tensor, "site token"]:
        """Whether the word is among the best `k`."""
        return self.rank(word) <= k

    def top_words(self, site: Site) -> tuple[tuple[str, ...], ...]:
        """The likeliest words of every token at a site, best first."""
        return tuple(tuple(self.texts[number] for number in ids) for ids in self.top_ids[self.site(site)].tolist())

    @property
    def vocabulary(self) -> Float[Tensor, "site token vocab"]:
        """The logits of the whole vocabulary.

        Raises:
            UsageError: they were not asked for.
        """
        if self.full is None:
            raise UsageError("the whole vocabulary was not kept; lens(..., whole_vocabulary=True) keeps it")
        return self.full

    @property
    def table(self) -> "pd.DataFrame":
        """One row per site, token and word, with logit (logits), log-probability (nats), rank and reciprocal rank."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for number, site in enumerate(self.sites):
            for place, token in enumerate(self.tokens):
                for which, label in enumerate(self.labels):
                    at = (number, place, which)
                    rank = int(self.ranks[at])
                    values = {"logit": float(self.logits[at]), "log_probability": float(self.log_probabilities[at])}
                    values |= {"rank": rank, "reciprocal_rank": 1 / rank, "whole": label.whole}
                    rows.append({"site": str(site), "layer": site.layer, **vars(token), "word": label.word, **values})
        return pd.DataFrame(rows)


def lens(
    vlm: "VLM",
    prompts: Prompt | Sequence[Prompt],
    sites: Site | Sequence[Site],
    span: Span,
    *,
    words: Sequence[str] = (),
    first_token: bool = False,
    top: int = 5,
    normed: bool = True,
    tuned: "TunedLens | None" = None,
    whole_vocabulary: bool = False,
    batch_size: int = 8,
) -> Lens:
    """The logit lens on every token of a span at every site.

    One pass a batch holds the residual states of the sites; logits of all words exist for a few tokens at a time.

    Args:
        sites: of `projector.out`, `llm.resid_pre`, `llm.resid_post`. What the decoder receives is `llm.resid_pre` 0:
            `projector.out` may still be scaled, unpadded or put in another order.
        words: words whose logit, log-probability and rank are kept (see `label_of`).
        first_token: whether a word of several tokens stands for its first one.
        top: how many of the likeliest words are kept.
        normed: whether the final norm is applied, once.
        tuned: translators to apply before the norm.
        whole_vocabulary: whether all logits are kept.

    Raises:
        UsageError: another site, a layer out of range, an empty span, tokens of a span that `projector.out` does not
            have, a word that is no token, or a tuned lens made for another model or with these very prompts.
    """
    prompts = (prompts,) if isinstance(prompts, Prompt) else tuple(prompts)
    sites = (sites,) if isinstance(sites, Site) else tuple(sites)
    labels = tuple(label_of(vlm, word, first_token=first_token) for word in words)
    _check(vlm, prompts, sites, top, batch_size)
    if tuned is not None:
        tuned.check(vlm, prompts, sites, normed=normed)
    readout = readout_of(vlm, prompts[0])
    tokens: list[Token] = []
    parts: dict[Site, list[_Part]] = {site: [] for site in sites}
    for some, states in states_of(vlm, prompts, sites, span, batch_size=batch_size):
        tokens += some
        for site in sites:
            hidden = states.pop(site)
            hidden = hidden if tuned is None else tuned.translate(site, hidden)
            parts[site] += _parts(readout, hidden, labels, top, normed, whole_vocabulary)
    return _joined(vlm, prompts, sites, tokens, labels, parts)


def lens_of(vlm: "VLM", states: Activations, span: Span, readout: Readout, labels: Sequence[Label] = ()) -> Lens:
    """The logit lens on states that were read already, such as those of an edited run, at all their sites.

    Args:
        readout: from states to scores of the vocabulary (see `readout.readout_of`).
        labels: the words whose numbers are kept (see `label_of`).
    """
    encoded, sites = states.encoded, tuple(states.values)
    if not isinstance(encoded, Encoded):
        raise UsageError("the lens reads states of prompts, not those of a contrastive model")
    _check(vlm, encoded.prompts, sites, 1, 1)
    tokens, places = _places(encoded, sites, span, 0)
    found = _gathered(states, places)
    parts = {site: list(_parts(readout, found[site], tuple(labels), 1, True, False)) for site in sites}
    return _joined(vlm, encoded.prompts, sites, tokens, tuple(labels), parts)


def _check(vlm: "VLM", prompts: tuple[Prompt, ...], sites: tuple[Site, ...], top: int, batch_size: int) -> None:
    if not prompts or not sites:
        raise UsageError(f"{len(prompts)} prompts and {len(sites)} sites were given; one of each is needed")
    if len(set(sites)) != len(sites):
        raise UsageError("a site is named twice")
    if top < 1 or batch_size < 1:
        raise UsageError(f"top {top} and batch_size {batch_size} must be at least 1")
    for site in sites:
        check_site(vlm, site)
        if site.name not in SITES:
            raise UsageError(f"{site} is no state that the head could read; sites: {', '.join(SITES)}")


# States


def states_of(
    vlm: "VLM", prompts: Sequence[Prompt], sites: Sequence[Site], span: Span, *, batch_size: int
) -> Iterator[tuple[list[Token], dict[Site, Tensor]]]:
    """Batch by batch the tokens of a span, and at each site their states, token x d_model."""
    if isinstance(span, Each) and len(span.spans) != len(prompts):
        raise UsageError(f"Each gives {len(span.spans)} spans for {len(prompts)} prompts")
    for start in range(0, len(prompts), batch_size):
        encoded = vlm.encode(prompts[start : start + batch_size])
        tokens, places = _places(encoded, sites, _of_batch(span, start, len(encoded)), start)
        yield tokens, _gathered(read(vlm, encoded, sites), places)


_Places = dict[Site, list[tuple[int, int]]]
"""For each site the (row, position) of every token in its tensor."""


def _places(encoded: Encoded, sites: Sequence[Site], span: Span, first: int) -> tuple[list[Token], _Places]:
    """The tokens of a span, examples counted from `first`, and where each site holds them."""
    cells = encoded.cells(span)
    where = list(zip(cells.rows.tolist(), cells.positions.tolist(), strict=True))
    known = [_image_tokens(encoded, example) for example in range(len(encoded))]
    tokens = [_token(encoded, known, first, *at) for at in where]
    given = [known[row][position][1] if position in known[row] else None for row, position in where]
    return tokens, {site: _given(site, given, span) if site.name == "projector.out" else where for site in sites}


def _gathered(states: Activations, places: _Places) -> dict[Site, Tensor]:
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
    place = known[example][position][0] if position in known[example] else {}
    return Token(first + example, row.present.index(position), row.tokens[position], **place)


# Numbers

_Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""Of some tokens: logits, log-probabilities and ranks of the words, best ids and their probabilities, all logits."""


def _parts(
    readout: Readout,
    hidden: Float[Tensor, "token d_model"],
    labels: tuple[Label, ...],
    top: int,
    normed: bool,
    whole_vocabulary: bool,
) -> Iterator[_Part]:
    for some in hidden.split(max(1, MOST_LOGITS // readout.n_words)):
        with torch.no_grad():
            logits = readout(some, normed=normed)
        yield _numbers(logits, labels, top, whole_vocabulary)


def _numbers(
    logits: Float[Tensor, "token vocab"], labels: tuple[Label, ...], top: int, whole_vocabulary: bool
) -> _Part:
    total = logits.logsumexp(-1, keepdim=True)
    best, ids = logits.topk(min(top, logits.shape[-1]), -1)
    found, ranks = logits.new_zeros(len(logits), len(labels)), ids.new_zeros(len(logits), len(labels))
    for number, label in enumerate(labels):
        own = logits[:, list(label.ids)]
        found[:, number] = own.amax(-1)
        limit = found[:, number, None]
        ranks[:, number] = 1 + (logits >= limit).sum(-1) - (own >= limit).sum(-1)
    kept = logits.cpu() if whole_vocabulary else None
    numbers = (found, found - total, ranks, ids, (best - total).exp())
    return (*(each.cpu() for each in numbers), kept)  # type: ignore[return-value]


def _joined(
    vlm: "VLM",
    prompts: tuple[Prompt, ...],
    sites: tuple[Site, ...],
    tokens: list[Token],
    labels: tuple[Label, ...],
    parts: dict[Site, list[_Part]],
) -> Lens:
    columns = [[torch.cat(column) for column in list(zip(*parts[site], strict=True))[:5]] for site in sites]
    logits, log_probabilities, ranks, ids, probabilities = (torch.stack(each) for each in zip(*columns, strict=True))
    kept = [[part[5] for part in parts[site] if part[5] is not None] for site in sites]
    full = torch.stack([torch.cat(each) for each in kept]) if all(kept) else None
    texts = {number: _text(vlm, number) for number in ids.unique().tolist()}
    return Lens(
        prompts, sites, tuple(tokens), labels, logits, log_probabilities, ranks, ids, probabilities, texts, full
    )


def _text(vlm: "VLM", number: int) -> str:
    """A token as it reads; those that read as nothing under their name, and ids without a token as such."""
    token = vlm.tokenizer.convert_ids_to_tokens(number)
    if token is None:
        return f"<id {number}>"
    return vlm.tokenizer.decode([number]) or str(token)
