"""Controls of a swap: who lends states, that it depends on no batch, what is claimed beside them."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from experiments import layer_swap as experiment
from tests.helpers import as_folder, command, killed_at
from tests.methods.test_layer_swap_claims import CURVES, measured
from tests.zoo.tiny import picture
from vlm_mech.data.derived_pairs import with_others_answers
from vlm_mech.data.pairs import DIRECTIONS, Pair, Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import Wording
from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import run
from vlm_mech.methods.layer_swap import layer_swap as layer_swap_module
from vlm_mech.methods.layer_swap import study
from vlm_mech.methods.layer_swap.claims import CARRIES, MOVES, NOT_YET, TURNS, kind_of, pool
from vlm_mech.methods.layer_swap.controls import (
    CONTROLS,
    COUNTERFACTUAL,
    DONOR,
    NO_DONOR,
    OTHER,
    SAME,
    WRONG_DONOR,
    donors_of,
)
from vlm_mech.methods.layer_swap.data import swap_sites
from vlm_mech.methods.layer_swap.figures import drawn
from vlm_mech.methods.layer_swap.findings import controlled, takeover
from vlm_mech.methods.layer_swap.layer_swap import layer_swap, swap_result
from vlm_mech.methods.layer_swap.study import METRICS, plan_swap, swap_states
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.claiming import claimed
from vlm_mech.results.result import Result
from vlm_mech.runs import merge

ASKED = ("what colour is the circle?", "what colour is the star?")
SPANS = ("image", "question", "last")


@pytest.fixture(scope="module")
def organism():
    return VLM.load("organism")


@pytest.fixture(scope="module")
def scenes():
    return load_pairs("scenes/colour", n=24)


def some(rows, **more):
    """Pairs of pictures of their own: question, answer, counterfactual answer and group of each."""
    made = [
        Pair(f"p{number}", picture(number), picture(100 + number), question, answer, other, group=group, **more)
        for number, (question, answer, other, group) in enumerate(rows)
    ]
    return Pairs("some", tuple(made))


ROWS = [
    (ASKED[0], "red", "blue", "a"),
    (ASKED[0], "blue", "red", "a"),
    (ASKED[1], "red", "blue", "b"),
    (ASKED[0], "green", "red", "c"),
]
FOUR = some(ROWS)


@pytest.mark.parametrize("name", [SAME, OTHER])
@pytest.mark.parametrize("side", [0, 1], ids=DIRECTIONS)
def test_donors_answer_what_they_must_and_are_of_other_groups(organism, scenes, name, side):
    grouped = dataclasses.replace(
        scenes, pairs=tuple(dataclasses.replace(pair, group=f"g{at // 2}") for at, pair in enumerate(scenes))
    )
    found, direction = donors_of(organism, grouped, CONTROLS), DIRECTIONS[side]
    donors = found.of(name, direction, grouped)
    assert len({donor.pair.id for donor in donors if donor}) > 6
    for pair, donor in zip(grouped, donors, strict=True):
        both = (pair.answer, pair.counterfactual_answer)
        if donor is None:
            wanted, asked = both[side if name == SAME else 1 - side], pair.question
            assert not [
                other
                for other in grouped
                if other.group != pair.group
                and wanted in (other.answer, other.counterfactual_answer)
                and (name == SAME or other.question != asked)
            ]
            continue
        assert donor.answer == both[side if name == SAME else 1 - side]
        assert donor.answer == (donor.pair.answer, donor.pair.counterfactual_answer)[donor.side]
        assert donor.prompt.image is (donor.pair.image, donor.pair.counterfactual_image)[donor.side]
        assert donor.pair.group != pair.group
        assert donor.asks_the_same == (donor.pair.question == pair.question)
        assert name == SAME or not donor.asks_the_same
        if name == SAME and not donor.asks_the_same:
            assert not [
                other
                for other in grouped
                if (other.group, other.question) != (pair.group, pair.question)
                and other.group != pair.group
                and other.question == pair.question
                and both[side] in (other.answer, other.counterfactual_answer)
            ], "one to the same question goes first"
    counts = found.told[name][direction]
    assert counts["with donor"] == sum(donor is not None for donor in donors) and counts["pairs"] == len(grouped)
    assert counts["same question"] == sum(donor.asks_the_same for donor in donors if donor)


def places(donors, name, pairs):
    return [donor and (donor.pair.id, donor.side) for donor in donors.of(name, "noising", pairs)]


def test_donors_are_drawn_with_the_seed_and_those_of_one_control_do_not_depend_on_the_other(organism, scenes):
    one, again, other = (donors_of(organism, scenes, CONTROLS, seed=seed) for seed in (0, 0, 1))
    alone = donors_of(organism, scenes, ["other-object"], directions=("noising",))
    for name in (SAME, OTHER):
        assert places(one, name, scenes) == places(again, name, scenes) != places(other, name, scenes)
    assert places(alone, OTHER, scenes) == places(one, OTHER, scenes) and alone.names == (OTHER,)
    # Part of the pairs, or the same ones with others' answers, as a gate asks about them: the donors stay.
    assert places(one, SAME, scenes[5:9]) == places(one, SAME, scenes)[5:9]
    assert places(one, SAME, with_others_answers(scenes, seed=3)) == places(one, SAME, scenes)


def test_tokens_of_a_donor_stand_where_the_pair_has_its_own(vlm):
    """Questions of other lengths have no states to put there; they are passed by."""
    longer = "is the red star left of the blue circle?"
    rows = [(longer if each[3] == "b" else each[0], *each[1:]) for each in ROWS]
    with pytest.raises(UsageError, match="0 of 4 pairs of some have another pair") as told:
        donors_of(vlm, some(rows), ["other-object"])
    assert "\n" not in str(told.value) and "--control other-object" in str(told.value)
    assert donors_of(vlm, FOUR, ["other-object"]).told[OTHER]["noising"]["with donor"] == 4


def test_what_has_no_donor_is_skipped_counted_and_told(vlm):
    """Nobody else answers green: the last pair has no donor, and the counterfactual's rows are as they were."""
    controls = donors_of(vlm, FOUR, ["same-answer"])
    assert controls.told[SAME]["noising"] == {"pairs": 4, "with donor": 3, "same question": 1}
    sites = swap_sites(vlm, "llm", "resid_post")
    how = {"only_correct": False, "engine": "fast"}
    table, receipts = swap_states(vlm, FOUR, sites, SPANS, controls=controls, **how)
    plain, fewer = swap_states(vlm, FOUR, sites, SPANS, **how)
    own = table[table[DONOR] == COUNTERFACTUAL].drop(columns=DONOR).reset_index(drop=True)
    pd.testing.assert_frame_equal(own[plain.columns], plain, check_exact=True)
    lent = table[table[DONOR] == SAME]
    assert len(lent) == len(plain) and len(receipts) == 2 * len(fewer)
    none = (lent["example"] == "p3") & (lent["direction"] == "noising")
    assert (lent[none]["skipped"] == NO_DONOR).all() and lent[none][
        ["logit_diff", "recovered", "flip"]
    ].isna().to_numpy().all()
    assert lent[~none]["logit_diff"].notna().all() and not lent[~none]["skipped"].isin([NO_DONOR]).any()
    result = swap_result("llm", table, {"controls": controls.told}, controls=controls)
    assert result.axes == ("direction", "span", DONOR, "layer")
    noising, denoising = controlled(result)
    assert "3 of 4 pairs have a donor with the same answer (2 of these for another question)" in noising
    assert "the image tokens" in denoising and "(counterfactual: " in denoising
    assert not named_without_claim((noising, denoising), ())


def test_both_engines_give_the_same_and_it_is_the_donors_states_that_are_swapped_in(organism, scenes):
    pairs, sites = scenes[:4], swap_sites(organism, "llm", "resid_post")[1:3]
    controls = donors_of(organism, scenes, CONTROLS)
    fast, trace = (
        swap_states(organism, pairs, sites, SPANS, controls=controls, engine=name)[0] for name in ("fast", "trace")
    )
    keys = ["example", "direction", "span", DONOR, "layer", "skipped"]
    pd.testing.assert_frame_equal(fast[keys], trace[keys])
    assert np.allclose(fast["logit_diff"], trace["logit_diff"], atol=1e-4, equal_nan=True)
    assert fast["logit_diff"].notna().mean() > 0.8
    donors = controls.of(OTHER, "denoising", pairs)
    edit = Replace(sites[1], "last", source=[donor.prompt for donor in donors])
    logits = run(organism, pairs.counterfactual, edit).last
    encoded = organism.encode(pairs.counterfactual)
    own, other = (organism.answer_ids(encoded, each) for each in (pairs.counterfactual_answer, pairs.answer))
    wanted = (logits.gather(1, own[:, None]) - logits.gather(1, other[:, None]))[:, 0]
    rows = trace[(trace["direction"] == "denoising") & (trace["span"] == "last") & (trace[DONOR] == OTHER)]
    found = rows[rows["layer"] == sites[1].layer]["logit_diff"]
    assert np.allclose(found, wanted.double().numpy(), atol=1e-4)


def test_a_donor_that_is_answered_wrongly_does_not_count(vlm):
    """The tiny model answers nothing right: with only_correct no pair counts at all, so the donors alone are asked."""
    controls = donors_of(vlm, FOUR, ["same-answer"])
    sites = swap_sites(vlm, "llm", "resid_post")[:1]
    cells = [(site, "last") for site in sites]
    read = study._read(vlm, FOUR, "logit_diff")
    unedited = [each.value(0, run(vlm, each.encoded).reads) for each in read]
    how = {"why": [""] * 4, "measure": "logit_diff", "engine": "trace", "budget": 10**9}
    for only_correct, told in ((True, WRONG_DONOR), (False, "")):
        tables, _ = study._controlled(
            vlm, FOUR, cells, "noising", controls, read, unedited, only_correct=only_correct, **how
        )
        assert set(tables[0]["skipped"][:3]) <= {told, study.NO_GAP} and tables[0]["skipped"][3] == NO_DONOR
        assert tables[0]["logit_diff"][:3].isna().all() == only_correct


def with_control(same=None, other=None, curves=None):
    """The result of `measured` with the curves of controls beside it."""
    parts = [measured(curves).table.assign(**{DONOR: COUNTERFACTUAL})]
    parts += [measured(each).table.assign(**{DONOR: name}) for name, each in ((SAME, same), (OTHER, other)) if each]
    axes = ("direction", "span", DONOR, "layer")
    return Result("swap", pd.concat(parts, ignore_index=True), axes, METRICS)


def told(result):
    return dataclasses.replace(result, claims=claimed(pool(result, layers=range(5)), result))


def layers_of(result, span, kind, donor=COUNTERFACTUAL):
    of = [claim for claim in result.claims if claim.made and claim.kind == kind_of(span, kind)]
    return [claim.about["layer"] for claim in of if claim.about[DONOR] == donor]


STILL = {span: [0.0] * 6 for span in CURVES}


def test_a_swap_turns_the_answer_only_beyond_what_states_with_the_same_answer_do():
    without, still = told(measured()), told(with_control(same=STILL))
    made = [(claim.kind, claim.about["layer"]) for claim in without.claims if claim.made]
    assert [(claim.kind, claim.about["layer"]) for claim in still.claims if claim.made] == made
    # What reads who is there, not which colour it has, is moved as far by any other example.
    same = STILL | {"image": [1.0, 0.3, *[0.0] * 4], "question": CURVES["question"]}
    result = told(with_control(same=same))
    assert layers_of(result, "image", TURNS) == [1] and layers_of(result, "question", MOVES) == []
    assert layers_of(result, "last", TURNS) == [3, 4] and layers_of(result, "last", NOT_YET) == [0, 1, 2]
    claim = next(each for each in result.claims if each.kind == kind_of("image", TURNS))
    assert [each.less for each in claim.conditions][-1] == claim.conditions[0].cell | {DONOR: SAME}
    assert "minus the effect of states with the same answer: -" in str(claim)
    assert not any(each.about[DONOR] == SAME for each in pool(result)), "of the control itself nothing is claimed"


def test_where_another_objects_states_turn_the_answer_is_claimed_besides():
    other = STILL | {"last": CURVES["last"], "image": [0.4] * 6}
    result = told(with_control(same=STILL, other=other))
    assert layers_of(result, "last", CARRIES, OTHER) == [3, 4] and not layers_of(result, "image", CARRIES, OTHER)
    said = takeover(result)
    assert any(
        each.startswith(
            "noising: patching the last token alone from another object's run also flips the answer from layer 3"
        )
        for each in said
    )
    assert "the image tokens from another object's run (noising)" in said[-1]
    assert not named_without_claim(said, result.claims)
    # As far as states with the same answer bring it, too, it is not the answer that they carry.
    assert not layers_of(told(with_control(same=other, other=other)), "last", CARRIES, OTHER)


def test_a_control_without_values_asks_for_nothing():
    empty = with_control(same=STILL)
    empty.table.loc[empty.table[DONOR] == SAME, ["recovered", "logit_diff", "flip"]] = float("nan")
    assert [len(each.conditions) for each in pool(empty)] == [len(each.conditions) for each in pool(measured())]


def test_figures_show_the_control_as_a_line_of_its_own():
    result = dataclasses.replace(with_control(same=STILL, other=STILL), provenance={"controls": {SAME: {}, OTHER: {}}})
    found = drawn(result)
    assert {"controls_image", "controls_last", "same_answer_heatmap", "other_object_heatmap"} <= set(found)
    names = {trace.name for trace in found["controls_image"].data}
    assert {COUNTERFACTUAL, SAME, OTHER} <= names
    assert set(drawn(measured())) == {"recovered_heatmap", "recovered_lines", "logit_diff_heatmap"}
    plain = drawn(measured())["recovered_lines"].data
    for one, other in zip(plain, found["recovered_lines"].data, strict=True):
        assert one.name == other.name and np.array_equal(one.y, other.y)


def test_one_call_claims_with_controls_what_it_claims_without(organism, scenes):
    how = {"spans": ("image", "last"), "directions": "noising"}
    both = layer_swap(organism, scenes, control=CONTROLS, **how)
    plain = layer_swap(organism, scenes, **how)
    own = both.table[both.table[DONOR] == COUNTERFACTUAL].drop(columns=DONOR).reset_index(drop=True)
    pd.testing.assert_frame_equal(own[plain.table.columns], plain.table)
    assert "controls" not in plain.provenance and both.provenance["controls"][SAME]["noising"]["pairs"] == 24
    turns = {each.about["layer"] for each in both.claims if each.made and each.kind == kind_of("last", TURNS)}
    assert turns >= {2, 3, 4}
    effects = both.summary("logit_diff").set_index(["span", DONOR, "layer"])["effect"]
    assert abs(effects["last", SAME, 4]) < 3 and effects["last", OTHER, 4] < -15 > effects["last", COUNTERFACTUAL, 4]
    assert any(each.startswith("Control, noising: ") for each in both.findings)


def test_a_plan_counts_the_swaps_of_controls(organism, scenes):
    sites = swap_sites(organism, "llm", "resid_post")
    plain, more = (plan_swap(organism, scenes, sites, SPANS, n_controls=n) for n in (0, 2))
    assert more.n_cells == 3 * plain.n_cells
    # Each direction runs what is patched once more, and a pass of the donors for each control.
    cells, passes = plain.forwards - 2, 2 * (1 + 2)
    assert more.forwards == pytest.approx(plain.forwards + 2 * cells + passes, rel=1e-3)
    assert more.flops / plain.flops == pytest.approx(more.forwards / plain.forwards, rel=1e-3)
    assert more.peak_bytes == plain.peak_bytes


GIVEN = ["--n", "12", "--batch", "4", "--spans", "last", "--gates", "none", "--control", *CONTROLS]


def test_a_killed_run_shards_and_batches_of_another_size_have_the_same_donors(tmp_path, monkeypatch):
    assert command(experiment, *GIVEN, "--out", tmp_path / "one") == 0
    with monkeypatch.context() as patched:
        killed_at(patched, study, "swap_states", 2)
        assert command(experiment, *GIVEN, "--out", tmp_path / "two") == 130
    assert command(experiment, *GIVEN, "--out", tmp_path / "two", "--resume") == 0
    for number in (2, 1):
        assert command(experiment, *GIVEN, "--out", tmp_path / "three", "--shard", f"{number}/2") == 0
    monkeypatch.setattr("sys.argv", ["merge", str(tmp_path / "three")])
    merge.main()
    for name in ("two", "three"):
        assert (tmp_path / "one/result.parquet").read_bytes() == (tmp_path / name / "result.parquet").read_bytes()
    assert command(experiment, *GIVEN, "--batch", "6", "--out", tmp_path / "four") == 0
    one, four = (Result.load(tmp_path / name).summary("logit_diff") for name in ("one", "four"))
    keys = list(Result.load(tmp_path / "one").axes)
    both = one.merge(four, on=keys, suffixes=("", "_other"))
    assert len(both) == len(one) and np.allclose(both["mean"], both["mean_other"], atol=1e-3, equal_nan=True)


def test_wrong_use_is_one_clear_line(vlm, organism, scenes, tmp_path, capsys):
    for controls, message in (
        (["another"], "control 'another' of a layer swap is not known; use same-answer or other-object"),
        (["same-answer"] * 2, "the control 'same-answer' is given twice"),
    ):
        with pytest.raises(UsageError, match=message):
            donors_of(organism, scenes, controls)
    assert donors_of(organism, scenes, ()) is None
    items = some([(ASKED[0], "red", "blue", None), (ASKED[0], "red", "blue", None)], made="other")
    with pytest.raises(UsageError, match="controls of a swap need pairs"):
        donors_of(vlm, items, ["same-answer"])
    apart = as_folder(tmp_path / "data", some([(ASKED[0], "red", "blue", None), (ASKED[0], "green", "cyan", None)]))
    for given, message in (
        (["--swap", "weights", "--control", "same-answer"], "--control is for --swap state"),
        (["--swap", "weights", "--n-random", "0"], "--n-random is 0; at least 1 random change is needed"),
        (["--control", "random"], "--control"),
        (["--data", apart, "--control", "same-answer"], "--control same-answer: 0 of 2 pairs of"),
    ):
        assert command(experiment, *given, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_the_other_sites_take_controls_too(organism, scenes):
    """All that the projector gives is the image: another's states there are another picture."""
    for stream, axis in (("projector", "point"), ("vision", "layer")):
        result = layer_swap(organism, scenes, site=stream, control="same-answer", spans="image", gates="none")
        assert result.axes == ("direction", "span", DONOR, axis)
        values = result.table[result.table[DONOR] == SAME]["logit_diff"]
        assert values.notna().sum() > 0.5 * len(values)


def test_nulls_and_other_wordings_draw_donors_among_their_own_pairs(organism, scenes, monkeypatch):
    """What is measured again is what a run of those pairs measures: donors are asked and answered likewise."""
    caught = {}

    def caught_gated(asked, vlm, pairs, result, pool, measured, *ways, at_once):
        caught.update(measured=measured, at_once=at_once)
        return ()

    monkeypatch.setattr(layer_swap_module, "gated", caught_gated)
    how = {
        "spans": ("last",),
        "directions": "noising",
        "only_correct": False,
        "variants": "as-written",
        "control": CONTROLS,
        "gates": "none",
    }
    own = layer_swap(organism, scenes, **how)
    measured, tables = caught["measured"], {}
    assert caught["at_once"], "donors are drawn among all pairs of a null"
    worded = scenes.worded(Wording("answer : {question}"))
    for name, pairs in (("own", scenes), ("worded", worded), ("shuffled", with_others_answers(scenes, seed=1))):
        tables[name] = measured(organism, pairs)
        expected = (own if name == "own" else layer_swap(organism, pairs, **how)).table
        keys = ["example", "direction", "span", DONOR, "layer"]
        both = tables[name].merge(expected, on=keys, suffixes=("", "_expected"), validate="one_to_one")
        assert len(both) == len(expected)
        np.testing.assert_allclose(both["logit_diff"], both["logit_diff_expected"], atol=1e-4)
    apart = [tables[name].loc[tables[name][DONOR] == SAME, "logit_diff"].to_numpy() for name in ("own", "worded")]
    assert np.nanmax(np.abs(apart[0] - apart[1])) > 0.1
    for number, donors in enumerate((caught_donors(organism, scenes), caught_donors(organism, worded))):
        asked = {donor.prompt.question for donor in donors.chosen.values()}
        assert all(each.startswith("answer :") is bool(number) for each in asked)


def caught_donors(vlm, pairs):
    """Donors of the scenes, drawn again for other pairs."""
    return donors_of(vlm, load_pairs("scenes/colour", n=24), CONTROLS).afresh(vlm, pairs)
