"""`--describe` says what the data hold, without a model, and `--fix-labels` is a part of a run only where given."""

import json
import subprocess
import sys
from pathlib import Path

from experiments import classify, erroneous_agreement, layer_swap, validate
from tests.data.readers.made import mmvp, save, whatsup, write_json, write_lines
from tests.helpers import command
from tests.runs import fake_run
from vlm_mech.data.pairs import load_pairs
from vlm_mech.results.result import Result
from vlm_mech.runs.configuration import as_json


def described(capsys, experiment, *arguments):
    assert command(experiment, "--describe", *arguments) == 0
    return capsys.readouterr().out


MMVP = [
    (1, "Is it open?", "(a) Open (b) Closed", "(a)"), (2, "Is it open?", "(a) Open (b) Closed", "(b)"),
    (3, "Which way?", "(a) Up (b) Down (c) Left", "(c)"), (4, "Which way?", "(a) Up (b) Down (c) Left", "(a)"),
    (5, "Which?", "(a) One (b) Two", "(d)"), (6, "Which?", "(a) One (b) Two", "(a)"),
]  # fmt: skip


def test_pairs_are_counted(tmp_path, capsys):
    """Two pairs with two and three options: a guess is right of one picture with (1/2 + 1/3) / 2, of both with
    (1/4 + 1/9) / 2."""
    said = described(capsys, layer_swap, "--data", f"mmvp:{mmvp(tmp_path, MMVP)}", "--out", tmp_path / "out")
    for line in (
        "format mmvp (Questions.csv)", "pairs: 2", "groups: 2 (2 of 1)", "options: 2 1, 3 1",
        "answers: Open 1, Closed 1, Left 1, Up 1",
        "chance: 0.417 for one image, 0.181 for both of a pair", "cannot be used: 1",
        "5/6: Questions.csv row 5: the correct answer '(d)' is none of the options",
    ):  # fmt: skip
        assert line in said, line
    assert not (tmp_path / "out").exists(), "nothing is run"


def test_whatsup_groups_of_four(tmp_path, capsys):
    folder = whatsup(tmp_path, (("mug", "table"), ("dog", "bed")))
    said = described(capsys, layer_swap, "--data", folder)
    for line in (
        "pairs: 8", "groups: 4 (4 of 2)", "categories: left/right 4, in front of/behind 2, on/under 2",
        "answers: left 4, right 4, in front of 2, behind 2, on 2, under 2", "chance: 0.500 for one image, 0.250",
        "cannot be used: 0",
    ):  # fmt: skip
        assert line in said, line


def test_items_classes_scenes_and_what_experiments_make(tmp_path, capsys):
    for number in (1, 2, 3):
        save(tmp_path / "items" / f"{number}.png", number)
    asked = {"question": "q", "answer": "a", "options": ["a", "b"]}
    rows = [{"image": f"{number % 3 + 1}.png"} | asked for number in range(5)]
    rows[0] |= {"prior": "b", "conflict": True, "category": "legs"}
    write_lines(tmp_path / "items" / "items.jsonl", [*rows, {"image": "9.png", "question": "q", "answer": "a"}])
    said = described(capsys, layer_swap, "--data", tmp_path / "items")
    for line in (
        "items: 5", "groups: 3 (1 of 1, 2 of 2)", "categories: none 4, legs 1", "answers: a 5", "prior known: 1",
        "in conflict: 1, not 0, not known 4", "chance: 0.500", "cannot be used: 1", "does not exist",
    ):  # fmt: skip
        assert line in said, line
    assert "classes: 8" in described(capsys, classify, "--data", "scenes/beetles")
    assert "planted: made by the experiment itself" in described(capsys, validate)
    said = described(capsys, layer_swap, "--swap", "weights", "--n", "4")
    assert "scenes/colour-conflict: generated scenes\npairs: 4" in said and "in conflict: second 4" in said
    said = described(capsys, erroneous_agreement, "--n", "4", "--data", "scenes/colour", "scenes/relations")
    assert "scenes/colour: generated" in said and "scenes/relations: made by the experiment itself" in said


def test_no_such_data_is_one_line(tmp_path, capsys):
    assert command(layer_swap, "--describe", "--data", tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert command(layer_swap, "--describe", "--data", f"pope:{mmvp(tmp_path, MMVP)}") == 2
    assert "holds no file of the format pope: needed is JSON lines" in capsys.readouterr().err


def test_it_is_said_before_any_model_is_loaded(tmp_path):
    """In a process of its own: torch is imported with the pictures, transformers' models are not."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['it', '--describe', '--data', {f'mmvp:{mmvp(tmp_path, MMVP)}'!r}, '--model', 'nowhere']\n"
        "try: runpy.run_module('experiments.layer_swap', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'nnsight' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "pairs: 2" in done.stdout, done.stderr


# Label errors


def pillows(folder):
    captions = ["A pillow to the left of a chair", "A pillow to the right of a chair"]
    for number, name in enumerate(("left", "right"), 1):
        save(folder / "data" / "c" / f"pillow_{name}_of_chair.jpeg", number)
    rows = [
        {"image_path": f"data/c/pillow_{name}_of_chair.jpeg", "caption_options": captions[::step]}
        for name, step in (("left", 1), ("right", -1))
    ]
    write_json(folder / "data" / "controlled_images_dataset.json", rows)
    return folder


def test_known_label_errors_are_told_in_findings_and_provenance(tmp_path, capsys):
    folder = pillows(tmp_path)
    for fix, said in (((), "left as they are"), (("--fix-labels",), "label error corrected")):
        assert said in described(capsys, layer_swap, "--data", folder, *fix)

    def run(config, work):
        pairs = load_pairs(config.data, **config.drawn)
        told = {"data": pairs.described, "refused": []}
        return fake_run.Outcome(fake_run.swap_result(provenance=told), {}, ())

    experiment = type("experiment", (), {"__name__": "fake", "Config": fake_run.Config, "run": staticmethod(run)})
    for fix in ((), ("--fix-labels",)):
        out = tmp_path / f"run{len(fix)}"
        assert command(experiment, "--data", folder, "--out", out, *fix) == 0
        findings = Result.load(out).findings
        assert any("pillow_left_of_chair and pillow_right_of_chair are exchanged" in each for each in findings)
        assert ("fix_labels" in json.loads((out / "config.json").read_text())) is bool(fix)
    again = tmp_path / "again"
    assert command(experiment, "--config", tmp_path / "run1" / "config.json", "--out", again) == 0
    assert (again / "config.json").read_bytes() == (tmp_path / "run1" / "config.json").read_bytes()


def test_options_that_are_not_given_are_not_in_the_config():
    assert not {"describe", "fix_labels"} & set(as_json(fake_run.Config()))
    assert as_json(fake_run.Config(fix_labels=True))["fix_labels"] is True
    assert "fix_labels" not in fake_run.Config().drawn and fake_run.Config(fix_labels=True).drawn["fix_labels"]


def test_labels_of_no_official_format_cannot_be_corrected(capsys):
    for experiment in (layer_swap, classify, validate):
        assert command(experiment, "--fix-labels") == 2
        error = capsys.readouterr().err
        assert "--fix-labels is for official formats, such as whatsup:FOLDER" in error and error.count("\n") == 1
