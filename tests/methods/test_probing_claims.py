"""Claims of probes: where the answer can be read, where it cannot, beyond which controls, and what becomes of them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import permutation_test

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.methods.gates.gated import Options
from vlm_mech.methods.probing import claims as probing_claims
from vlm_mech.methods.probing import gating
from vlm_mech.methods.probing.claims import (
    CANNOT,
    LEAST,
    READS,
    about_place,
    does_of,
    fair_controls,
    of_test,
    place_in_words,
    pool,
)
from vlm_mech.methods.probing.controls import NO_IMAGE, NONE, RANDOM, SHUFFLED, TASK, shuffled
from vlm_mech.methods.probing.crossfit import METRICS, crossfit, is_first
from vlm_mech.methods.probing.data import Examples, Spot
from vlm_mech.methods.probing.descent import LINEAR, ProbeRecipe
from vlm_mech.methods.probing.findings import readable
from vlm_mech.methods.probing.gating import BY_DESIGN, Probed, gated
from vlm_mech.methods.probing.splits import make_splits
from vlm_mech.methods.probing.study import AXES, CONFLICT, ELSEWHERE, TEST, Design
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.gates import SHUFFLED as ANSWERS
from vlm_mech.results.gates import STABLE, TWIN
from vlm_mech.results.result import Result

CHANCE = 0.25
PLACES = ("vision.resid_post[0]", "projector.out", *(f"llm.resid_post[{layer}]" for layer in range(4)))
QUICK = ProbeRecipe(l2=(1e-2,), learning_rate=3e-2, max_epochs=15)


def rows(name, place, right, *, control=NONE, model="m", probe="linear", span="last", label=None, seed=0, times=10):
    """Test examples of a cell, two a scene, whose probes are right in a share of ten seeds."""
    n, rng = 64, np.random.default_rng((seed, sum(map(ord, f"{name}{place}{control}{model}{probe}{span}"))))
    labels = np.arange(n) % 4
    return pd.DataFrame({
        "example": [f"test e{number}" for number in range(n)], "group": [f"test g{number // 2}" for number in range(n)],
        "model": model, "probe": probe, "control": control, "read_on": TEST, "span": span, "place": place,
        "accuracy": rng.binomial(times, right, n) / times, "accuracy_baseline": (labels == 0).astype(float),
        "skipped": "", "label": [f"l{each}" for each in (labels if label is None else label)],
    })  # fmt: skip


def made(shares, controls=None, **about):
    """A result whose probes are right in a share of the examples by place, controls' in the same share everywhere."""
    tables = [rows("own", place, share, **about) for place, share in shares.items()]
    for control, share in (controls or {}).items():
        label = np.arange(64) % 3 if control == TASK else None
        tables += [rows("own", place, share, control=control, label=label, **about) for place in shares]
    return Result("probes", pd.concat(tables, ignore_index=True), AXES, METRICS[:1], elsewhere=ELSEWHERE)


def half_that_tests(result):
    parts = halves(result)
    assert parts is not None
    return parts[1].table


@pytest.fixture(autouse=True)
def few_groups_deny(monkeypatch):
    """These tables have fewer groups than are asked for before it is said that something cannot be read."""
    monkeypatch.setattr(probing_claims, "FEWEST_TO_DENY", 2)


def said(claims, does=READS):
    return [claim.about.get("layer") for claim in claims if claim.made and does_of(claim) == does]


# The pool


def test_places_are_named_by_their_layer_and_stream():
    assert about_place("llm.resid_post[3]") == {"stream": "decoder", "point": "resid_post", "layer": 3}
    words = [place_in_words(about_place(f"llm.{point}[2]")) for point in ("resid_pre", "resid_post")]
    assert words == ["before layer 2 of the decoder", "after layer 2 of the decoder"]
    assert place_in_words(about_place("projector.out")) == "the projector's output"
    claims = pool(made(dict.fromkeys(PLACES, 0.5)))
    assert len(claims) == 2 * len(PLACES) and len({claim.kind for claim in claims}) == 2 * 3
    assert [claim.about["layer"] for claim in claims if "layer" in claim.about] == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_planted_places_are_claimed_with_the_numbers_of_the_other_half():
    result = made({PLACES[2]: CHANCE, PLACES[3]: 0.9, PLACES[4]: 0.9, PLACES[5]: 0.6}, {SHUFFLED: CHANCE})
    found = claimed(pool(result), result)
    assert said(found) == [1, 2, 3]
    other = half_that_tests(result)
    own, control = (other[other["control"] == name].set_index(["place", "example"]) for name in (NONE, SHUFFLED))
    p = []
    for claim in (claim for claim in found if does_of(claim) == READS):
        place = claim.about["place"]
        above = own.loc[place, "accuracy"] - own.loc[place, "accuracy_baseline"]
        beyond = own.loc[place, "accuracy"] - control.loc[place, "accuracy"]
        assert [told.mean for told in claim.tested] == pytest.approx([above.mean(), beyond.mean()])
        assert [told.n for told in claim.tested] == [32, 32]
        # Both examples of a scene are flipped together.
        tests = [
            permutation_test((each.to_numpy().reshape(16, 2).sum(1),), np.mean, permutation_type="samples",
                             n_resamples=np.inf).pvalue for each in (above, beyond)
        ]  # fmt: skip
        p.append(max(tests))
        assert [told.p for told in claim.tested] == pytest.approx(tests, rel=0.5, abs=1e-4)
    n_declared = len(found)
    # The smallest p of all is multiplied by the number declared.
    assert min(claim.p for claim in found) == pytest.approx(n_declared * min(p), rel=0.5, abs=1e-4 * n_declared)


def test_every_control_must_be_beaten():
    """The first is, the second reads as well as the probe itself at one of two places."""
    result = made({PLACES[2]: 0.9, PLACES[3]: 0.9}, {SHUFFLED: CHANCE, RANDOM: CHANCE})
    assert said(claimed(pool(result), result)) == [0, 1]
    here = (result.table["control"] == RANDOM) & (result.table["place"] == PLACES[3])
    table = result.table.assign(accuracy=result.table["accuracy"].where(~here, 0.88))
    found = claimed(pool(one := dataclasses.replace(result, table=table, known={})), one)
    assert said(found) == [0]


def test_of_few_groups_it_is_not_asked_what_cannot_be_read(monkeypatch):
    result = made(dict.fromkeys(PLACES[2:], 0.0))
    n_groups = len(set(result.groups()))
    for fewest, asked in ((n_groups, True), (n_groups + 1, False)):
        monkeypatch.setattr(probing_claims, "FEWEST_TO_DENY", fewest)
        assert any(does_of(claim) == CANNOT for claim in pool(result)) is asked


def test_a_sure_but_small_accuracy_is_no_reading():
    """Every probe is right where the commonest label is, and in three more of a hundred."""
    result = made(dict.fromkeys(PLACES[2:], 0.0))
    base = result.table["accuracy_baseline"]
    for extra, layers in ((LEAST - 0.02, []), (LEAST + 0.02, [0, 1, 2, 3])):
        table = result.table.assign(accuracy=np.clip(base + extra, 0, 1), accuracy_baseline=np.clip(base, 0, 1 - extra))
        found = claimed(pool(one := dataclasses.replace(result, table=table, known={})), one)
        assert said(found) == layers and bool(said(found, CANNOT)) != bool(layers)


@pytest.mark.parametrize("control", [SHUFFLED, TASK, NO_IMAGE, RANDOM])
def test_what_a_control_reads_as_well_is_not_claimed(control):
    result = made({PLACES[2]: 0.9, PLACES[3]: 0.9}, {control: CHANCE})
    assert said(claimed(pool(result), result)) == [0, 1]
    here = (result.table["control"] == control) & (result.table["place"] == PLACES[3])
    table = result.table.assign(accuracy=result.table["accuracy"].where(~here, 0.88))
    found = claimed(pool(one := dataclasses.replace(result, table=table, known={})), one)
    assert said(found) == [0]
    less = pool(result)[0].conditions[1].less
    assert isinstance(less, dict) and less["control"] == control


def test_a_control_task_whose_labels_follow_from_the_answers_is_no_fair_control():
    labels = np.arange(64) % 4
    for task, fair in (((labels + 1) % 4, False), (labels * np.arange(64) % 3, True)):
        table = pd.concat([rows("own", PLACES[2], 0.9), rows("own", PLACES[2], 0.9, control=TASK, label=task)])
        result = Result("probes", table.reset_index(drop=True), AXES, METRICS[:1])
        assert fair_controls(result, "m") == ((TASK,) if fair else ())
        assert len(pool(result)[0].conditions) == (2 if fair else 1)


def test_that_it_cannot_be_read_is_claimed_where_accuracy_is_surely_low():
    result = made({PLACES[2]: 0.01, PLACES[3]: 0.9})
    found = claimed(pool(result), result)
    assert said(found, CANNOT) == [0] and said(found) == [1]
    (condition,) = next(claim for claim in found if does_of(claim) == CANNOT).conditions
    assert (condition.side, condition.bound, condition.less) == ("below", LEAST, "baseline")


def test_only_test_examples_are_asked_about():
    result = made({PLACES[2]: 0.9})
    other = result.table.assign(read_on=CONFLICT, accuracy=0.0)
    table = pd.concat([result.table, other.assign(example=other["example"] + "c", group=other["group"] + "c")])
    # As `completed` has it: each example in each cell.
    cells, people = table[list(AXES)].drop_duplicates(), table[["example", "group"]].drop_duplicates("example")
    whole = people.merge(cells, how="cross").merge(table.drop(columns="group"), on=["example", *AXES], how="left")
    whole = whole.fillna({"skipped": ELSEWHERE, "label": ""})
    both = dataclasses.replace(result, table=whole, known={})
    pd.testing.assert_frame_equal(of_test(both).table[result.table.columns], result.table)
    assert [str(claim) for claim in gated(Options("none", 0, 0, 8), both, ())] == [
        str(claim) for claim in gated(Options("none", 0, 0, 8), result, ())
    ]


# Nothing to be read


def test_nothing_is_claimed_of_guesses_in_more_than_a_twentieth_of_tables():
    """Probes that guess between two labels, held against the share of the commonest alone: 8 cells a table."""
    n_false = n_declared = 0
    asked = [(place, span) for place in PLACES[2:] for span in ("last", "image")]
    for seed in range(100):
        tables = [rows("null", place, 0.5, span=span, seed=seed, times=1) for place, span in asked]
        table = pd.concat(tables, ignore_index=True).assign(accuracy_baseline=0.5)
        result = Result("probes", table, AXES, METRICS[:1])
        found = claimed([claim for claim in pool(result) if does_of(claim) == READS], result)
        n_false, n_declared = n_false + bool(said(found)), n_declared + bool(found)
    assert n_false <= 5 and n_declared > 3, "one half alone declares something now and then"


def test_fitted_probes_of_states_that_have_nothing_to_do_with_the_labels_claim_nothing():
    """Examples of one half train probes of the other, so that the halves are not independent as guesses are."""
    n_false, n, groups = 0, 64, np.repeat(np.arange(32), 2)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels, shared = np.stack([first := rng.integers(0, 2, 32), 1 - first], 1).ravel(), rng.normal(size=(n, 24))
        features = {
            Spot(Site("llm.resid_post", layer), "last"): torch.tensor(3 * shared + rng.normal(size=(n, 24))).float()
            for layer in range(4)
        }
        splits = make_splits(labels, groups, n_folds=4, n_seeds=2, seed=seed)
        found = crossfit(features, labels[None], splits, QUICK, groups=groups.tolist())
        base = {"group": groups, "model": "m", "probe": "linear", "control": NONE, "read_on": TEST, "skipped": ""}
        base |= {"span": "last", "example": [f"e{number}" for number in range(n)]}
        base |= {"accuracy_baseline": (found.majority[0] == labels).mean(0)}
        table = pd.concat(
            [
                pd.DataFrame(
                    base | {"span": "last", "place": str(spot.site), "accuracy": is_first(each, labels).mean(0)}
                )
                for spot, each in zip(found.spots, found.tested[:, 0], strict=True)
            ],
            ignore_index=True,
        )
        result = Result("probes", table, AXES, METRICS[:1])
        n_false += bool(said(claimed(pool(result), result)))
    assert n_false <= 2, "a rate of 5 % gives 3 or more in one of 13 such tests"


def test_shuffled_labels_are_dealt_again_where_a_part_would_lack_a_rare_one():
    labels, groups = np.array([0] * 20 + [1] * 4), np.arange(24)
    splits = make_splits(labels, groups, n_folds=4, n_seeds=1)
    assert np.array_equal(shuffled(labels, seed=1), np.random.default_rng(1).permutation(labels))
    lacking = [
        seed for seed in range(200) if any(shuffled(labels, seed=seed)[each.train].max() == 0 for each in splits)
    ]
    assert lacking, "some orders leave a training part without it"
    for seed in lacking:
        dealt = shuffled(labels, seed=seed, splits=splits)
        assert all(dealt[each.train].max() == 1 for each in splits) and dealt.sum() == 4


# Gates


@pytest.fixture
def nulls(monkeypatch):
    """Nulls whose probes are right in a share of the examples at all places; what was asked for is noted."""
    asked = []

    def null_rows(vlm, examples, design, *, folder, seeds=None):
        asked.append((vlm, design, folder, seeds))
        tables = [
            pd.concat([rows(f"{vlm}{seed}", place, null_rows.share) for place in PLACES[2:]])
            for seed in ([0] if seeds is None else seeds)
        ]
        return [table.reset_index(drop=True) for table in tables]

    null_rows.share = 0.5
    monkeypatch.setattr(gating, "null_rows", null_rows)
    monkeypatch.setattr(gating, "twin_of", lambda vlm, seed: f"{vlm.name}, twin {seed}")
    return SimpleNamespace(rows=null_rows, asked=asked)


def probed(tmp_path, name="m"):
    spots = tuple(Spot(Site("llm.resid_post", layer), "last") for layer in range(4))
    return Probed(
        SimpleNamespace(name=name), Examples("made", *[()] * 6), Design(spots, (LINEAR,), n_seeds=5), tmp_path
    )


def test_a_null_is_held_against_a_claim_by_how_far_its_best_place_lies_above_the_commonest_label(nulls, tmp_path):
    result = made({PLACES[2]: 0.01, PLACES[3]: 0.9}, {RANDOM: 0.3, SHUFFLED: CHANCE})
    found = gated(Options("all", 3, 0, 8), result, [model := probed(tmp_path)])
    reads, cannot = (next(claim for claim in found if does_of(claim) == does) for does in (READS, CANNOT))
    assert reads.made and [gate.name for gate in reads.gates] == [STABLE, TWIN, ANSWERS]
    own = reads.tested[0].mean
    for gate, control in zip(reads.gates[1:], (RANDOM, SHUFFLED), strict=True):
        best = result.table[result.table["control"] == control].groupby("place")["accuracy"].mean().max()
        expected = [(best - CHANCE) / own]
        names = ("m, twin 10", "m, twin 20") if control == RANDOM else (f"{model.vlm}1", f"{model.vlm}2")
        for name in names:
            each = [rows(name, place, 0.5)["accuracy"].mean() for place in PLACES[2:]]
            expected.append((max(each) - CHANCE) / own)
        assert gate.numbers["T_null"] == pytest.approx(expected) and gate.numbers["p"] == 0.25 and gate.verdict
        assert gate.says.endswith(
            f"of one partition into folds, one null is the run's own control, {control}".removeprefix("of ")
        )
    assert [gate.verdict for gate in cannot.gates] == [True, None, None] and cannot.gates[1].says == BY_DESIGN
    # Two twins and one call for both shuffles: the third null of each kind is in the table already.
    assert [seeds for *_, seeds in nulls.asked] == [None, None, range(1, 3)]
    assert {design.n_seeds for _, design, *_ in nulls.asked} == {1}
    nulls.rows.share = 0.97
    lost = gated(Options("all", 3, 0, 8), result, [probed(tmp_path)])
    assert next(claim for claim in lost if does_of(claim) == READS).lost == (TWIN, ANSWERS)


def test_a_run_without_controls_draws_all_nulls_and_one_with_enough_of_them_none(nulls, tmp_path):
    result = made({PLACES[3]: 0.9})
    (claim,) = gated(Options("all", 2, 0, 8), result, [probed(tmp_path)])
    assert len(claim.gates[1].numbers["T_null"]) == len(nulls.asked[:2]) == 2
    assert "own control" not in claim.gates[1].says
    nulls.asked.clear()
    both = made({PLACES[3]: 0.9}, {RANDOM: CHANCE, SHUFFLED: CHANCE})
    (claim,) = gated(Options("all", 1, 0, 8), both, [probed(tmp_path)])
    assert not [seeds for vlm, *_, seeds in nulls.asked if seeds is None or len(seeds)]
    assert [len(gate.numbers["T_null"]) for gate in claim.gates[1:]] == [1, 1]


def test_what_cannot_be_tried_is_said_and_quick_gates_draw_nothing(nulls, tmp_path, monkeypatch):
    result = made({PLACES[3]: 0.9})
    (claim,) = gated(Options("quick", 2, 0, 8), result, [probed(tmp_path)])
    assert [gate.name for gate in claim.gates] == [STABLE] and not nulls.asked

    def none(vlm, seed):
        raise UsageError("a quantised model has no random twin")

    monkeypatch.setattr(gating, "twin_of", none)
    (claim,) = gated(Options("all", 2, 0, 8), result, [probed(tmp_path)])
    assert claim.gates[1].verdict is None and claim.gates[1].says.startswith("not tried: a quantised model")
    assert claim.gates[2].verdict is True


def test_each_model_meets_its_own_nulls(nulls, tmp_path):
    """The second model has nothing to be read, and is not asked for its nulls."""
    tables = [made({PLACES[3]: share}, model=name).table for name, share in (("m", 0.9), ("n", CHANCE))]
    result = Result("probes", pd.concat(tables, ignore_index=True), AXES, METRICS[:1], elsewhere=ELSEWHERE)
    found = gated(Options("all", 1, 0, 8), result, [probed(tmp_path, name) for name in ("m", "n")])
    assert [claim.about["model"] for claim in found if claim.made] == ["m"]
    assert {str(getattr(vlm, "name", vlm)).split(",")[0] for vlm, *_ in nulls.asked} == {"m"}


# Sentences


def test_sentences_name_layers_in_claims_alone():
    shares = {PLACES[0]: 0.9, PLACES[1]: 0.9, PLACES[2]: 0.05, PLACES[3]: 0.9, PLACES[4]: 0.9, PLACES[5]: 0.9}
    result = made(shares)
    result = dataclasses.replace(result, claims=gated(Options("none", 0, 0, 8), result, ()))
    (text,) = readable(result, "m", "linear")
    assert text.startswith("m, linear probe, last: the answer can be read in the vision encoder at layer 0 (by +")
    assert "in the projector (by +" in text and "in the decoder from layer 1 on (by +" in text
    assert "the answer cannot be read in the decoder at layer 0 (by -" in text
    assert named_without_claim((text,), result.claims) == []
    assert named_without_claim((text.replace("layer 1", "layer 7"),), result.claims)
    every = made(dict.fromkeys(PLACES[2:], 0.9))
    every = dataclasses.replace(every, claims=gated(Options("none", 0, 0, 8), every, ()))
    assert "in the decoder at every layer (by " in readable(every, "m", "linear")[0]
    (silent,) = readable(dataclasses.replace(every, claims=()), "m", "linear")
    assert silent == "m, linear probe, last: no claim."


def test_of_many_patches_it_is_told_how_many_can_be_read():
    tables = [rows("own", PLACES[3], 0.9 if column < 2 else CHANCE, span=f"patch 0,{column}") for column in range(3)]
    result = Result("probes", pd.concat(tables, ignore_index=True), AXES, METRICS[:1], elsewhere=ELSEWHERE)
    result = dataclasses.replace(result, claims=gated(Options("none", 0, 0, 8), result, ()))
    assert len({claim.kind for claim in pool(result)}) == 2
    (text,) = readable(result, "m", "linear")
    assert text == "m, linear probe, patch: the answer can be read in some layer at 2 of 3 spans patch (claims.json)."
