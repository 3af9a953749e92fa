"""Greedy answers of many edited versions at once: one batch, a token a row at a time, which rows leave as they end.

The model makes embeddings, positions and masks as it does with a cache, since it is told how many tokens came before.
Its attention function is replaced by a softmax over the keys that versions share and those of their own (`tracks.py`).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm_mech.interventions.attention import Attend, allowed_edges, attending
from vlm_mech.interventions.receipt import Receipt
from vlm_mech.sweeps.recorded_pass import RecordedPass, last_states, read_out
from vlm_mech.sweeps.tracks import Track

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True)
class Before:
    """What a decoder asks of a cache: how many tokens came before. It holds none of them."""

    n_seen: int

    def get_seq_length(self, *_: Any) -> int:
        """Tokens before this pass."""
        return self.n_seen

    def get_query_offset(self, *_: Any) -> int:
        """Position of the first query."""
        return self.n_seen

    def get_mask_sizes(self, n_query: int, *_: Any) -> tuple[int, int]:
        """Number of keys that a mask is over, and the position of the first."""
        return self.n_seen + n_query, 0

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """The new ones alone; the attention function knows the others."""
        return keys, values


@dataclass(eq=False)
class Decoding:
    """Greedy decoding of all rows of some tracks, whose versions have the numbers from 0 on, after a clean pass.

    `ends` are the tokens that end an answer, `fill` is the one that fills up what has ended. `proofs` are the receipts
    of edits of generated tokens' edges, by layer and version.
    """

    vlm: "VLM"
    clean: RecordedPass
    tracks: list[Track]
    ends: tuple[int, ...]
    fill: int
    proofs: dict[tuple[int, int], list[Receipt]] = field(default_factory=dict)

    def run(self, first: Float[Tensor, "version batch vocab"], n_new: int) -> Int[Tensor, "version batch new"]:
        """The tokens of all answers, `n_new` at most.

        Args:
            first: logits of the first token.
        """
        device = first.device
        ids = torch.full((*first.shape[:2], n_new), self.fill, device=device)
        ids[:, :, 0] = first.float().argmax(-1)
        ends, going = (
            torch.tensor(self.ends, device=device),
            torch.ones(first.shape[:2], dtype=torch.bool, device=device),
        )
        layers = {
            block.get_submodule(self.vlm.family.llm.attention): layer
            for layer, block in enumerate(self.vlm.model.get_submodule(self.vlm.family.llm.path).children())
        }
        with torch.no_grad(), self.vlm.passing():
            for step in range(n_new - 1):
                going &= ~torch.isin(ids[:, :, step], ends)
                self._leave(going.tolist())
                rows = [(version.number, example) for track in self.tracks for version, example in track.rows]
                if not rows:
                    break
                at = tuple(torch.tensor(rows, device=device).T)
                with attending(set(layers), lambda _, step=step: self._attention(layers, step)):
                    ids[(*at, step + 1)] = self._next(ids[(*at, step)], at[1], step)
        return ids

    def _leave(self, going: list[list[bool]]) -> None:
        for track in self.tracks:
            track.keep([row for row, (version, example) in enumerate(track.rows) if going[version.number][example]])
        self.tracks = [track for track in self.tracks if len(track)]

    def _next(self, tokens: Int[Tensor, "row"], examples: Int[Tensor, "row"], step: int) -> Int[Tensor, "row"]:
        """The token after these, which are number `step` of their answers."""
        n_seen, given = self.clean.final.shape[1] + step, self.clean.encoded.inputs["attention_mask"][examples]
        mask = torch.cat([given, given.new_ones(len(given), step + 1)], 1)
        positions = self._positions(examples, step)
        # Where none were given in the clean pass, the decoder counts them itself.
        options = {} if positions is None else {"position_ids": positions}
        decoder = self.vlm.model.get_submodule(self.vlm.family.decoder)
        cache: Any = Before(n_seen)
        hidden = last_states(
            self.vlm,
            lambda: decoder(input_ids=tokens[:, None], attention_mask=mask, past_key_values=cache, **options),
        )
        return read_out(self.vlm, hidden[:, -1]).float().argmax(-1)

    def _positions(self, examples: Int[Tensor, "row"], step: int) -> Tensor | None:
        """Position ids of the tokens number `step`: they go on after the largest of the prompt on any axis."""
        ids = self.clean.positions
        if ids is None:
            return None
        # Of four axes the first counts the text.
        last = ids.amax(-1) if ids.ndim == 2 else ids[-3:].amax((0, 2))
        last = last.to(examples.device)
        last = last[examples] if len(last) > 1 else last.expand(len(examples))
        after = (last + 1 + step)[:, None]
        return after if ids.ndim == 2 else after.expand(3, -1, -1)

    def _attention(self, layers: dict[nn.Module, int], step: int) -> Attend:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
        ) -> tuple[Tensor, None]:
            layer, n_key = layers[module], self.clean.final.shape[1] + step + 1
            allowed = allowed_edges(mask, n_query=1, n_key=n_key, causal=False, device=query.device)
            allowed, out, first = allowed.expand(len(query), -1, -1, -1), [], 0
            for track in self.tracks:
                rows = slice(first, first + len(track))
                made, proofs = track.attend(layer, step, query[rows], key[rows], value[rows], allowed[rows])
                self.proofs |= {(layer, number): proof for number, proof in proofs.items()}
                out.append(made)
                first = rows.stop
            return torch.cat(out), None

        return attend
