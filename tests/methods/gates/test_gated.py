"""Claims of a run with their gates: which nulls are made, of how many examples, and what is told when none can be."""

import dataclasses

import numpy as np
import pytest

from tests.results.test_claim import measured, pool
from vlm_mech.data.derived_pairs import with_others_answers
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.methods.gates import gated as gated_module
from vlm_mech.methods.gates.gated import N_EXAMPLES, gated, through_gates
from vlm_mech.results.claim import Gate
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.results.rewording import WORDINGS
from vlm_mech.runs.configuration import ClaimConfig


@dataclasses.dataclass(frozen=True)
class Config(ClaimConfig):
    """Options of a made experiment."""

    batch: int = 12


@pytest.fixture
def asked(monkeypatch):
    """A result with one claim, its pairs, and what was measured for it again: the model and the answers."""
    monkeypatch.setattr(gated_module, "twin_of", lambda vlm, seed: f"twin {seed}")
    pairs, seen = load_pairs("scenes/colour", n=40), []

    def again(vlm, some):
        seen.append((vlm, [pair.id for pair in some], [pair.answer for pair in some]))
        table = measured([0, -0.2], n=len(some), seed=len(seen)).table
        names = {f"e{number}": pair.id for number, pair in enumerate(some)}
        return table.assign(example=table["example"].map(names))

    def reworded(claims, possible, vlm, pairs, *given, **how):
        asked_in.append(([pair.id for pair in pairs], how["given"]))
        return tuple(dataclasses.replace(c, gates=(*c.gates, Gate(WORDINGS, True, "made again"))) for c in claims)

    monkeypatch.setattr(gated_module, "in_other_wordings", reworded)
    asked_in.clear()
    result = measured([0, -3], n=40)
    names = {f"e{number}": pair.id for number, pair in enumerate(pairs)}
    table = result.table.assign(example=result.table["example"].map(names), group=result.table["group"].map(names))
    return dataclasses.replace(result, table=table, known={}), pairs, again, seen


asked_in = []
"""The pairs that were asked in other wordings, and the wordings given."""


def test_all_gates_measure_twins_and_shuffled_answers_again(asked):
    result, pairs, again, seen = asked
    (claim,) = gated(Config(null=2), "the model", pairs, result, pool, again)
    assert claim.made and [gate.name for gate in claim.gates] == [STABLE, TWIN, SHUFFLED, WORDINGS] and not claim.lost
    assert [vlm for vlm, *_ in seen] == ["twin 1"] * 3 + ["twin 2"] * 3 + ["the model"] * 6
    names = [pair.id for pair in pairs][:N_EXAMPLES]
    for start in range(0, 12, 3):
        assert [name for _, some, _ in seen[start : start + 3] for name in some] == names
    own = [pair.answer for pair in pairs][:N_EXAMPLES]
    told = [[answer for *_, some in seen[start : start + 3] for answer in some] for start in range(0, 12, 3)]
    assert told[0] == told[1] == own and told[2] != own and told[2] != told[3]
    assert sorted(told[2]) == sorted(own), "every answer is taken once"


@pytest.mark.parametrize(("gates", "names"), [("none", []), ("quick", [STABLE])])
def test_fewer_gates_measure_nothing(asked, gates, names):
    result, pairs, again, seen = asked
    (claim,) = gated(Config(gates=gates), "the model", pairs, result, pool, again)
    assert [gate.name for gate in claim.gates] == names and not seen


def test_a_null_that_cannot_be_made_is_told(asked, monkeypatch):
    def refused(vlm, seed):
        raise UsageError("no room")

    monkeypatch.setattr(gated_module, "twin_of", refused)
    result, pairs, again, _ = asked
    (claim,) = gated(Config(null=2), "the model", pairs, result, pool, again)
    twin = claim.gates[1]
    assert twin.name == TWIN and twin.verdict is None and twin.says == "not tried: no room"
    assert claim.gates[2].verdict is True and not claim.lost


def test_pairs_that_the_result_has_values_of_are_asked_in_other_wordings_those_given_first(asked):
    result, pairs, again, _ = asked
    left_out = {pair.id for pair in list(pairs)[:5]}
    table = result.table.copy()
    table.loc[table["example"].isin(left_out), "lead"] = np.nan
    result = dataclasses.replace(result, table=table, known={})
    config = Config(null=0, other_wordings=("see it. {question}",))
    (claim,) = gated(config, "the model", pairs, result, pool, again)
    assert [gate.name for gate in claim.gates] == [STABLE, TWIN, SHUFFLED, WORDINGS]
    assert [gate.says for gate in claim.gates[1:3]] == ["not tried: no null was requested"] * 2
    ((names, given),) = asked_in
    assert names == [pair.id for pair in pairs][5 : 5 + N_EXAMPLES] and given == ("see it. {question}",)


def test_what_cannot_be_measured_again_is_not_tried_in_other_wordings(asked):
    result, pairs, _, _ = asked
    (claim,) = gated(Config(null=1), "the model", pairs, result, pool, "there are two checkpoints")
    assert {gate.name: gate.says for gate in claim.gates[1:]} == dict.fromkeys(
        (TWIN, SHUFFLED, WORDINGS), "not tried: there are two checkpoints"
    )


def test_claims_that_were_tested_before_go_through_the_same_gates(asked):
    result, pairs, again, _ = asked
    found = claimed(pool(result), result)
    told = through_gates(Config(null=2), found, "the model", pairs, result, pool, again)
    (one,), (other,) = told, gated(Config(null=2), "the model", pairs, result, pool, again)
    assert (one.tested, one.p, one.gates[0]) == (other.tested, other.p, other.gates[0])
    # What is measured again differs from call to call here.
    assert [gate.name for gate in one.gates] == [gate.name for gate in other.gates]
    untold = dataclasses.replace(found[0], p=0.5)
    assert through_gates(Config(), (untold,), "the model", pairs, result, pool, again) == (untold,)


def test_what_was_not_made_meets_no_gate(asked):
    _, pairs, again, seen = asked
    nothing = measured([0, 0])
    assert gated(Config(), "the model", pairs, nothing, pool, again) == () and not seen


def test_shuffled_answers_are_both_of_another_pair():
    pairs = load_pairs("scenes/colour", n=20)
    made = with_others_answers(pairs, seed=1)
    both = lambda some: [(pair.answer, pair.counterfactual_answer) for pair in some]  # noqa: E731
    assert sorted(both(made)) == sorted(both(pairs)) and both(made) != both(pairs)
    for own, other in zip(pairs, made, strict=True):
        assert (own.id, own.question) == (other.id, other.question)
        assert np.array_equal(np.asarray(own.image), np.asarray(other.image))
    assert both(with_others_answers(pairs, seed=1)) == both(made) != both(with_others_answers(pairs, seed=2))
    with pytest.raises(UsageError):
        with_others_answers(pairs[:1], seed=0)


def test_what_counts_as_large_is_read_off_the_half_that_declares(asked):
    """A pool whose threshold is the mean of all examples that it is shown."""
    result, pairs, again, _ = asked
    for seed in (0, 3):
        shown = []

        def sized(some, shown=shown):
            shown.append(set(some.table["example"]))
            return [
                dataclasses.replace(claim, conditions=tuple(wide(one, some) for one in claim.conditions))
                for claim in pool(some)
            ]

        (claim,) = gated(Config(gates="none", seed=seed), "the model", pairs, result, sized, again)
        one, other = halves(result, seed=seed)
        assert shown[0] == set(one.table["example"]) != set(other.table["example"])
        assert (
            claim.conditions[0].least == wide(claim.conditions[0], one).least != wide(claim.conditions[0], other).least
        )
        (by_hand,) = claimed(
            [dataclasses.replace(claim, declared=(), tested=())], result, seed=seed, parts=(one, other)
        )
        assert claim.tested == by_hand.tested, "intervals and tests are drawn with the seed of the run"


def wide(condition, some):
    return dataclasses.replace(condition, least=abs(float(some.table["lead"].mean())) / 10)
