"""Planted arbiters as a family of their own: which sets go with which methods, and what is graded."""

import dataclasses
import math

import pandas as pd
import pytest

from tests.organism.test_arbiters import made
from vlm_mech.errors import UsageError
from vlm_mech.methods.arbitration.data import HEAD, MLP, TOKEN, Part
from vlm_mech.methods.arbitration.find import FEW, UNREAD, WINS, Arbitration
from vlm_mech.results.result import Metric, Result
from vlm_mech.validate.adapters import ARBITRATION, METHODS
from vlm_mech.validate.arbiters import SETS, grade_arbiter
from vlm_mech.validate.examination import Job, completed, examine, methods_for, sets_for
from vlm_mech.validate.grading import ARBITER, ARBITER_CLAIMED, ARBITER_PART, REASON

PARTS = {"route": Part(HEAD, 2, 2), "late head": Part(HEAD, 5, 3), "mlp": Part(MLP, 4), "sink": Part(TOKEN, text="?")}
"""What is planted in `tests.organism.test_arbiters`."""


def said(kind, part=None, why=""):
    row = {"example": "0", "layer": 0, "share": 1.0, "share_baseline": 1.0}
    result = Result("told", pd.DataFrame([row]), ("layer",), (Metric("share", "share", "of nothing"),))
    return Arbitration(kind, part, why, pd.DataFrame(), result)


@pytest.mark.parametrize("kind", PARTS)
def test_kind_and_part_are_graded(kind):
    truth = made(kind).truth
    right = {name: score.hits for name, score in grade_arbiter(said(kind, PARTS[kind]), truth).items()}
    assert right == {ARBITER: 1, ARBITER_PART: 1}
    for other, part in PARTS.items():
        if other != kind:
            assert not any(score.hits for score in grade_arbiter(said(other, part), truth).values())
            wrong = grade_arbiter(said(kind, part), truth)
            assert (wrong[ARBITER].hits, wrong[ARBITER_PART].hits) == (1, 0)
    assert not any(score.hits for score in grade_arbiter(said("none", None, UNREAD), truth).values())


@pytest.mark.parametrize(("kind", "why", "other"), [("none", WINS, FEW), ("blind", UNREAD, WINS)])
def test_nulls_are_graded_by_false_alarms_and_reasons(kind, why, other):
    truth = dataclasses.replace(made("mlp").truth, kind=kind, arbiter=())
    right, wrong = (grade_arbiter(said("none", None, each), truth) for each in (why, other))
    assert (right[ARBITER_CLAIMED].hits, right[REASON].hits, wrong[REASON].hits) == (0, 1, 0)
    assert grade_arbiter(said("mlp", PARTS["mlp"]), truth)[ARBITER_CLAIMED].hits == 1
    assert math.isnan(right[REASON].chance) and right[ARBITER_CLAIMED].chance == 0.05


def test_sets_follow_from_methods_and_the_other_way_round():
    assert sets_for(()) == sets_for(("knockout",)) == ("plain", "matched null, random answers", "hard")
    assert sets_for(("arbitration",)) == tuple(SETS) and len(SETS) == 6
    assert sets_for(("arbitration", "knockout")) == (*sets_for(()), *SETS)
    assert methods_for("plain", ()) == tuple(METHODS) and methods_for("arbiter: mlp", ()) == tuple(ARBITRATION)
    assert methods_for("plain", ("arbitration", "knockout")) == ("knockout",)
    for kind, method in (("plain", "arbitration"), ("arbiter: sink", "knockout")):
        with pytest.raises(UsageError, match=f"method '{method}' does not go with the set '{kind}'"):
            Job(kind, 0, methods_for(kind, (method,)))


def test_an_arbiter_is_examined():
    table, notes = examine(Job("arbiter: late head", 5000, ("arbitration",), n_examples=24))
    assert table["score"].tolist() == [1, 1] and table["grade"].tolist() == [ARBITER, ARBITER_PART]
    found = notes["found"]["arbitration"]
    assert found["kind"] == notes["says"] == "late head" and found["n"]["n"] == 48 and notes["accuracy"] == 1
    assert completed(table)["skipped"].tolist() == ["", ""]
