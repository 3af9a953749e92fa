"""A bank of contextual text states: what tokens of texts look like inside the decoder, kept to be searched by cosine.

After LatentLens (arXiv 2602.00462), whose bank is of captions. States are raw residual states by `Site`, never Hugging
Face's `hidden_states`, whose last entry is already normed.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.methods.lens.data import unnamed

if TYPE_CHECKING:
    import pandas as pd

    from vlm_mech.models.vlm import VLM

STATES, CONTEXTS, RECORD = "bank.safetensors", "contexts.parquet", "bank.json"
CHUNK = 2**23
"""Numbers of the bank, and similarities, that are held at once: 32 MiB each."""


@dataclass(frozen=True)
class Neighbour:
    """A token of the bank that is near a state: its `word` (the token widened to the word that it is part of), the
    cosine `similarity`, the `text` around it, its `position` in that text, and the bank's `site` where it is near."""

    word: str
    token: str
    similarity: float
    text: str
    position: int
    site: Site


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest rows of a bank, best first: cosine, number of the bank's site, number of the context."""

    similarities: Float[Tensor, "state best"]
    sites: Int[Tensor, "state best"]
    contexts: Int[Tensor, "state best"]


@dataclass(frozen=True, eq=False)
class ContextBank:
    """Contextual states on disk: unit rows in float16 for each site and context, mapped into memory when searched.

    `record` is what `bank.json` holds: the model, the settings, the texts' fingerprint, the sites, the number of
    contexts.
    """

    folder: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "ContextBank":
        """The bank that `build_bank` left in the folder.

        Raises:
            UsageError: there is none, or it is not finished.
        """
        folder = Path(folder)
        lacking = [name for name in (RECORD, STATES, CONTEXTS) if not (folder / name).is_file()]
        if lacking:
            begun = "holds a bank that is not finished; call build_bank again" if folder.is_dir() else "is not a folder"
            raise UsageError(f"there is no finished context bank in {str(folder)!r}: it lacks {lacking[0]} ({begun})")
        return cls(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The bank's sites: the decoder's input and outputs of blocks."""
        return tuple(Site(name, layer) for name, layer in self.record["sites"])

    @functools.cached_property
    def contexts(self) -> "pd.DataFrame":
        """A row per context: `token_id`, `token`, `word`, `position` in its text, and the `text` around it."""
        import pandas as pd

        return pd.read_parquet(self.folder / CONTEXTS)

    def __len__(self) -> int:
        return self.record["n_contexts"]

    def states(self, site: Site, start: int = 0, stop: int | None = None) -> Float[Tensor, "context d_model"]:
        """Unit rows of a site in float16; only the contexts asked for are read.

        Args:
            start: first context.
            stop: the context after the last one; by default all that follow.

        Raises:
            UsageError: the bank does not have the site.
        """
        if site not in self.sites:
            raise UsageError(f"the bank does not have {site}; it has {', '.join(map(str, self.sites))}")
        with safe_open(self.folder / STATES, framework="pt") as opened:
            return opened.get_slice(str(site))[start : len(self) if stop is None else stop]

    def check(self, vlm: "VLM") -> None:
        """Raise `UsageError` unless the bank is of this model."""
        own, found = self.record["model"], unnamed(vlm)
        different = sorted(key for key in own.keys() | found.keys() if own.get(key) != found.get(key))
        if different:
            told = "; ".join(f"{key} {own.get(key)}, not {found.get(key)}" for key in different)
            raise UsageError(f"the context bank in {str(self.folder)!r} was made for another model: {told}")

    def search(
        self, states: Float[Tensor, "state d_model"], *, top_k: int = 5, layers: Sequence[int] | None = None
    ) -> tuple[tuple[Neighbour, ...], ...]:
        """The nearest contexts of each state by cosine, best first, over all of the bank's sites together.

        Both sides are normalised. A context may be found at several layers, as in the source.

        Args:
            top_k: how many are found.
            layers: layers of the bank that are searched, -1 for the decoder's input; all by default.

        Raises:
            UsageError: no state, one that is 0 or not finite, states of another width, a layer that the bank does not
                have, or `top_k` below 1 or above what is searched.
        """
        found = self.nearest(states, top_k=top_k, layers=layers)
        if odd := (states == 0).all(-1).nonzero().flatten().tolist():
            raise UsageError(f"state {odd[0]} of those to be searched is 0 everywhere; it has no direction to compare")
        return self.neighbours(found)

    def nearest(
        self, states: Float[Tensor, "state d_model"], *, top_k: int = 5, layers: Sequence[int] | None = None
    ) -> Nearest:
        """The same as numbers (see `search`).

        Args:
            top_k: how many are found.
            layers: layers of the bank that are searched.
        """
        sites = self._sites_of(layers)
        width = self.record["d_model"]
        if states.ndim != 2 or states.shape[1] != width or not len(states):
            raise UsageError(f"states have the shape {tuple(states.shape)}; states x {width} is needed")
        if not 1 <= top_k <= len(sites) * len(self):
            raise UsageError(f"top_k is {top_k}; 1 to {len(sites) * len(self)} is possible in this bank")
        if odd := (~states.isfinite().all(-1)).nonzero().flatten().tolist():
            raise UsageError(f"state {odd[0]} of those to be searched is NaN or infinite in places; numbers are needed")
        step = max(1, CHUNK // min(len(self), self._rows_held))
        parts = [
            self._nearest(some, top_k, sites) for some in torch.nn.functional.normalize(states.float()).split(step)
        ]
        return Nearest(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in Nearest.__annotations__))

    def _sites_of(self, layers: Sequence[int] | None) -> list[int]:
        """Numbers of the sites that are searched."""
        known = {site.layer if site.name == "llm.resid_post" else -1: n for n, site in enumerate(self.sites)}
        asked = list(known) if layers is None else list(layers)
        lacking = [layer for layer in asked if layer not in known]
        if lacking or not asked:
            raise UsageError(f"the bank does not have layer(s) {lacking}; it has {sorted(known)} (-1: decoder's input)")
        return [known[layer] for layer in dict.fromkeys(asked)]

    def _nearest(self, queries: Tensor, top_k: int, sites: Sequence[int]) -> Nearest:
        best = queries.new_full((len(queries), 0), 0.0)
        where = torch.zeros(len(queries), 0, 2, dtype=torch.long, device=queries.device)
        for number in sites:
            for start, rows in self._chunks(self.sites[number]):
                found = queries @ torch.nn.functional.normalize(rows.to(queries.device).float()).mT
                values, ids = found.topk(min(top_k, found.shape[1]), -1)
                here = torch.stack([torch.full_like(ids, number), ids + start], -1)
                best, where = torch.cat([best, values], 1), torch.cat([where, here], 1)
                best, order = best.topk(min(top_k, best.shape[1]), -1)
                where = where.gather(1, order[..., None].expand(-1, -1, 2))
        return Nearest(best, where[..., 0], where[..., 1])

    def _chunks(self, site: Site) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self), self._rows_held):
            yield start, self.states(site, start, min(start + self._rows_held, len(self)))

    @property
    def _rows_held(self) -> int:
        return max(1, CHUNK // self.record["d_model"])

    def neighbours(self, found: Nearest) -> tuple[tuple[Neighbour, ...], ...]:
        """The contexts behind the numbers."""
        rows = self.contexts.loc[found.contexts.unique().tolist()].to_dict("index")
        sites, lines = self.sites, []
        columns = (found.similarities, found.sites, found.contexts)
        for line in zip(*(column.tolist() for column in columns), strict=True):
            lines.append(
                tuple(_neighbour(rows[at], value, sites[number]) for value, number, at in zip(*line, strict=True))
            )
        return tuple(lines)

    def __repr__(self) -> str:
        return f"ContextBank({str(self.folder)!r}: {len(self)} contexts at {len(self.sites)} sites)"


def check_bank(given: Any, call: str) -> None:
    """Raise `UsageError` unless a bank is given, such as its folder alone."""
    if not isinstance(given, ContextBank):
        opens = f"ContextBank.open({str(given)!r:.60})" if isinstance(given, str | Path) else "build_bank"
        raise UsageError(f"{call} takes a ContextBank, not a {type(given).__name__}; {opens} gives one")


def _neighbour(row: dict[Any, Any], similarity: float, site: Site) -> Neighbour:
    return Neighbour(row["word"], row["token"], similarity, row["text"], int(row["position"]), site)
