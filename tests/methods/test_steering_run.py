"""`python -m experiments.steer`: what it leaves, that it goes on after a kill, and what is refused."""

import json

import pytest

from experiments import steer
from tests.helpers import assert_help_tells, command, killed_at
from vlm_mech import Direction
from vlm_mech.results.result import Result
from vlm_mech.runs.workspace import Workspace

SMALL = ("--n", "20", "--layers", "3", "--spans", "last", "--doses", "-2", "0", "2", "--n-random", "2")
SMALL = (*SMALL, "--n-others", "1", "--others", "scenes/kind", "--n-side", "4", "--generate", "2", "--gates", "none")
SMALL = (*SMALL, "--batch", "4")


def test_a_run_leaves_the_direction_and_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(steer, *SMALL, "--out", whole) == 0
    kept = {path.name for path in whole.iterdir()}
    assert {"result.parquet", "summary.csv", "claims.json", "report.html", "direction.safetensors"} < kept
    assert {"slopes.csv", "side_effects.csv", "written.csv"} < kept
    direction, told = (
        Direction.load(whole / "direction.safetensors"),
        json.loads((whole / "provenance.json").read_text()),
    )
    assert (direction.site.layer, direction.span, direction.dose) == (3, "last", told["direction"]["dose"])
    assert told["direction"]["n_pairs"] == {"train": 8, "validation": 4, "test": 8}
    result = Result.load(whole)
    assert set(result.table["example"]) == set(direction.parts["test"])
    assert any("0 of 2 random directions" in each for each in result.findings)
    with monkeypatch.context() as patch:
        killed_at(patch, Workspace, "keep", 2)
        assert command(steer, *SMALL, "--out", killed) == 130
    assert command(steer, *SMALL, "--out", killed, "--resume") == 0
    for name in ("result.parquet", "summary.csv", "slopes.csv", "direction.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_what_it_will_need_is_said_and_nothing_run(tmp_path, capsys):
    assert command(steer, *SMALL, "--dry-run", "--out", tmp_path / "run") == 0
    assert "forward" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_help_tells_its_options():
    assert_help_tells(steer, ("--contrast", "--doses", "--n-random", "--others"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--n", "4"), "two of each are needed"),
        (("--contrast", "up"), "contrast 'up' is none of"),
        (("--doses", "1", "2"), "0 and both signs are needed"),
        (("--others", "scenes/left-right"), "is what the direction is about"),
        (("--n-random", "0"), "n_random is 0"),
        (("--generate", "-1"), "must be 0 or more"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(tmp_path, capsys, given, told):
    assert command(steer, *SMALL, *given, "--out", tmp_path / "run") == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()
