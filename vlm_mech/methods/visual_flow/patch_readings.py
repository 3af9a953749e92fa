"""What is read at every patch of single examples: the lens's words, a probe's probability, a head's attention."""

import base64
import dataclasses
import io
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.extraction.sink_rule import read_sinks
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.specification import Knockout
from vlm_mech.methods.lens.leads import INPUT, depth_sites
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.lens.patch_words import Reading, strengths
from vlm_mech.methods.visual_flow.claims import CARRY, READ, READ_NEEDED, FlowClaims
from vlm_mech.methods.visual_flow.data import Cases, edges
from vlm_mech.methods.visual_flow.lenses import Lenses
from vlm_mech.methods.visual_flow.probes import ProbeExamples, patch_probabilities
from vlm_mech.results.claiming import halves
from vlm_mech.results.result import Result
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
"""Examples at most on which the reading head is chosen, and on which its effect is told."""


def patch_readings(
    vlm: "VLM",
    cases: Cases,
    effects: Result,
    fitted: ProbeExamples | None,
    *,
    n: int,
    folder: Path,
    measure: Comparison = "logit_diff",
    seed: int = 0,
    lenses: Lenses | None = None,
) -> list[dict[str, Any]]:
    """What the page shows of the first `n` examples, as JSON values: picture, and at every patch and place the word of
    each lens, the probe's probability of the answer, and the attention of the reading head; and which patches are sinks
    by their states (L in the decoder, V in the tower), read once over these examples and not verified by attention.

    Args:
        effects: those of the map, with its claims; the half of its examples that declared them chooses the head.
        fitted: what probes are fitted on; without it they are left out.
        measure: by which the reading head is chosen (see `measures.comparison`).
        seed: that claims were made with, which parts the examples.
        lenses: a bank of text states, and translators, for a contextual and a tuned lens beside the logit lens.

    Raises:
        UsageError: a bank or tuned lens of another model, image tokens that are learned queries, or images cut into
            unlike grids.
    """
    shown = cases[:n]
    encoded = vlm.encode(shown.pairs.base)
    if not all(row.images[0].layout.views for row in encoded.rows):
        raise UsageError(
            f"image tokens of {vlm.name} are not patches, so that there is nothing to lay over an image; --pages 0"
        )
    sites = _some(depth_sites(vlm))
    words = lens(vlm, shown.pairs.base, sites, "image", top=1)
    others = {} if lenses is None else lenses.beside(vlm, shown.pairs.base, sites)
    probed = None if fitted is None else patch_probabilities(vlm, shown, fitted, sites, folder=folder)
    labels = _sinks(vlm, encoded)
    looks, about = _attention(vlm, cases, shown, effects, (measure, seed))
    at, found = operator.attrgetter("example", "image", "view"), []
    for number, pair in enumerate(shown.pairs):
        n_rows, n_columns = encoded.grids(number)[0]
        tokens = [place for place, token in enumerate(words.tokens) if at(token) == (number, 0, 0)]
        tokens.sort(key=lambda place: (words.tokens[place].row, words.tokens[place].column))
        beside = {name: _best(each, tokens) for name, each in others.items()}
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
                **_best(words, tokens),
                "beside": beside,
                "probed": None if probed is None else [_rounded(each) for each in probed[number]],
                "attention": None if looks is None else _rounded(looks[number]),
                "head": about,
                "sinks": labels[number],
            }
        )
    return found


def _best(reading: Reading, tokens: list[int]) -> dict[str, Any]:
    """The best word of each patch at each place, and how strong it is."""
    read = [reading.top_words(site) for site in reading.sites]
    return {
        "words": [[each[place][0] for place in tokens] for each in read],
        "likely": [_rounded(each[tokens, 0].numpy()) for each in strengths(reading)],
    }


def _sinks(vlm: "VLM", encoded: Encoded) -> list[list[str]]:
    """Of every patch of each first picture's first view the rules that label it a sink, as one text."""
    states, found = read_sinks(vlm, encoded), []
    for number, row in enumerate(encoded.rows):
        picture, at = row.images[0], {position: index for index, position in enumerate(row.image)}
        positions = [picture.positions[slot] for slot in picture.layout.views[0].slots]
        decoder = np.asarray(states.sinks(number).any(0))[[row.present.index(position) for position in positions]]
        tower = states.tower_sinks(number)[[at[position] for position in positions]]
        found.append(["L" * bool(one) + "V" * bool(other) for one, other in zip(decoder, tower, strict=True)])
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
    vlm: "VLM", cases: Cases, shown: Cases, effects: Result, how: tuple[Comparison, int]
) -> tuple[list[Float[np.ndarray, "patch"]] | None, str]:
    """Attention of the reading head on each patch, from the queries that it reads for, and the head in words.

    The layer is that of the claim which was strongest where it was declared. The same half of the examples chooses the
    head; the other half tells what cutting it does.
    """
    measure, seed = how
    parts = halves(effects, seed=seed)
    asked = _read_at(FlowClaims.of(effects.claims), cases.said)
    if asked is None or parts is None:
        return None, "no layer is claimed to read"
    layer, edge = asked
    query, key = edge.split("<-")
    chooses, tells = (_named(cases, part)[:N_CHOOSING] for part in parts)
    alone = _cut_alone(vlm, chooses, (layer, query, key), range(vlm.n_heads("llm")), measure)
    head = min(alone, key=lambda each: alone[each])
    change = _cut_alone(vlm, tells, (layer, query, key), [head], measure)[head]
    compared = comparison(measure, shown.pairs.answer, shown.pairs.counterfactual_answer)
    encoded = readings_of(vlm, vlm.encode(shown.pairs.base), [compared]).encoded
    queries = [encoded.positions(joined(query), number) for number in range(len(encoded))]
    weights = attention_from(vlm, encoded, queries, [layer])[layer][:, head].numpy()
    looks = []
    for number, row in enumerate(encoded.rows):
        picture = row.images[0]
        looks.append(weights[number, [picture.positions[slot] for slot in picture.layout.views[0].slots]])
    effect = f"cut alone: {change:+.2f} {compared.metric.unit} on {len(tells)} examples that did not choose it"
    return looks, f"layer {layer} head {head}, from {query} ({effect})"


def _read_at(said: FlowClaims, where_said: str) -> tuple[int, str] | None:
    """The layer that reads and the edge by which it does, as far as is claimed."""
    needed = [claim for claim in said.made if claim.kind == READ_NEEDED]
    if needed:
        return needed[0].about["layer"], needed[0].about["edge"]
    of_last, of_question, _ = edges(where_said)
    reads = said.layers(READ)
    return (reads[0], of_question if said.layers(CARRY) else of_last) if reads else None


def _named(cases: Cases, part: Result) -> Cases:
    """The examples of a part of the result."""
    names = set(part.table["example"])
    held = [(pair, rival) for pair, rival in zip(cases.pairs, cases.rivals, strict=True) if pair.id in names]
    pairs, rivals = zip(*held, strict=True)
    return dataclasses.replace(cases, pairs=dataclasses.replace(cases.pairs, pairs=pairs), rivals=rivals)


def _cut_alone(
    vlm: "VLM", cases: Cases, edge: tuple[int, str, str], heads: Sequence[int], name: Comparison
) -> dict[int, float]:
    """By how much the answer changes, on average, when single heads of a layer are cut from query to key."""
    (layer, query, key), pairs = edge, cases.pairs
    measure = comparison(name, pairs.answer, pairs.counterfactual_answer)
    points = grid(head=heads)
    cuts = {point.head: Knockout(joined(query), key, layer, heads=(point.head,)) for point in points}
    table = sweep(vlm, pairs, points, lambda point: cuts[point.head], measure, check=0).table
    changes = table[name] - table[f"{name}_baseline"]
    return {head: float(changes[table["head"] == head].mean()) for head in heads}
