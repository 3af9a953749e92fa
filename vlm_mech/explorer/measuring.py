"""What exchanging one token's state, or cutting one edge, does to the answer; lens words, sinks and a probe there."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.explorer.asked import Asked
from vlm_mech.explorer.exploration import Stored, scaled, shares, whole
from vlm_mech.extraction.sink_rule import read_sinks
from vlm_mech.inputs.span import Span, Tokens
from vlm_mech.interventions.specification import Activations, Intervention, Knockout, Replace
from vlm_mech.interventions.trace import read
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.sweeps.sweep import Point, grid, sweep


def lens_words(asked: Asked, top: int) -> tuple[list[str], dict[str, Stored]]:
    """The likeliest words of every token at every place: a table of words, and numbers in it with probabilities."""
    found = lens(asked.vlm, asked.prompt, asked.places, "all", top=top)
    ids = found.top_ids.numpy()
    kept, numbers = np.unique(ids, return_inverse=True)
    words = [_readable(found.texts[int(number)]) for number in kept]
    arrays = {"lens_words": whole(numbers.reshape(ids.shape)), "lens_shares": shares(found.top_probabilities.numpy())}
    return words, arrays


def _readable(text: str) -> str:
    """A token as a word to read: without the spaces around it, and white space alone by its name."""
    names = {"\n": "(new line)", "\t": "(tab)"}
    return text.strip() or next((name for sign, name in names.items() if sign in text), "(space)")


def swap(asked: Asked, *, span: Span, every: int, memory: int | str | None) -> tuple[Stored, float]:
    """Change of the measure when exactly one token's state is exchanged, place x token; and the measure before."""
    places = {_name(site): site for site in asked.places}
    source = [asked.source] if asked.source is not None else _means(asked)

    def exchanged(point: Point) -> Intervention:
        return Replace(places[point.place], Tokens((point.token,)), source=source)

    n_places = len(places)
    chosen = [number for number in range(n_places) if number % every == 0 or number == n_places - 1]
    names, tokens = list(places), asked.numbers(asked.encoded.positions(span))
    points = grid(place=[names[number] for number in chosen], token=tokens)
    changes, baseline = _swept(asked, points, exchanged, memory)
    found = np.full((n_places, asked.n_tokens), np.nan)
    for point, change in zip(points, changes, strict=True):
        found[names.index(point.place), point.token] = change
    return scaled(found), baseline


def cut(
    asked: Asked, edges: Bool[np.ndarray, "layer token"] | None, *, span: Span, every: int, memory: int | str | None
) -> Stored:
    """Change of the measure when exactly the edge from the last token to one token is cut in one block, all heads.

    Args:
        edges: where there is any attention to lose; the others change nothing and are not run. None: all are run.
    """
    layers, n_tokens = list(asked.vlm.llm_layers), asked.n_tokens
    tokens = asked.numbers(asked.encoded.positions(span))
    found = np.full((len(layers), n_tokens), np.nan)
    some = [layer for layer in layers if layer % every == 0 or layer == layers[-1]]
    found[np.ix_(some, tokens)] = 0.0
    points = [point for point in grid(layer=some, token=tokens) if edges is None or edges[point.layer, point.token]]

    def without(point: Point) -> Intervention:
        return Knockout("last", Tokens((point.token,)), point.layer)

    for point, change in zip(points, _swept(asked, points, without, memory)[0], strict=True):
        found[point.layer, point.token] = change
    return scaled(found)


def _swept(
    asked: Asked, points: Any, intervention: Callable[[Point], Intervention], memory: int | str | None
) -> tuple[Float[np.ndarray, "point"], float]:
    """Change of the measure at each point, and the measure of the unedited run."""
    name = asked.measure.metric.name
    table = sweep(asked.vlm, [asked.prompt], points, intervention, asked.measure, memory=memory).table
    values, clean = table[name].to_numpy(), table[f"{name}_baseline"].to_numpy()
    return values - clean, float(clean[0])


def _name(site: Site) -> str:
    return "input" if site.point == "resid_pre" else f"after {site.layer}"


def _means(asked: Asked) -> Activations:
    """Mean states in the place of each: of image tokens, and of all others but the first, which is a sink in many."""
    states, row = read(asked.vlm, asked.encoded, list(asked.places)), asked.encoded.rows[0]
    image = list(row.image)
    others = [position for position in row.present if position not in set(image)]
    values = {}
    for site in asked.places:
        found = states[site].clone()
        for positions, over in ((image, image), (others, others[1:] or others)):
            if positions:
                found[:, positions] = states[site][:, over].mean(1, keepdim=True)
        values[site] = found
    return Activations(values, asked.encoded)


def marked(asked: Asked) -> Stored:
    """Which tokens are sinks by their states: 1 in the decoder, 2 in the tower, 3 in both."""
    states, row = read_sinks(asked.vlm, asked.encoded), asked.encoded.rows[0]
    found = np.zeros(asked.n_tokens, np.uint8)
    if len(states.layers):
        found += states.sinks(0).any(0)
    found[asked.numbers(row.image)] += 2 * states.tower_sinks(0).astype(np.uint8)
    return Stored(found)


def probed(asked: Asked, probe: Callable[[Site, Tensor], Any]) -> Stored:
    """What a probe says of every token at every place.

    Raises:
        UsageError: it gives something else than a number for each token.
    """
    states = read(asked.vlm, asked.encoded, list(asked.places))
    found = []
    for site in asked.places:
        given = np.asarray(probe(site, states[site][0, list(asked.encoded.rows[0].present)]), dtype=float)
        if given.shape != (asked.n_tokens,):
            raise UsageError(f"the probe gives {list(given.shape)} at {site}; {asked.n_tokens} numbers are needed")
        found.append(given)
    return scaled(np.stack(found))
