"""The layer swap as a method: identities that must hold in its table, both directions, every site."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from tests.runs import fake_run
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pair, Pairs, load_pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import generate, run
from vlm_mech.methods.layer_swap import figures
from vlm_mech.methods.layer_swap.claims import pool
from vlm_mech.methods.layer_swap.data import default_spans, swap_sites
from vlm_mech.methods.layer_swap.findings import findings, takeover, usable_share
from vlm_mech.methods.layer_swap.layer_swap import layer_swap, swap_result, told
from vlm_mech.methods.layer_swap.study import METRICS, WRONG, swap_states
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claiming import claimed
from vlm_mech.results.generated_answers import agreement
from vlm_mech.results.result import Result
from vlm_mech.sweeps.generated_answers import GeneratedPart

SPANS = ("image", "question", "last", "all")


@pytest.fixture(scope="module")
def pairs(vlm):
    made = []
    for number in range(4):
        question = ("what colour is the circle?", "is the red star left of the blue circle?")[number % 2]
        made.append(Pair(str(number), picture(number), picture(100 + number), question, "red", "blue"))
    return Pairs("pictures", tuple(made))


@pytest.fixture(scope="module", params=["trace", "fast"])
def engine(request):
    return request.param


@pytest.fixture
def same(engine):
    """The reference holds identities to the last bit; the fast engine computes in other batches, so it rounds."""
    limit = 0.0 if engine == "trace" else 2e-5
    return lambda one, other: np.allclose(np.asarray(one, float), np.asarray(other, float), rtol=0, atol=limit)


@pytest.fixture(scope="module")
def table(vlm, pairs, engine):
    sites = swap_sites(vlm, "llm", "resid_post")
    found, receipts = swap_states(vlm, pairs, sites, SPANS, only_correct=False, engine=engine)
    assert len(receipts) == 2 * 4 * len(SPANS)
    return found


def at(table, direction, layer, span, column):
    rows = table[(table.direction == direction) & (table.layer == layer) & (table.span == span)]
    return rows.set_index("example")[column]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_identities(table, direction, same):
    """`all` anywhere and `last` at the last layer give the other run; `image` at the last moves nothing."""
    baseline = at(table, direction, 0, "all", "logit_diff_baseline")
    other = at(table, "denoising" if direction == "noising" else "noising", 0, "all", "logit_diff_baseline")
    for layer in range(4):
        assert same(at(table, direction, layer, "all", "logit_diff"), -other)
    assert same(at(table, direction, 3, "image", "logit_diff"), baseline)
    assert same(at(table, direction, 3, "last", "logit_diff"), -other)
    held = ~at(table, direction, 0, "all", "recovered").isna()
    assert held.any()
    assert same(at(table, direction, 0, "all", "recovered")[held], 1.0)
    assert (at(table, direction, 3, "image", "recovered")[held] == 0.0).all()


def test_directions_are_complements(vlm, pairs):
    """The image's run with the counterfactual's image states is the counterfactual's run with all the rest replaced."""
    rest = ("system", "question", "answer_prompt")
    for layer in (0, 2):
        site = Site("llm.resid_post", layer)
        noised = run(vlm, pairs.base, Replace(site, "image", source=pairs.counterfactual))
        denoised = run(vlm, pairs.counterfactual, Replace(site, rest, source=pairs.base))
        assert (noised.last - denoised.last).abs().max() < 1e-5
        assert noised.receipts[0].pass_readout_change > 1e-3


def test_question_states_before_the_first_attention_carry_nothing(vlm, pairs, engine, same):
    sites = swap_sites(vlm, "llm", "resid_pre")[:1]
    table, _ = swap_states(vlm, pairs, sites, ("question", "last"), only_correct=False, engine=engine)
    assert same(table["logit_diff"], table["logit_diff_baseline"])


def test_projector_and_tower(vlm, pairs, engine, same):
    both = swap_sites(vlm, "projector", "")
    table, _ = swap_states(vlm, pairs, both, ("image",), only_correct=False, engine=engine)
    held = table[~table["recovered"].isna()]
    assert set(held["point"]) == {"in", "out"} and same(held["recovered"], 1.0)
    sites, spans = swap_sites(vlm, "vision", "resid_post"), default_spans(vlm, "vision")
    table, receipts = swap_states(vlm, pairs, sites, spans, directions=("noising",), only_correct=False, engine=engine)
    unread = table[table.layer >= vlm.vision_depth]
    assert len(unread) and np.array_equal(unread["logit_diff"], unread["logit_diff_baseline"])
    assert same(at(table, "noising", vlm.vision_depth - 1, "image", "recovered").dropna(), 1.0)
    assert same(at(table, "noising", vlm.vision_depth - 1, "class", "recovered").dropna(), 0.0)
    assert any(not receipt.reaches for receipt in receipts)


def test_both_engines_fill_the_same_table(vlm, pairs):
    sites = swap_sites(vlm, "llm", "resid_post")
    fast, trace = (
        swap_states(vlm, pairs, sites, SPANS, only_correct=False, engine=name)[0] for name in ("fast", "trace")
    )
    assert list(fast.columns) == list(trace.columns)
    for column in ("example", "direction", "span", "layer", "skipped", "group"):
        assert fast[column].tolist() == trace[column].tolist()
    for column in ("recovered", "logit_diff", "logit_diff_baseline", "flip"):
        assert np.allclose(fast[column], trace[column], rtol=0, atol=1e-4, equal_nan=True)
    with pytest.raises(UsageError, match="engine 'slow' is not known; use fast or trace"):
        swap_states(vlm, pairs, sites, SPANS, engine="slow")


def test_wrongly_answered_pairs_are_counted_and_left_out(vlm, pairs):
    table, _ = swap_states(vlm, pairs, swap_sites(vlm, "llm", "resid_post")[2:3], ("image",))
    wrong = table["skipped"] == WRONG
    assert wrong.any() and table[wrong]["logit_diff"].isna().all()
    result = Result("swap", table, ("direction", "span", "layer"), METRICS)
    with pytest.raises(WorkError, match=r"\(only_correct=False, or --all of the command, keeps the others too\)"):
        usable_share(result, pairs)


def test_two_examples_a_half_are_too_few_to_claim_anything(table, pairs):
    result = Result("swap", table, ("direction", "span", "layer"), METRICS)
    first, silent = takeover(dataclasses.replace(result, claims=claimed(pool(result), result)))
    assert len(pool(result)) > 20 and first.startswith("No claim was selected")
    assert "the image tokens (noising), the question tokens (noising), the last token alone (noising)" in silent
    assert "4 of 4 pairs of pictures are used" in usable_share(result, pairs)


def test_unknown_direction(vlm, pairs):
    with pytest.raises(UsageError, match="direction 'up' is not known"):
        swap_states(vlm, pairs, swap_sites(vlm, "llm", "resid_post")[:1], ("image",), directions=("up",))


@pytest.mark.parametrize("site", ["llm", "projector", "vision"])
def test_one_call_gives_the_table_of_the_study(vlm, pairs, site):
    result = layer_swap(vlm, pairs, site=site, only_correct=False)
    pairs, sites = fitting(vlm, pairs), swap_sites(vlm, site, "resid_post")
    table, receipts = swap_states(vlm, pairs, sites, default_spans(vlm, site), only_correct=False)
    pd.testing.assert_frame_equal(result.table, table)
    assert result.axes == ("direction", "span", "point" if site == "projector" else "layer")
    assert result.provenance["receipts"]["receipts"] == len(receipts)
    assert result.findings == findings(result, pairs) == (usable_share(result, pairs), *takeover(result))
    one = layer_swap(vlm, pairs, site=site, only_correct=False, spans="image", directions="noising")
    assert set(one.table.span) == {"image"} and set(one.table.direction) == {"noising"}
    with pytest.raises(UsageError, match="batch is 0; a whole number of at least 1 is needed"):
        layer_swap(vlm, pairs, batch=0)


def test_whole_answers_are_swapped_at_the_last_token_and_at_their_own():
    """The states of prompt and answer together are all that foretells an answer; both engines say the same."""
    vlm = VLM.load("organism-phrases")
    pairs = fitting(vlm, load_pairs("scenes/phrases", n=8))
    sites, spans = swap_sites(vlm, "llm", "resid_post")[1::2], ("last", "last+answer", "all+answer")
    found = {}
    for name in ("logit_diff", "logprob_diff"):
        tables = [
            swap_states(vlm, pairs, sites, spans, only_correct=False, measure=name, engine=engine)[0]
            for engine in ("fast", "trace")
        ]
        assert (tables[0][name] - tables[1][name]).abs().max() <= 1e-4
        found[name] = tables[0].groupby(["span", "layer"])["recovered"].mean()
        assert found[name]["all+answer"].to_numpy() == pytest.approx(1.0, abs=1e-3)
        assert found[name]["last+answer", len(vlm.llm_layers) - 1] == pytest.approx(1.0, abs=1e-3)
        assert found[name]["last"].max() < 0.6, "the answer's own tokens look at the picture again"
    assert (found["logit_diff"] - found["logprob_diff"]).abs().max() > 0.01
    positions = (
        tables[0].get("logprob_diff_tokens"),
        swap_states(vlm, pairs, sites[:1], ("last",))[0]["logit_diff_position"],
    )
    assert positions[0].between(3, 4).all() and positions[1].between(0, 3).all() and positions[1].nunique() > 2


def test_the_difference_of_answers_is_drawn_as_the_change_that_a_swap_makes():
    """The level of a difference is high wherever nothing happens, so that all cells would be as dark."""
    result = fake_run.swap_result()
    panel = figures.drawn(result)["logit_diff_heatmap"].data[0]
    summary = result.summary("logit_diff").query("direction == 'noising'").set_index(["span", "layer"])["effect"]
    assert panel.z[2][0] == summary["last", 0] and abs(panel.z[2][0]) < 2 < 8 < result.table["logit_diff"].max()
    assert panel.zmid == 0 and panel.zmin == -panel.zmax and panel.zmax == pytest.approx(abs(summary).max(), rel=0.05)


def test_what_is_generated_under_a_swap_is_read_and_told_beside_the_logits():
    vlm = VLM.load("organism-phrases")
    pairs = fitting(vlm, load_pairs("scenes/phrases", n=12))
    part = GeneratedPart(n_cells=6, seed=1)
    table, _ = swap_states(vlm, pairs, swap_sites(vlm, "llm", "resid_post"), ("image", "all"), part=part)
    cells = table[table["says"].notna()]
    assert len(cells.drop_duplicates(["direction", "span", "layer"])) == 6 and set(cells["says"]) >= {"own", "other"}
    row = cells.iloc[0]
    number = [pair.id for pair in pairs].index(row["example"])
    sides = (pairs.base, pairs.counterfactual)[:: 1 if row["direction"] == "noising" else -1]
    edit = Replace(Site("llm.resid_post", int(row["layer"])), row["span"], source=[sides[1][number]])
    assert generate(vlm, [sides[0][number]], edit, max_new_tokens=16).texts[0] == row["text"]
    result = told(swap_result("llm", table, {}), pairs)
    (edited,) = [line for line in result.findings if line.startswith("edited runs")]
    named = cells[cells["says"] != "neither"].dropna(subset=["flip"])
    agrees = ((named["says"] == "other") == (named["flip"] > 0.5)).groupby(named["example"]).mean().mean()
    assert f"{100 * agrees:.0f} % name what logit_diff prefers" in edited
    shuffled = agreement(table.assign(says=table["says"].map({"own": "other", "other": "own", "neither": "neither"})))
    assert shuffled.summary("agrees").set_index("run").loc["edited", "mean"] == pytest.approx(1 - agrees, abs=0.02)


def test_answers_are_generated_in_as_many_cells_as_asked_for_where_they_can_be():
    vlm = VLM.load("organism-phrases")
    pairs, sites = fitting(vlm, load_pairs("scenes/phrases", n=4)), swap_sites(vlm, "llm", "resid_post")
    part = GeneratedPart(n_cells=7, max_new_tokens=2)
    table, _ = swap_states(vlm, pairs, sites, ("image", "last+answer"), directions=("noising",), part=part)
    chosen = table[table["says"].notna()]
    # Of the answer's own tokens there are no states to put at what is generated.
    assert set(chosen["span"]) == {"image"} and chosen["layer"].nunique() == len(sites) == 6
    with pytest.raises(UsageError, match="answers can be generated in no cell"):
        swap_states(vlm, pairs, sites, ("last+answer",), part=part)


def test_answers_of_several_tokens_are_swapped_at_their_own_tokens_too():
    vlm = VLM.load("organism-phrases", check=False)
    phrases, colours = load_pairs("scenes/phrases", n=4), load_pairs("scenes/colour", n=4)
    assert default_spans(vlm, "llm", pairs=phrases) == ("image", "question", "last", "last+answer", "all")
    assert default_spans(vlm, "llm", pairs=colours) == ("image", "question", "last", "all") == default_spans(vlm, "llm")
    assert default_spans(vlm, "vision", pairs=phrases) == default_spans(vlm, "vision")
