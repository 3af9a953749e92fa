"""A run that is taken up again is made of the same model and data, and nobody else writes in its folder meanwhile."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.runs import fake_run
from tests.runs.test_contract import ROOT, command, contents, killed_after
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.runs import workspace
from vlm_mech.runs.ingredients import ingredients


@pytest.fixture
def folders(tmp_path):
    """A model's folder, and one of data with a picture that lies elsewhere."""
    for name in ("model", "data", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"one")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "pictures" / "a.png")
    line = {"image": "../pictures/a.png", "question": "?"}
    (tmp_path / "data" / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def _run(folders, *arguments, **how):
    given = ("--model", folders / "model", "--data", folders / "data", "--out", folders / "data" / "out")
    return command(*given, *arguments, **how)


CHANGES = [
    ("model", lambda path: (path / "model" / "model.safetensors").write_bytes(b"two")),
    ("data", lambda path: (path / "data" / "pairs.jsonl").write_text('{"image": "../pictures/a.png"}\n')),
    ("data", lambda path: Image.new("RGB", (4, 4), "blue").save(path / "pictures" / "a.png")),
]


@pytest.mark.parametrize(("what", "change"), CHANGES)
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_not_resumed_with_another_model_or_data(folders, capsys, what, change, finished):
    assert _run(folders, **({} if finished else {"experiment": killed_after(1)})) == (0 if finished else 130)
    before = contents(folders / "data" / "out")
    kept = {name: content for name, content in before.items() if not name.endswith("lock")}
    change(folders)
    capsys.readouterr()
    assert _run(folders, "--resume") == 2
    error = capsys.readouterr().err
    assert f"was made of another {what}, which changed since" in error and error.count("\n") == 1
    after = contents(folders / "data" / "out")
    assert all(after[name] == content for name, content in kept.items())


def test_a_run_whose_model_and_data_stayed_is_resumed(folders, capsys):
    assert _run(folders, experiment=killed_after(1)) == 130
    assert _run(folders, "--resume") == 0 and _run(folders, "--resume") == 0
    assert "this run is already complete" in capsys.readouterr().out
    made_of = json.loads((folders / "data" / "out" / "provenance.json").read_text())["made_of"]
    assert set(made_of) == {"model", "data"}


def test_what_lies_beside_the_files_that_are_read_does_not_count(folders):
    options = {"model": str(folders / "model"), "n": 3, "kind": "plain", "spans": ["a"], "stem": ""}
    before = ingredients(options, besides=folders / "out")
    (folders / "model" / "runs").mkdir()
    (folders / "model" / "runs" / "x.json").write_text("{}")
    assert ingredients(options, besides=folders / "out") == before and set(before) == {"model"}


def test_the_base_of_an_adapter_counts(folders):
    adapter = folders / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folders / "model")}))
    before = ingredients({"tuned": str(adapter)}, besides=folders / "out")
    (folders / "model" / "model.safetensors").write_bytes(b"two")
    assert ingredients({"tuned": str(adapter)}, besides=folders / "out") != before


HOLD = """
import sys
from pathlib import Path
from vlm_mech.runs.workspace import Workspace
with Workspace(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_which_a_run_goes_on_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out, experiment=killed_after(2)) == 130
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert other.stdout.readline() == "held\n"
    capsys.readouterr()
    before = contents(out / "partial")
    for how in ("--overwrite", "--resume"):
        assert command("--out", out, how) == 2
        assert (
            capsys.readouterr().err
            == f"error: another run is going on in {str(out)!r}; wait for it, or give another --out\n"
        )
        assert contents(out / "partial") == before
    other.kill()
    other.communicate()
    assert command("--out", out, "--overwrite") == 0


def test_a_batch_that_is_gone_is_missed(tmp_path):
    work = workspace.prepare(tmp_path / "out", {}, resume=False, overwrite=False)
    for start in (0, 4):
        work.keep(f"{start:08d}", fake_run.swapped(range(start, start + 1)), {})
    (work.partial / "00000000.parquet").unlink()
    with pytest.raises(WorkError, match=r"batch 00000000 in .* is gone or was changed"):
        work.collect()


def test_a_workspace_says_what_it_was_made_of(tmp_path):
    work = workspace.prepare(tmp_path / "out", {}, resume=False, overwrite=False)
    work.made_of({"model": "a"})
    work.made_of({"model": "a", "points": "b"})
    with pytest.raises(UsageError, match="another points"):
        work.made_of({"points": "c"})
