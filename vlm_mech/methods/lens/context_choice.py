"""Which tokens of which texts go into a bank: of each token at most so many contexts, drawn by a hash.

A context is a token with all tokens before it, since under causal attention its state depends on nothing else. The hash
of these, with the seed, ranks it; of each token the lowest ranks are kept. So equal beginnings count once without a
list of those that were seen, each distinct one is as likely to be kept, and the order of the texts does not matter.
"""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

LATE = 10
"""Position from which on contexts come before all earlier ones."""


@dataclass(frozen=True, order=True)
class Context:
    """A token at a position of a text; the lower the rank, the sooner it is kept."""

    rank: int
    text: int
    position: int


@dataclass(eq=False)
class Contexts:
    """The contexts chosen so far: for each token id a heap with the highest rank on top, and the ranks in it."""

    most: int
    first: int
    seed: int
    heaps: dict[int, list[tuple[int, Context]]] = field(default_factory=dict)
    ranks: dict[int, set[int]] = field(default_factory=dict)

    def add(self, text: int, ids: Sequence[int], skipped: frozenset[int]) -> None:
        """Offers every token of a text.

        Args:
            text: its number.
            ids: its tokens without padding.
            skipped: special tokens, of which no context is kept.
        """
        digest = hashlib.blake2b(digest_size=8, key=str(self.seed).encode())
        for position, token in enumerate(ids):
            digest.update(token.to_bytes(4, "little"))
            if position >= self.first and token not in skipped:
                early = position < LATE
                rank = (early << 64) | int.from_bytes(digest.copy().digest(), "little")
                self._offer(token, Context(rank, text, position))

    def _offer(self, token: int, context: Context) -> None:
        heap, ranks = self.heaps.setdefault(token, []), self.ranks.setdefault(token, set())
        if context.rank in ranks or (len(heap) == self.most and context.rank > -heap[0][0]):
            return
        ranks.add(context.rank)
        entry = (-context.rank, context)
        if len(heap) < self.most:
            heapq.heappush(heap, entry)
        else:
            ranks.remove(heapq.heappushpop(heap, entry)[1].rank)

    def by_text(self) -> dict[int, list[tuple[int, int, int]]]:
        """For each text that has any its contexts as (number, position, token id), numbered in the texts' order."""
        chosen = sorted((each.text, each.position, token) for token, each in self._all())
        found: dict[int, list[tuple[int, int, int]]] = {}
        for number, (text, position, token) in enumerate(chosen):
            found.setdefault(text, []).append((number, position, token))
        return found

    def _all(self) -> Iterator[tuple[int, Context]]:
        return ((token, each) for token, heap in self.heaps.items() for _, each in heap)
