"""The map of the visual flow as a method that is graded: swaps, knockouts and lens together, on planted models."""

import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.gates.gated import Options
from vlm_mech.methods.visual_flow.claims import CARRY, READ, SUPPRESS, WRITE, FlowClaims, pool_of, with_claims
from vlm_mech.methods.visual_flow.data import Cases, flow_scan, said_at
from vlm_mech.methods.visual_flow.effects import CUT, READS, SWAPPED, WRITES, flow_effects
from vlm_mech.methods.visual_flow.study import AXES, METRICS, flow
from vlm_mech.organism.planted import Planted
from vlm_mech.results.result import Result
from vlm_mech.validate.commands import UNGATED
from vlm_mech.validate.statements import Claims

EFFECTS = (READS, WRITES, SWAPPED, CUT)
"""Kinds of cells that measure what an edit does to the answer."""


def flow_map(planted: Planted, pairs: Pairs, *, asked: Options = UNGATED) -> Claims:
    """The layers of which the map claims that they read, carry, write and suppress, on the held-out half.

    The rival of an answer is the prior one of its object. Probes are left out: none of these claims rests on them.

    Args:
        asked: how claims are tested.
    """
    vlm, rivals = planted.vlm, tuple(planted.priors(pairs))
    cases = Cases(pairs, rivals, "the prior answer", said_at(vlm, pairs, rivals))
    scan = flow_scan(vlm, cases)
    table, _ = flow(vlm, cases, scan)
    effects = with_claims(flow_effects(Result("visual flow", table, AXES, METRICS)), asked, vlm, cases, scan)
    claims = effects.claims
    found = FlowClaims.of(claims)
    layers = {kind: tuple(sorted(found.layers(kind))) for kind in (READ, CARRY, WRITE, SUPPRESS)}
    return Claims(
        _cells(effects),
        reading=layers[READ],
        carrying=layers[CARRY],
        writing=layers[WRITE],
        suppressing=layers[SUPPRESS],
        route=found.route,
        told=claims,
        possible=tuple(pool_of(scan)(effects)),
    )


def _cells(effects: Result) -> pd.DataFrame:
    """Every effect on the answer, on all examples, corrected over all cells of the map."""
    summary = effects.summary()
    measured = summary[summary["kind"].isin(EFFECTS)]
    measured = measured.assign(place=measured["kind"] + ", " + measured["span"], head=-1, p=measured["p_corrected"])
    measured = measured.drop(columns=["effect"]).rename(columns={"mean": "effect", "ci_low": "low", "ci_high": "high"})
    return pd.DataFrame(measured[["place", "layer", "head", "effect", "low", "high", "p"]])
