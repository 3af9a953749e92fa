"""What is read at every patch of single examples: the lens's words, a probe's probability, a head's attention."""

import base64
import io
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.specification import Knockout
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.visual_flow.claims import FlowClaims
from vlm_mech.methods.visual_flow.data import Cases, edges
from vlm_mech.methods.visual_flow.probes import ProbeExamples, patch_probabilities
from vlm_mech.methods.visual_flow.study import INPUT, swapped_sites
from vlm_mech.sweeps.measures import Comparison, comparison
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.sweep import grid, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

MOST_SITES = 9
"""Places at which patches are read: all of a small model, evenly spaced ones of a large one."""
LONGEST_SIDE, SMALL = 480, 256
"""Of the picture that is kept, in pixels; pictures no larger than the second are kept without loss."""
N_CHOOSING = 32
"""Examples at most on which the reading head is chosen; those that are shown are not among them if there are enough."""


def patch_readings(
    vlm: "VLM",
    cases: Cases,
    said: FlowClaims,
    fitted: ProbeExamples | None,
    *,
    n: int,
    folder: Path,
    measure: Comparison = "logit_diff",
) -> list[dict[str, Any]]:
    """What the page shows of the first `n` examples, as JSON values: picture, and at every patch and place the word of
    the lens, the probe's probability of the answer, and the attention of the reading head.

    Args:
        fitted: what probes are fitted on; without it they are left out.
        measure: by which the reading head is chosen (see `measures.comparison`).

    Raises:
        UsageError: image tokens that are learned queries, or images cut into unlike grids.
    """
    shown = cases[:n]
    encoded = vlm.encode(shown.pairs.base)
    if not all(row.images[0].layout.views for row in encoded.rows):
        raise UsageError(
            f"image tokens of {vlm.name} are no patches, so that there is nothing to lay over a picture; --pages 0"
        )
    sites = _some(swapped_sites(vlm))
    words = lens(vlm, shown.pairs.base, sites, "image", top=1)
    probed = None if fitted is None else patch_probabilities(vlm, shown, fitted, sites, folder=folder)
    looks, about = _attention(vlm, cases, shown, said, measure)
    at, found = operator.attrgetter("example", "image", "view"), []
    for number, pair in enumerate(shown.pairs):
        n_rows, n_columns = encoded.grids(number)[0]
        tokens = [place for place, token in enumerate(words.tokens) if at(token) == (number, 0, 0)]
        tokens.sort(key=lambda place: (words.tokens[place].row, words.tokens[place].column))
        read = [words.top_words(site) for site in sites]
        found.append(
            {
                "example": pair.id,
                "question": pair.question,
                "answer": pair.answer,
                "rival": shown.rivals[number],
                "picture": _kept(load_image(pair.images[0])),
                "grid": [n_rows, n_columns],
                "boxes": [[box.left, box.top, box.right, box.bottom] for box in encoded.boxes(number)],
                "layers": [INPUT if site.name == "llm.resid_pre" else site.layer for site in sites],
                "words": [[each[place][0] for place in tokens] for each in read],
                "likely": [_rounded(each[tokens, 0].numpy()) for each in words.top_probabilities],
                "probed": None if probed is None else [_rounded(each) for each in probed[number]],
                "attention": None if looks is None else _rounded(looks[number]),
                "head": about,
            }
        )
    return found


def _some(sites: list[Site]) -> tuple[Site, ...]:
    chosen = np.unique(np.linspace(0, len(sites) - 1, min(MOST_SITES, len(sites))).round().astype(int))
    return tuple(sites[number] for number in chosen)


def _rounded(values: Float[np.ndarray, "patch"]) -> list[float]:
    return [round(float(value), 4) for value in values]


def _kept(picture: Image.Image) -> dict[str, Any]:
    size, buffer = list(picture.size), io.BytesIO()
    picture = picture.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    kind = "PNG" if max(size) <= SMALL else "JPEG"
    picture.save(buffer, format=kind, **({} if kind == "PNG" else {"quality": 88}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"source": f"data:image/{kind.lower()};base64,{data}", "size": size}


def _attention(
    vlm: "VLM", cases: Cases, shown: Cases, said: FlowClaims, measure: Comparison
) -> tuple[list[Float[np.ndarray, "patch"]] | None, str]:
    """Attention of the reading head on each patch, from the queries that it reads for, and the head in words."""
    if said.reading is None or said.reading.at is None:
        return None, "no layer is said to read"
    of_last, of_question, _ = edges(cases.said)
    layer, edge = said.reading.at, of_question if said.carries else of_last
    query, key = edge.split("<-")
    others = cases[len(shown) : len(shown) + N_CHOOSING]
    some = others if len(others) >= len(shown) else cases[:N_CHOOSING]
    head, change = _reading_head(vlm, some, (layer, query, key), measure)
    compared = comparison(measure, shown.pairs.answer, shown.pairs.counterfactual_answer)
    encoded = readings_of(vlm, vlm.encode(shown.pairs.base), [compared]).encoded
    queries = [encoded.positions(joined(query), number) for number in range(len(encoded))]
    weights = attention_from(vlm, encoded, queries, [layer])[layer][:, head].numpy()
    looks = []
    for number, row in enumerate(encoded.rows):
        picture = row.images[0]
        looks.append(weights[number, [picture.positions[slot] for slot in picture.layout.views[0].slots]])
    about = f"layer {layer} head {head}, from {query}"
    return (
        looks,
        f"{about} (cut alone: {change:+.2f} {compared.metric.unit} on {len(some)} examples)",
    )


def _reading_head(vlm: "VLM", cases: Cases, edge: tuple[int, str, str], name: Comparison) -> tuple[int, float]:
    """The head of a layer whose cut from query to key lowers the answer most, and by how much."""
    (layer, query, key), pairs = edge, cases.pairs
    measure = comparison(name, pairs.answer, pairs.counterfactual_answer)
    points = grid(head=range(vlm.n_heads("llm")))
    cuts = {point.head: Knockout(joined(query), key, layer, heads=(point.head,)) for point in points}
    table = sweep(vlm, pairs, points, lambda point: cuts[point.head], measure, check=0).table
    changes = (table[name] - table[f"{name}_baseline"]).groupby(table["head"]).mean()
    return int(changes.idxmin()), float(changes.min())
