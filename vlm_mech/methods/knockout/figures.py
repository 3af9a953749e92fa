"""Pictures of a knockout run: examples with their answers, and where the strongest heads look."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from PIL import Image

from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.methods.knockout.data import Masks
from vlm_mech.methods.knockout.edges import Edge, Ends, ends_of, object_positions, visible_edges
from vlm_mech.methods.knockout.findings import Head, Told
from vlm_mech.results.overlays import laid_over
from vlm_mech.sweeps.recorded_pass import record

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pair, Pairs
    from vlm_mech.models.vlm import VLM

N_SHOWN, N_HEADS, N_MAPPED = 4, 3, 32
"""Examples shown, heads told of, and examples on which these heads' attention is averaged, at most."""


def attention_maps(
    vlm: "VLM", pairs: "Pairs", edge: Edge, heads: Sequence[Head], masks: Masks, *, n_pictures: int = N_SHOWN
) -> Told:
    """Where these heads look from the queries of an edge (the mean over them), with nothing cut.

    Returns:
        The mean attention that the heads give to the image and, where it is known, to the object, with the share of
        patches that show it; and `n_pictures` examples for each head: the first image in its first view, every patch
        as bright as its share of the largest weight on any token, those of the object framed. Nothing where image
        tokens are no patches.
    """
    if not heads or not len(pairs):
        return Told((), ())
    encoded = vlm.encode(pairs.base)
    if not all(row.images[0].layout.views for row in encoded.rows):
        return Told((), ())
    clean = record(vlm, encoded)
    ends = [ends_of(encoded, at, edge, visible_edges(clean, at), masks.get(pair.id)) for at, pair in enumerate(pairs)]
    queries = [
        [row.present[number] for number in each.query] if isinstance(each, Ends) else [encoded.n_pos - 1]
        for row, each in zip(encoded.rows, ends, strict=True)
    ]
    weights = attention_from(vlm, encoded, queries, [head.layer for head in heads])
    findings: list[str] = []
    pictures: list[tuple[str, Image.Image]] = []
    for head in heads:
        looks = [
            _Look(encoded, at, pair, masks, weights[head.layer][at, head.head].numpy())
            for at, (pair, each) in enumerate(zip(pairs, ends, strict=True))
            if isinstance(each, Ends)
        ]
        findings.append(_said(edge, head, looks))
        pictures += [look.drawn(f"{head}, from {edge.query}") for look in looks[:n_pictures]]
    return Told(tuple(findings), tuple(pictures))


@dataclass(frozen=True, eq=False)
class _Look:
    """The attention of one head in one example, over all positions."""

    encoded: Encoded
    example: int
    pair: "Pair"
    masks: Masks
    weights: Float[np.ndarray, "pos"]

    @property
    def shown(self) -> set[int]:
        """Positions that show the object; empty where it is not known."""
        mask = self.masks.get(self.pair.id)
        return set() if mask is None else object_positions(self.encoded, self.example, mask)

    @property
    def shares(self) -> tuple[float, float, float]:
        """Attention on the image, on the object, and the object's share of the image tokens."""
        image, shown = list(self.encoded.rows[self.example].image), sorted(self.shown)
        return float(self.weights[image].sum()), float(self.weights[shown].sum()), len(shown) / len(image)

    def drawn(self, what: str) -> tuple[str, Image.Image]:
        """Caption and picture."""
        picture = self.encoded.rows[self.example].images[0]
        positions = [picture.positions[slot] for slot in picture.layout.views[0].slots]
        shown, weights = self.shown, self.weights[positions]
        boxes = self.encoded.boxes(self.example)
        most, outlined = float(self.weights.max()), [position in shown for position in positions]
        drawn = laid_over(load_image(self.pair.image), boxes, weights, most=most, outlined=outlined)
        amounts = f"{100 * self.shares[0]:.0f} % on the image, brightest patch {100 * weights.max():.0f} %"
        return f"{self.pair.question} {self.pair.answer} - {what}: {amounts}", drawn


def _said(edge: Edge, head: Head, looks: Sequence[_Look]) -> str:
    on_image, on_object, share = np.array([look.shares for look in looks]).mean(0)
    text = f"{head}: {100 * on_image:.0f} % of the attention of {edge.query} is on the image"
    if all(look.pair.id in look.masks for look in looks):
        text += f", {100 * on_object:.0f} % on the object, which {100 * share:.0f} % of the image tokens show"
    return f"{text} (means, n = {len(looks)})."


def captioned(pairs: "Pairs", texts: pd.DataFrame) -> tuple[tuple[str, Image.Image], ...]:
    """Each picture with everything that was written about it."""
    shown = []
    for pair in pairs:
        rows = texts[texts["example"] == pair.id]
        without = "; ".join(f"without {edge}: {cut!r}" for edge, cut in zip(rows["edge"], rows["cut"], strict=True))
        shown.append((f"{pair.question} {rows['clean'].iloc[0]!r}; {without}", load_image(pair.image)))
    return tuple(shown)
