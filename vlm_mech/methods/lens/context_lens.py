"""Contextual lens: which words of a bank of text states the states of image tokens are nearest to, at any layer.

After LatentLens (arXiv 2602.00462): cosine with all of the bank's layers together, the best few merged. What a state is
near to is no proof that the model reads it there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Span
from vlm_mech.methods.lens.context_bank import ContextBank, Nearest, Neighbour, check_bank
from vlm_mech.methods.lens.data import Token, states_of
from vlm_mech.methods.lens.leads import INPUT

if TYPE_CHECKING:
    import pandas as pd

    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True, eq=False)
class ContextWords:
    """The nearest contexts of every token at every site: cosines, numbers of the bank's sites and of its contexts."""

    prompts: tuple[Prompt, ...]
    sites: tuple[Site, ...]
    tokens: tuple[Token, ...]
    bank: ContextBank
    similarities: Float[Tensor, "site token best"]
    bank_sites: Int[Tensor, "site token best"]
    contexts: Int[Tensor, "site token best"]

    def site(self, site: Site) -> int:
        """Number of a site.

        Raises:
            UsageError: it was not read.
        """
        if site not in self.sites:
            raise UsageError(f"{site} was not read; these words are of {', '.join(map(str, self.sites))}")
        return self.sites.index(site)

    def top_words(self, site: Site) -> tuple[tuple[str, ...], ...]:
        """The words of the nearest contexts of every token at a site, best first; a word may come more than once."""
        words = self.bank.contexts["word"].tolist()
        return tuple(tuple(words[at] for at in line) for line in self.contexts[self.site(site)].tolist())

    def neighbours(self, site: Site) -> tuple[tuple[Neighbour, ...], ...]:
        """The nearest contexts of every token at a site, with their texts."""
        at = self.site(site)
        return self.bank.neighbours(Nearest(self.similarities[at], self.bank_sites[at], self.contexts[at]))

    @property
    def layer_map(self) -> "pd.DataFrame":
        """Share of the nearest contexts by `site` of the token and `bank_site` where they are; 1 in all of a site."""
        import pandas as pd

        rows = []
        for site, found in zip(self.sites, self.bank_sites, strict=True):
            counts = torch.bincount(found.flatten(), minlength=len(self.bank.sites)) / found.numel()
            for other, share in zip(self.bank.sites, counts.tolist(), strict=True):
                rows.append({"site": str(site), "bank_site": str(other), "share": share})
        return pd.DataFrame(rows)


def context_words(
    vlm: "VLM",
    prompts: Prompt | Sequence[Prompt],
    bank: ContextBank,
    *,
    layers: Sequence[int] | None = None,
    span: Span = "image",
    top: int = 5,
    bank_layers: Sequence[int] | None = None,
    batch_size: int = 8,
) -> ContextWords:
    """The words whose states in texts are nearest to those of the tokens of a span.

    States are raw residual states, on both sides.

    Args:
        bank: of this model (`build_bank`).
        layers: outputs of blocks that are read, -1 for the decoder's input; by default that and all blocks.
        span: tokens that are read.
        top: how many of the nearest contexts are kept.
        bank_layers: layers of the bank that are searched; all by default.
        batch_size: prompts per forward pass.

    Raises:
        UsageError: a bank of another model, no prompt, a layer out of range or that the bank does not have, an empty
            span, or a number below 1.
    """
    check_decoder(vlm, "context_words")
    check_bank(bank, "context_words")
    bank.check(vlm)
    prompts = (prompts,) if isinstance(prompts, Prompt) else tuple(prompts)
    depths = [INPUT, *vlm.llm_layers] if layers is None else list(dict.fromkeys(layers))
    sites = tuple(Site("llm.resid_pre", 0) if at == INPUT else Site("llm.resid_post", at) for at in depths)
    if not prompts or not sites or batch_size < 1:
        raise UsageError(
            f"{len(prompts)} prompts, {len(sites)} layers and a batch of {batch_size}; one of each is needed"
        )
    for site in sites:
        vlm.check_site(site)
    tokens: list[Token] = []
    parts: dict[Site, list[Nearest]] = {site: [] for site in sites}
    for some, states in states_of(vlm, prompts, sites, span, batch_size=batch_size):
        tokens += some
        for site in sites:
            parts[site].append(bank.nearest(states.pop(site), top_k=top, layers=bank_layers))
    columns = [
        torch.stack([torch.cat([getattr(part, name) for part in parts[site]]) for site in sites])
        for name in ("similarities", "sites", "contexts")
    ]
    return ContextWords(prompts, sites, tuple(tokens), bank, *columns)
