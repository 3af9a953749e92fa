"""Joint cuts: several heads, or layers, at once, where single cuts find nothing because one stands in for another."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import knockout as experiment
from tests.helpers import command
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import run
from vlm_mech.methods.gates.manifold import MANIFOLD
from vlm_mech.methods.gates.removals import OTHER_WAYS
from vlm_mech.methods.knockout import joint
from vlm_mech.methods.knockout.claims import pool
from vlm_mech.methods.knockout.data import CONTROL, EDGE, Scan, scan_of
from vlm_mech.methods.knockout.edges import Edge
from vlm_mech.methods.knockout.joint import TOGETHER, _chosen, _Cutter, joint_cuts, label
from vlm_mech.methods.knockout.layers import layer_sets
from vlm_mech.methods.knockout.study import METRICS, knock_out
from vlm_mech.organism.planted import examples, plant
from vlm_mech.organism.planted_draw import draw
from vlm_mech.results.claim import named_without_claim, sentences
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.results.result import Result
from vlm_mech.results.rewording import WORDINGS
from vlm_mech.validate.examination import random_answers

N = 20


@pytest.fixture(scope="module")
def single():
    """Single cuts of last<-image in a planted model, with what they claim."""
    known = {}

    def made(kind, seed, *, heads=True, shuffled=False):
        key = kind, seed, heads, shuffled
        if key not in known:
            planted = plant(draw(seed, kind), check=False, n=8)
            pairs = examples(planted.recipe, N, seed=seed)
            pairs = random_answers(pairs, seed, planted.recipe.answers) if shuffled else pairs
            scan = scan_of(planted.vlm, pairs, {}, ("last<-image",), heads=heads)
            table, _ = knock_out(planted.vlm, pairs, scan, only_correct=False)
            result = Result("knockout", table, scan.axes, METRICS)
            known[key] = planted, pairs, dataclasses.replace(result, claims=claimed(pool(result), result)), scan
        return known[key]

    return made


def planted_heads(recipe):
    return [(each.layer, each.head) for each in (*recipe.reads, recipe.backup, recipe.second_backup) if each]


def joint_claims(made, **how):
    planted, pairs, result, scan = made
    found = joint_cuts(planted.vlm, pairs, result, scan, **how)
    return found, [claim for claim in found.claims if claim.kind == TOGETHER and claim.made]


@pytest.mark.parametrize(
    ("kind", "seed", "heads"), [("backup", 2, True), ("two backups", 1, False), ("two backups", 2, True)]
)
def test_heads_that_stand_in_for_each_other_are_claimed_together_alone(single, kind, seed, heads):
    made = single(kind, seed, heads=heads)
    assert not any(claim.made for claim in made[2].claims), "no single cut tells anything"
    found, (claim,) = joint_claims(made)
    wanted = sorted(planted_heads(made[0].recipe))
    assert [tuple(each.values()) for each in claim.about["members"]] == [each if heads else each[:1] for each in wanted]
    assert claim.tested[0].mean < -10
    assert named_without_claim(sentences(found.claims), found.claims) == []
    named = " and ".join(f"layer {layer} head {head}" if heads else f"layer {layer}" for layer, head in wanted)
    assert named_without_claim([f"{named} do it."], found.claims) == []


def test_one_head_that_reads_alone_gains_nothing_from_others(single):
    made = single("plain", 4)
    assert [tuple(claim.about.values()) for claim in made[2].claims if claim.made], "a single cut claims it"
    found, claims = joint_claims(made)
    assert not claims and found.claims == made[2].claims and found.tables == {}


@pytest.mark.parametrize(("kind", "seed"), [("backup", 2), ("plain", 4)])
def test_nothing_is_claimed_of_answers_that_have_nothing_to_do_with_the_pictures(single, kind, seed):
    assert joint_claims(single(kind, seed, shuffled=True))[1] == []


def test_too_small_sets_find_nothing_and_sets_of_one_are_refused(single):
    made = single("two backups", 1)
    assert joint_claims(made, size=2)[1] == []
    assert joint_claims(made, size=0)[0].claims == made[2].claims
    with pytest.raises(UsageError, match="2 or more"):
        joint_claims(made, size=1)


def test_the_numbers_are_those_of_the_cuts_made_by_hand_on_the_half_that_did_not_choose(single):
    made = single("backup", 2)
    planted, pairs, result, _ = made
    found, (claim,) = joint_claims(made)
    (one, other) = planted_heads(planted.recipe)
    table = found.tables["joint_cuts"]
    assert set(table["layer"]) == {label((one,)), label((other,)), label((one, other))}
    assert set(table["cut"]) == {EDGE, CONTROL}
    encoded, vlm = planted.vlm.encode(pairs.base), planted.vlm
    cuts = {place: Knockout("last", "image", place[0], heads=(place[1],)) for place in (one, other)}
    own, rival = (
        torch.tensor([vlm.tokenizer.convert_tokens_to_ids(each) for each in words])
        for words in (pairs.answer, pairs.counterfactual_answer)
    )
    leads = {}
    for places, edit in (((one, other), cuts[one] & cuts[other]), ((one,), cuts[one])):
        logits = run(vlm, encoded, edit).logits.reshape(N, -1, vlm.model.config.text_config.vocab_size)[:, -1]
        lead = (logits.gather(1, own[:, None]) - logits.gather(1, rival[:, None]))[:, 0].double().numpy()
        rows = table[(table["layer"] == label(places)) & (table["cut"] == EDGE)]
        np.testing.assert_allclose(rows["logit_diff"], lead, atol=1e-3)
        leads[places] = dict(zip((pair.id for pair in pairs), lead, strict=True))
    tests = halves(result)[1].table["example"].unique()
    further = np.mean([leads[(one, other)][name] - leads[(one,)][name] for name in tests])
    told = {json.dumps(each.less): found for each, found in zip(claim.conditions, claim.tested, strict=True)}
    about = {"edge": "last<-image", "cut": EDGE, "layer": label((one,))}
    assert told[json.dumps(about)].mean == pytest.approx(further, abs=1e-3)
    assert told[json.dumps(about)].n == N // 2
    (stable,) = joint_claims(made, gates="quick")[1][0].gates
    assert stable.name == STABLE and stable.verdict


def test_a_joint_claim_meets_every_gate_with_the_set_as_it_was_chosen(single, monkeypatch):
    """Twins and shuffled answers lose the same heads; the model knows no other words but one wording's."""
    made = single("backup", 2)
    seen, cut = [], joint.knock_out

    def counted(vlm, pairs, scan, **how):
        seen.append((vlm, tuple(scan.layers.sets)))
        return cut(vlm, pairs, scan, **how)

    monkeypatch.setattr(joint, "knock_out", counted)
    found, (claim,) = joint_claims(made, gates="all", null=2)
    gates = {gate.name: gate for gate in claim.gates}
    assert list(gates) == [STABLE, TWIN, SHUFFLED, WORDINGS, MANIFOLD, OTHER_WAYS]
    one, other = planted_heads(made[0].recipe)
    sets = tuple(label(each) for each in (sorted((one, other)), (sorted((one, other))[1],), (sorted((one, other))[0],)))
    twins = [names for vlm, names in seen if vlm is not made[0].vlm]
    assert len(twins) == 2 and set(twins) == {sets}
    assert len(gates[TWIN].numbers["T_null"]) == len(gates[SHUFFLED].numbers["T_null"]) == 2
    assert gates[TWIN].verdict is True, "no twin loses as much of its lead"
    assert gates[WORDINGS].verdict is None and gates[WORDINGS].says.startswith("not tried")
    zero = gates[OTHER_WAYS].numbers["zero"]["effect"]
    by_hand = [Ablate(Site("llm.head_out", layer), "last", to="zero", heads=(head,)) for layer, head in (one, other)]
    assert zero == pytest.approx(change(made, by_hand[0] & by_hand[1]), abs=1e-2)
    assert sorted(gates[MANIFOLD].numbers["percentiles"])[0] == str(min(one[0], other[0]))
    assert (gates[OTHER_WAYS].numbers["zero"]["rank"], gates[OTHER_WAYS].numbers["zero"]["of"]) == (1, 1)
    quick = joint_claims(made, gates="quick")[0]
    assert [str(each).split("; lost")[0] for each in quick.claims] == [
        str(each).split("; lost")[0] for each in found.claims
    ], "gates make no claim and take none away"


def change(made, edit):
    """What an edit does to the mean difference of the answers, by single runs."""
    planted, pairs, *_ = made
    encoded, rows = planted.vlm.encode(pairs.base), torch.arange(N)
    own, rival = (planted.vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer))
    after, before = (run(planted.vlm, encoded, each).last for each in (edit, None))
    return ((after - before)[rows, own] - (after - before)[rows, rival]).mean().item()


def test_where_the_engine_differs_by_rounding_the_reference_measures(single, monkeypatch):
    made = single("backup", 2)
    fast, engines, cut = joint_claims(made)[0].table, [], joint.knock_out

    def refused(*given, check=1, engine="fast", **how):
        engines.append((engine, check))
        if engine == "fast" and check:
            raise WorkError("the fast engine differs")
        return cut(*given, check=check, engine=engine, **how)

    monkeypatch.setattr(joint, "knock_out", refused)
    with pytest.warns(UserWarning, match="the fast engine differs"):
        found, claims = joint_claims(made)
    assert len(claims) == 1 and {engine for engine, check in engines if not check} == {"fast"}
    assert engines[-2:] == [("fast", 1), ("trace", 1)]
    np.testing.assert_allclose(found.table["logit_diff"], fast["logit_diff"], atol=1e-3)


def chosen(lead, n=5, size=3):
    """What is chosen of n layers, where `lead` says how a set of them changes the answer's lead of 10."""
    rows = [
        {"example": f"e{number}", "edge": "a<-b", "cut": EDGE, "layer": layer}
        | {f"{metric.name}{end}": 10.0 for metric in METRICS for end in ("", "_baseline")}
        | {"logit_diff": 10 + lead({layer})}
        for number in range(4)
        for layer in range(n)
    ]
    result = Result("made", pd.DataFrame(rows), ("edge", "cut", "layer"), METRICS)

    class Cutter(_Cutter):
        def leads(self, pairs, edge, sets, metric):
            assert all(list(each) == sorted(each) for each in sets)
            return [10 + lead({place[0] for place in each}) for each in sets]

    scan = Scan((Edge("last", "image"),), layer_sets(n, "each"))
    cutter = Cutter(None, scan, {}, 4, {})
    return [place[0] for place in _chosen(cutter, examples(draw(0), 1), result, Edge("a", "b"), size, 0.5)]


def test_a_set_is_found_whose_parts_change_nothing_at_all():
    assert chosen(lambda cut: -8.0 if {0, 2, 4} <= cut else 0.1 * len(cut & {0, 2, 4})) == [0, 2, 4]
    assert chosen(lambda cut: -8.0 if {3, 4} <= cut else 0.0, n=12) == [3, 4]
    assert len(chosen(lambda cut: -3.0 if 1 in cut else 0.0)) < 2
    assert len(chosen(lambda cut: 2.0 * len(cut))) < 2


def test_of_many_that_are_needed_the_strongest_are_taken_one_by_one():
    weights = dict(enumerate((1.0, 3.0, 0.9, 2.0, 1.5)))
    assert chosen(lambda cut: -sum(weights[each] for each in cut)) == [1, 3, 4]
    assert chosen(lambda cut: -sum(weights[each] for each in cut), size=2) == [1, 3]


def test_a_set_has_no_member_that_it_does_not_need():
    """Layer 1 is the strongest alone and does nothing beside 2 and 3; four more layers keep the cut of all apart."""

    def lead(cut):
        low = -5.0 if {2, 3} <= cut else -0.8 if {1, 2} <= cut else -0.7 if 1 in cut else 0.0
        return low - (20 if {4, 5, 6, 7} <= cut else 0)

    assert chosen(lead, n=8) == [2, 3]


def test_the_command_keeps_the_table_and_says_what_comes_on_top(tmp_path, capsys):
    asked = ("--heads", "--joint", "--n", "16", "--gates", "none", "--out", tmp_path / "out")
    assert command(experiment, *asked, "--dry-run") == 0
    assert "joint cuts come on top: up to 76 cells more for each of 1 edge(s)" in capsys.readouterr().out
    assert command(experiment, *asked) == 0
    table = pd.read_csv(tmp_path / "out/joint_cuts.csv")
    assert set(table["cut"]) == {EDGE, CONTROL} and table["layer"].str.contains("+", regex=False).any()
    assert table["example"].nunique() == 16 and table["logit_diff"].notna().all()
    assert "joint_cuts.csv" in (tmp_path / "out/report.html").read_text()
    assert command(experiment, *asked[:-1], tmp_path / "no", "--joint-size", "1") == 2
    assert "--joint-size is 1" in capsys.readouterr().err
