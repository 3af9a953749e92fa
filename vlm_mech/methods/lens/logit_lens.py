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

from vlm_mech.architectures.site import Site, listed_sites
from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.specification import Activations
from vlm_mech.methods.lens.data import MOST_LOGITS, SITES, Label, Token, gathered, label_of, states_of, token_positions
from vlm_mech.models.readout import Readout

if TYPE_CHECKING:
    import pandas as pd

    from vlm_mech.methods.lens.tuned_lens import TunedLens
    from vlm_mech.models.vlm import VLM


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
            raise UsageError(f"word {word!r} was not requested; this lens has {', '.join(words) or 'no words'}")
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
        words: words whose logit, log-probability and rank are kept. A word stands for each way of writing it that is
            one token: after a space or not, with a capital, with an s.
        first_token: whether a word of several tokens stands for its first one.
        top: how many of the likeliest words are kept.
        normed: whether the final norm is applied, once.
        tuned: translators to apply before the norm.
        whole_vocabulary: whether all logits are kept.
        batch_size: prompts per forward pass.

    Raises:
        UsageError: another site, a layer out of range, an empty span, tokens of a span that `projector.out` does not
            have, a word that is no token, or a tuned lens made for another model or with these very prompts.
    """
    check_decoder(vlm, "lens")
    prompts = (prompts,) if isinstance(prompts, Prompt) else tuple(prompts)
    sites = listed_sites(sites, "lens")
    labels = tuple(label_of(vlm, word, first_token=first_token) for word in words)
    _check(vlm, prompts, sites, top, batch_size)
    if tuned is not None:
        tuned.check(vlm, prompts, sites, normed=normed)
    readout = vlm.readout
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
        span: `answer` too, where the states are of prompts with answers after them.
        readout: from states to scores of the vocabulary (see `VLM.readout`).
        labels: the words whose numbers are kept (see `label_of`).

    Raises:
        UsageError: states that are no prompts', a site that the head cannot read, or a span without a token.
    """
    encoded, sites = states.encoded, tuple(states.values)
    if not isinstance(encoded, Encoded):
        raise UsageError("the lens reads states of prompts, not those of a contrastive model")
    _check(vlm, encoded.prompts, sites, 1, 1)
    tokens, places = token_positions(encoded, sites, span, 0)
    found = gathered(states, places)
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
        vlm.check_site(site)
        if site.name not in SITES:
            raise UsageError(f"{site} is not a state that the head could read; sites: {', '.join(SITES)}")


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
