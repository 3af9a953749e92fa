"""What is read without an edit: attention, tokens as they read, pictures with the pixels of each token."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from vlm_mech.errors import UsageError
from vlm_mech.explorer.asked import Asked
from vlm_mech.explorer.exploration import Stored, shares, whole
from vlm_mech.inputs.image import ImageLike, load_image
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.attention_weights import attention_rows

AT_ONCE = 2**26
"""Weights that are read in one pass at most."""
MOST_WEIGHTS, BY_HEAD = 1_500_000, 500_000
"""Weights that are kept in full at most: of their mean over heads, and of every head."""
N_KEPT = 5
"""Tokens that are kept of each row and column of longer prompts."""
LONGEST_SIDE, SMALL_SIDE, LOSSLESS = 480, 128, 256
"""Of a picture and of a counterfactual one, in pixels; pictures up to the third are kept without loss."""
KINDS = ("image", "question", "system", "separator", "answer_prompt")


@dataclass(frozen=True, eq=False)
class Weights:
    """Attention as it is kept, and between the last token and which others there is any, layer x token."""

    kept: dict[str, Stored]
    edges: Bool[np.ndarray, "layer token"]


def weights_of(asked: Asked) -> Weights:
    """Attention from every token to every other at every layer; of long prompts the largest weights alone.

    Raises:
        UsageError, WorkError: as for `attention_from`.
    """
    vlm, encoded, n = asked.vlm, asked.encoded, asked.n_tokens
    layers, present = list(vlm.llm_layers), list(encoded.rows[0].present)
    each = n * n * vlm.n_heads("llm")
    by_head, at_once = each * len(layers) <= BY_HEAD, max(1, AT_ONCE // each)
    edges, found = np.zeros((len(layers), n), bool), []
    for start in range(0, len(layers), at_once):
        some = layers[start : start + at_once]
        rows = attention_rows(vlm, encoded, [present], some, by_head=True)
        for layer in some:
            weights = rows[layer][0][..., present].numpy()
            edges[layer] = (weights[:, -1] > 0).any(0)
            found.append(_kept(weights if by_head else weights.mean(0, keepdims=True), len(layers)))
    return Weights({name: _stacked([each[name] for each in found]) for name in found[0]}, edges)


def _kept(weights: Float[np.ndarray, "head query key"], n_layers: int) -> dict[str, Stored]:
    """What is kept of one layer's weights."""
    if weights.size * n_layers <= MOST_WEIGHTS:
        return {"attention": shares(weights, 2)}
    mean = weights[0]
    kept = {"attention_last": shares(mean[-1], 2)}
    for name, by in (("looks_at", mean), ("seen_by", mean.T)):
        best = np.argsort(-by, axis=1, kind="stable")[:, :N_KEPT]
        kept |= {name: whole(best), f"{name}_weights": shares(np.take_along_axis(by, best, 1), 2)}
    return kept


def _stacked(parts: Sequence[Stored]) -> Stored:
    return Stored(np.stack([each.stored for each in parts]), parts[0].scale, parts[0].power)


def readable(encoded: Encoded) -> list[str]:
    """The tokens of the first prompt as they stand in its text, without the marks of its tokenizer."""
    row, decode, found = encoded.rows[0], encoded.vlm.tokenizer.decode, []
    ids = encoded.inputs["input_ids"][0].tolist()
    for position in row.present:
        start, end = row.offsets[position]
        text = row.text[start:end] if end > start else decode([ids[position]])
        found.append(text.strip(" ") or ("(space)" if text else row.tokens[position]))
    return found


def kinds(encoded: Encoded) -> list[str]:
    """Of each token of the first prompt the span it belongs to."""
    row = encoded.rows[0]
    found: dict[int, str] = {}
    for name in KINDS:
        try:
            found |= {position: name for position in encoded.positions(name) if position not in found}
        except UsageError:
            continue
    return [found.get(position, "other") for position in row.present]


def pictures(encoded: Encoded) -> list[dict[str, Any]]:
    """The pictures of the first prompt, with the grids of their views and the pixels of each token."""
    prompt, row, found = encoded.prompts[0], encoded.rows[0], []
    number = {position: at for at, position in enumerate(row.present)}
    for at, (image, picture) in enumerate(zip(prompt.images, row.images, strict=True)):
        views = []
        for which, view in enumerate(picture.layout.views):
            boxes = [[box.left, box.top, box.right, box.bottom] for box in encoded.boxes(0, image=at, view=which)]
            views.append(
                {
                    "name": view.name,
                    "grid": list(view.grid),
                    "tokens": [number[picture.positions[slot]] for slot in view.slots],
                    "boxes": [[round(edge, 1) for edge in box] for box in boxes],
                }
            )
        shown = load_image(image)
        found.append({"size": list(shown.size), "source": as_data(shown, LONGEST_SIDE), "views": views})
    return found


def thumbnails(images: Sequence[ImageLike]) -> list[str]:
    """Pictures in small, as data."""
    return [as_data(load_image(image), SMALL_SIDE) for image in images]


def as_data(picture: Image.Image, side: int) -> str:
    """A picture as the text that a page takes for its address."""
    small, buffer = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side))
    kind = "PNG" if max(picture.size) <= LOSSLESS else "JPEG"
    small.save(buffer, kind, **({} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
