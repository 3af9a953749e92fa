"""What an attribution claims: by hand on small tables, on planted models, and that no pair tests a cell it chose."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest

from vlm_mech.architectures.site import Site, sites
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Span
from vlm_mech.methods.attribution.claims import LOWERS, RAISES, edit_of, pool, removed_of
from vlm_mech.methods.attribution.data import Cell, top_cells
from vlm_mech.methods.attribution.study import Attribution, attribute
from vlm_mech.methods.gates.manifold import MANIFOLD
from vlm_mech.methods.gates.removals import OTHER_WAYS
from vlm_mech.organism.planted import Planted, plant
from vlm_mech.organism.planted_recipe import Head, Recipe, matched_null
from vlm_mech.results.claim import named_without_claim, sentences
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.rewording import WORDINGS
from vlm_mech.sweeps.measures import Measure, logit_diff, prob
from vlm_mech.validate.examination import random_answers

N = 24
RECIPE = Recipe(3, 6, reads=(Head(2, 1),), carries=(Head(4, 3),), decoys=(Head(1, 0, 0),), priors=(3, 1, 0, 5, 4, 2))
RECIPES = {"two-hop": RECIPE, "null": matched_null(RECIPE)}


@functools.cache
def made(name: str) -> Planted:
    return plant(RECIPES[name], check=False, n=16)


def difference(pairs: Pairs) -> Measure:
    return logit_diff(pairs.answer, pairs.counterfactual_answer)


def attributed(name: str, pairs: Pairs, **options) -> Attribution:
    vlm = made(name).vlm
    how = {"heads": True, "n_random": 2} | options
    return attribute(vlm, pairs, sites("llm.head_out", vlm.llm_layers), ["last", "question"], difference(pairs), **how)


@functools.cache
def found(gates: str = "quick") -> Attribution:
    return attributed("two-hop", made("two-hop").pairs(32, seed=1), gates=gates, null=1)


def by_hand(effects: dict[int, float], *, unit: str = "logits", unedited: float = 5.0, asked=(), spread=0.2) -> Result:
    """Effects of an exchange at each layer, with a spread balanced over the examples."""
    rng, rows = np.random.default_rng(0), []
    for layer, mean in effects.items():
        noise = rng.normal(0, spread, N // 2)
        for example, effect in enumerate(mean + np.concatenate([noise, -noise])):
            row = {"example": str(example), "direction": "noising", "site": "llm.mlp_out", "span": "last"}
            row |= {"layer": layer, "effect": effect, "effect_baseline": 0.0, "unedited": unedited}
            rows.append(row | {"asked": layer in asked if asked else True})
    metrics, axes = (Metric("effect", unit, "", signed=True),), ("direction", "site", "span", "layer")
    return Result("by hand", pd.DataFrame(rows), axes, metrics, {"measure": "logit_diff"})


def told(result: Result) -> set[tuple[str, int]]:
    return {(claim.kind, claim.about["layer"]) for claim in claimed(pool(result), result) if claim.made}


# By hand


def test_a_cell_is_claimed_where_its_true_effect_is_large_enough():
    assert told(by_hand({0: -3.0, 1: 0.0, 2: 2.0})) == {(LOWERS, 0), (RAISES, 2)}
    # A twentieth of 5 logits, or of 40.
    assert told(by_hand({0: -0.24, 1: -0.26}, spread=0.001)) == {(LOWERS, 1)}
    assert told(by_hand({0: -1.9, 1: -2.1}, spread=0.001, unedited=-40.0)) == {(LOWERS, 1)}
    assert told(by_hand({0: -0.09, 1: -0.11}, spread=0.001, unedited=0.0)) == {(LOWERS, 1)}


def test_a_probability_needs_no_tenth():
    """0.1 says what odds of two answers are; of another measure a twentieth of what it is without an edit counts."""
    found = by_hand({0: -0.04, 1: -0.06}, unit="probability", unedited=1.0, spread=0.001)
    assert told(found) == {(LOWERS, 1)}
    assert told(by_hand({0: -0.06}, unit="logits", unedited=1.0, spread=0.001)) == set()


def test_only_cells_that_half_of_the_pairs_chose_are_asked_about():
    result = by_hand({0: -3.0, 1: -3.0, 2: 2.0}, asked=(1,))
    assert [(claim.kind, claim.about["layer"]) for claim in pool(result)] == [(LOWERS, 1), (RAISES, 1)]
    assert told(result) == {(LOWERS, 1)}


def test_what_is_enough_is_of_each_direction():
    one = by_hand({0: -1.0}, spread=0.001)
    other = one.table.assign(direction="denoising", unedited=-40.0, effect=-one.table["effect"])
    both = dataclasses.replace(one, table=pd.concat([one.table, other], ignore_index=True), known={})
    least = {claim.about["direction"]: claim.conditions[0].least for claim in pool(both)}
    assert least == {"noising": pytest.approx(0.25), "denoising": pytest.approx(2.0)}
    assert {claim.about["direction"] for claim in claimed(pool(both), both)} == {"noising"}


def test_sentences_name_the_cell():
    claim = pool(by_hand({4: -3.0}))[0]
    assert claim.says == "noising: patching llm.mlp_out at layer 4, span last, lowers logit_diff"
    assert claim.about == {"direction": "noising", "site": "llm.mlp_out", "span": "last", "layer": 4}


# Which pairs choose


def test_the_half_that_declares_chooses_and_the_other_half_tests():
    pairs = made("two-hop").pairs(12, seed=4)
    result = attributed("two-hop", pairs, top_k=4, directions=("noising",), gates="none")
    parts = halves(result.screen, seed=0)
    assert parts is not None
    cells, numbers = ["site", "span", "layer", "head"], {}
    for name, table in (("half", parts[0].table), ("all", result.screen.table), ("other", parts[1].table)):
        table = table.assign(cell=table.groupby(cells).ngroup())
        named = dict(zip(table["cell"], table[cells].itertuples(index=False, name=None), strict=True))
        numbers[name] = {named[cell] for cell in top_cells(table, 4)}
    kinds = result.checked.table.drop_duplicates(cells)
    asked = set(kinds.loc[kinds["asked"], cells].itertuples(index=False, name=None))
    top = set(kinds.loc[kinds["chosen"] == "top", cells].itertuples(index=False, name=None))
    assert asked == numbers["half"] != numbers["all"] == top, "here the halves choose otherwise"
    assert set(kinds.loc[kinds["chosen"] == "top of half", cells].itertuples(index=False, name=None)) <= asked - top
    assert {tuple(claim.about[axis] for axis in cells) for claim in pool(result.checked)} == asked
    assert result.claims
    for claim in result.claims:
        own = result.checked.table
        own = own[np.logical_and.reduce([own[axis] == claim.about[axis] for axis in cells])].set_index("example")
        for told_, part in zip((claim.declared, claim.tested), parts, strict=True):
            some = part.table["example"].unique()
            assert told_[0].n == len(some) == 6 and told_[0].mean == pytest.approx(own.loc[some, "effect"].mean())


def test_the_agreement_is_of_cells_that_all_pairs_chose():
    result = found()
    kinds = result.checked.table.drop_duplicates(["direction", "site", "span", "layer", "head"])
    counts = kinds.groupby(["direction", "chosen"]).size()
    for _, row in result.agreement.iterrows():
        assert row["n"] == counts[row["direction"], row["chosen"]] == (10 if row["chosen"] == "top" else 2)
    assert set(result.agreement["chosen"]) == {"top", "random"}
    assert result.screen.table.equals(found("none").screen.table) and result.agreement.equals(found("none").agreement)


def test_too_few_groups_claim_nothing():
    result = attributed("two-hop", made("two-hop").pairs(3, seed=3), top_k=2)
    assert result.claims == () and not result.checked.table["asked"].any()
    assert result.findings[-1].startswith("No claim was selected")


# Planted models


def test_the_heads_that_read_and_carry_are_claimed():
    result = found()
    made_ = [claim for claim in result.claims if claim.made]
    places = {(claim.about["direction"], claim.kind, claim.about["layer"], claim.about["head"]) for claim in made_}
    heads = ((2, 1), (4, 3))
    assert places == {("noising", LOWERS, *head) for head in heads} | {("denoising", RAISES, *head) for head in heads}
    assert {(claim.about["span"], claim.about["layer"]) for claim in made_} == {("question", 2), ("last", 4)}
    assert all([gate.name for gate in claim.gates] == [STABLE] for claim in made_)
    assert result.claims == result.checked.claims and result.findings == result.checked.findings
    assert set(sentences(result.claims)) <= set(result.findings)
    assert named_without_claim(result.findings, result.claims) == []
    assert not any("layer" in sentence for sentence in result.screen.findings)
    assert not any(claim.gates for claim in found("none").claims) and found("none").claims


def test_claims_are_saved_with_the_result(tmp_path):
    found().checked.save(tmp_path)
    assert [str(claim) for claim in Result.load(tmp_path).claims] == [str(claim) for claim in found().claims]


def test_random_answers_claim_nothing():
    planted = made("null")
    for seed in range(3):
        pairs = random_answers(planted.pairs(16, seed=seed), seed, planted.recipe.answers)
        assert not any(claim.made for claim in attributed("null", pairs, top_k=5).claims)


# Gates


def test_gates_tell_their_numbers():
    made_ = [claim for claim in found("all").claims if claim.made]
    for claim in made_:
        gates = {gate.name: gate for gate in claim.gates}
        assert set(gates) == {STABLE, TWIN, SHUFFLED, WORDINGS, MANIFOLD, OTHER_WAYS}
        for name in (TWIN, SHUFFLED):
            assert len(gates[name].numbers["T_null"]) == 1 and gates[name].numbers["p"] == pytest.approx(1 / 2)
            assert gates[name].verdict is True and max(gates[name].numbers["T_null"]) < 1
        tried = claim.about["direction"] == "noising"
        assert (gates[MANIFOLD].verdict is not None) is tried and (gates[OTHER_WAYS].verdict is not None) is tried
    last = next(claim for claim in made_ if claim.about["layer"] == 4 and claim.kind == LOWERS)
    ways = next(gate for gate in last.gates if gate.name == OTHER_WAYS).numbers
    assert ways["counterfactual"]["rank"] == 1
    assert ways["counterfactual"]["effect"] == pytest.approx(last.tested[0].mean, rel=0.15)


def test_answers_are_shuffled_where_the_measure_asks_about_some():
    planted = made("two-hop")
    pairs, vlm = planted.pairs(24, seed=1), planted.vlm
    word = vlm.answer_ids(vlm.encode(pairs.base), pairs.answer)[0].item()
    first = Measure(Metric("first", "logits", "logit of a word", signed=True), lambda logits: logits[:, word])
    how = {"heads": True, "directions": "noising", "gates": "all", "null": 1, "top_k": 4, "n_random": 1}
    result = attribute(vlm, pairs, sites("llm.head_out", [2, 4]), ["last", "question"], first, **how)
    for claim in (claim for claim in result.claims if claim.made):
        gates = {gate.name: gate for gate in claim.gates}
        assert gates[SHUFFLED].verdict is None and "no answers that could be shuffled" in gates[SHUFFLED].says
        assert OTHER_WAYS not in gates, "which compares the two answers of each pair"


def test_a_probability_of_answers_is_shuffled_too():
    planted = made("two-hop")
    pairs = planted.pairs(24, seed=1)
    how = {"heads": True, "directions": "noising", "gates": "all", "null": 1, "top_k": 4, "n_random": 1}
    measure = prob(pairs.answer)
    result = attribute(planted.vlm, pairs, sites("llm.head_out", [2, 4]), ["last", "question"], measure, **how)
    lowered = [claim for claim in result.claims if claim.made]
    assert {(claim.about["layer"], claim.about["head"]) for claim in lowered} == {(2, 1), (4, 3)}
    for claim in lowered:
        assert {gate.name for gate in claim.gates} == {STABLE, TWIN, SHUFFLED, WORDINGS, MANIFOLD}
        (gate,) = (gate for gate in claim.gates if gate.name == SHUFFLED)
        assert len(gate.numbers["T_null"]) == 1 and gate.verdict is True


@pytest.mark.parametrize(
    ("site", "span", "direction", "wanted"),
    [
        (Site("llm.head_out", 4), "last", "noising", True),
        (Site("llm.head_out", 4), "last", "denoising", False),
        (Site("llm.head_out", 4), ("last", "answer"), "noising", False),
        (Site("vision.mlp_out", 1), "image", "noising", False),
        (Site("projector.out"), "image", "noising", False),
    ],
)
def test_edits_by_name_are_those_of_noising_in_the_decoder(site: Site, span: Span, direction: str, wanted: bool):
    spots = [Cell(Site("llm.head_out", 1), "last", None), Cell(site, span, None)]
    about = {"direction": direction, **spots[1].axes}
    claim = dataclasses.replace(pool(by_hand({0: 1.0}))[0], about=about)
    pairs = made("two-hop").pairs(2)
    edit, removed = edit_of(spots)(claim, pairs), removed_of(spots)(claim)
    assert isinstance(edit, str) is isinstance(removed, str) is not wanted
    if not isinstance(edit, str) and not isinstance(removed, str):
        assert edit.sites == removed.sites == (site,) and removed.exchanged and removed.heads is None


@pytest.mark.usefixtures("untyped")
def test_wrong_use_is_one_line():
    for message, options in (("gates 'some' are not known", {"gates": "some"}), ("null is -1", {"null": -1})):
        with pytest.raises(UsageError, match=message) as caught:
            attributed("two-hop", made("two-hop").pairs(2), **options)
        assert "\n" not in str(caught.value)
