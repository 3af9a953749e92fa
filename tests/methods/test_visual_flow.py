"""The map of the visual flow: statistics of layers by hand, claims on made-up numbers and planted models, the run."""

import dataclasses
import functools
import json

import numpy as np
import pandas as pd
import pytest

from experiments import visual_flow as experiment
from tests.helpers import assert_help_is_light, command, killed_at
from tests.zoo import ZOO
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.methods.visual_flow import study
from vlm_mech.methods.visual_flow.claims import all_cells, claims, deepest, largest, layers_of, overtaken, where
from vlm_mech.methods.visual_flow.data import Cases, cases_of, edges, flow_edges, flow_scan, spans
from vlm_mech.methods.visual_flow.findings import findings
from vlm_mech.methods.visual_flow.probes import patch_probabilities, probe_examples, probe_rows
from vlm_mech.methods.visual_flow.study import (
    AXES,
    CONTROL,
    INPUT,
    KNOCKOUT,
    LENS,
    METRICS,
    PROBE,
    SHUFFLED,
    SWAP,
    as_rows,
    flow,
    swapped_sites,
)
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.planted import Planted, coloured_cells, plant
from vlm_mech.organism.planted_recipe import Head, Recipe, matched_null
from vlm_mech.results import metrics
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.validate.grading import grade
from vlm_mech.validate.visual_flow import flow_map as graded_map

TWO_HOP = Recipe(3, 6, reads=(Head(2, 1),), carries=(Head(4, 3),), decoys=(Head(1, 0, 0),), priors=(3, 1, 0, 5, 4, 2))
PLANTINGS = {
    "two-hop": TWO_HOP,
    "suppressed": dataclasses.replace(TWO_HOP, reads=(Head(3, 1),), carries=(), suppressor=Head(5, 0, 2.5)),
    "backup": dataclasses.replace(TWO_HOP, carries=(), backup=Head(4, 3)),
}
PLANTINGS["null"] = matched_null(PLANTINGS["suppressed"])
N, N_PROBED = 14, 24
"""So few that every pattern of signs is tried; probes need more."""


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


# Layers as statistics


def test_statistics_of_layers_by_hand():
    means = np.array([[1.0, 3.0, 3.0, -1.0], [-1.0, 2.0, -2.0, -3.0], [-1.0, -1.0, -1.0, -1.0], [0.0, 1.0, 2.0, 3.0]])
    assert largest(means).tolist() == [1, 1, 0, 3]
    assert deepest(means).tolist() == [3, 3, 0, -1]
    assert overtaken(means).tolist() == [3, 2, 0, -1]


def test_the_interval_of_a_layer_by_hand():
    """Of two examples, a resample holds the first twice, both, or the second twice: one, two and one in four."""
    values, groups = np.array([[0.0, 5.0, 0.0], [0.0, 0.0, 1.0]]), np.arange(2)
    found = where(values, groups, largest, [4, 6, 8], n_resamples=4000)
    assert (found.at, found.low, found.high, found.share) == (6, 6, 8, 1.0)
    # Half of the resamples are negative in the mean somewhere: those with the first example twice, and both.
    values = np.array([[1.0, -3.0, -1.0], [1.0, 1.0, 0.5]])
    found = where(values, groups, overtaken, [4, 6, 8], n_resamples=4000)
    assert (found.at, found.low, found.high) == (6, 6, 6)
    assert found.share == pytest.approx(0.75, abs=0.03)
    nowhere = where(np.ones((2, 3)), groups, overtaken, [4, 6, 8])
    assert (nowhere.at, nowhere.low, nowhere.share) == (None, None, 0.0)
    # Examples of one group are drawn together, so that nothing is left to chance.
    together = where(values, np.zeros(2, int), overtaken, [4, 6, 8])
    assert (together.at, together.share) == (6, 1.0)


# Claims on made-up numbers

DEPTHS = (INPUT, 0, 1, 2, 3)
IMAGE, LAST = (-10.0, -10.0, -10.0, -1.0, 0.0), (0.0, 0.0, 0.0, -9.0, -10.0)
LEADS = (0.0, 0.0, 4.0, 5.0, -6.0)


def made_up(image=IMAGE, last=LAST, question=(0.0,) * 5, cuts=None, leads=LEADS, spread=0.2, n=12) -> Result:
    """A map of four blocks whose numbers are these means and a spread about them, balanced over the examples."""
    rng = np.random.default_rng(0)
    cuts = {"last<-image": (0.0, 0.0, -8.0, 0.0)} if cuts is None else cuts
    curves = [(SWAP, span, DEPTHS, curve) for span, curve in zip(spans(), (image, question, last), strict=True)]
    for edge in edges():
        curves.append((KNOCKOUT, edge, DEPTHS[1:], cuts.get(edge, (0.0,) * 4)))
        curves.append((CONTROL, edge, DEPTHS[1:], (0.0,) * 4))
    rows = []
    for method, span, layers, curve in [*curves, (LENS, "last", DEPTHS, leads)]:
        for layer, mean in zip(layers, curve, strict=True):
            noise = rng.normal(0, spread, n // 2)
            for example, value in enumerate(mean + np.concatenate([noise, -noise])):
                row = {"example": f"e{example}", "group": f"e{example}", "method": method, "span": span}
                row |= {"stream": "llm", "layer": layer, "skipped": ""}
                if method == LENS:
                    row |= {"lead": value, "lead_baseline": 0.0}
                else:
                    row |= {"logit_diff": 5 + value, "logit_diff_baseline": 5.0}
                if method == SWAP:
                    row |= {"recovered": value / -10, "recovered_baseline": 0.0}
                rows.append(row)
    return Result("visual flow", as_rows(pd.DataFrame(rows)), AXES, METRICS)


def test_a_layer_reads_where_the_swap_of_the_image_stops_mattering():
    said = claims(made_up())
    assert layers_of(said.reads) == (2, 3) and layers_of(said.writes) == (2, 3)
    assert [claim.needed for claim in said.reads] == [True, False]
    assert said.reads[0].effect == pytest.approx(9.0) and said.reads[0].low < 9.0 < said.reads[0].high
    assert (said.reading.at, said.reading.low, said.reading.high, said.reading.share) == (2, 2, 2, 1.0)
    assert said.carries == () and said.route == "direct" and said.reads[0].n == 12
    # Half of the whole is 5 logits: a twentieth of that is the least that counts.
    small = claims(made_up(image=(-10.0, -9.8, -9.8, -0.2, 0.0), spread=0.02))
    assert layers_of(small.reads) == (2,)


def test_a_layer_carries_where_the_question_holds_the_answer_and_a_cut_from_it_hurts():
    cuts = {"question<-image": (0.0, -8.0, 0.0, 0.0), "last<-question": (0.0, 0.0, 0.0, -8.0)}
    last, image = (0.0, 0.0, 0.0, 0.0, -10.0), (-10.0, -10.0, 0.0, 0.0, 0.0)
    said = claims(made_up(image, last, (0.0, 0.0, -10.0, -10.0, 0.0), cuts))
    assert (layers_of(said.reads), layers_of(said.carries), said.route) == ((1,), (3,), "two-hop")
    assert claims(made_up(image, last, cuts=cuts)).carries == ()


def test_a_layer_suppresses_only_after_the_lead_had_risen():
    said = claims(made_up())
    assert layers_of(said.suppresses) == layers_of(said.pushes) == (3,)
    assert said.suppressing.at == 3 and said.overtaking.at == 3 and said.end.effect == pytest.approx(-6.0)
    fallen = claims(made_up(leads=(0.0, -3.0, -4.0, -4.0, -2.0)))
    assert fallen.suppresses == () and fallen.suppressing is None and layers_of(fallen.pushes) == (0, 1)
    assert (fallen.overtaking.at, fallen.overtaking.low, fallen.overtaking.high) == (0, 0, 0)
    ahead = claims(made_up(leads=(0.0, 0.0, 4.0, 5.0, 2.0)))
    assert layers_of(ahead.suppresses) == (3,) and ahead.overtaking is None
    # However sure a tie is, the rival does not lead by a twentieth of a logit.
    assert claims(made_up(leads=(0.0, 0.0, 4.0, 5.0, -0.05), spread=0.01)).overtaking is None


def test_nothing_is_claimed_of_noise():
    nothing = (0.0,) * 5
    said = claims(made_up(nothing, nothing, cuts={}, leads=nothing, spread=2.0))
    assert (said.reads, said.writes, said.carries, said.suppresses, said.pushes) == ((),) * 5
    assert said.reading is said.suppressing is said.overtaking is None and said.route == "none"


def test_all_cells_are_corrected_together():
    cells = all_cells(made_up())
    # Four blocks: read, written, 5 x held by the question, 3 edges, lead changed and risen; and the lead at the end.
    assert len(cells) == 4 + 4 + 5 + 3 * 4 + 4 + 4 + 1
    # The smallest p of 12 examples is that of two of 2 ** 12 patterns of signs.
    assert cells["p"].min() == pytest.approx(len(cells) * 2 / 2**12)


def test_sentences_follow_from_the_numbers():
    result = made_up()
    pairs = made("two-hop").pairs(12)
    told = findings(result, Cases(pairs, tuple(pairs.counterfactual_answer), "the usual answer"), claims(result))
    assert "no longer after block 2 (95 % interval 2 to 2), one of the last token first after block 2" in told[1]
    assert (
        "cutting last<-image lowers the answer's lead over the other image's at layers 2, most at 2, by -8.0" in told[2]
    )
    assert told[3].endswith(
        "cutting question<-image changes the answer's lead over the other image's at no layer significantly."
    )
    assert "layers 2 (+9.00" in told[6] and "where cuts hurt too; layers 3 (+1.00" in told[6]
    assert "falls across layers 3 (-11.00" in told[8]
    assert "the usual answer leads for good from the output of block 3 on (95 % interval 3 to 3" in told[9]
    with pytest.raises(WorkError, match="gives 1 example; at least two are needed"):
        findings(result, Cases(pairs[:1], ("red",), "a rival"), claims(result))


# Planted models


@pytest.mark.parametrize("name", ["two-hop", "suppressed", "backup"])
def test_planted_layers_are_named_and_no_others(name):
    said, recipe = claims(mapped(name)[0]), PLANTINGS[name]
    assert layers_of(said.reads) == tuple(head.layer for head in recipe.reads) == (said.reading.at,)
    assert said.reads[0].needed is (name != "backup")
    assert layers_of(said.carries) == tuple(head.layer for head in recipe.carries)
    assert layers_of(said.writes) == tuple(head.layer for head in recipe.carries or recipe.reads)
    suppressed = name == "suppressed"
    assert layers_of(said.suppresses) == ((5,) if suppressed else ())
    assert (said.overtaking is not None and said.overtaking.at == 5) is suppressed


def test_a_null_claims_nothing_of_the_picture():
    """Its prior answer is planted all the same, but nothing had risen that it could suppress."""
    said = claims(mapped("null")[0])
    assert (said.reads, said.writes, said.carries, said.suppresses) == ((),) * 4


def test_the_adapter_is_graded_as_planted():
    for name, kind in (("suppressed", "plain"), ("null", "matched null")):
        planted = made(name)
        found = graded_map(planted, planted.pairs(N, seed=1))
        scores = grade(found, planted.truth, kind, n_layers=6, n_heads=4)
        wrong = {each for each, score in scores.items() if score.value != (kind == "plain")}
        assert wrong <= {"trace significant", "suppression where none is"}
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
    assert [str(site) for site in swapped_sites(vlm)][:2] == ["llm.resid_pre[0]", "llm.resid_post[0]"]


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
    cells = claims(result).cells.set_index(["kind", "span", "layer"])
    assert cells.loc[("edge cut", "last<-image"), "n"].tolist() == [0, 4, 0, 4]
    assert cells.loc[("edge cut", "last<-image"), "effect"].isna().tolist() == [True, False] * 2


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
    sites = tuple(swapped_sites(planted.vlm)[:2])
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
    for pair in planted.pairs(N_PROBED, seed=3):
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
    given = ["--model", folders / "model", "--data", folders / "data", "--pages", "2", "--batch", "16"]
    assert command(experiment, *given, "--out", out) == 0
    return out


def test_a_run_leaves_a_map_and_a_page(finished):
    result = Result.load(finished)
    assert result.table["example"].nunique() == N_PROBED and set(result.table["method"]) >= {
        PROBE,
        SWAP,
        KNOCKOUT,
        LENS,
    }
    said = result.provenance["claims"]
    assert [claim["layer"] for claim in said["reads"]] == [2] and [claim["layer"] for claim in said["carries"]] == [4]
    assert any(
        "read: what a swap of the image does is lost, in logits, across layers 2 (" in each for each in result.findings
    )
    drawn = redraw(finished)
    assert set(drawn) == {"flow_map", "examples"}
    for name, figure in drawn.items():
        saved = json.loads((finished / "figures" / f"{name}.json").read_text())
        assert len(figure.data) == len(saved["data"]) and figure.layout.title.text == saved["layout"]["title"]["text"]
    marked = {note.text for note in drawn["flow_map"].layout.annotations}
    assert {"<b>read</b>"} <= marked and not any("suppress</b>" in text for text in marked)


def test_the_page_shows_one_example_at_a_time_and_knows_the_reading_head(finished):
    pages = Result.load(finished).provenance["pages"]
    assert [page["example"] for page in pages] == ["0", "1"]
    assert pages[0]["head"].startswith("layer 2 head 1, from question (cut alone: -")
    figure = redraw(finished)["examples"]
    buttons, steps = figure.layout.updatemenus[0].buttons, figure.layout.sliders[0].steps
    assert [sum(button.args[0]["visible"]) for button in buttons] == [8, 8] and len(steps) == 7
    assert not any(one and other for one, other in zip(*(b.args[0]["visible"] for b in buttons), strict=True))
    restyled, targets = steps[3].args
    assert np.allclose(np.ravel(restyled["z"][0]), pages[0]["probed"][3]) and list(targets) == [0, 1, 8, 9]


def test_a_run_killed_on_the_way_resumes_to_the_same_bytes(folders, finished, monkeypatch):
    given = ["--model", folders / "model", "--data", folders / "data", "--pages", "2", "--batch", "16"]
    killed_at(monkeypatch, study, "flow", 2)
    assert command(experiment, *given, "--out", folders / "killed") == 130
    assert command(experiment, *given, "--out", folders / "killed", "--resume") == 0
    for name in ("result.parquet", "summary.csv"):
        assert (folders / "killed" / name).read_bytes() == (finished / name).read_bytes()


def test_without_probes_and_pages(folders, capsys):
    given = ["--model", folders / "model", "--data", folders / "data", "--no-probe", "--pages", "0", "--n", "6"]
    assert command(experiment, *given, "--out", folders / "bare") == 0
    result = Result.load(folders / "bare")
    assert PROBE not in set(result.table["method"]) and set(redraw(folders / "bare")) == {"flow_map"}
    assert not any(each.startswith("decodable") for each in result.findings)
    assert command(experiment, *given, "--dry-run") == 0
    assert "57 cells x 6 examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--pages", "-1"], "pages is -1 and every is 1; 0 and 1 are the least"),
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


def test_help_is_light():
    assert_help_is_light(experiment, ["--probe-data", "--pages", "--window", "--resume"])
