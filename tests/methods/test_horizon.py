"""The horizon of the image: where it was planted, what removal, freezing and exchange compute, and the rule itself."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom

from experiments import horizon as experiment
from tests.helpers import assert_help_tells, command, killed_at
from tests.organism.test_planted import DIRECT, NULL, TWO_HOP
from tests.zoo.batches import pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import run
from vlm_mech.methods.horizon.claims import FEWEST, FREE, LOSES, declared_and_tested, what_of
from vlm_mech.methods.horizon.data import (
    FROZEN,
    HALF,
    OTHER,
    REMOVED,
    TEXT,
    Scan,
    edits_of,
    exchanged,
    scan_of,
    source_of,
)
from vlm_mech.methods.horizon.figures import curves, drawn
from vlm_mech.methods.horizon.horizon import horizon
from vlm_mech.methods.horizon.horizons import (
    Horizon,
    Tolerance,
    counted,
    first_within,
    horizon_of,
    upper_kl,
    upper_lost,
)
from vlm_mech.methods.horizon.study import WRONG, horizon_rows, metrics_of
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.planted import plant
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.claiming import halves
from vlm_mech.results.gates import STABLE
from vlm_mech.results.result import Result
from vlm_mech.runs import merge
from vlm_mech.runs.workspace import Workspace

RECIPES = {"direct": (DIRECT, 4), "two-hop": (TWO_HOP, 3)}
EACH = ["direct", pytest.param("two-hop", marks=pytest.mark.long)]
"""Planted models with the layer from which on the image is not read any more: that after the reading head's."""
SMALL = Scan(4, sources=())


@functools.cache
def planted_horizon(name):
    planted = plant(RECIPES[name][0], check=False)
    return horizon(planted.vlm, planted.pairs(180, seed=1), variants="as-written", batch=90)


@functools.cache
def organism():
    return VLM.load("organism", check=False)


def rows_of(result, arm, metric="kl"):
    table = result.table[result.table["arm"] == arm]
    return table.groupby("layer")[metric].mean()


@pytest.mark.parametrize("name", EACH)
def test_the_image_may_go_after_the_layer_that_reads_it(name):
    result, first = planted_horizon(name), RECIPES[name][1]
    free = {claim.about["arm"]: claim for claim in result.claims if claim.made and what_of(claim) == FREE}
    assert free[REMOVED].about["layer"] == first
    told = {row["arm"]: row for row in result.provenance["horizons"]}
    assert {told[REMOVED][each] for each in ("declared", "low", "high", "other half", "all examples")} == {first}
    loses = [claim.about for claim in result.claims if claim.made and what_of(claim) == LOSES]
    assert [each["layer"] for each in loses if each["arm"] == REMOVED] == list(range(first))
    assert {each["arm"] for each in loses} == {REMOVED}
    said = next(each for each in result.findings if each.startswith("From layer"))
    assert said.startswith(f"From layer {first} on the image may be removed: less than 0.1 nats and 5 % of the answers")
    assert not named_without_claim(result.findings, result.claims)


@pytest.mark.parametrize("name", EACH)
def test_planted_image_states_do_not_change_so_that_freezing_and_exchanging_cost_nothing(name):
    result = planted_horizon(name)
    for arm in (FROZEN, exchanged(0), exchanged(3), exchanged(5)):
        assert rows_of(result, arm).max() < 0.01 and rows_of(result, arm, "lost").max() == 0
        held = [each for each in result.claims if each.about["arm"] == arm and each.made]
        # States exchanged with themselves are no edit, so that the first layer of that arm is the next one.
        assert [(what_of(each), each.about["layer"]) for each in held] == [(FREE, int(arm == exchanged(0)))]
    assert rows_of(result, OTHER, "said").tolist() == [0.0]
    # Half of the image has the coloured patch, or not.
    half = rows_of(result, HALF, "said")
    assert 0.3 < half[0] < 0.7 and half[RECIPES[name][1]] == 1


def test_a_claim_of_no_effect_takes_enough_examples():
    planted = plant(DIRECT, check=False)
    result = horizon(planted.vlm, planted.pairs(40, seed=1), variants="as-written", exchange="none", batch=40)
    assert {what_of(claim) for claim in result.claims} == {"costs", LOSES}
    assert any(each.startswith("A claim that at most 0.1 nats and 5 % of the answers are lost needs 144 ")
               for each in result.findings)  # fmt: skip
    assert not any(".csv" in each for each in result.findings), "a call leaves no files"


def test_a_blind_model_does_not_need_the_image_anywhere():
    null = plant(NULL, check=False)
    pairs, how = null.pairs(144, seed=2), {"variants": "as-written", "exchange": "none"}
    result = horizon(null.vlm, pairs, only_correct=False, batch=144, **how)
    held = [(what_of(claim), claim.about) for claim in result.claims if claim.made]
    assert held == [(FREE, {"arm": arm, "layer": 0}) for arm in (REMOVED, FROZEN)]
    assert rows_of(result, OTHER).max() < 0.01, "the other picture changes nothing either"
    # Of examples that are answered right it has too few.
    with pytest.raises(WorkError, match="are answered correctly; at least two are needed"):
        horizon(null.vlm, pairs[:4], **how)


def without_image(vlm, prompt):
    """Next-token logits of the decoder for the text alone, at the positions that it has beside the image."""
    encoded = vlm.encode([prompt])
    ids, row = encoded.inputs["input_ids"], encoded.rows[0]
    kept = [position for position in range(ids.shape[1]) if position not in row.image]
    with torch.no_grad(), vlm.passing():
        embeds = vlm.model.get_input_embeddings()(ids[:, kept])
        states = vlm.model.model.language_model(
            inputs_embeds=embeds, position_ids=torch.tensor([kept])
        ).last_hidden_state
        return vlm.model.lm_head(states[:, -1])


def test_removal_from_the_first_layer_on_is_an_image_that_was_never_read():
    vlm, pairs = organism(), load_pairs("scenes/colour", n=3)
    table = horizon_rows(vlm, pairs, Scan(len(vlm.llm_layers)), only_correct=False)[0]
    found = table[(table["arm"] == REMOVED) & (table["layer"] == 0)]
    for prompt, answer, value in zip(pairs.base, pairs.answer, found["prob"], strict=True):
        token = vlm.answer_ids(vlm.encode([prompt]), [answer])
        expected = without_image(vlm, prompt).softmax(-1)[0, token].item()
        assert value == pytest.approx(expected, abs=1e-5)


def test_nothing_is_edited_at_the_end():
    """There the table has the unedited run's values; edits of what nobody reads any more change nothing either."""
    vlm, pairs = organism(), load_pairs("scenes/colour", n=3)
    n_layers = len(vlm.llm_layers)
    scan = Scan(n_layers, sources=(0, 2))
    table = horizon_rows(vlm, pairs, scan, only_correct=False)[0]
    ends = {REMOVED: [n_layers], FROZEN: [n_layers - 1, n_layers], exchanged(2): [2, n_layers], OTHER: []}
    for arm, layers in ends.items():
        rows = table[table["arm"] == arm]
        still = rows[rows["layer"].isin(layers)]
        assert len(still) == 3 * len(layers)
        for metric in metrics_of():
            assert (still[metric.name] == still[f"{metric.name}_baseline"]).all()
        assert set(rows["layer"]) - set(layers) == set(scan.layers(arm))
    encoded, last = vlm.encode(pairs.base), n_layers - 1
    edit = Replace(Site("llm.resid_post", last), "image", source_site=Site("llm.resid_pre", last))
    assert torch.equal(run(vlm, encoded, edit).last, run(vlm, encoded).last)


@pytest.mark.parametrize(
    ("family", "attn"),
    [
        ("llava_clip", "sdpa"),
        ("qwen2_5_vl", "sdpa"),
        ("llava_clip", "eager"),
        pytest.param("gemma3", "sdpa", marks=pytest.mark.long),
        pytest.param("qwen3_vl", "sdpa", marks=pytest.mark.long),
    ],
)
def test_the_engine_equals_the_reference(family, attn):
    vlm, pairs = wrapped(family, attn), pairs_of(3)
    scan = scan_of(vlm, pairs)
    assert scan.arms[-3:] == (HALF, TEXT, OTHER)
    fast, slow = (horizon_rows(vlm, pairs, scan, only_correct=False, engine=each)[0] for each in ("fast", "trace"))
    for metric in metrics_of():
        assert np.allclose(fast[metric.name], slow[metric.name], atol=1e-4), metric.name


def test_controls_are_as_large_and_do_not_depend_on_batches():
    vlm, pairs = organism(), load_pairs("scenes/colour", n=4)
    scan = scan_of(vlm, pairs, "none")
    whole = edits_of(vlm, pairs, scan, seed=3)
    parts = [edits_of(vlm, pairs[rows], scan, seed=3) for rows in (slice(0, 1), slice(1, 4))]
    for name in ("half", "text"):
        assert [*parts[0].__dict__[name].spans, *parts[1].__dict__[name].spans] == list(whole.__dict__[name].spans)
    assert edits_of(vlm, pairs, scan, seed=4).half != whole.half
    for row, half, text in zip(vlm.encode(pairs.base).rows, whole.half.spans, whole.text.spans, strict=True):
        numbers = {position: number for number, position in enumerate(row.present)}
        image = {numbers[position] for position in row.image}
        assert set(half.numbers) < image and len(half.numbers) == len(image) / 2
        assert not set(text.numbers) & {*image, 0, len(row.present) - 1}
        # There are fewer others than image tokens, of which half go.
        assert len(text.numbers) == -(-(len(row.present) - len(image) - 2) // 2)


def test_what_is_answered_wrong_is_left_out_or_kept():
    vlm, pairs = organism(), load_pairs("scenes/colour", n=4)
    wrong = dataclasses.replace(pairs[0:1].pairs[0], answer="red", counterfactual_answer="blue")
    wrong = dataclasses.replace(wrong, answer=pairs.counterfactual_answer[0], counterfactual_answer=pairs.answer[0])
    mixed = dataclasses.replace(pairs, pairs=(wrong, *pairs.pairs[1:]))
    scan = Scan(len(vlm.llm_layers))
    table = horizon_rows(vlm, mixed, scan)[0]
    gone = table[table["example"] == wrong.id]
    assert set(gone["skipped"]) == {WRONG} and gone[["kl", "said", "lost", "prob_baseline"]].isna().all(axis=None)
    assert set(table.loc[table["example"] != wrong.id, "skipped"]) == {""}
    every = horizon_rows(vlm, mixed, scan, only_correct=False)[0]
    held = every[every["example"] == wrong.id]
    assert held["kl"].notna().all() and (held["lost"] == 0).all() and (held["said_baseline"] == 0).all()


# The rule


def made_up(curve, *, n=128, lost=None, seed=0):
    """A result whose divergences by layer have these means; `lost` are the numbers of examples that lose the answer."""
    rng, rows = np.random.default_rng(seed), []
    for layer in range(SMALL.n_layers + 1):
        for arm in (REMOVED, FROZEN):
            mean = curve[layer] if arm == REMOVED and layer < len(curve) else 0.0
            values = mean * rng.permutation(-np.log1p(-(np.arange(n) + 0.5) / n))
            gone = rng.permutation(n) < (0 if lost is None or arm == FROZEN or layer >= len(lost) else lost[layer])
            for number in range(n):
                row = {"example": f"e{number}", "arm": arm, "layer": layer, "kl": values[number], "kl_baseline": 0.0}
                row |= {"lost": float(gone[number]), "lost_baseline": 0.0}
                for metric in metrics_of():
                    row.setdefault(metric.name, 0.0)
                    row.setdefault(f"{metric.name}_baseline", 0.0)
                rows.append(row)
    return Result("made up", pd.DataFrame(rows), SMALL.axes, metrics_of())


def first_of(result, tolerance=None):
    layers = SMALL.layers(REMOVED)
    parts = halves(result)
    return horizon_of(result, parts, SMALL, REMOVED, tolerance or Tolerance()), layers


@pytest.mark.parametrize(
    ("curve", "lost", "first"),
    [
        ([1.0, 1.0, 0.0, 0.0], None, 2),
        ([0.0, 0.0, 0.0, 0.0], None, 0),
        ([1.0, 0.0, 1.0, 0.0], None, 3),
        ([0.0, 0.0, 0.0, 1.0], None, 4),
        ([0.0, 0.0, 0.0, 0.0], [0, 60, 0, 0], 2),
        ([0.09, 0.0, 0.0, 0.0], None, 1),
    ],
)
def test_the_horizon_is_the_first_layer_from_which_on_all_pass(curve, lost, first):
    """Also where a mean lies within the tolerance, and its bound does not (the last case)."""
    found, layers = first_of(made_up(curve, lost=lost))
    assert (found.declared, found.all, found.end) == (first, first, layers[-1] + 1)
    assert found.found == (first < 4) and found.low <= first <= found.high


def test_the_interval_tells_where_it_is_not_sure():
    found, _ = first_of(made_up([1.0, 0.083, 0.0, 0.0], n=256))
    assert (found.low, found.high) == (1, 2)
    sure, _ = first_of(made_up([1.0, 1.0, 0.0, 0.0], n=256))
    assert sure.low == sure.high == 2


def test_no_layer_stands_for_none():
    """Neither in the table nor in the figure, with enough examples and with too few."""
    drawn_of = made_up([1.0], n=24)

    def shown(found):
        result = dataclasses.replace(drawn_of, provenance={"horizons": [found.as_row()]})
        return found.as_row(), curves(result, arm=REMOVED)

    never = Horizon(REMOVED, 4, 4, 4, 4, 4, 4, 60, float("nan"), float("nan"), 60, 120, Tolerance().needed)
    row, figure = shown(never)
    assert [row[each] for each in ("declared", "low", "high", "other half", "all examples")] == ["at none"] * 5
    assert row["horizon"].startswith("at none") and not figure.layout.shapes
    assert "horizon on the selection half of the examples: at none" in caption(figure)
    row, figure = shown(dataclasses.replace(never, declared=2, low=2, high=3, kl_below=0.05, lost_below=0.03))
    assert (row["horizon"], row["declared"], row["low"], row["high"]) == ("from layer 2 on", 2, 2, 3)
    assert {shape.type for shape in figure.layout.shapes} == {"line", "rect"}
    row, figure = shown(dataclasses.replace(never, low=0))
    assert (row["declared"], row["low"], row["high"]) == ("at none", 0, "at none")
    assert {shape.type for shape in figure.layout.shapes} == {"rect"} and ", from 0 to none" in caption(figure)
    # A half of 32 can tell of none, all 64 can.
    row, figure = shown(first_of(made_up([1.0, 1.0, 0.0, 0.0], n=64))[0])
    assert (row["declared"], row["low"], row["all examples"]) == ("not determined from 32", "", 2)
    assert not figure.layout.shapes and "no horizon can be determined from n = 32; 59 are needed" in caption(figure)


def caption(figure):
    return next(each.text for each in figure.layout.annotations if each.name == "caption")


@pytest.mark.parametrize("lost", [0.05, 0.1, 0.3, 0.5])
def test_the_fewest_groups_of_a_horizon_are_those_that_pass_if_none_loses_its_answer(lost):
    n = Tolerance(lost=lost).needed
    for groups, passes in ((n, True), (n - 1, False)):
        assert (upper_lost(np.zeros((groups, 1)), np.arange(groups))[0] <= lost) == passes


def test_bounds_are_those_of_the_books():
    groups = np.arange(64)
    none = np.zeros((64, 1))
    assert upper_lost(none, groups)[0] == pytest.approx(1 - 0.05 ** (1 / 64))
    one = none.copy()
    one[3] = 1
    assert binom.cdf(1, 64, upper_lost(one, groups)[0]) == pytest.approx(0.05)
    assert upper_lost(np.ones((64, 1)), groups)[0] == 1
    # Two examples of a group that both lose the answer count once.
    assert counted(np.ones((64, 1)), groups // 2) == (32, 32)
    values = np.random.default_rng(0).normal(1, 0.5, (64, 1))
    bound = upper_kl(values, groups)[0]
    assert bound == pytest.approx(values.mean() + 1.67 * values.std(ddof=1) / 8, abs=0.02)
    assert np.isinf(upper_kl(values[:1], groups[:1])).all()


def test_a_horizon_is_rarely_told_too_low():
    """As many answers are lost at layer 2 as is too many, and few beyond it: however often layers are looked at."""
    rng, n, below = np.random.default_rng(0), 64, 0
    groups, layers = np.arange(n), tuple(range(4))
    for _ in range(400):
        lost = (rng.random((n, 4)) < [0.05, 0.05, 0.05, 0.0]).astype(float)
        below += first_within((np.zeros((n, 4)), lost, groups), layers, Tolerance(), n_resamples=20) <= 2
    assert below / 400 <= binom.ppf(0.999, 400, 0.05) / 400


def test_claims_of_no_effect_are_tested_by_the_same_rule():
    claims, horizons, _ = declared_and_tested(*told(made_up([1.0, 1.0, 0.0, 0.0], n=144)))
    free = [claim for claim in claims if claim.made and what_of(claim) == FREE]
    assert [claim.about for claim in free] == [{"arm": REMOVED, "layer": 2}, {"arm": FROZEN, "layer": 0}]
    assert [each.declared for each in horizons] == [2, 0]
    assert min(claim.p for claim in free) >= 0.95**72 - 1e-9, "p is the exact one of no lost answer, not of sign flips"
    # Four lost of 64 are within no bound of .05, though they lie below it in the mean.
    parts = told(made_up([1.0, 0.0, 0.0, 0.0], lost=[0, 0, 0, 0], n=144))
    spoilt = parts[1][1].table.copy()
    some = sorted(set(spoilt["example"]))[:3]
    spoilt.loc[(spoilt["arm"] == REMOVED) & (spoilt["layer"] == 2) & spoilt["example"].isin(some), "lost"] = 1.0
    other = dataclasses.replace(parts[1][1], table=spoilt, known={})
    claims, *_ = declared_and_tested(parts[0], (parts[1][0], other), *parts[2:])
    held = {claim.about["arm"]: claim.made for claim in claims if what_of(claim) == FREE}
    assert held[REMOVED] is False
    # Of fewer examples nothing of the kind is declared.
    claims, *_ = declared_and_tested(*told(made_up([1.0, 1.0, 0.0, 0.0], n=FEWEST - 1)))
    assert not [claim for claim in claims if what_of(claim) == FREE]


def told(result):
    return result, halves(result), SMALL, Tolerance()


# The call and the command

ASKED = ("--n", "6", "--batch", "3", "--exchange", "few", "--gates", "none")


SPOKEN = (*ASKED, "--outcome", "generation", "--generated-cells", "3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("horizon") / "whole"
    assert command(experiment, *SPOKEN, "--out", folder) == 0
    return folder


def test_a_run_leaves_curves_horizons_and_what_is_said(whole):
    result, n_layers = Result.load(whole), 6
    assert {f"{name}.json" for name in ("removed", "frozen", "exchanged_0", "exchanged_3", "exchanged_5")} == {
        path.name for path in (whole / "figures").glob("*.json")
    }
    assert set(result.table["arm"]) == set(Scan(n_layers, (0, 3, 5)).arms) and result.axes == ("arm", "layer")
    assert len(result.table) == 6 * (7 * (n_layers + 1) + 1)
    horizons = pd.read_csv(whole / "horizons.csv").set_index("arm")
    # Three groups a half cannot say that fewer than a twentieth of the answers are lost.
    assert set(horizons["declared"]) == {"not determined from 3"} == set(horizons["other half"])
    assert set(horizons["all examples"]) == {"not determined from 6"} and horizons[["low", "high"]].isna().all(
        axis=None
    )
    assert set(horizons["horizon"]) == {"no horizon can be determined from n = 3; 59 are needed"}
    assert "none" not in horizons and set(horizons["claim"]) == {"not tested"}
    said = pd.read_csv(whole / "generated.csv")
    assert len(said) == 3 and (said["n"] == 6).all() and (said["low"] <= said["same text"]).all()
    spoken = result.table[result.table["text"].notna()]
    assert set(zip(spoken["arm"], spoken["layer"], strict=True)) == set(zip(said["arm"], said["layer"], strict=True))
    texts = {"own", "other", "neither"}
    assert set(spoken["says"]) <= texts and (spoken["says_baseline"] == "own").all()
    page = (whole / "report.html").read_text()
    assert "horizons.csv" in page and "needs 180 groups of examples; this run has 6" in page
    assert "but no horizon can be determined from n = 3; 59 are needed in that half." in page
    for arm, figure in drawn(result).items():
        assert not figure.layout.shapes, arm
        assert "no horizon can be determined from n = 3; 59 are needed" in caption(figure), arm


LEFT = ("result.parquet", "summary.csv", "horizons.csv", "generated.csv")


def test_a_killed_run_ends_in_the_same_bytes(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, Workspace, "keep", 2)
        assert command(experiment, *SPOKEN, "--out", tmp_path / "killed") == 130
    assert command(experiment, *SPOKEN, "--out", tmp_path / "killed", "--resume") == 0
    for name in LEFT:
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.long
def test_parts_end_in_the_same_bytes(whole, tmp_path, monkeypatch):
    for part in ("2/2", "1/2"):
        assert command(experiment, *SPOKEN, "--out", tmp_path / "parts", "--shard", part) == 0
    monkeypatch.setattr("sys.argv", ["merge", str(tmp_path / "parts")])
    merge.main()
    for name in LEFT:
        assert (tmp_path / "parts" / name).read_bytes() == (whole / name).read_bytes(), name


def test_what_it_will_need_is_said_and_nothing_run(tmp_path, capsys):
    for more in ((), ("--outcome", "generation")):
        assert command(experiment, *ASKED, *more, "--dry-run", "--out", tmp_path / "run") == 0
        assert "forward" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [(("--exchange", "some"), "some"), (("--kl", "0"), "the tolerance is 0.0 nats"), (("--lost", "1"), "a share")],
)
def test_wrong_options_end_the_command_in_a_line(given, told, capsys, tmp_path):
    assert command(experiment, *given, "--n", "4", "--out", tmp_path / "run") == 2
    assert told in capsys.readouterr().err


def test_help_tells_its_options():
    assert_help_tells(experiment, ("--exchange", "--kl", "--lost", "--outcome"))


def test_gates_of_both_kinds_of_claims():
    result = planted_horizon("direct")
    for claim in result.claims:
        assert claim.made and [gate.name for gate in claim.gates] == [STABLE] and not claim.lost


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_is_said_in_a_line():
    vlm, pairs = organism(), load_pairs("scenes/colour", n=2)
    for wrong, said in (
        ({"exchange": "some"}, "exchange 'some' is not known; use one of few, all, none"),
        ({"kl": 0.0}, "the tolerance is 0.0 nats and 0.05 of the answers; a number above 0 and a share"),
        ({"lost": 1.0}, "a share between 0 and 1"),
        ({"batch": 0}, "batch is 0"),
        ({"gates": "some"}, "gates 'some' are not known"),
    ):
        with pytest.raises(UsageError, match="(?s)^[^\n]*$") as caught:
            horizon(vlm, pairs, **wrong)
        assert said in str(caught.value)


def test_names_of_arms_say_their_source():
    assert [source_of(each) for each in (REMOVED, exchanged(0), exchanged(12))] == [None, 0, 12]
    assert Scan(3, (1,)).layers(exchanged(1)) == (0, 2) and Scan(3).layers(FROZEN) == (0, 1)
