"""The map of the visual flow: statistics of layers by hand, claims on made-up numbers and planted models, the run."""

import dataclasses
import functools
import json

import numpy as np
import pandas as pd
import pytest

from experiments import visual_flow as experiment
from tests.helpers import assert_help_tells, command, killed_at
from tests.zoo import ZOO
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.methods.lens.leads import depth_sites
from vlm_mech.methods.visual_flow import study
from vlm_mech.methods.visual_flow.claims import (
    CARRY,
    FOUND,
    READ,
    READ_NEEDED,
    SUPPRESS,
    TURNS,
    WRITE,
    FlowClaims,
    pool_of,
)
from vlm_mech.methods.visual_flow.data import Cases, cases_of, edges, flow_edges, flow_scan
from vlm_mech.methods.visual_flow.effects import EFFECT, again_of, flow_effects
from vlm_mech.methods.visual_flow.example_pages import example_pages
from vlm_mech.methods.visual_flow.probes import patch_probabilities, probe_examples, probe_rows
from vlm_mech.methods.visual_flow.study import (
    AXES,
    INPUT,
    KNOCKOUT,
    LENS,
    METRICS,
    PROBE,
    SHUFFLED,
    SWAP,
    flow,
)
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.planted import Planted, coloured_cells, plant
from vlm_mech.organism.planted_recipe import Head, Recipe, matched_null
from vlm_mech.results import metrics
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.claiming import claimed
from vlm_mech.results.gates import SHUFFLED as SHUFFLED_ANSWERS
from vlm_mech.results.gates import TWIN
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.validate.grading import FALSE_ALARMS, grade
from vlm_mech.validate.visual_flow import flow_map as graded_map

TWO_HOP = Recipe(3, 6, reads=(Head(2, 1),), carries=(Head(4, 3),), decoys=(Head(1, 0, 0),), priors=(3, 1, 0, 5, 4, 2))
PLANTINGS = {
    "two-hop": TWO_HOP,
    "suppressed": dataclasses.replace(TWO_HOP, reads=(Head(3, 1),), carries=(), suppressor=Head(5, 0, 2.5)),
    "backup": dataclasses.replace(TWO_HOP, carries=(), backup=Head(4, 3)),
}
PLANTINGS["null"] = matched_null(PLANTINGS["suppressed"])
N, N_PROBED, N_SAVED = 24, 24, 40
"""Half of them test: so few that every pattern of signs is tried, and enough for a p to survive the correction.

Saved pairs that show the same picture are one group, so that more of them are needed.
"""


@functools.cache
def made(name: str) -> Planted:
    return plant(PLANTINGS[name])


@functools.cache
def mapped(name: str) -> tuple[Result, Cases]:
    planted = made(name)
    pairs = planted.pairs(N, seed=1)
    cases = Cases(pairs, tuple(planted.priors(pairs)), "the prior answer")
    table, receipts = flow(planted.vlm, cases, flow_scan(planted.vlm, cases))
    assert receipts["receipts"] == 7 * 3 + 2 * 3 * 6
    return Result("visual flow", table, AXES, METRICS), cases


@functools.cache
def said(name: str) -> FlowClaims:
    result, cases = mapped(name)
    effects = flow_effects(result)
    return FlowClaims.of(claimed(pool_of(flow_scan(made(name).vlm, cases))(effects), effects))


# Planted models


@pytest.mark.parametrize("name", ["two-hop", "suppressed", "backup"])
def test_planted_layers_are_named_and_no_others(name):
    found, recipe = said(name), PLANTINGS[name]
    reads = tuple(head.layer for head in recipe.reads)
    assert found.layers(READ) == reads
    assert found.layers(READ_NEEDED) == (() if name == "backup" else reads)
    assert found.layers(CARRY) == tuple(head.layer for head in recipe.carries)
    assert found.layers(WRITE) == tuple(head.layer for head in recipe.carries or recipe.reads)
    assert found.route == ("two-hop" if recipe.carries else "direct")
    suppressed = name == "suppressed"
    assert found.layers(SUPPRESS) == ((5,) if suppressed else ())
    assert found.overtaken == (5 if suppressed else None)
    # What is swapped turns the answer as long as it is not read, and from where it is written on.
    turned = {(claim.about["span"], claim.about["layer"]) for claim in found.made if claim.kind == TURNS}
    question = range(reads[0], recipe.carries[0].layer) if recipe.carries else ()
    written = max(found.layers(WRITE))
    assert turned == {
        *(("image", layer) for layer in range(reads[0])),
        *(("question", layer) for layer in question),
        *(("last", layer) for layer in range(written, 5)),
    }


def test_a_null_claims_nothing_of_the_picture():
    """Its prior answer is planted all the same, but nothing had risen that it could suppress."""
    found = said("null")
    assert [found.layers(kind) for kind in (READ, WRITE, CARRY, SUPPRESS, TURNS)] == [()] * 5 and found.route == "none"


def test_where_answers_are_shuffled_the_rival_is_that_of_the_answer_shown():
    """The same analysis again: of the pairs themselves it gives the same numbers, with no row of a probe."""
    planted = made("two-hop")
    cases = cases_of(planted.vlm, planted.pairs(6, seed=2))
    scan = flow_scan(planted.vlm, cases)
    table, _ = flow(planted.vlm, cases, scan)
    again = again_of(cases, scan)
    effects = flow_effects(Result("visual flow", table, AXES, METRICS)).table
    pd.testing.assert_frame_equal(again(planted.vlm, cases.pairs), effects)
    turned = tuple(
        dataclasses.replace(pair, answer=pair.counterfactual_answer, counterfactual_answer=pair.answer)
        for pair in cases.pairs
    )
    other = again(planted.vlm, dataclasses.replace(cases.pairs, pairs=turned))
    assert np.allclose(other[EFFECT], -effects[EFFECT], atol=1e-4) and effects[EFFECT].abs().max() > 5


def test_the_adapter_is_graded_as_planted():
    for name, kind in (("suppressed", "plain"), ("null", "matched null")):
        planted = made(name)
        found = graded_map(planted, planted.pairs(N, seed=1))
        scores = grade(found, planted.truth, kind, n_layers=6, n_heads=4)
        right = {each: kind == "plain" and each not in FALSE_ALARMS for each in scores}
        wrong = {each for each, score in scores.items() if score.value != right[each]}
        assert wrong <= {"trace significant"}
        assert not found.suppressing or name == "suppressed"


def test_the_same_numbers_by_other_ways():
    """The lens at the last block is the model; swaps of everything an image changes give the other image's answer."""
    result, cases = mapped("two-hop")
    vlm, table = made("two-hop").vlm, result.table.set_index(["method", "span", "layer"]).sort_index()
    encoded = vlm.encode(cases.pairs.base)
    ids = [vlm.answer_ids(encoded, each) for each in (cases.pairs.answer, list(cases.rivals))]
    expected = metrics.logit_diff(record(vlm, encoded).logits, *ids)
    assert np.allclose(table.loc[(LENS, "last", 5), "lead"], expected, atol=1e-4)
    for span, layer, recovered in (("image", INPUT, 1.0), ("last", INPUT, 0.0), ("last", 5, 1.0), ("image", 5, 0.0)):
        assert np.allclose(table.loc[(SWAP, span, layer), "recovered"], recovered, atol=1e-4)
    assert [str(site) for site in depth_sites(vlm)][:2] == ["llm.resid_pre[0]", "llm.resid_post[0]"]


def test_edges_that_prompts_lack_are_left_out(vlm, tiny_vlm):
    from tests.methods.test_layer_swap import Pair, Pairs, picture

    pairs = Pairs("pictures", (Pair("0", picture(1), picture(2), "what is this?", "red", "blue"),))
    cases = cases_of(vlm, pairs)
    assert cases.said == "last" and flow_edges(vlm, cases) == edges()
    window = flow_scan(vlm, cases, window=3)
    assert window.layers.sets[1] == (0, 1, 2) and [str(edge) for edge in window.edges] == list(edges())
    with pytest.raises(UsageError, match="2 rivals are given for 1 pairs; one for each is needed"):
        Cases(pairs, ("red", "blue"), "two")


def test_a_layer_that_does_not_see_the_image_has_no_cut():
    """Every other layer of this model sees the last twelve tokens only, and the image is before them."""
    from tests.methods.test_layer_swap import Pair, Pairs, picture

    vlm = VLM(*ZOO["gemma3"]("sdpa", 0), name="gemma3", check=False)
    question = "is the red star left of the blue circle?"
    shown = [Pair(str(n), picture(n), picture(9 + n), question, "red", "blue") for n in range(4)]
    cases = cases_of(vlm, Pairs("pictures", tuple(shown)))
    table, _ = flow(vlm, cases, flow_scan(vlm, cases))
    result = Result("visual flow", table, AXES, METRICS)
    effects = flow_effects(result)
    cells = effects.summary().set_index(["kind", "span", "layer"])
    assert cells.loc[("edge cut", "last<-image"), "n"].tolist() == [0, 4, 0, 4]
    assert cells.loc[("edge cut", "last<-image"), "mean"].isna().tolist() == [True, False] * 2
    assert len(claimed(pool_of(flow_scan(vlm, cases))(effects), effects)) == 0, "two examples of each half say nothing"


def test_scenes_in_conflict_are_turned_round():
    organism = VLM.load("organism", check=False)
    pairs = load_pairs("scenes/colour-conflict", n=3)
    cases = cases_of(organism, pairs)
    for pair, turned in zip(pairs, cases.pairs, strict=True):
        assert (turned.answer, turned.counterfactual_answer) == (pair.counterfactual_answer, pair.answer)
        assert turned.image is pair.counterfactual_image and turned.counterfactual_image is pair.image
    assert list(cases.rivals) == pairs.answer and cases.rival == "the usual answer"
    plain = load_pairs("scenes/colour", n=2)
    assert (
        cases_of(organism, plain).pairs is plain
        and list(cases_of(organism, plain).rivals) == plain.counterfactual_answer
    )


# Probes


def test_probes_read_what_is_shown_at_the_object_and_patches_know_where(tmp_path):
    """On their own examples, by folds: the colour is at its patch from the start, at `last` once it is carried."""
    planted = made("two-hop")
    cases = cases_of(planted.vlm, planted.pairs(N_PROBED, seed=1))
    fitted = probe_examples(planted.vlm, cases, None, folder=tmp_path)
    table, notes = probe_rows(planted.vlm, cases, fitted, folder=tmp_path)
    assert notes["own"] and table["example"].tolist()[:N_PROBED] == [pair.id for pair in cases.pairs]
    means = table.groupby(["method", "span", "stream", "layer"])["p_true"].mean()
    assert means[PROBE, "object", "llm", INPUT] > 0.8 and means[PROBE, "object", "projector", 0] > 0.8
    assert means[PROBE, "last", "llm", INPUT] < 0.3 < 0.8 < means[PROBE, "last", "llm", 4]
    assert means[SHUFFLED].max() < 0.35
    sites = tuple(depth_sites(planted.vlm)[:2])
    maps = patch_probabilities(planted.vlm, cases[:3], fitted, sites, folder=tmp_path)
    assert maps.shape == (3, 2, 16)
    for number, pair in enumerate(cases[:3].pairs):
        [(row, column)] = coloured_cells(pair.image)
        assert maps[number].argmax(1).tolist() == [4 * row + column] * 2
    # Probes of other pairs, read on these: the rows are of these examples.
    others = dataclasses.replace(planted.pairs(N_PROBED, seed=2), name="others")
    elsewhere = probe_examples(planted.vlm, cases, others, folder=tmp_path / "other")
    read, notes = probe_rows(planted.vlm, cases, elsewhere, folder=tmp_path / "other")
    assert not notes["own"] and notes["on"] == "others"
    assert read.groupby(["method", "span", "stream", "layer"])["p_true"].mean()[PROBE, "object", "llm", INPUT] > 0.8
    with pytest.raises(UsageError, match="a probe needs 4 of each answer: give more examples"):
        probe_examples(planted.vlm, cases[:4], None, folder=tmp_path / "few")


def test_a_planted_rival_may_be_the_answer():
    """Random answers of a null model: the usual answer is now and then the true one, and leads by nothing."""
    planted = made("two-hop")
    pairs = planted.pairs(4, seed=1)
    cases = Cases(pairs, (pairs.answer[0], *pairs.counterfactual_answer[1:]), "the usual answer")
    leads = study._of_lens(planted.vlm, cases, "logit_diff").set_index("example")["lead"]
    first = pairs[0].id
    assert (leads[first] == 0).all() and (leads.drop(first) != 0).any()


# The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A planted model and its pairs, saved as a user has them."""
    planted, home = made("two-hop"), tmp_path_factory.mktemp("planted")
    planted.vlm.model.save_pretrained(home / "model")
    planted.vlm.processor.save_pretrained(home / "model")
    rows = []
    (home / "data").mkdir()
    for pair in planted.pairs(N_SAVED, seed=3):
        names = {"image": f"{pair.id}a.png", "counterfactual_image": f"{pair.id}b.png"}
        for field, name in names.items():
            getattr(pair, field).save(home / "data" / name)
        answers = {"answer": pair.answer, "counterfactual_answer": pair.counterfactual_answer}
        rows.append(names | answers | {"id": pair.id, "question": pair.question})
    (home / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture(scope="module")
def finished(folders):
    out = folders / "out"
    given = ["--model", folders / "model", "--data", folders / "data", "--pages", "2", "--batch", "16", "--null", "2"]
    assert command(experiment, *given, "--out", out) == 0
    return out


def test_a_run_leaves_a_map_and_a_page(finished):
    result = Result.load(finished)
    assert result.table["example"].nunique() == N_SAVED and set(result.table["method"]) >= {
        PROBE,
        SWAP,
        KNOCKOUT,
        LENS,
    }
    found = FlowClaims.of(result.claims)
    assert (found.layers(READ), found.layers(CARRY)) == ((2,), (4,)) and found.layers(FOUND)
    text = (
        "layer 2 reads and is needed, by question<-image: the effect of patching the image on the answer's lead "
        "is lost "
    )
    assert any(each.startswith(text) for each in result.findings)
    assert not named_without_claim(result.findings, result.claims)
    drawn = redraw(finished)
    assert set(drawn) == {"flow_map", "examples"}
    for name, figure in drawn.items():
        saved = json.loads((finished / "figures" / f"{name}.json").read_text())
        assert len(figure.data) == len(saved["data"]) and figure.layout.title.text == saved["layout"]["title"]["text"]
    marked = {note.text for note in drawn["flow_map"].layout.annotations}
    assert {"<b>read</b>"} <= marked and not any("suppress</b>" in text for text in marked)


def test_every_gate_is_tried_but_nulls_have_no_probes(finished):
    claims = [claim for claim in Result.load(finished).claims if claim.made]
    tried = {(claim.kind, gate.name): gate.verdict for claim in claims for gate in claim.gates}
    for name in (TWIN, SHUFFLED_ANSWERS):
        assert tried[READ_NEEDED, name] is tried[CARRY, name] is True
        assert tried[FOUND, name] is None


def test_the_page_shows_one_example_at_a_time_and_knows_the_reading_head(finished):
    pages = Result.load(finished).provenance["pages"]
    assert [page["example"] for page in pages] == ["0", "1"]
    assert pages[0]["head"].startswith("layer 2 head 1, from question (cut alone: -")
    assert pages[0]["head"].endswith("logits on 22 examples that did not choose it)")
    figure = redraw(finished)["examples"]
    buttons, steps = figure.layout.updatemenus[0].buttons, figure.layout.sliders[0].steps
    assert [sum(button.args[0]["visible"]) for button in buttons] == [11, 11] and len(steps) == 7
    assert not any(one and other for one, other in zip(*(b.args[0]["visible"] for b in buttons), strict=True))
    restyled, targets = steps[3].args
    assert np.allclose(np.ravel(restyled["z"][0]), pages[0]["probed"][3]) and list(targets) == [0, 1, 11, 12]


def test_pages_mark_the_patches_that_are_sinks(finished):
    result = Result.load(finished)
    pages = result.provenance["pages"]
    assert all(page["sinks"] == [""] * 16 for page in pages), "none is planted"
    labels = ["L" if number == 5 else "V" if number == 9 else "" for number in range(16)]
    marked = [page | {"sinks": labels} for page in pages]
    figure = example_pages(dataclasses.replace(result, provenance=result.provenance | {"pages": marked}))
    crosses = [trace for trace in figure.data if trace.type == "scatter" and trace.marker.symbol == "x-thin"]
    assert len(crosses) == 6 and {tuple(trace.text) for trace in crosses} == {("L", "V")}
    boxes = [pages[0]["boxes"][number] for number in (5, 9)]
    assert list(crosses[0].x) == [(box[0] + box[2]) / 2 for box in boxes]


def test_a_run_killed_on_the_way_resumes_to_the_same_bytes(folders, finished, monkeypatch):
    given = ["--model", folders / "model", "--data", folders / "data", "--pages", "2", "--batch", "16", "--null", "2"]
    killed_at(monkeypatch, study, "flow", 2)
    assert command(experiment, *given, "--out", folders / "killed") == 130
    assert command(experiment, *given, "--out", folders / "killed", "--resume") == 0
    for name in ("result.parquet", "summary.csv"):
        assert (folders / "killed" / name).read_bytes() == (finished / name).read_bytes()


def test_without_probes_and_pages(folders, capsys):
    given = [
        "--model",
        folders / "model",
        "--data",
        folders / "data",
        "--no-probe",
        "--pages",
        "0",
        "--n",
        "6",
        "--gates",
        "quick",
    ]
    assert command(experiment, *given, "--out", folders / "bare") == 0
    result = Result.load(folders / "bare")
    assert PROBE not in set(result.table["method"]) and set(redraw(folders / "bare")) == {"flow_map"}
    assert not any(each.startswith("decodable") for each in result.findings)
    assert command(experiment, *given, "--dry-run") == 0
    assert "57 cells x 6 examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--pages", "-1"], "pages is -1 and every is 1; they must be at least 0 and 1"),
        (["--every", "0"], "pages is 8 and every is 0"),
        (["--window", "0"], "a window of 0 layers is none"),
        (["--probe-data", "nowhere"], "data 'nowhere' is neither a folder with pairs.jsonl nor one of"),
        (["--n", "4"], "a probe needs 4 of each answer: give more examples, another --probe-data, or --no-probe"),
        (["--n", "1", "--no-probe"], "gives 1 example; at least two are needed"),
    ],
)
def test_wrong_use_is_one_clear_line(folders, tmp_path, capsys, options, line):
    given = ["--model", folders / "model", "--data", folders / "data", *options, "--out", tmp_path / "out"]
    assert command(experiment, *given) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and line in error and not (tmp_path / "out" / "report.html").exists()


def test_help_tells_its_options():
    assert_help_tells(experiment, ["--probe-data", "--pages", "--window", "--resume"])
