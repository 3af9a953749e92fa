"""What the lens claims of an answer's lead: by hand on small tables, on planted models, and what its gates say."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest

from tests.zoo.tiny import picture
from vlm_mech import lens_figures
from vlm_mech.architectures.site import Site, sites
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.interventions.trace import run
from vlm_mech.methods.gates.shuffled import following
from vlm_mech.methods.lens import study
from vlm_mech.methods.lens.claims import AHEAD, KINDS, OVERTAKEN, PUSH, RISE, SUPPRESS, lead_claims, pool
from vlm_mech.methods.lens.findings import findings
from vlm_mech.methods.lens.leads import INPUT
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.lens.study import GIVEN, OTHER_IMAGE, lens_lead
from vlm_mech.methods.lens.tuned_lens import LensTraining, TunedLens, retrained, train_tuned_lens
from vlm_mech.models.twin import twin_of
from vlm_mech.organism.planted import Planted, plant
from vlm_mech.organism.planted_recipe import Head, Recipe, matched_null
from vlm_mech.results.claim import Condition, named_without_claim, sentences
from vlm_mech.results.claiming import claimed
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.rewording import WORDINGS
from vlm_mech.validate.examination import random_answers

N = 24
WRITES, PRIOR = 2, 4
RECIPE = Recipe(3, 6, reads=(Head(WRITES, 1),), decoys=(Head(3, 0, 0),), priors=(3, 1, 0, 5, 4, 2))
RECIPES = {
    "plain": RECIPE,
    "suppressed": dataclasses.replace(RECIPE, suppressor=Head(PRIOR, 0, 2.5)),
    "null": matched_null(RECIPE),
    # So that no picture is shown twice, as a tuned lens asks for.
    "textured": dataclasses.replace(RECIPE, jitter=0.1, texture=0.3),
}


@functools.cache
def made(name: str) -> Planted:
    return plant(RECIPES[name], check=False, n=16)


def by_hand(*curve: float, over: str = OTHER_IMAGE, spread: float = 0.2) -> Result:
    """Leads with these means in the input and after each block, and a spread about them balanced over examples."""
    rng, rows = np.random.default_rng(0), []
    noise = rng.normal(0, spread, (N // 2, len(curve)))
    for example, row in enumerate(np.concatenate([curve + noise, curve - noise])):
        for number, lead in enumerate(row):
            numbers = {"lead": lead, "lead_baseline": row[0], "step_baseline": 0.0}
            numbers["step"] = lead - row[number - 1] if number else np.nan
            rows.append({"example": str(example), "rival": over, "layer": INPUT + number} | numbers)
    metrics = (Metric("lead", "logits", "", signed=True), Metric("step", "logits", "", signed=True))
    return Result("by hand", pd.DataFrame(rows), ("rival", "layer"), metrics, {"lens": "logit lens"})


def layers(result: Result, kind: str) -> tuple[int, ...]:
    found = result.claims or claimed(pool(result), result)
    return tuple(claim.about["layer"] for claim in found if claim.made and claim.kind == kind)


# By hand


def test_a_lead_rises_falls_and_changes_hands_where_it_does():
    result = by_hand(0.0, 0.0, 6.0, 6.0, -2.0, -2.0)
    assert (layers(result, RISE), layers(result, PUSH), layers(result, SUPPRESS)) == ((1,), (3,), (3,))
    assert (layers(result, AHEAD), layers(result, OVERTAKEN)) == ((), (3, 4)), "it leads, but not for good"
    assert layers(by_hand(0.0, 0.0, 6.0, 6.0), AHEAD) == (1, 2)
    assert layers(by_hand(0.0, -3.0, -6.0, -6.0), SUPPRESS) == (), "nothing had risen that could be suppressed"
    assert layers(by_hand(0.0, -3.0, -6.0, -6.0), PUSH) == (0, 1)


def test_the_numbers_of_a_claim_are_those_of_the_half_that_tests():
    result = by_hand(0.0, 0.0, 6.0, 6.0)
    (rises,) = (claim for claim in claimed(pool(result), result) if claim.kind == RISE)
    assert rises.about == {"layer": 1, "rival": OTHER_IMAGE} and rises.unit == "logits"
    assert rises.tested[0].n == rises.declared[0].n == N // 2
    assert rises.tested[0].mean == pytest.approx(6.0, abs=0.3) and rises.p < 0.05
    assert str(rises).startswith("the answer's lead over the other image's answer rises across layer 1, by +")


def test_a_step_counts_from_a_twentieth_of_the_largest_rise_on():
    """The largest rise is 20: 0.9 is too little, 1.2 is enough, and of a lead of nothing 0.1 logits are."""
    assert layers(by_hand(0.0, 0.9, 20.0, 20.0, spread=0.01), RISE) == (1,)
    assert layers(by_hand(0.0, 1.2, 20.0, 20.0, spread=0.01), RISE) == (0, 1)
    assert layers(by_hand(0.0, 0.09, 0.09, spread=0.001), RISE) == ()
    assert layers(by_hand(0.0, 0.2, 0.2, spread=0.001), RISE) == (0,)
    # A sure tie at the end is no lead.
    assert layers(by_hand(0.0, 0.2, 0.08, spread=0.001), AHEAD) == ()


def test_every_layer_is_asked_in_every_way():
    found = pool(by_hand(0.0, 1.0, 2.0, 3.0))
    assert [sum(claim.kind == kind for claim in found) for kind in KINDS] == [3, 3, 2, 3, 3]
    (ahead,) = (claim for claim in found if claim.kind == AHEAD and claim.about["layer"] == 1)
    assert [condition.cell["layer"] for condition in ahead.conditions] == [1, 2]
    assert [condition.least for condition in ahead.conditions] == [0.0, 0.1]
    rises = next(claim for claim in found if claim.kind == RISE)
    assert rises.conditions == (Condition("step", {"rival": OTHER_IMAGE, "layer": 0}, "above", pytest.approx(0.15)),)


def test_kinds_can_be_left_out():
    def on(what, layer, side, least, says):
        return Condition(what, {"layer": layer}, side, least, says=says)

    found = lead_claims(on, [0, 1], 0.5, kinds=(PUSH, OVERTAKEN))
    assert [(claim.kind, claim.about) for claim in found] == [
        (PUSH, {"layer": 0}), (OVERTAKEN, {"layer": 0}), (PUSH, {"layer": 1}), (OVERTAKEN, {"layer": 1})
    ]  # fmt: skip
    assert found[0].says == "the answer's lead over its rival falls across layer 0"


def test_sentences_name_layers_from_claims_alone_and_leave_out_what_follows():
    result = by_hand(0.0, 0.0, 6.0, 6.0, 6.0)
    result = dataclasses.replace(result, claims=claimed(pool(result), result))
    told = findings(result)
    assert "leads the other image's answer by" in told[0] and "layer" not in told[0]
    assert set(told[2:-1]) < set(sentences(result.claims)) and len(told) == 5
    assert told[-1] == "2 more claims follow from these and hold too (claims.json)."
    assert named_without_claim(told, result.claims) == []
    assert findings(dataclasses.replace(result, claims=()))[1].startswith("No claim was selected")


# Models


@pytest.mark.parametrize("name", ["plain", "suppressed"])
def test_the_layer_that_writes_is_the_planted_one(name):
    result = lens_lead(made(name).vlm, made(name).pairs(32, seed=1))
    assert layers(result, RISE) == (WRITES,) and layers(result, AHEAD) == (2, 3, 4, 5)
    (claim,) = (claim for claim in result.claims if claim.kind == RISE)
    assert [gate.name for gate in claim.gates] == [STABLE] and claim.gates[0].numbers["share"] == 1
    assert f"across layer {WRITES}" in " ".join(result.findings) and not named_without_claim(
        result.findings, result.claims
    )


def test_the_layer_that_brings_a_prior_in_is_the_planted_one():
    planted = made("suppressed")
    pairs = planted.pairs(32, seed=1)
    result = lens_lead(planted.vlm, pairs, against=planted.priors(pairs), gates="none")
    assert layers(result, PUSH) == layers(result, SUPPRESS) == (PRIOR,)
    assert layers(result, OVERTAKEN) == (PRIOR, PRIOR + 1) and layers(result, RISE) == (WRITES,)
    assert set(result.table["rival"]) == {GIVEN} and not any(claim.gates for claim in result.claims)


def test_random_answers_claim_nothing():
    planted = made("null")
    for seed in range(3):
        pairs = random_answers(planted.pairs(24, seed=seed), seed, planted.recipe.answers)
        assert not any(claim.made for claim in lens_lead(planted.vlm, pairs).claims)


def test_leads_are_the_lens_and_at_the_end_the_model():
    planted = made("plain")
    pairs, vlm = planted.pairs(6, seed=2), planted.vlm
    result = lens_lead(vlm, pairs, batch=4)
    assert lens_lead(vlm, pairs, batch=6).table.set_index(["example", "layer"]).sort_index()["lead"].to_numpy() == (
        pytest.approx(result.table.set_index(["example", "layer"]).sort_index()["lead"].to_numpy(), abs=1e-4)
    )
    words = sorted({*pairs.answer, *pairs.counterfactual_answer})
    read = lens(vlm, pairs.base, sites("llm.resid_post", [0, WRITES]), "last", words=words)
    logits = run(vlm, pairs.base).last
    encoded = vlm.encode(pairs.base)
    own, other = (vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer))
    lead = result.table.set_index(["example", "layer"])["lead"]
    for number, pair in enumerate(pairs):
        for at, layer in enumerate((0, WRITES)):
            one, two = (read.logits[at, number, read.word(word)] for word in (pair.answer, pair.counterfactual_answer))
            assert lead[pair.id, layer] == pytest.approx(float(one - two), abs=1e-4)
        end = float(logits[number, own[number]] - logits[number, other[number]])
        assert lead[pair.id, 5] == pytest.approx(end, abs=1e-4)
    table = result.table.sort_values(["example", "layer"])
    steps = table.groupby("example")["lead"].diff()
    assert np.allclose(table["step"][steps.notna()], steps.dropna()) and table["step"][steps.isna()].isna().all()


def test_gates_tell_their_numbers():
    planted = made("plain")
    result = lens_lead(planted.vlm, planted.pairs(32, seed=1), gates="all", null=1)
    (claim,) = (claim for claim in result.claims if claim.kind == RISE)
    gates = {gate.name: gate for gate in claim.gates}
    assert gates.pop(WORDINGS).verdict is None, "planted models know no other words"
    assert set(gates) == {STABLE, TWIN, SHUFFLED} and all(gate.verdict for gate in gates.values())
    for name in (TWIN, SHUFFLED):
        assert len(gates[name].numbers["T_null"]) == 1 and max(gates[name].numbers["T_null"]) < 1
        assert gates[name].numbers["p"] == pytest.approx(1 / 2)


def test_figures_are_drawn_from_the_file(tmp_path):
    result = by_hand(0.0, 0.0, 6.0, 6.0)
    result.save(tmp_path)
    drawn, again = (lens_figures.drawn(each) for each in (result, Result.load(tmp_path)))
    assert {name: figure.to_json() for name, figure in drawn.items()} == {
        name: figure.to_json() for name, figure in again.items()
    }
    line = next(trace for trace in drawn["lead"].data if trace.name == OTHER_IMAGE)
    assert list(line.x) == [-1, 0, 1, 2] and line.y[2] == pytest.approx(6.0, abs=0.2)
    step = next(trace for trace in drawn["step"].data if trace.name == OTHER_IMAGE)
    assert list(step.x) == [0, 1, 2]


# Tuned


@pytest.fixture(scope="module")
def tuned() -> TunedLens:
    planted = made("textured")
    where = [Site("llm.resid_pre", 0), *sites("llm.resid_post", range(5))]
    few = LensTraining(n_steps=10, check_every=5)
    return train_tuned_lens(
        planted.vlm, planted.pairs(8, seed=5).base, planted.pairs(4, seed=6).base, where, "last", training=few
    )


def test_a_tuned_lens_reads_what_it_translates(tuned):
    planted = made("textured")
    pairs = planted.pairs(6, seed=2)
    result = lens_lead(planted.vlm, pairs, tuned=tuned, gates="none")
    words = sorted({*pairs.answer, *pairs.counterfactual_answer})
    read = lens(planted.vlm, pairs.base, sites("llm.resid_post", [WRITES]), "last", words=words, tuned=tuned)
    lead = result.table.set_index(["example", "layer"])["lead"]
    for number, pair in enumerate(pairs):
        one, two = (read.logits[0, number, read.word(word)] for word in (pair.answer, pair.counterfactual_answer))
        assert lead[pair.id, WRITES] == pytest.approx(float(one - two), abs=1e-4)
    assert "n the tuned lens the answer leads" in result.findings[0]
    assert "used" not in result.provenance["tuned_lens"] and result.provenance["tuned_lens"]["n_train"] == 8


def test_a_twin_has_a_tuned_lens_of_its_own(tuned, tmp_path, monkeypatch):
    planted, seen = made("textured"), []
    pairs = planted.pairs(32, seed=1)
    monkeypatch.setattr(study, "retrained", lambda lens, vlm: seen.append((vlm, retrained(lens, vlm))) or seen[-1][1])
    result = lens_lead(planted.vlm, pairs, tuned=tuned, gates="all", null=2, batch=16)
    assert len(seen) == 2, "once a twin, however many batches"
    assert all(vlm is not planted.vlm and own.sites == tuned.sites for vlm, own in seen)
    (claim,) = (claim for claim in result.claims if claim.kind == RISE)
    assert {gate.name: gate.verdict for gate in claim.gates} == {
        STABLE: True,
        TWIN: True,
        SHUFFLED: True,
        WORDINGS: None,
    }
    tuned.save(tmp_path / "lens")
    loaded = TunedLens.load(tmp_path / "lens")
    result = lens_lead(planted.vlm, pairs, tuned=loaded, gates="all", null=1)
    (claim,) = (claim for claim in result.claims if claim.kind == RISE)
    gates = {gate.name: gate for gate in claim.gates}
    assert gates[TWIN].verdict is None and "keeps no training prompts" in gates[TWIN].says
    assert gates[SHUFFLED].verdict is True


def test_a_lens_trained_again_on_the_same_model_is_the_same(tuned):
    again = retrained(tuned, made("textured").vlm)
    assert again.sites == tuned.sites and all(again.weights[site].equal(tuned.weights[site]) for site in tuned.sites)
    other = retrained(tuned, twin_of(made("textured").vlm, 1))
    assert other.record["held_out"] != tuned.record["held_out"]


# What goes with answers


def test_what_is_given_for_answers_goes_with_them():
    def pair(name: str, answer: str, other: str) -> Pair:
        return Pair(name, picture(1), picture(2), "what colour is the circle?", answer, other)

    pairs = Pairs("own", (pair("a", "red", "blue"), pair("b", "blue", "green"), pair("c", "red", "blue")))
    found = following(pairs, ["one", "two", "three"])
    assert found(pairs) == ["one", "two", "three"] and found(pairs[1:]) == ["two", "three"]
    turned = Pairs("own", (pair("a", "blue", "green"), pair("b", "red", "blue"), pair("c", "red", "blue")))
    assert found(turned) == ["two", "one", "three"]


# Wrong use


@pytest.mark.usefixtures("untyped")
def test_wrong_use_is_one_line(tuned):
    planted = made("textured")
    pairs = planted.pairs(4, seed=2)
    some = TunedLens({site: tuned.weights[site] for site in tuned.sites[1:]}, tuned.biases, tuned.record)
    wrong = {
        "against is 'usual'; 'counterfactual' or a list": {"against": "usual"},
        "3 rivals are given for 4 pairs": {"against": ["red", "blue", "red"]},
        "gates 'some' are not known": {"gates": "some"},
        "null is -1": {"null": -1},
        "batch is 0": {"batch": 0},
        "no translator for llm.resid_pre": {"tuned": some},
    }
    for message, options in wrong.items():
        with pytest.raises(UsageError, match=message) as caught:
            lens_lead(planted.vlm, pairs, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="lens_lead: no pairs were given"):
        lens_lead(planted.vlm, pairs[:0])
    with pytest.raises(UsageError, match="had a part in training this lens"):
        lens_lead(planted.vlm, planted.pairs(8, seed=5), tuned=tuned)
    twice = dataclasses.replace(pairs, pairs=(pairs[0], *pairs))
    with pytest.raises(UsageError, match="is given twice"):
        lens_lead(planted.vlm, twice)
