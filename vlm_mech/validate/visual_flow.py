"""The map of the visual flow as a method that is graded: swaps, knockouts and lens together, on planted models."""

import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.visual_flow.claims import CUT, HOLDS, READS, WRITES, claims, layers_of
from vlm_mech.methods.visual_flow.data import Cases, flow_scan, said_at
from vlm_mech.methods.visual_flow.study import AXES, METRICS, flow
from vlm_mech.organism.planted import Planted
from vlm_mech.results.claim import Claims
from vlm_mech.results.result import Result

EFFECTS = (READS, WRITES, HOLDS, CUT)
"""Kinds of cells that measure what an edit does to the answer."""


def flow_map(planted: Planted, pairs: Pairs) -> Claims:
    """The layers that the map names as reading, carrying, writing and suppressing.

    The rival of an answer is the prior one of its object. Probes and controls of knockouts are left out: no claim rests
    on them.
    """
    vlm, rivals = planted.vlm, tuple(planted.priors(pairs))
    cases = Cases(pairs, rivals, "the prior answer", said_at(vlm, pairs, rivals))
    table, _ = flow(vlm, cases, flow_scan(vlm, cases, controls=False))
    result = Result("visual flow", table, AXES, METRICS)
    found = claims(result)
    measured = found.cells[found.cells["kind"].isin(EFFECTS)]
    measured = measured.assign(place=measured["kind"] + ", " + measured["span"], head=-1)
    columns = ["place", "layer", "head", "effect", "low", "high", "p"]
    return Claims(
        pd.DataFrame(measured[columns]),
        reading=layers_of(found.reads),
        carrying=layers_of(found.carries),
        writing=layers_of(found.writes),
        suppressing=layers_of(found.suppresses),
        route=found.route,
    )
