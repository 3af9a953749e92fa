"""Identifiability rank: how well the lens names a part of the picture at the patches that show it.

After Takishita et al. (2025, arXiv 2506.05439), whose overview figure defines the score as the best rank of the part's
label over the patches of its mask. Best-of-many grows with the number of patches, so every rank comes with that of
equally many patches elsewhere in the same picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.methods.lens.logit_lens import Lens
from vlm_mech.results.result import Metric, Result

HITS = (1, 5, 10)
Cell = tuple[int, int]


@dataclass(frozen=True)
class MaskedPart:
    """A word and the patches, (row, column) in a view of an image, that show what it names."""

    example: int
    word: str
    cells: tuple[Cell, ...]
    image: int = 0
    view: int = 0

    def __post_init__(self) -> None:
        if not self.cells or len(set(self.cells)) != len(self.cells):
            raise UsageError(f"part {self.word!r} of example {self.example} has no patch, or one twice")


def patches_of_mask(
    encoded: Encoded,
    mask: Bool[np.ndarray, "height width"],
    *,
    example: int = 0,
    image: int = 0,
    view: int = 0,
    min_share: float = 0.5,
) -> tuple[Cell, ...]:
    """The patches of which at least a share of the pixels is in the mask, as (row, column), row by row.

    Args:
        mask: of the image as it was given to the prompt.
        example: number of the prompt in the batch.
        image, view: which image of the prompt, and which of its grids of tokens.
        min_share: the share.

    Raises:
        UsageError: the mask has another size than the image, or no patch holds that much of it.
    """
    boxes = encoded.boxes(example, image=image, view=view)
    picture = encoded.rows[example].images[image]
    if mask.shape[::-1] != picture.size:
        raise UsageError(f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels, the image {picture.size}")
    n_columns = picture.layout.views[view].grid[1]
    shares = []
    for box in boxes:
        inside = mask[math.floor(box.top) : math.ceil(box.bottom), math.floor(box.left) : math.ceil(box.right)]
        shares.append(float(inside.mean()) if inside.size else 0.0)
    found = tuple(divmod(number, n_columns) for number, share in enumerate(shares) if share >= min_share)
    if not found:
        raise UsageError(f"no patch lies in the mask to {min_share:.2f}; the most is {max(shares):.2f}")
    return found


def identifiability(
    lens: Lens, parts: Sequence[MaskedPart], *, hits: Sequence[int] = HITS, n_draws: int = 200, seed: int = 0
) -> Result:
    """The best rank of each part's word over its patches, against equally many random patches outside the part.

    One row per part and site, with metrics `reciprocal_rank`, `hit@k` and `log2_rank` (of which the mean is the
    geometric mean rank), whose baselines are their means over the draws, and the columns `rank`, `rank_null` (median
    over the draws), `n_patches` and `p_null` (share of draws at least as good, the part itself counted as one). The
    draws are the same at every site. Parts of one prompt form a group.

    Args:
        lens: read at the patches of the parts' images, with the parts' words.
        hits: each k of `hit@k`.
        n_draws: how often as many patches are drawn outside a part.
        seed: of these draws.

    Raises:
        UsageError: no parts, a word or patch that the lens did not read, or a part with fewer patches outside than in.
    """
    if not isinstance(lens, Lens):
        raise UsageError(f"identifiability takes what lens gives (a Lens), not a {type(lens).__name__}")
    odd = [each for each in parts if not isinstance(each, MaskedPart)]
    if odd:
        raise UsageError(
            f"a part is a {type(odd[0]).__name__}; a MaskedPart is needed: MaskedPart(example, word, patches)"
        )
    if not parts or n_draws < 1:
        raise UsageError(f"{len(parts)} parts and {n_draws} draws were given; at least one of each is needed")
    rng = np.random.default_rng(seed)
    rows = [row for number, part in enumerate(parts) for row in _of_part(lens, number, part, hits, n_draws, rng)]
    metrics = (
        Metric("reciprocal_rank", "share", "one over the best rank of the word over the part's patches"),
        *(Metric(f"hit@{k}", "share", f"whether the best rank is at most {k}") for k in hits),
        Metric("log2_rank", "bits", "binary logarithm of the best rank; 0 is the best"),
    )
    config = {"hits": list(hits), "n_draws": n_draws, "seed": seed}
    return Result("identifiability rank", pd.DataFrame(rows), ("site",), metrics, config=config)


def _of_part(
    lens: Lens, number: int, part: MaskedPart, hits: Sequence[int], n_draws: int, rng: np.random.Generator
) -> list[dict[str, object]]:
    patches = {
        (token.row, token.column): place
        for place, token in enumerate(lens.tokens)
        if (token.example, token.image, token.view) == (part.example, part.image, part.view)
    }
    lacking = [cell for cell in part.cells if cell not in patches]
    if lacking:
        raise UsageError(f"part {part.word!r}: the lens did not read patch {lacking[0]} of example {part.example}")
    outside = [place for cell, place in patches.items() if cell not in part.cells]
    size = len(part.cells)
    if len(outside) < size:
        raise UsageError(
            f"part {part.word!r} covers {size} of {len(patches)} patches; its null needs as many outside of it"
        )
    drawn = np.array([rng.choice(outside, size, replace=False) for _ in range(n_draws)])
    ranks = lens.rank(part.word).numpy()
    whole = lens.labels[lens.word(part.word)].whole
    about = {"example": str(number), "group": str(part.example), "word": part.word, "n_patches": size, "whole": whole}
    own = ranks[:, [patches[cell] for cell in part.cells]].min(1)
    null = ranks[:, drawn].min(2)
    scored = zip(lens.sites, own, null, strict=True)
    return [{**about, "site": str(site), **_scores(int(best), draws, hits)} for site, best, draws in scored]


def _scores(best: int, draws: Int[np.ndarray, "draw"], hits: Sequence[int]) -> dict[str, float]:
    def pair(name: str, value: float, null: Float[np.ndarray, "draw"]) -> dict[str, float]:
        return {name: float(value), f"{name}_baseline": float(null.mean())}

    found = {"rank": best, "rank_null": float(np.median(draws))}
    found["p_null"] = (1 + int((draws <= best).sum())) / (1 + len(draws))
    found |= pair("reciprocal_rank", 1 / best, 1 / draws) | pair("log2_rank", math.log2(best), np.log2(draws))
    for k in hits:
        found |= pair(f"hit@{k}", float(best <= k), (draws <= k).astype(np.float64))
    return found
