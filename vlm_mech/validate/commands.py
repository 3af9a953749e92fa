"""The adapters of methods that have commands which make claims: what a run of the command claims, in the same words.

Layers, heads and routes are read off the claims that are made and nothing else, so that what is graded is what a user
is told.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from vlm_mech.data.pairs import DIRECTIONS, Pairs
from vlm_mech.methods.gates.gated import Options, gated
from vlm_mech.methods.knockout.claims import NEEDED, edit_of, pool_of, removed_of
from vlm_mech.methods.knockout.data import EDGE, scan_of
from vlm_mech.methods.knockout.study import knock_out, metrics_of
from vlm_mech.methods.layer_swap.claims import MOVES, NO_LONGER, NOT_YET, TURNS, claimable, kind_of
from vlm_mech.methods.layer_swap.claims import pool_of as swap_pool_of
from vlm_mech.methods.layer_swap.data import default_spans, open_layers, swap_sites
from vlm_mech.methods.layer_swap.layer_swap import swap_result, with_claims
from vlm_mech.methods.layer_swap.study import LOGIT_DIFF, swap_states
from vlm_mech.methods.visual_flow.data import LAST, WHOLE, edges, spans
from vlm_mech.organism.planted import Planted
from vlm_mech.results.claim import Claim
from vlm_mech.results.result import Result
from vlm_mech.validate.statements import Claims, cells_of, strengths

UNGATED = Options("none", 0, 0, 32)
"""How claims are tested where nothing else is said: on the other half of the examples."""
POINT = "resid_post"
"""Where the command swaps states, unless told otherwise."""


def said_at(planted: Planted) -> str:
    """The tokens at which the answer is said: all that predict a token of it, wherever the model reads the picture."""
    return LAST if planted.recipe.answer == "word" else WHOLE


# Layer swap


def layer_swap(planted: Planted, pairs: Pairs, *, asked: Options = UNGATED) -> Claims:
    """What a run of `experiments.layer_swap --all` claims of states swapped after each block, in both directions.

    The image is read between the last layer at which its swap is claimed to flip the answer and the first at which it
    is claimed no longer to do so; the answer is written between the last at which a swap of the tokens that say it does
    not yet turn it and the first at which one does. All layers between are named, of either direction. The question
    carries the answer where a swap of it is claimed to flip or shift the answer; what writes, then takes it on.

    Args:
        asked: how claims are tested.
    """
    vlm, said = planted.vlm, said_at(planted)
    sites, of = swap_sites(vlm, "llm", POINT), claimable(default_spans(vlm, "llm", pairs=pairs))
    how: dict[str, Any] = {"directions": DIRECTIONS, "only_correct": False}
    result = swap_result("llm", swap_states(vlm, pairs, sites, of, **how)[0], {})
    result = with_claims(result, asked, vlm, pairs, sites, of, how)
    made, end = [claim for claim in result.claims if claim.made], vlm.n_layers("llm") - 1
    # In the decoder's input, and after the last attention, what a swap does is known without trying.
    reading = turnings(made, "image", (TURNS, NO_LONGER), end)
    writing = turnings(made, said, (NOT_YET, TURNS), end)
    carried = any(claim.kind in (kind_of("question", TURNS), kind_of("question", MOVES)) for claim in made)
    return Claims(
        _swap_cells(result, spans(said)),
        reading,
        writing if carried else (),
        writing,
        route=route_of(reading, carried),
        told=result.claims,
        possible=tuple(swap_pool_of(open_layers(vlm, "llm", POINT))(result)),
    )


def turnings(made: Sequence[Claim], span: str, kinds: tuple[str, str], end: int) -> tuple[int, ...]:
    """The layers at which a swap of a span goes over from the first kind of claims to the second, in any direction.

    Of every such change all layers are named that lie above the last claim of the first kind, up to the first one of
    the second: somewhere there it happens.

    Args:
        made: claims that are made.
        kinds: what holds of a swap in the decoder's input, and of one after the last block; both need no claim, but
            where no claim is made of a direction nothing is named.
        end: the last layer.
    """
    found: set[int] = set()
    for direction in DIRECTIONS:
        about = {"direction": direction, "span": span}
        some = [claim for claim in made if about.items() <= claim.about.items()]
        claimed = {
            int(claim.about["layer"]): kind for kind in kinds for claim in some if claim.kind == kind_of(span, kind)
        }
        if claimed:
            found |= _between({-1: kinds[0], end: kinds[1]} | claimed, kinds)
    return tuple(sorted(found))


def _between(known: Mapping[int, str], kinds: tuple[str, str]) -> set[int]:
    steps = itertools.pairwise(sorted(known))
    changes = [(one, other) for one, other in steps if (known[one], known[other]) == kinds]
    return {layer for before, after in changes for layer in range(before + 1, after + 1)}


def _swap_cells(result: Result, of: Sequence[str]) -> pd.DataFrame:
    """The cells of swaps towards the other picture, by the layer before which states are swapped."""
    table = result.table
    own = table[(table["direction"] == "noising") & table["span"].isin(of)]
    cells = cells_of(Result("layer swap", own, ("span", "layer"), (LOGIT_DIFF,)), place="span")
    return cells.assign(layer=cells["layer"] + 1)


def route_of(reading: Sequence[int], carried: bool) -> Literal["direct", "two-hop", "none"]:
    """The route that follows from the layers that read, and whether the question carries the answer."""
    if not reading:
        return "none"
    return "two-hop" if carried else "direct"


# Knockout


def knockout(planted: Planted, pairs: Pairs, *, asked: Options = UNGATED) -> Claims:
    """What a run of `experiments.knockout --all` claims of attention edges cut at single layers, with its own rules.

    Without --all it says nothing of models that say the prior's answer, which is wrong.

    Args:
        asked: how claims are tested.
    """
    said = said_at(planted)
    result, possible = _knocked_out(planted, pairs, edges(said), asked, heads=False)
    made = [claim for claim in result.claims if claim.made and claim.kind == NEEDED]
    by_edge = {edge: tuple(sorted(c.about["layer"] for c in made if c.about["edge"] == edge)) for edge in edges(said)}
    reading = tuple(sorted({*by_edge[f"{said}<-image"], *by_edge["question<-image"]}))
    carried = bool(by_edge["question<-image"])
    carrying, route = by_edge[f"{said}<-question"] if carried else (), route_of(reading, carried)
    return Claims(_cut_cells(result), reading, carrying, route=route, told=result.claims, possible=possible)


def head_knockout(planted: Planted, pairs: Pairs, *, asked: Options = UNGATED) -> Claims:
    """What `experiments.knockout --heads --all` claims, of three edges at once: heads that the answer needs.

    Args:
        asked: how claims are tested.
    """
    result, possible = _knocked_out(planted, pairs, edges(said_at(planted)), asked, heads=True)
    made = [claim for claim in result.claims if claim.made and claim.kind == NEEDED]
    found, cells = {(claim.about["layer"], claim.about["head"]) for claim in made}, _cut_cells(result)
    strong = strengths(cells.assign(effect=cells["high"].clip(upper=0.0)))
    return Claims(cells, heads=tuple(sorted(found)), strengths=strong, told=result.claims, possible=possible)


def _knocked_out(
    planted: Planted, pairs: Pairs, which: Sequence[str], asked: Options, *, heads: bool
) -> tuple[Result, tuple[Claim, ...]]:
    """The table of a knockout of some edges with what is claimed, over all of them at once; and what could be."""
    vlm = planted.vlm
    scans = [scan_of(vlm, pairs, {}, (edge,), heads=heads) for edge in which]

    def measured(vlm: Any, pairs: Any) -> pd.DataFrame:
        return pd.concat([knock_out(vlm, pairs, scan, only_correct=False)[0] for scan in scans], ignore_index=True)

    result = Result("knockout", measured(vlm, pairs), scans[0].axes, metrics_of())
    # The layers of an edge are those of all.
    pool, ways = pool_of(scans[0]), (edit_of(scans[0]), removed_of(scans[0]))
    claims = gated(asked, vlm, pairs, result, pool, measured, *ways)
    return dataclasses.replace(result, claims=claims), tuple(pool(result))


def _cut_cells(result: Result) -> pd.DataFrame:
    own = dataclasses.replace(result, table=result.table[result.table["cut"] == EDGE], known={})
    return cells_of(own, "logit_diff", place="edge")
