"""The adapters of methods that change one head's output at a time: exchanged, set to zero, or estimated by a gradient.

Attribution makes claims of its own. The other two are sweeps that a user makes by hand; claims come of these in the
same way: what half of the examples declares, and the other half confirms.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Ablate, Intervention, Replace, Source
from vlm_mech.interventions.trace import read
from vlm_mech.methods.attribution.claims import ASKED, EFFECT, LOWERS, UNEDITED
from vlm_mech.methods.attribution.claims import pool as attribution_pool
from vlm_mech.methods.attribution.study import Attribution, attribute
from vlm_mech.methods.gates.gated import Options
from vlm_mech.organism.planted import Planted
from vlm_mech.results import metrics
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.claiming import claimed, least
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.measures import Measure, logit_diff
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.sweep import Point, grid, sweep
from vlm_mech.validate.commands import UNGATED, said_at
from vlm_mech.validate.statements import Claims, LayerHead, cells_of, strengths

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Edit = Callable[[Point, Source], Intervention]
"""What is done in a cell `place`, `layer`, `head`; the source are runs on the counterfactuals."""
EXCHANGED, ZEROED = "exchanging", "setting to zero"
"""Kinds of claims: the answer's lead is lower when the output of a head is changed in this way."""


def writers(said: str) -> tuple[str, str]:
    """Where a head may write what it read."""
    return said, "question"


def head_interchange(planted: Planted, pairs: Pairs, *, whole: bool = True) -> Claims:
    """Outputs of single heads exchanged with the counterfactual's; those with which the answer is lower matter.

    Args:
        whole: as for `swept`.
    """
    said = said_at(planted) if whole else "last"
    return _of_sweep(swept(planted, pairs, _head_points(planted, said), head_swap, whole=whole), EXCHANGED)


def head_swap(point: Point, source: Source) -> Intervention:
    """The output of one head exchanged."""
    return Replace(Site("llm.head_out", point.layer), joined(point.place), heads=(point.head,), source=source)


def zero_ablation(planted: Planted, pairs: Pairs) -> Claims:
    """Outputs of single heads set to zero; heads without which the answer is lower are needed for it."""
    return _of_sweep(swept(planted, pairs, _head_points(planted, said_at(planted)), head_zero), ZEROED)


def head_zero(point: Point, source: Source | None = None) -> Intervention:
    """The output of one head set to zero."""
    return Ablate(Site("llm.head_out", point.layer), joined(point.place), heads=(point.head,))


def attribution(planted: Planted, pairs: Pairs, *, asked: Options = UNGATED) -> Claims:
    """Heads whose exchange is claimed to lower the answer's lead, of those that an attribution's estimates choose.

    The cells are the estimates: what they cover of the true effects is theirs, and heads are ranked by them.

    Args:
        asked: how claims are tested.
    """
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    places = {str(joined(place)): place for place in writers(said_at(planted))}
    found = attribute(
        planted.vlm, pairs, _head_sites(planted), tuple(map(joined, places.values())), measure, heads=True,
        directions=("noising",), n_random=1, batch=len(pairs), seed=asked.seed, gates=asked.gates, null=asked.null,
    )  # fmt: skip
    cells = cells_of(found.screen, "estimate", place="span")
    cells, told = (
        cells.assign(place=cells["place"].map(places)),
        tuple(_at_place(each, places) for each in found.claims),
    )
    possible = tuple(_at_place(each, places) for each in every_claim(found))
    return Claims(cells, heads=_heads(told, LOWERS), strengths=_sure(cells), told=told, possible=possible)


def _at_place(claim: Claim, places: dict[str, str]) -> Claim:
    """The claim with its span as adapters call it."""
    return replace(claim, about=claim.about | {"place": places[claim.about["span"]]})


def every_claim(found: Attribution) -> tuple[Claim, ...]:
    """What could be claimed of every cell of the screen, were it chosen: power counts what the screen misses too."""
    numbers = {EFFECT: 0.0, f"{EFFECT}_baseline": 0.0, UNEDITED: 0.0, ASKED: True}
    table = found.screen.table.assign(**numbers)
    return attribution_pool(replace(found.checked, table=table, claims=(), known={}))


# What sweeps share


def lowering(result: Result, kind: str) -> tuple[Claim, ...]:
    """For each cell of a sweep that its change lowers the difference of the two answers, by `claiming.least`.

    Args:
        result: a sweep over `place`, `layer` and `head`, whose first metric is the difference.
        kind: `EXCHANGED` or `ZEROED`, which the sentence begins with.
    """
    metric = result.metrics[0]
    enough, found = least(result, metric.name), []
    for row in result.cells.to_dict("records"):
        cell = {str(axis): value for axis, value in row.items()}
        condition = Condition(metric.name, cell, "below", enough, less="baseline")
        says = f"{kind} the output of layer {cell['layer']} head {cell['head']} at {cell['place']} lowers {metric.name}"
        found.append(Claim(kind, cell, says, (condition,), metric.unit))
    return tuple(found)


def _of_sweep(result: Result, kind: str) -> Claims:
    """Every head of which it is claimed that the answer is lower when it is changed."""
    possible, cells = lowering(result, kind), cells_of(result)
    told = claimed(possible, result)
    return Claims(cells, heads=_heads(told, kind), strengths=_sure(cells), told=told, possible=possible)


def _heads(told: Sequence[Claim], kind: str) -> tuple[LayerHead, ...]:
    made = [claim.about for claim in told if claim.made and claim.kind == kind]
    return tuple(sorted({(int(about["layer"]), int(about["head"])) for about in made}))


def _sure(cells: pd.DataFrame) -> dict[LayerHead, float]:
    """How much each head surely lowers the answer: by the end of the interval that is nearer to zero.

    Heads that write noise have large means now and then.
    """
    return strengths(cells.assign(effect=cells["high"].clip(upper=0.0)))


def swept(planted: Planted, pairs: Pairs, points: Sequence[Point], edit: Edit, *, whole: bool = True) -> Result:
    """Every point, with the logit difference of the two answers where they part.

    Args:
        whole: off, the difference of their first tokens.
    """
    vlm, both = planted.vlm, (pairs.answer, pairs.counterfactual_answer)
    measure = logit_diff(*both) if whole else _of_first(logit_diff(*both).metric, both)
    donor = read(vlm, counterfactuals(vlm, pairs), _head_sites(planted)) if edit is head_swap else ()
    return sweep(vlm, pairs, points, lambda point: edit(point, donor), [measure], batch=len(pairs))


def _head_sites(planted: Planted) -> list[Site]:
    return [Site("llm.head_out", layer) for layer in planted.vlm.llm_layers]


def _head_points(planted: Planted, said: str) -> tuple[Point, ...]:
    heads = range(planted.vlm.n_heads("llm"))
    return grid(place=writers(said), layer=planted.vlm.llm_layers, head=heads)


def _of_first(metric: Metric, answers: tuple[Sequence[str], Sequence[str]]) -> Measure:
    """The logit difference of first tokens; where they are the same there is no difference to lose."""
    return Measure(metric, partial(metrics.logit_diff, apart=False), answers, apart=False)


def counterfactuals(vlm: "VLM", pairs: Pairs) -> Encoded:
    """The other pictures' prompts, followed by what the two answers of each pair begin with, as `logit_diff` reads."""
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    return readings_of(vlm, vlm.encode(pairs.counterfactual), [measure]).encoded
