"""Claims in other wordings: what counts as made again, what is left out, and sets of claims by hand."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.results.test_claim import lowers, measured, pool
from vlm_mech.results.claim import Gate
from vlm_mech.results.claiming import claimed
from vlm_mech.results.rewording import FEWEST_WORDINGS, WORDINGS, Reworded, over_other_wordings


def found_in(effects, others, left_out=None, possible=pool):
    """The claims of a result with these effects, after those of other wordings."""
    own = measured(effects, noise=0.1)
    made = tuple(claim for claim in claimed(possible(own), own) if claim.made)
    again = {
        f"{number} {{question}}": Reworded(measured(each, noise=0.1, seed=number), 0.5)
        for number, each in enumerate(others)
    }
    return over_other_wordings(made, possible(own), possible, own, again, left_out, right=1.0)


def gate_of(claims, layer) -> Gate:
    (claim,) = (claim for claim in claims if claim.about == {"layer": layer})
    return next(gate for gate in claim.gates if gate.name == WORDINGS)


def test_a_claim_passes_that_is_made_again_in_all_of_three():
    claims = found_in([0, -3, -3], [[0, -2, -2], [0, -2, -0.2], [0, -4, -2]])
    kept, lost = gate_of(claims, 1), gate_of(claims, 2)
    assert kept.verdict is True and kept.numbers["share"] == 1 and "in 3 of 3 other wordings" in kept.says
    assert lost.verdict is False and lost.numbers["share"] == pytest.approx(2 / 3)
    assert "in 2 of 3 other wordings, not in '1 {question}'" in lost.says
    by_wording = lost.numbers["by_wording"]
    assert [each["made"] for each in by_wording.values()] == [True, False, True]
    assert [each["means"][0] for each in by_wording.values()] == pytest.approx([-2, -0.2, -2], abs=0.1)
    assert {each["right"] for each in by_wording.values()} == {0.5} and lost.numbers["right"] == 1.0


@pytest.mark.parametrize(("n_lost", "verdict"), [(1, True), (2, False)])
def test_of_five_wordings_one_may_deny_it(n_lost, verdict):
    others = [[0, -2]] * (5 - n_lost) + [[0, 2]] * n_lost
    assert gate_of(found_in([0, -3], others), 1).verdict is verdict


def test_the_sign_and_the_least_size_count_and_every_condition_does():
    """The cut at layer 1 does as much as its control at layer 0 in one wording; nothing is significant of a mean."""
    possible = lambda result: (lowers(1, against=0),)  # noqa: E731
    good = [[0, -2], [-1, -2], [0, -2]]
    assert gate_of(found_in([0, -3], good, possible=possible), 1).verdict is True
    bad = [[0, -2], [-2.5, -2], [0, -2]]
    assert gate_of(found_in([0, -3], bad, possible=possible), 1).verdict is False
    small = [[0, -2], [0, -0.4], [0, -2]]
    assert gate_of(found_in([0, -3], small), 1).verdict is False, "half a logit is needed"


def test_below_three_wordings_it_is_not_tried_and_says_why():
    why = {"Look. {question}": "holds 'Look', which it has no token for"}
    gate = gate_of(found_in([0, -3], [[0, -2]] * 2, why), 1)
    assert FEWEST_WORDINGS == 3 and gate.verdict is None
    assert gate.says.startswith("not tried: 2 other wording(s) are usable, 3 are needed; 'Look. {question}': holds")
    counted = gate_of(found_in([0, -3], [[0, -2]] * 3, why), 1)
    assert counted.verdict is True and "not counted: 'Look. {question}'" in counted.says


def test_what_is_not_measured_in_a_wording_does_not_count_there():
    gate = gate_of(found_in([0, -3, -3], [[0, -2], [0, -2, -2], [0, -2, -2]]), 2)
    assert gate.verdict is None and "the measure exists in 2 other wording(s)" in gate.says
    assert [each["made"] for each in gate.numbers["by_wording"].values()] == [None, True, True]


def test_sets_of_claims_are_compared_pair_by_pair_with_the_own_wording_among_them():
    claims = found_in([0, -3, -3, 0], [[0, -2, -2, 0], [0, -2, 0, 0], [0, -2, -2, -2]])
    sets = [{1, 2}, {1, 2}, {1}, {1, 2, 3}]
    pairs = list(itertools.combinations(sets, 2))
    numbers = gate_of(claims, 1).numbers
    assert numbers["jaccard"] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
    shared = [len(a) * len(b) / 4 for a, b in pairs]
    chance = [each / (len(a) + len(b) - each) for each, (a, b) in zip(shared, pairs, strict=True)]
    assert numbers["jaccard_at_random"] == pytest.approx(np.mean(chance))


def test_the_least_size_is_that_of_the_wording():
    """A twentieth of the unedited difference, which is a hundred there."""

    def possible(result):
        before = float(result.table["lead_baseline"].mean())
        return tuple(lowers(layer, enough=0.05 * before) for layer in result.cells["layer"])

    own = measured([0, -3], noise=0.1)
    made = claimed(possible(own), own)
    other = measured([0, -3], noise=0.1, seed=1)
    table = other.table.assign(lead=other.table["lead"] + 90, lead_baseline=100.0)
    large = dataclasses.replace(other, table=table, known={})
    again = {str(number): Reworded(other) for number in range(2)}
    (claim,) = over_other_wordings(made, possible(own), possible, own, again | {"large": Reworded(large)})
    assert claim.gates[0].numbers["by_wording"]["large"]["made"] is False and claim.lost == (WORDINGS,)
