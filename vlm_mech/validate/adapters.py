"""One small adapter for each method: `(planted, pairs) -> Claims`. A new method is one more function and one line.

Every adapter runs the method as a user would, on examples of the planted model, and puts what its figure shows into
the words of `Claims`. None of them sees what was planted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Replace, Source
from vlm_mech.interventions.trace import read
from vlm_mech.methods.attribution.study import attribute
from vlm_mech.methods.layer_swap.data import swap_sites
from vlm_mech.methods.layer_swap.study import LOGIT_DIFF, swap_states
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.organism.planted import Planted
from vlm_mech.results import metrics
from vlm_mech.results.claim import Claims, cells_of, counted, differences, layer_heads, layers, strengths
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.engine import Reference
from vlm_mech.sweeps.measures import Measure, logit_diff
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.sweep import Point, grid, sweep
from vlm_mech.validate.probes import noisy_probes, probes
from vlm_mech.validate.visual_flow import flow_map

SPANS = ("image", "question", "last")
EDGES = ("last<-image", "question<-image", "last<-question")
WRITERS = ("last", "question")
"""Where a head may write what it read."""

Method = Callable[[Planted, Pairs], Claims]
Edit = Callable[[Point, Source], Intervention]
"""What is done in a cell `place`, `layer`, `head`; the source are runs on the counterfactuals."""


# Layers


def layer_swap(planted: Planted, pairs: Pairs) -> Claims:
    """Residual states exchanged with the counterfactual's, layer by layer.

    A layer reads what is lost between a swap of the image before it and one after it, and writes what a swap of the
    last position gains; the question carries the answer where a swap of it turns the answer.
    """
    n_layers = planted.vlm.n_layers("llm")
    sites = [*swap_sites(planted.vlm, "llm", "resid_pre"), Site("llm.resid_post", n_layers - 1)]
    whole = _swapped(planted, pairs, sites)
    # Rows come site by site.
    n_last = len(SPANS) * len(pairs)
    table, end = whole[:-n_last], whole[-n_last:].assign(layer=n_layers)
    cells = cells_of(Result("layer swap", table, ("place", "layer"), (LOGIT_DIFF,)))
    whole = pd.concat([table, end], ignore_index=True)
    steps = differences(whole.assign(value=whole["logit_diff"] - whole["logit_diff_baseline"]))
    before = whole["logit_diff_baseline"].mean()
    found = counted(cells_of(steps), before)
    # Swaps lower the logit difference; above the layer that reads, one of the image does so less.
    reading = layers(found[(found["place"] == "image") & (found["effect"] > 0)])
    writing = layers(found[(found["place"] == "last") & (found["effect"] < 0)])
    carried = bool((counted(cells, before)["place"] == "question").any())
    return Claims(cells, reading, writing if carried else (), writing, route=_route(reading, carried))


def _swapped(planted: Planted, pairs: Pairs, sites: Sequence[Site]) -> pd.DataFrame:
    table, _ = swap_states(planted.vlm, pairs, sites, SPANS, directions=("noising",), only_correct=False)
    return table.rename(columns={"span": "place"})


def _route(reading: Sequence[int], carried: bool) -> Literal["direct", "two-hop", "none"]:
    if not reading:
        return "none"
    return "two-hop" if carried else "direct"


def state_swap(point: Point, source: Source) -> Intervention:
    """The states of a span exchanged before one layer."""
    return Replace(Site("llm.resid_pre", point.layer), point.place, source=source)


def knockout(planted: Planted, pairs: Pairs) -> Claims:
    """Attention edges cut at single layers.

    What lowers the answer is needed for it; a cut of last<-question that lowers the prior answer shows suppression.
    """
    result = _sweep(planted, pairs, grid(place=EDGES, layer=planted.vlm.llm_layers), edge_cut)
    cells, before = cells_of(result, "logit_diff"), _baseline(result)
    lost = _lowered(counted(cells, before))
    prior = _lowered(counted(cells_of(result, "prior_diff"), before))
    by_edge = {edge: layers(lost[lost["place"] == edge]) for edge in EDGES}
    reading = tuple(sorted({*by_edge["last<-image"], *by_edge["question<-image"]}))
    carried = bool(by_edge["question<-image"])
    suppressing = layers(prior[prior["place"] == "last<-question"])
    carrying = by_edge["last<-question"] if carried else ()
    return Claims(cells, reading, carrying, suppressing=suppressing, route=_route(reading, carried))


def edge_cut(point: Point, source: Source | None = None) -> Intervention:
    """An edge cut at one layer, in one head if the point names one."""
    heads = (point.head,) if dict(point.axes).get("head", -1) >= 0 else None
    query, key = point.place.split("<-")
    return Knockout(query, key, point.layer, heads=heads)


def logit_lens(planted: Planted, pairs: Pairs) -> Claims:
    """The unembedding applied to the last position; a layer writes the answer whose logit difference it raises.

    A layer that raises the prior answer above the picture's suppresses the latter.
    """
    vlm, prior = planted.vlm, planted.priors(pairs)
    words = sorted({*pairs.answer, *pairs.counterfactual_answer, *prior})
    sites = [Site("llm.resid_pre", 0), *(Site("llm.resid_post", layer) for layer in vlm.llm_layers)]
    looked = lens(vlm, pairs.base, sites, "last", words=words, batch_size=len(pairs))
    tables: dict[str, list[pd.DataFrame]] = {"answer": [], "prior": []}
    for number, pair in enumerate(pairs):
        logit = {word: looked.logits[:, number, looked.word(word)].double().numpy() for word in words}
        gap = {"answer": logit[pair.answer] - logit[pair.counterfactual_answer]}
        gap["prior"] = logit[prior[number]] - logit[pair.answer]
        for place, rows in tables.items():
            at = {"example": pair.id, "place": place, "layer": range(len(sites)), "value": gap[place]}
            rows.append(pd.DataFrame(at))
    cells, priors = (cells_of(differences(pd.concat(rows))) for rows in tables.values())
    answers = pd.concat(tables["answer"])
    before = answers[answers["layer"] == len(sites) - 1]["value"].mean()
    writing, suppressing = (counted(each, before) for each in (cells, priors))
    return Claims(
        cells,
        writing=layers(writing[writing["effect"] > 0]),
        suppressing=layers(suppressing[suppressing["effect"] > 0]),
    )


# Heads


def head_knockout(planted: Planted, pairs: Pairs) -> Claims:
    """Attention edges cut in single heads; heads without which the answer is lower are needed for it."""
    result = _sweep(planted, pairs, _head_points(planted, EDGES), edge_cut)
    return _of_heads(cells_of(result), _baseline(result))


def head_interchange(planted: Planted, pairs: Pairs) -> Claims:
    """Outputs of single heads exchanged with the counterfactual's; those with which the answer is lower matter."""
    result = _sweep(planted, pairs, _head_points(planted, WRITERS), head_swap)
    return _of_heads(cells_of(result), _baseline(result))


def head_swap(point: Point, source: Source) -> Intervention:
    """The output of one head exchanged."""
    return Replace(Site("llm.head_out", point.layer), point.place, heads=(point.head,), source=source)


def zero_ablation(planted: Planted, pairs: Pairs) -> Claims:
    """Outputs of single heads set to zero; heads without which the answer is lower are needed for it."""
    result = _sweep(planted, pairs, _head_points(planted, WRITERS), head_zero)
    return _of_heads(cells_of(result), _baseline(result))


def head_zero(point: Point, source: Source | None = None) -> Intervention:
    """The output of one head set to zero."""
    return Ablate(Site("llm.head_out", point.layer), point.place, heads=(point.head,))


def attribution(planted: Planted, pairs: Pairs) -> Claims:
    """Effects of head interchanges as the gradient estimates them; the re-check is not used."""
    vlm, measure = planted.vlm, logit_diff(pairs.answer, pairs.counterfactual_answer)
    found = attribute(
        vlm, pairs, _head_sites(planted), WRITERS, measure, heads=True, directions=("noising",),
        top_k=1, n_random=1, engine="trace", batch=len(pairs),
    )  # fmt: skip
    asked = readings_of(vlm, vlm.encode(pairs.base), [measure])
    before = asked.values(Reference(vlm, asked.encoded).reads)[0].mean().item()
    return _of_heads(cells_of(found.screen, "estimate", place="span"), before)


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
EDITS: dict[str, Edit] = {
    "layer swap": state_swap,
    "knockout": edge_cut,
    "head knockout": edge_cut,
    "head interchange": head_swap,
    "attribution": head_swap,
    "zero ablation": head_zero,
}
"""What a cell of a method does (attribution: what it estimates). Lens and probes do nothing to the model."""


def _baseline(result: Result) -> float:
    """Mean logit difference of the two answers without any edit."""
    return float(result.table["logit_diff_baseline"].mean())


def _head_sites(planted: Planted) -> list[Site]:
    return [Site("llm.head_out", layer) for layer in planted.vlm.llm_layers]


def _head_points(planted: Planted, where: Sequence[str]) -> tuple[Point, ...]:
    return grid(place=where, layer=planted.vlm.llm_layers, head=range(planted.vlm.n_heads("llm")))


def _lowered(cells: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(cells[cells["effect"] < 0])


def _of_heads(cells: pd.DataFrame, before: float) -> Claims:
    """Every head that lowers the answer when it is changed; strong is what surely lowers it much.

    Sure is the end of the interval that is nearer to zero: heads that write noise have large means now and then.
    """
    found = _lowered(counted(cells, before))
    return Claims(
        cells, heads=layer_heads(found), strengths=strengths(cells.assign(effect=cells["high"].clip(upper=0.0)))
    )


def _sweep(planted: Planted, pairs: Pairs, points: Sequence[Point], edit: Edit) -> Result:
    """Every point, with the logit difference of the two answers, and of the prior one and the picture's."""
    vlm = planted.vlm
    metric = Metric("prior_diff", "logits", "logit of the prior answer less that of the picture's", signed=True)
    measures = (
        logit_diff(pairs.answer, pairs.counterfactual_answer),
        # Where the picture shows what is usual there is no difference to lose.
        Measure(metric, partial(metrics.logit_diff, apart=False), (planted.priors(pairs), pairs.answer), apart=False),
    )
    donor = read(vlm, vlm.encode(pairs.counterfactual), _head_sites(planted)) if edit is head_swap else ()
    return sweep(vlm, pairs, points, lambda point: edit(point, donor), measures, batch=len(pairs))
