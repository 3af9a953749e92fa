"""True effects of plantings, the table of grades, and the command."""

import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pytest

from experiments import validate
from tests.helpers import command
from tests.validate.test_grading import PLANTINGS, made, scores, told
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.interventions.specification import Replace
from vlm_mech.organism.planted import true_effect
from vlm_mech.organism.planted_recipe import COLOURS
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw
from vlm_mech.validate import grading, overview
from vlm_mech.validate.adapters import EDITS, METHODS
from vlm_mech.validate.examination import Job, _environment, completed, examine, examine_all, random_answers, shown
from vlm_mech.validate.grading import CARRYING, COVERAGE, MATCHED, SHARP, SUPPRESSING, TOP, WRITING  # fmt: skip
from vlm_mech.validate.statements import WHOLE
from vlm_mech.validate.true_effects import planted_points, population, true_cells

# True effects


def test_population_is_the_true_effect_of_every_planted_cell():
    planted = made("two-hop")
    points = {name: planted_points(planted.truth, name, 6) for name in METHODS}
    assert points["logit lens"] == points["probe"] == ()
    assert [tuple(value for _, value in point.axes) for point in points["layer swap"]] == [
        ("image", 2, WHOLE), ("question", 4, WHOLE), ("last", 5, WHOLE)
    ]  # fmt: skip
    wanted = [(EDITS["layer swap"], points["layer swap"][0]), (EDITS["knockout"], points["knockout"][1])]
    found = population(planted, wanted, n=48, seed="some", batch=32)
    site = Site("llm.resid_pre", 2)
    swap = true_effect(planted, lambda pairs: Replace(site, "image", source=pairs.counterfactual), n=48, seed="some")
    cut = true_effect(planted, lambda pairs: EDITS["knockout"](points["knockout"][1], ()), n=48, seed="some")
    assert found == pytest.approx(np.array([swap.mean, cut.mean]), abs=1e-4)
    assert found[0] < -25 and found[1] < -10


def test_intervals_hold_effects_known_from_many_examples():
    planted = made("two-hop")
    true = true_cells(planted, ("layer swap", "head interchange", "attribution"), n=128)
    assert true.groupby("method").size().to_dict() == {"attribution": 2, "head interchange": 2, "layer swap": 3}
    for method in ("layer swap", "head interchange"):
        own = true[true["method"] == method].drop(columns="method")
        assert scores("two-hop", told("two-hop", method), true=own)[COVERAGE] > 0.4
        assert scores("two-hop", told("two-hop", method), true=own.assign(true=-own["true"]))[COVERAGE] == 0


def test_random_answers_have_nothing_to_do_with_the_pictures():
    pairs = made("null").pairs(60)
    drawn = random_answers(pairs, 0, COLOURS)
    assert random_answers(pairs, 0, COLOURS).answer == drawn.answer != random_answers(pairs, 1, COLOURS).answer
    assert all(pair.answer != pair.counterfactual_answer for pair in drawn)
    assert set(drawn.answer) == set(COLOURS)
    assert sum(one == other for one, other in zip(drawn.answer, pairs.answer, strict=True)) < 25
    assert [pair.image for pair in drawn] == [pair.image for pair in pairs]


# Tables, sentences, command line


def test_every_planting_has_examples_of_its_own():
    """Otherwise one unlucky draw would count as many."""
    jobs = [
        Job(kind, number, n_examples=8)
        for kind in ("matched null", "matched null, random answers")
        for number in (1, 2)
    ]
    pictures = [[pair.image.tobytes() for pair in shown(job, PLANTINGS["null"])] for job in jobs]
    assert all(one != other for number, one in enumerate(pictures) for other in pictures[:number])
    one, other = (shown(job, PLANTINGS["null"]) for job in jobs[2:])
    assert one.answer != other.answer


def test_the_table_counts_and_says_what_does_not_apply():
    def row(example: str, method: str, grade: str, hits: int, n: int) -> dict:
        about = {"example": example, "set": "plain", "grade": grade, "method": method}
        return about | {"score": hits / n, "score_baseline": 0.5, "hits": hits, "of": n}

    rows = [row("9", "knockout", TOP, 1, 2), row("10", "knockout", TOP, 2, 2), row("10", "knockout", CARRYING, 1, 1)]
    table = completed(pd.DataFrame(rows))
    assert table["example"].drop_duplicates().tolist() == ["9", "10"] and len(table) == 4
    assert table[table["score"].isna()][["example", "grade", "skipped"]].to_numpy().tolist() == [
        ["9", CARRYING, "does not apply"]
    ]
    graded = overview.grades(Result("grades", table, overview.AXES, (overview.METRIC,))).set_index("grade")
    assert graded.loc[TOP, ["n", "rate"]].tolist() == [4, 0.75]
    # Clopper and Pearson for 3 of 4: 0.1941 to 0.9937.
    assert graded.loc[TOP, ["low", "high"]].tolist() == pytest.approx([0.1941, 0.9937], abs=1e-4)
    assert graded.loc[CARRYING, ["n", "rate", "low", "high"]].tolist() == pytest.approx([1, 1, 0.025, 1])


def test_sentences_name_what_breaks_its_promise():
    rows = [
        ("hard", COVERAGE, "knockout", 100, 0.9, 0.8, 0.95, 0.95),
        ("hard", COVERAGE, "layer swap", 100, 0.95, 0.9, 1, 0.95),
    ]
    rows += [
        (SHARP, grading.FALSE, "knockout", 20, 0.1, 0, 0.3, 0.05),
        (MATCHED, grading.TRACE, "knockout", 20, 1.0, 0.8, 1.0, math.nan),
        (MATCHED, grading.BEYOND, "lens", 20, 0.1, 0, 0.3, 0.05),
        (MATCHED, grading.CLAIMS, "knockout", 20, 0.05, 0, 0.2, 0.05),
    ]
    table = pd.DataFrame(rows, columns=["set", "grade", "method", "n", "rate", "low", "high", "chance"])
    *_, covered, alarmed, large, claimed = overview.findings(table, n_examples=8)
    assert covered.endswith("cells: knockout 90.0 %.")
    assert alarmed.endswith(f"find: {SHARP}, knockout 10 % (0 to 30 %, n = 20).")
    assert large.endswith(f"find: {MATCHED}, lens 10 % (0 to 30 %, n = 20).") and claimed.endswith("find: none.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "easy"}, "set 'easy' is not known; use one of plain, matched null"),
        ({"methods": ("magic",)}, "method 'magic' is not known; use one of layer swap"),
        ({"n_examples": 2}, "2 examples, 512 for the true effects, first seed 0; they must be at least 8, 2 and 0"),
    ],
)
def test_wrong_jobs_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        Job(**{"kind": "plain", "recipe": 0} | change)
    with pytest.raises(UsageError, match="workers is 0"):
        next(examine_all([Job("plain", 0)], workers=0))


def test_a_job_gives_the_same_scores_again():
    job = Job("plain", 0, ("logit lens",), n_examples=8, n_population=8)
    (one, about), (other, _) = examine(job), examine(job)
    pd.testing.assert_frame_equal(one, other)
    assert about["recipe"] == 0 and about["says"] == "prior"
    assert set(one["grade"]) == {WRITING, SUPPRESSING, grading.FALSE_RUN, grading.POWER}


def test_the_command_line_leaves_a_table_of_grades_and_resumes(tmp_path, capsys, monkeypatch):
    options = (
        "--n",
        1,
        "--first-seed",
        0,
        "--workers",
        1,
        "--examples",
        8,
        "--population",
        16,
        "--out",
        tmp_path / "out",
    )
    options += ("--sets", "plain", "matched null", "--methods", "knockout", "logit lens")
    assert command(validate, *options) == 0
    assert "reading layers" in capsys.readouterr().out
    result = Result.load(tmp_path / "out")
    graded = overview.grades(result)
    assert list(graded.columns) == ["set", "grade", "method", "n", "rate", "low", "high", "chance"]
    assert set(graded["method"]) == {"knockout", "logit lens"} and set(graded["set"]) == {"plain", "matched null"}
    assert [each["recipe"] for each in result.provenance["plantings"]] == [0, 0]
    assert len(pd.read_csv(tmp_path / "out" / "grades.csv")) == len(graded)
    drawn = redraw(tmp_path / "out")
    for name in ("glance", "grades"):
        assert drawn[name].to_json() == (tmp_path / "out" / "figures" / f"{name}.json").read_text()
    (heat,) = drawn["glance"].data
    every = graded[graded["grade"].isin(grading.FALSE_ALARMS) & (graded["method"] == "knockout")]
    name, alarm = every["grade"].iloc[0], every[every["grade"] == every["grade"].iloc[0]]
    share, at = (alarm["rate"] * alarm["n"]).sum() / alarm["n"].sum(), list(heat.x).index(f"{name} (alarm)")
    row = list(heat.y).index("knockout")
    assert heat.z[row][at] == pytest.approx(1 - share) and heat.text[row][at] == f"{100 * share:.0f} %"
    monkeypatch.setattr("vlm_mech.validate.examination.examine", None)
    assert command(validate, *options, "--resume") == 0, "a finished run is not run again"


def test_wrong_use_is_one_line(tmp_path, capsys):
    for wrong, message in (
        (("--n", 0), "n is 0 and sets are plain"),
        (("--model", "organism"), "only planted models are examined"),
        (("--sets", "easy"), "set 'easy' is not known"),
        (("--first-seed", -1), "first seed -1"),
    ):
        assert command(validate, "--out", tmp_path / "out", *wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_workers_find_variables_that_are_gone_afterwards(monkeypatch):
    monkeypatch.setenv("VLM_MECH_OWN", "mine")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with _environment({"VLM_MECH_NEW": "1", "VLM_MECH_OWN": "theirs"}):
            found = [pool.submit(os.getenv, name) for name in ("VLM_MECH_NEW", "VLM_MECH_OWN")]
        assert "VLM_MECH_NEW" not in os.environ and os.environ["VLM_MECH_OWN"] == "mine"
        assert [each.result() for each in found] == ["1", "mine"]
