"""Claims: declared on one half of the examples, tested on the other, and lost where a gate says so."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test

from vlm_mech.results.claim import (
    LEVEL,
    Claim,
    Condition,
    Gate,
    as_dicts,
    as_rows,
    named_without_claim,
    of_dicts,
    sentences,
)
from vlm_mech.results.claim import Tested as Numbers
from vlm_mech.results.claiming import checked_on, claimed, corrected_together, halves, least, parted_like
from vlm_mech.results.gates import (
    N_RESAMPLES,
    SHUFFLED,
    STABLE,
    TWIN,
    against_nulls,
    interval_of,
    with_stability,
)
from vlm_mech.results.result import Metric, Result

METRIC = Metric("lead", "logits", "a difference of logits", signed=True)
LAYERS = range(6)


def measured(effects, n=24, *, seed=0, noise=1.0, groups=None):
    """A result whose cells lower a lead of 10 by given effects, on average."""
    rng = np.random.default_rng(seed)
    values = 10 + np.asarray(effects) + noise * rng.normal(size=(n, len(effects)))
    rows = [
        {"example": f"e{number}", "group": groups[number] if groups else f"e{number}", "layer": layer}
        | {"lead": float(values[number, layer]), "lead_baseline": 10.0}
        for number in range(n)
        for layer in range(len(effects))
    ]
    return Result("made", pd.DataFrame(rows), ("layer",), (METRIC,))


def lowers(layer, *, enough=0.5, against=None):
    conditions = [Condition("lead", {"layer": layer}, "below", least=enough, less="baseline")]
    if against is not None:
        conditions.append(
            Condition("lead", {"layer": layer}, "below", less={"layer": against}, says="less a control's")
        )
    return Claim("needed", {"layer": layer}, f"cutting at layer {layer} lowers lead", tuple(conditions), "logits")


def pool(result):
    return tuple(lowers(layer) for layer in result.cells["layer"])


def test_what_is_there_is_claimed_with_the_numbers_of_the_half_that_chose_nothing():
    result = measured([0, -3, 0, 0, -2, 0])
    found = claimed(pool(result), result)
    assert [claim.about["layer"] for claim in found if claim.made] == [1, 4]
    one, other = halves(result)
    assert set(one.table["example"]).isdisjoint(other.table["example"])
    assert len(set(one.table["example"])) == len(set(other.table["example"])) == 12
    for part, told in ((one, found[0].declared[0]), (other, found[0].tested[0])):
        changes = part.table.query("layer == 1")["lead"] - 10
        assert told.n == 12 and told.mean == pytest.approx(changes.mean()) and told.low < told.mean < told.high


def test_p_is_that_of_a_sign_flip_test_and_corrected_over_what_was_declared():
    result = measured([-0.9, -3, -1.0, 0, -1.1, -0.9], n=20)
    found = claimed(pool(result), result)
    assert len(found) > 2
    other = halves(result)[1]
    own = []
    for claim in found:
        changes = (other.table.query("layer == @claim.about['layer']")["lead"] - 10).to_numpy()
        test = permutation_test((changes,), np.mean, permutation_type="samples", n_resamples=np.inf)
        own.append(test.pvalue)
        assert claim.tested[0].p == pytest.approx(test.pvalue, abs=1e-9)
    # Holm by hand.
    order, corrected, largest = np.argsort(own), np.zeros(len(own)), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(own) - rank) * own[at]))
        corrected[at] = largest
    assert [claim.p for claim in found] == pytest.approx(corrected.tolist())


def test_a_significant_change_that_is_too_small_is_no_claim():
    result = measured([0, -0.3, -3], noise=0.01)
    assert [claim.about["layer"] for claim in claimed(pool(result), result)] == [2]
    small = claimed([lowers(1, enough=0.2)], result)
    assert len(small) == 1 and small[0].made


def test_every_condition_must_hold():
    """The control at layer 2 does as much as the cut at layer 1."""
    result = measured([0, -3, -3, 0])
    assert claimed([lowers(1, against=0)], result)[0].made
    assert not any(claim.made for claim in claimed([lowers(1, against=2)], result))
    assert not claimed([lowers(1, against=9)], result), "a control that was never measured is not beaten"


def test_the_wrong_side_is_no_claim():
    assert not claimed(pool(result := measured([3, 3, 3])), result)


def test_a_claim_of_one_half_that_the_other_denies_is_not_made():
    """The examples of the half that declares are changed alone."""
    result = measured([0, 0, 0])
    chosen = set(halves(result)[0].table["example"])
    table = result.table.copy()
    table.loc[table["example"].isin(chosen) & (table["layer"] == 1), "lead"] -= 5
    (claim,) = claimed(pool(result), dataclasses.replace(result, table=table, known={}))
    assert claim.about == {"layer": 1} and not claim.made and claim.declared[0].mean < -4


def test_groups_stay_together_and_too_few_make_no_claim():
    groups = [f"g{number // 6}" for number in range(24)]
    one, other = halves(measured([-3], groups=groups))
    assert set(one.table["group"]).isdisjoint(other.table["group"]) and len(set(one.table["group"])) == 2
    assert halves(measured([-3], groups=[f"g{number % 3}" for number in range(24)])) is None
    assert claimed([lowers(0)], measured([-3], n=3)) == ()


def test_examples_without_values_do_not_choose():
    """Half of the examples were answered wrongly; those left are shared out evenly."""
    result = measured([0, -3])
    table = result.table.copy()
    table.loc[table["example"].isin([f"e{number}" for number in range(12)]), "lead"] = np.nan
    one, other = halves(dataclasses.replace(result, table=table, known={}))
    assert one.table.dropna()["example"].nunique() == other.table.dropna()["example"].nunique() == 6


def test_nothing_is_claimed_of_noise_in_more_than_a_twentieth_of_runs():
    """Family-wise, over 200 results of six layers each; the size alone would let many pass (noise of 1, n = 12)."""
    alarms = [
        claimed([lowers(layer, enough=0.1) for layer in LAYERS], measured([0] * 6, n=24, seed=seed))
        for seed in range(200)
    ]
    n_declared, n_false = sum(map(bool, alarms)), sum(any(claim.made for claim in each) for each in alarms)
    assert n_declared > 15, "one half alone declares something often"
    assert n_false <= 0.05 * 200


def test_what_counts_grows_with_the_unedited_difference():
    assert least(measured([0]), "lead") == pytest.approx(0.05 * 10)
    result = measured([0])
    small = dataclasses.replace(result, table=result.table.assign(lead_baseline=0.4), known={})
    assert least(small, "lead") == 0.1


# Gates


def test_nulls_count_those_that_reach_the_claim():
    result = measured([0, -3, 0])
    found = claimed(pool(result), result)
    own = found[0].strength(found[0].tested)
    weak, strong = measured([0, 0, -1], noise=0.01), measured([-9, 0, 0], noise=0.01)
    (passed,) = against_nulls(found, pool, {TWIN: [weak] * 4, SHUFFLED: [weak, strong, weak, weak]})
    twin, shuffled = passed.gates
    assert twin.verdict is True and twin.numbers["p"] == pytest.approx(1 / 5)
    assert shuffled.verdict is False and shuffled.numbers["p"] == pytest.approx(2 / 5)
    null = np.array(shuffled.numbers["T_null"])
    assert null * own == pytest.approx([1, 9, 1, 1], abs=0.02), "the largest of all cells, wherever it is"
    assert np.isnan(shuffled.numbers["Z"]), "of four nulls no Z is told"
    assert passed.lost == (SHUFFLED,)


def test_nulls_in_which_nothing_is_measured_do_not_count():
    result = measured([0, -3, 0])
    found, weak = claimed(pool(result), result), measured([0, 0, -1], noise=0.01)
    empty = dataclasses.replace(weak, table=weak.table.assign(lead=np.nan), known={})
    (claim,) = against_nulls(found, pool, {TWIN: [weak, empty, empty, weak], SHUFFLED: [empty]})
    twin, shuffled = claim.gates
    assert twin.numbers["p"] == pytest.approx(1 / 3) and "2 more lack the measure" in twin.says
    assert shuffled.verdict is None


def test_a_null_must_meet_every_condition_by_as_much():
    """Its cell falls more than the claim's, and so does its control."""
    result = measured([0, -3, 0])
    possible = lambda of: (lowers(1, against=0),)  # noqa: E731
    found = claimed(possible(result), result)
    (claim,) = against_nulls(found, possible, {TWIN: [measured([-9, -9, 0], noise=0.01)]})
    assert claim.gates[0].verdict is True and abs(claim.gates[0].numbers["T_null"][0]) < 0.05
    (claim,) = against_nulls(found, possible, {TWIN: [measured([0, -9, 0], noise=0.01)]})
    assert claim.gates[0].verdict is False


def test_many_nulls_are_told_by_p():
    result = measured([0, -3, 0])
    found = claimed(pool(result), result)
    weak, strong = measured([0, 0, -1], noise=0.01), measured([-9, 0, 0], noise=0.01)
    (claim,) = against_nulls(found, pool, {TWIN: [weak] * 99 + [strong]})
    assert claim.gates[0].verdict is True and claim.gates[0].numbers["p"] == pytest.approx(2 / 101)
    null = np.array(claim.gates[0].numbers["T_null"])
    assert claim.gates[0].numbers["Z"] == pytest.approx((1 - null.mean()) / null.std(ddof=1))
    (claim,) = against_nulls(found, pool, {TWIN: [weak] * 95 + [strong] * 5})
    assert claim.gates[0].verdict is False and claim.gates[0].numbers["p"] == pytest.approx(6 / 101)


def test_a_claim_that_few_examples_carry_is_not_stable():
    steady = measured([0, -3])
    (claim,) = with_stability(claimed(pool(steady), steady), pool(steady), steady)
    assert claim.gates[0].name == STABLE and claim.gates[0].verdict is True
    assert claim.gates[0].numbers["share"] == 1.0 and claim.gates[0].numbers["n_resamples"] == N_RESAMPLES
    border = measured([0, -0.7], noise=0.5, n=24)
    borderline = Claim(
        "needed", {"layer": 1}, "", lowers(1).conditions, tested=(Numbers(12, -0.6, -1, -0.2, 0.01),), p=0.01
    )
    (told,) = with_stability([borderline], pool(border), border)
    assert told.gates[0].verdict is False and 0.2 < told.gates[0].numbers["share"] < 0.8


def test_the_share_of_resamples_is_what_a_loop_with_scipy_counts():
    from scipy.stats import ttest_1samp

    result = measured([0, -0.8], noise=1.0, n=20, seed=3)
    claim = dataclasses.replace(lowers(1), tested=(Numbers(10, -0.8, -1, -0.2, 0.01),), p=0.01)
    (told,) = with_stability([claim], pool(result), result, seed=5)
    changes = result.table.query("layer == 1")["lead"].to_numpy() - 10
    rng, hits = np.random.default_rng(5), 0
    for _ in range(N_RESAMPLES):
        drawn = changes[rng.integers(0, 20, 20)]
        hits += ttest_1samp(drawn, 0).pvalue < LEVEL and drawn.mean() < -0.5
    assert 0 < hits < N_RESAMPLES
    assert told.gates[0].numbers["share"] == pytest.approx(hits / N_RESAMPLES)


def test_sets_of_claims_have_a_jaccard_index_beside_that_of_random_sets():
    result = measured([-3, -3, 0, 0, 0, 0], noise=0.2)
    found = with_stability(claimed(pool(result), result), pool(result), result)
    numbers = found[0].gates[0].numbers
    assert numbers["jaccard"] == 1.0 and numbers["jaccard_at_random"] == pytest.approx((4 / 6) / (4 - 4 / 6))


# What is said


def test_sentences_come_from_claims_and_say_what_was_lost():
    result = measured([0, -3, 0, 0])
    found = claimed([lowers(1, against=0), lowers(2)], result)
    first, second = sentences(found)
    assert "1 selected on half of the examples, 1 confirmed on the held-out half" in first
    told = found[0].tested
    assert second.startswith(f"cutting at layer 1 lowers lead, by {told[0]} logits; less a control's {told[1]} (p = ")
    lost = dataclasses.replace(found[0], gates=(Gate(TWIN, False, "3 of 5 reach it"), Gate(STABLE, None, "not tried")))
    first, second = sentences([lost])
    assert "; 0 of these pass every gate that was run" in first and second.endswith("fails the gates: random twin.")
    assert "no effect was large" in sentences(())[0]
    partly = dataclasses.replace(found[0], gates=(Gate(TWIN, True, ""), Gate(STABLE, None, "")))
    assert "; 1 of these pass every gate that was run (1 could not be run through all)" in sentences([partly])[0]
    row = as_rows([lost]).iloc[0]
    assert row[TWIN] == "failed" and row[STABLE] == "not tried" and row["other half"] == "passed"


def test_a_sentence_that_names_a_layer_needs_a_claim():
    result = measured([0, -3, 0, 0])
    found = claimed(pool(result), result)
    good = [*sentences(found), "64 of 64 examples are used.", "layer 1 looks at the picture (n = 4)."]
    assert named_without_claim(good, found) == []
    for bad in (
        "the strongest is layer 2.",
        "layers 1 and then head 3 do it",
        "across block(s) 4",
        "layer 1 head 0: 80 %",
    ):
        assert named_without_claim([*good, bad], found) == [bad]
    denied = [dataclasses.replace(claim, p=0.5) for claim in found]
    assert "layer 1 looks at the picture (n = 4)." in named_without_claim(good, denied)


def test_claims_are_kept_as_json_without_loss(tmp_path):
    result = measured([0, -3, 0, 0])
    found = with_stability(claimed(pool(result), result), pool(result), result)
    never = dataclasses.replace(found[0], tested=(Numbers(0, *(float("nan"),) * 4),), p=float("nan"))
    dataclasses.replace(result, claims=(*found, never)).save(tmp_path)
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert rows[0]["made"] is True and rows[0]["lost"] == [] and rows[1]["p"] is None
    back = Result.load(tmp_path).claims
    assert back[0] == of_dicts(as_dicts(found))[0]
    assert back[0].tested == found[0].tested and back[0].conditions == found[0].conditions and back[0].made
    assert np.isnan(back[1].tested[0].mean) and not back[1].made
    (tmp_path / "claims.json").unlink()
    assert Result.load(tmp_path).claims == ()


def test_both_sides_of_a_bound_are_one_test():
    result = measured([0, -3, 0])
    above = Condition("lead", {"layer": 1}, "above", less="baseline")
    both = [lowers(1), Claim("raises", {"layer": 1}, "", (above,))]
    one, other = checked_on(both, result)
    assert one == other and one[0].mean < 0 and both[0].met(one) and not both[1].met(other)


# Claims about several places


def test_families_that_were_tested_apart_are_corrected_as_one():
    result = measured([0, -0.9, -1.0, -3], n=20)
    possible = pool(result)
    whole = claimed(possible, result)
    assert len(whole) > 2
    one, other = (claimed([claim], result) for claim in (possible[1], possible[3]))
    rest = claimed([possible[2]], result)
    together = {claim.about["layer"]: claim.p for claim in corrected_together(one, other, rest)}
    assert together == pytest.approx({claim.about["layer"]: claim.p for claim in whole})
    assert corrected_together(one, ()) == one and corrected_together() == ()


def test_another_result_is_parted_as_the_first_was():
    result = measured([0, -3])
    parts = halves(result, seed=4)
    other = dataclasses.replace(result, table=result.table.iloc[::-1].reset_index(drop=True), known={})
    for mine, like in zip(parts, parted_like(other, parts), strict=True):
        assert set(mine.table["example"]) == set(like.table["example"])
    fewer = dataclasses.replace(result, table=result.table[result.table["example"] != "e0"], known={})
    assert sum(part.table["example"].nunique() for part in parted_like(fewer, parts)) == 23


def test_a_sentence_about_members_of_a_claim_may_name_them():
    result = measured([0, -3, 0, 0])
    (claim,) = claimed([lowers(1)], result)
    members = [{"layer": 1, "head": 2}, {"layer": 3, "head": 0}]
    joint = dataclasses.replace(claim, about={"edge": "last<-image", "members": members})
    assert named_without_claim(["layer 1 head 2 looks at the picture."], [joint]) == []
    assert named_without_claim(["layer 3 head 2 looks at the picture."], [joint]) != []


def test_a_large_mean_that_is_not_significant_declares_nothing():
    """Two examples alone carry it, far beyond the least size."""
    result = measured([0, 0])
    table = result.table.copy()
    first = halves(result)[0].table["example"].drop_duplicates().tolist()[:2]
    table.loc[table["example"].isin(first) & (table["layer"] == 1), "lead"] -= 20
    found = dataclasses.replace(result, table=table, known={})
    (told,) = checked_on([lowers(1)], halves(found)[0])
    assert told[0].mean < -2 and told[0].p > LEVEL
    assert claimed([lowers(1)], found) == ()


def test_the_seed_draws_the_halves():
    result = measured([0])
    chosen = [frozenset(halves(result, seed=seed)[0].table["example"]) for seed in range(5)]
    assert len(set(chosen)) == 5 and chosen[0] == frozenset(halves(result, seed=0)[0].table["example"])
    in_order = frozenset(result.table["example"].drop_duplicates().tolist()[:12])
    assert in_order not in chosen


def test_resamples_draw_groups_and_weigh_them_alike():
    """Pairs of examples that say the same are half as many groups, so that a claim is less sure."""
    from scipy.stats import ttest_1samp

    alone = measured([0, -0.8], n=10, seed=3)
    twice = pd.concat([alone.table, alone.table.assign(example=alone.table["example"] + "b")], ignore_index=True)
    result = dataclasses.replace(alone, table=twice, known={})
    claim = dataclasses.replace(lowers(1), tested=(Numbers(10, -0.8, -1, -0.2, 0.01),), p=0.01)
    (told,) = with_stability([claim], pool(result), result, seed=5)
    changes = alone.table.query("layer == 1")["lead"].to_numpy() - 10
    rng, hits = np.random.default_rng(5), 0
    for _ in range(N_RESAMPLES):
        drawn = changes[rng.integers(0, 10, 10)]
        hits += ttest_1samp(drawn, 0).pvalue < LEVEL and drawn.mean() < -0.5
    assert 0 < hits < N_RESAMPLES and told.gates[0].numbers["share"] == pytest.approx(hits / N_RESAMPLES)


# Flags, and nulls of fractions


def test_a_size_is_sure_where_the_whole_interval_lies_beyond_it():
    def told(low, high, *, side="below", more=()):
        conditions = (Condition("lead", {"layer": 1}, side, least=0.5, bound=1.0), *more)
        numbers = Numbers(12, (low + high) / 2, low, high, 0.01)
        return Claim("needed", {}, "", conditions, tested=(numbers,) * len(conditions), p=0.01).size_sure

    assert told(-3, 0.4) and not told(-3, 0.6), "a half beyond the bound, which is 1"
    assert told(1.6, 9, side="above") and not told(1.4, 9, side="above")
    assert not told(-3, 0.4, more=(Condition("lead", {"layer": 2}, "below", bound=-2.0),)), "of every condition"
    assert not lowers(1).size_sure, "what was never tested is not sure"


def test_the_flag_is_in_the_table_and_in_the_file_and_changes_no_claim():
    result = measured([0, -3, -0.8], noise=0.4)
    sure, unsure = (next(c for c in claimed(pool(result), result) if c.about["layer"] == layer) for layer in (1, 2))
    assert sure.made and unsure.made and sure.size_sure and not unsure.size_sure
    assert as_rows([sure, unsure])["size sure"].tolist() == ["yes", "no"]
    rows = as_dicts([sure, unsure])
    assert [row["size_sure"] for row in rows] == [True, False] and of_dicts(rows) == (sure, unsure)


def test_a_row_has_the_numbers_of_one_condition_and_names_it():
    """That with the largest p; of equal ones the first that is not met."""
    falls = Condition("logprob", {"arm": "removed", "layer": 2}, "below", 0.1, less="baseline")
    apart = Condition("kl", {"arm": "removed", "layer": 2}, "above", bound=0.1)
    other = Condition("logprob", {"arm": "removed", "layer": 2}, "below", less={"arm": "frozen", "layer": 2})
    sure, vague = Numbers(12, -2.466, -3.181, -1.796, 0.0005), Numbers(11, 0.2, -0.1, 0.5, 0.39)

    def row(conditions, tested, **more):
        about = {"arm": "removed", "layer": 2}
        claim = Claim("costs", about, "less probable", conditions, tested=tested, **more)
        return as_rows([claim, dataclasses.replace(claim, conditions=(falls,), tested=(sure,))]).iloc

    shown, single = (row((falls, apart), (sure, vague), p=0.39)[number] for number in (0, 1))
    assert shown[["effect", "low", "high", "n", "p"]].tolist() == [0.2, -0.1, 0.5, 11, 0.39]
    assert shown["condition that decides"] == "kl above 0.1" and single["condition that decides"] == ""
    assert single["effect"] == -2.466
    shown = row((apart, falls), (vague, sure), p=0.39)[0]
    assert (shown["effect"], shown["condition that decides"]) == (0.2, "kl above 0.1")
    # As small a p of both, of which the second is not met.
    near = dataclasses.replace(sure, mean=0.05, low=0.01, high=0.09)
    shown = row((falls, apart), (sure, near), p=0.001)[0]
    assert (shown["effect"], shown["other half"]) == (0.05, "failed")
    # A larger p of the first, and of the second a mean on the wrong side: both are told.
    shown = row((falls, other), (dataclasses.replace(sure, p=0.01), near), p=0.01)[0]
    assert shown["effect"] == -2.466 and shown["condition that decides"] == (
        "logprob minus its baseline below 0 by at least 0.1; not met: logprob minus that of (arm frozen) below 0, "
        "which is +0.05 (+0.01 to +0.09, n = 12)"
    )
    never = Numbers(0, *(float("nan"),) * 4)
    assert row((falls, apart), (sure, never))[0]["n"] == 0, "a condition without a mean decides"


def test_a_table_of_claims_with_one_condition_has_no_column_more():
    claim = dataclasses.replace(lowers(1), tested=(Numbers(10, -0.8, -1, -0.2, 0.01),), p=0.01)
    assert list(as_rows([claim])) == ["claim", "effect", "low", "high", "n", "p", "other half", "size sure"]


def test_stability_is_told_with_the_exact_interval_of_its_share():
    from scipy.stats import beta

    low, high = interval_of(0.9)
    assert low == pytest.approx(beta.ppf(0.025, 180, 21)) and high == pytest.approx(beta.ppf(0.975, 181, 20))
    assert interval_of(1.0) == (pytest.approx(0.025 ** (1 / N_RESAMPLES)), 1.0)
    steady = measured([0, -3])
    (claim,) = with_stability(claimed(pool(steady), steady), pool(steady), steady)
    numbers = claim.gates[0].numbers
    assert (numbers["low"], numbers["high"]) == interval_of(1.0) and "100 % (98 to 100 %)" in claim.gates[0].says


SHARE = Metric("recovered", "fraction", "how much of a gap", signed=True)


def turning(fraction, lowered, *, kind="turns", n=24, seed=0):
    """A result in which a swap at layer 0 has these means, and what could be said of it; NaN: there is no gap."""
    table = measured([lowered], n=n, seed=seed, noise=0.1).table
    table = table.assign(recovered=fraction + 0.0 * table["lead"], recovered_baseline=0.0)
    result = Result("made", table, ("layer",), (SHARE, METRIC))

    def possible(found):
        cell = {"layer": 0}
        half = Condition("recovered", cell, "above", bound=0.5)
        falls = Condition("lead", cell, "below", 0.5, less="baseline")
        claims = (Claim(kind, cell, "turns", (half, falls)), Claim("half", cell, "half alone", (half,)))
        return claims if found.table["recovered"].notna().any() else ()

    return result, possible


def test_a_null_is_compared_in_units_of_the_difference_whatever_its_fractions_are():
    """Fractions of a gap of nothing are anything: they are no reason to lose a claim, and none to keep one."""
    result, possible = turning(0.9, -4.0)
    found = claimed(possible(result), result)
    assert [claim.kind for claim in found if claim.made] == ["turns", "half"]
    wild, strong = turning(50.0, -0.01)[0], turning(0.0, -9.0)[0]
    turns, half = against_nulls(found, possible, {TWIN: [wild] * 3, SHUFFLED: [wild, strong]})
    assert [gate.verdict for gate in turns.gates] == [True, False]
    assert turns.gates[1].numbers["T_null"] == pytest.approx([0, 9 / 4], abs=0.1)
    assert "compared in logits or nats, not as a fraction" in turns.gates[0].says
    assert half.gates[0].verdict is None and "a fraction of the answer gap" in half.gates[0].says


def test_a_null_without_any_fraction_is_asked_what_the_result_was_asked():
    """Its own pool has no such claim; without the result's pool nothing could be compared."""
    result, possible = turning(0.9, -4.0)
    found = claimed(possible(result), result)[:1]
    none = turning(float("nan"), -1.0)[0]
    (untried,) = against_nulls(found, possible, {TWIN: [none]})
    assert untried.gates[0].verdict is None
    (claim,) = against_nulls(found, possible, {TWIN: [none, none]}, possible(result))
    assert claim.gates[0].verdict is True
    assert claim.gates[0].numbers["T_null"] == pytest.approx([0.25, 0.25], abs=0.05)


def test_of_conditions_at_several_places_the_least_is_compared():
    """An effect at every one of three depths: a null that has it at the last alone does not reach it."""

    def possible(result):
        conditions = tuple(Condition("lead", {"layer": layer}, "below", 0.5, less="baseline") for layer in range(3))
        return (Claim("everywhere", {"layer": 0}, "everywhere", conditions),)

    result = measured([-4, -2, -4], noise=0.1)
    found = claimed(possible(result), result)
    at_the_end, all_over = measured([0, 0, -9], noise=0.1), measured([-9, -3, -9], noise=0.1)
    (claim,) = against_nulls(found, possible, {TWIN: [at_the_end, all_over]})
    assert claim.gates[0].numbers["T_null"] == pytest.approx([0, 1.5], abs=0.1)
