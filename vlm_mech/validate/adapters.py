"""One small adapter for each method: `(planted, pairs) -> Claims`. A new method is one more function and one line.

Every adapter runs the method as a user would, on examples of the planted model, and puts what its figure shows into
the words of `Claims`. None of them sees what was planted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Replace, Source
from vlm_mech.interventions.trace import read
from vlm_mech.methods.attribution.study import attribute
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.visual_flow.data import edges
from vlm_mech.organism.planted import Planted
from vlm_mech.results import metrics
from vlm_mech.results.metrics import AnswerLogits
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.measures import Measure, logit_diff
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.sweep import Point, grid, sweep
from vlm_mech.validate.commands import head_knockout, knockout, layer_swap, route_of, said_at
from vlm_mech.validate.probes import noisy_probes, probes
from vlm_mech.validate.statements import Claims, cells_of, counted, differences, layer_heads, layers, strengths
from vlm_mech.validate.visual_flow import flow_map

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Method = Callable[..., Claims]
"""Of a planted model and examples; those of `GATED` also take `asked`, how claims are tested."""
Edit = Callable[[Point, Source], Intervention]
"""What is done in a cell `place`, `layer`, `head`; the source are runs on the counterfactuals."""


def writers(said: str) -> tuple[str, str]:
    """Where a head may write what it read."""
    return said, "question"


# Layers


def state_swap(point: Point, source: Source) -> Intervention:
    """The states of a span exchanged before one layer."""
    return Replace(Site("llm.resid_pre", point.layer), joined(point.place), source=source)


def next_token_knockout(planted: Planted, pairs: Pairs) -> Claims:
    """Edges cut where the first token of an answer is said, by those who read that token alone: a control."""
    result = _sweep(planted, pairs, grid(place=edges("last"), layer=planted.vlm.llm_layers), edge_cut, whole=False)
    cells, before = cells_of(result, "logit_diff"), _baseline(result)
    lost = _lowered(counted(cells, before))
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


def logit_lens(planted: Planted, pairs: Pairs) -> Claims:
    """The unembedding applied where two answers part; a layer writes the answer whose logit difference it raises.

    That is at the last position, or behind the tokens that both begin with. A layer that raises the prior answer above
    the picture's suppresses the latter.
    """
    sites = [Site("llm.resid_pre", 0), *(Site("llm.resid_post", layer) for layer in planted.vlm.llm_layers)]
    answers = _leads(planted.vlm, pairs, sites, "answer", pairs.answer, pairs.counterfactual_answer)
    prior = _leads(planted.vlm, pairs, sites, "prior", planted.priors(pairs), pairs.answer)
    cells, priors = (cells_of(differences(each)) for each in (answers, prior))
    before = answers[answers["layer"] == len(sites) - 1]["value"].mean()
    writing, suppressing = (counted(each, before) for each in (cells, priors))
    return Claims(
        cells,
        writing=layers(writing[writing["effect"] > 0]),
        suppressing=layers(suppressing[suppressing["effect"] > 0]),
    )


def _leads(
    vlm: "VLM", pairs: Pairs, sites: Sequence[Site], place: str, answers: Sequence[str], others: Sequence[str]
) -> pd.DataFrame:
    """By how much an answer leads another in the lens, at the token where the two part; by example and layer."""
    written = [(one.split(), other.split()) for one, other in zip(answers, others, strict=True)]
    # The same answer twice has a lead of 0 at every token.
    common = [
        next((n for n, (word, rival) in enumerate(zip(*both, strict=True)) if word != rival), 0) for both in written
    ]
    words = [(one[n], other[n]) for (one, other), n in zip(written, common, strict=True)]
    begun = [
        dataclasses.replace(prompt, prefix=" ".join(one[:n])) if n else prompt
        for prompt, (one, _), n in zip(pairs.base, written, common, strict=True)
    ]
    told = sorted({word for both in words for word in both})
    looked = lens(vlm, begun, sites, "last", words=told, batch_size=len(pairs))
    tables = []
    for number, (pair, both) in enumerate(zip(pairs, words, strict=True)):
        one, other = (looked.logits[:, number, looked.word(word)].double().numpy() for word in both)
        at = {"example": pair.id, "place": place, "layer": range(len(sites))}
        tables.append(pd.DataFrame(at | {"value": one - other}))
    return pd.concat(tables)


# Heads


def head_interchange(planted: Planted, pairs: Pairs, *, whole: bool = True) -> Claims:
    """Outputs of single heads exchanged with the counterfactual's; those with which the answer is lower matter.

    Args:
        whole: as for `knockout`.
    """
    said = said_at(planted) if whole else "last"
    result = _sweep(planted, pairs, _head_points(planted, writers(said)), head_swap, whole=whole)
    return _of_heads(cells_of(result), _baseline(result))


def head_swap(point: Point, source: Source) -> Intervention:
    """The output of one head exchanged."""
    return Replace(Site("llm.head_out", point.layer), joined(point.place), heads=(point.head,), source=source)


def zero_ablation(planted: Planted, pairs: Pairs) -> Claims:
    """Outputs of single heads set to zero; heads without which the answer is lower are needed for it."""
    result = _sweep(planted, pairs, _head_points(planted, writers(said_at(planted))), head_zero)
    return _of_heads(cells_of(result), _baseline(result))


def head_zero(point: Point, source: Source | None = None) -> Intervention:
    """The output of one head set to zero."""
    return Ablate(Site("llm.head_out", point.layer), joined(point.place), heads=(point.head,))


def attribution(planted: Planted, pairs: Pairs) -> Claims:
    """Effects of head interchanges as the gradient estimates them; the re-check is not used."""
    vlm, measure = planted.vlm, logit_diff(pairs.answer, pairs.counterfactual_answer)
    places = {str(joined(place)): place for place in writers(said_at(planted))}
    found = attribute(
        vlm, pairs, _head_sites(planted), tuple(map(joined, places.values())), measure, heads=True,
        directions=("noising",), top_k=1, n_random=1, engine="trace", batch=len(pairs),
    )  # fmt: skip
    asked = readings_of(vlm, vlm.encode(pairs.base), [measure])
    before = asked.values(Reference(vlm, asked.encoded).reads)[0].mean().item()
    cells = cells_of(found.screen, "estimate", place="span")
    return _of_heads(cells.assign(place=cells["place"].map(places)), before)


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
GATED = ("layer swap", "knockout", "head knockout", "visual flow")
"""Methods whose commands make claims, which are graded as such, and try gates."""
CONTROLS: dict[str, Method] = {
    "knockout, next token": next_token_knockout,
    "head interchange, next token": partial(head_interchange, whole=False),
}
"""What is found in models with answers of two tokens by those who read the next token alone."""
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


def _sweep(
    planted: Planted, pairs: Pairs, points: Sequence[Point], edit: Edit, *, whole: bool = True, prior: bool = False
) -> Result:
    """Every point, with the logit difference of the two answers where they part.

    Args:
        whole: off, the difference of their first tokens.
        prior: whether that of the prior answer and the picture's is measured too.
    """
    vlm, both = planted.vlm, (pairs.answer, pairs.counterfactual_answer)
    measures = [logit_diff(*both) if whole else _of_first(logit_diff(*both).metric, both)]
    if prior:
        metric = Metric("prior_diff", "logits", "logit of the prior answer less that of the picture's", signed=True)
        answers = (planted.priors(pairs), pairs.answer)
        one = said_at(planted) == "last" or not whole
        measures.append(_of_first(metric, answers) if one else Measure(metric, _parted, answers, at="whole"))
    donor = read(vlm, counterfactuals(vlm, pairs), _head_sites(planted)) if edit is head_swap else ()
    return sweep(vlm, pairs, points, lambda point: edit(point, donor), measures, batch=len(pairs))


def _of_first(metric: Metric, answers: tuple[Sequence[str], Sequence[str]]) -> Measure:
    """The logit difference of first tokens; where they are the same there is no difference to lose."""
    return Measure(metric, partial(metrics.logit_diff, apart=False), answers, apart=False)


def _parted(one: AnswerLogits, other: AnswerLogits) -> Tensor:
    """The logit difference at the first token where two answers part, 0 where they are the same."""
    rows, at = torch.arange(len(one.ids)), (one.ids != other.ids).int().argmax(1)
    return metrics.logit_diff(one.logits[rows, at], one.ids[rows, at], other.ids[rows, at], apart=False)


def counterfactuals(vlm: "VLM", pairs: Pairs) -> Encoded:
    """The other pictures' prompts, followed by what the two answers of each pair begin with, as `logit_diff` reads."""
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    return readings_of(vlm, vlm.encode(pairs.counterfactual), [measure]).encoded
