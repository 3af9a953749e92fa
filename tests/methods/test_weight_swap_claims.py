"""What an exchange of blocks claims, on numbers that are known."""

import dataclasses

import numpy as np
import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.gates.gated import Options, gated
from vlm_mech.methods.weight_swap.claims import STAYS, TURNS, pool
from vlm_mech.methods.weight_swap.findings import turning
from vlm_mech.methods.weight_swap.study import (
    AXES,
    GRAFT,
    METRICS,
    OUTSIDE,
    PARENT,
    RANDOM,
    REVERT,
    SECOND,
    random_name,
)
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.claiming import claimed
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.results.result import Result

SUFFIX = [6.0, 3.0, 0.0, -2.0]
"""Mean lead of the base with the tune's layers from each on; at layer 2 it is undecided."""


def measured(*, graft=SUFFIX, control=(-2.0,) * 4, more=(), revert=None, second=None, n=32):
    """Both directions of one schedule; the base's own lead is -2, the tune's 6; `more` are further random changes."""
    revert = [-2.0, 1.0, 5.0, 6.0] if revert is None else revert
    curves = [(GRAFT, PARENT, graft, -2.0), (GRAFT, RANDOM, control, -2.0)]
    curves += [(REVERT, PARENT, revert, 6.0), (REVERT, RANDOM, [6.0] * 4, 6.0)]
    curves += [(REVERT, SECOND, second, 6.0)] if second else []
    curves += [(GRAFT, random_name(number), means, -2.0) for number, means in enumerate(more, 1)]
    cells = [
        (direction, "suffix", donor, layer, mean, own)
        for direction, donor, means, own in curves
        for layer, mean in enumerate(means)
    ]
    cells.append((GRAFT, OUTSIDE, PARENT, -1, -1.0, -2.0))
    rows, rng = [], np.random.default_rng(0)
    for direction, schedule, donor, layer, mean, own in cells:
        for number, lead in enumerate(mean + rng.permutation(np.linspace(-0.5, 0.5, n))):
            row = {"example": f"e{number}", "direction": direction, "schedule": schedule, "donor": donor}
            row |= {"layer": layer, "lead": lead, "lead_baseline": own}
            rows.append(row | dict.fromkeys(("true", "true_baseline", "prior", "prior_baseline"), 0.0))
    return Result("blocks", pd.DataFrame(rows), AXES, METRICS)


def told(result):
    return dataclasses.replace(result, claims=claimed(pool(result), result))


def layers_of(result, direction, kind, donor=PARENT):
    about = {"direction": direction, "donor": donor}
    some = [each for each in result.claims if each.made and about.items() <= each.about.items()]
    return [each.about["layer"] for each in some if each.kind == f"suffix {kind}"]


def test_the_sign_of_the_lead_is_claimed_on_either_side_and_not_in_between():
    result = told(measured())
    assert layers_of(result, GRAFT, TURNS) == [0, 1] and layers_of(result, GRAFT, STAYS) == [3]
    assert layers_of(result, REVERT, TURNS) == [0] and layers_of(result, REVERT, STAYS) == [1, 2, 3]
    revert = next(each for each in turning(result) if each.startswith(REVERT))
    graft = next(each for each in turning(result) if each.startswith(GRAFT))
    at = {(each.about["direction"], each.about["layer"]): each for each in result.claims}
    assert graft == (
        f"{GRAFT}, patching this layer and all later ones: the mean lead is positive up to layer 1 (lead "
        f"{at[GRAFT, 1].tested[0]} at layer 1, p = {at[GRAFT, 1].p:.2g}); it stays negative from layer 3 on (lead "
        f"{at[GRAFT, 3].tested[0]}, p = {at[GRAFT, 3].p:.2g})."
    )
    assert "is negative at layer 0 (" in revert and "stays positive from layer 1 on (" in revert
    assert not named_without_claim(turning(result), result.claims)
    assert 2.5 < at[GRAFT, 1].tested[0].mean < 3.5 and at[GRAFT, 1].tested[0].n == 16


def test_what_random_changes_of_equal_size_do_too_is_not_claimed():
    result = told(measured(control=[6.0, 2.0, -2.0, -2.0]))
    assert layers_of(result, GRAFT, TURNS) == [1]


def test_each_of_several_random_changes_has_to_be_beaten():
    result = told(measured(more=([6.0, -2.0, -2.0, -2.0], [-2.0] * 4)))
    assert layers_of(told(measured()), GRAFT, TURNS) == [0, 1] and layers_of(result, GRAFT, TURNS) == [1]
    claim = next(each for each in result.claims if each.made and each.about["direction"] == GRAFT)
    assert "minus the lead after random changes of equal norm, draw 1: +" in str(claim)
    assert "minus the lead after random changes of equal norm, draw 3: +" in str(claim) and len(claim.conditions) == 4
    assert "draw" not in str(told(measured()).claims), "of a single one no number is told"
    assert not any("random" in each for each in turning(result)), "of random changes themselves nothing is claimed"


def test_a_lead_that_never_had_the_other_sign_has_not_turned_and_where_nothing_moves_nothing_stays():
    result = told(measured(graft=[-2.0] * 4))
    assert not layers_of(result, GRAFT, TURNS) and not layers_of(result, GRAFT, STAYS)
    assert turning(result)[-1] == f"No claim is made about: {GRAFT}, patching this layer and all later ones."


def test_a_second_tune_is_claimed_on_its_own():
    result = told(measured(second=[-3.0, 6.0, 6.0, 6.0]))
    assert layers_of(result, REVERT, TURNS, SECOND) == [0] and not layers_of(result, REVERT, STAYS, SECOND)
    assert any(
        each.startswith(f"{REVERT}, from {SECOND}, patching this layer and all later ones") for each in turning(result)
    )


def test_two_checkpoints_have_no_random_twin_and_the_gates_say_so():
    result, vlm = measured(), VLM.load("organism", check=False)
    claims = gated(Options("all", 5, 0, 8), vlm, Pairs("none", ()), result, pool, "there are two checkpoints")
    gates = {gate.name: (gate.verdict, gate.says) for gate in claims[0].gates}
    assert gates[STABLE][0] is True
    assert gates[TWIN] == gates[SHUFFLED] == (None, "not tried: there are two checkpoints")
    quick = gated(Options("quick", 5, 0, 8), vlm, Pairs("none", ()), result, pool, "there are two checkpoints")
    assert [gate.name for gate in quick[0].gates] == [STABLE]
