"""One small adapter for each method: `(planted, pairs) -> Claims`. A new method is one more function and one line.

Every adapter runs the method as a user would, on examples of the planted model, and puts what its figure shows into
the words of `Claims`. None of them sees what was planted.
"""

from collections.abc import Callable
from functools import partial

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Intervention, Knockout, Replace, Source
from vlm_mech.methods.visual_flow.data import edges
from vlm_mech.organism.planted import Planted
from vlm_mech.sweeps.sweep import Point, grid
from vlm_mech.validate.arbiters import ArbiterMethod, arbitration
from vlm_mech.validate.commands import head_knockout, knockout, layer_swap, route_of
from vlm_mech.validate.heads import Edit, attribution, head_interchange, head_swap, head_zero, swept, zero_ablation
from vlm_mech.validate.lens import logit_lens
from vlm_mech.validate.probes import noisy_probes, probes
from vlm_mech.validate.statements import Claims, cells_of, counted, layers
from vlm_mech.validate.visual_flow import flow_map

Method = Callable[..., Claims]
"""Of a planted model and examples; those of `GATED` also take `asked`, how claims are tested."""


def state_swap(point: Point, source: Source) -> Intervention:
    """The states of a span exchanged before one layer."""
    return Replace(Site("llm.resid_pre", point.layer), joined(point.place), source=source)


def next_token_knockout(planted: Planted, pairs: Pairs) -> Claims:
    """Edges cut where the first token of an answer is said, by those who read that token alone: a control."""
    result = swept(planted, pairs, grid(place=edges("last"), layer=planted.vlm.llm_layers), edge_cut, whole=False)
    cells, before = cells_of(result, "logit_diff"), float(result.table["logit_diff_baseline"].mean())
    found = counted(cells, before)
    lost = pd.DataFrame(found[found["effect"] < 0])
    by_edge = {edge: layers(lost[lost["place"] == edge]) for edge in edges("last")}
    reading = tuple(sorted({*by_edge["last<-image"], *by_edge["question<-image"]}))
    carried = bool(by_edge["question<-image"])
    carrying = by_edge["last<-question"] if carried else ()
    return Claims(cells, reading, carrying, route=route_of(reading, carried))


def edge_cut(point: Point, source: Source | None = None) -> Intervention:
    """An edge cut at one layer, in one head if the point names one."""
    heads = (point.head,) if dict(point.axes).get("head", -1) >= 0 else None
    query, key = point.place.split("<-")
    return Knockout(joined(query), key, point.layer, heads=heads)


METHODS: dict[str, Method] = {
    "layer swap": layer_swap,
    "knockout": knockout,
    "head knockout": head_knockout,
    "head interchange": head_interchange,
    "attribution": attribution,
    "zero ablation": zero_ablation,
    "logit lens": logit_lens,
    "probe": probes,
    "probe, 1 % noise": noisy_probes,
    "visual flow": flow_map,
}
GATED = ("layer swap", "knockout", "head knockout", "attribution", "logit lens", "visual flow")
"""Methods whose commands or calls make claims, which are graded as such, and try gates."""
CONTROLS: dict[str, Method] = {
    "knockout, next token": next_token_knockout,
    "head interchange, next token": partial(head_interchange, whole=False),
}
"""What is found in models with answers of two tokens by those who read the next token alone."""
ARBITRATION: dict[str, ArbiterMethod] = {"arbitration": arbitration}
"""Methods that say where the prior wins; they are graded on planted arbiters, a family of their own."""
EDITS: dict[str, Edit] = {
    "layer swap": state_swap,
    "knockout": edge_cut,
    "head knockout": edge_cut,
    "head interchange": head_swap,
    "attribution": head_swap,
    "zero ablation": head_zero,
}
"""What a cell of a method does (attribution: what it estimates). Lens and probes do nothing to the model."""
