"""Classification: data of all kinds, and the run."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from experiments import classify
from tests.behaviour.test_classify import QUESTIONS
from tests.helpers import assert_help_tells, command, killed_at
from tests.zoo.tiny import picture
from vlm_mech.behaviour.classify import steps
from vlm_mech.behaviour.classify.table import (
    AXES,
    CLASSES,
    ELSEWHERE,
    GENERATION,
    MEAN,
    METRICS,
    OPEN,
    SUM,
    Cell,
    completed,
    score_rows,
)
from vlm_mech.data.class_names import normalised
from vlm_mech.data.image_classes import Labelled, class_names, from_splits, load_classes
from vlm_mech.errors import UsageError
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw
from vlm_mech.results.wordings import over_wordings, side_by_side

# Data


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Three classes; one picture is broken."""
    folder = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(("red_circle", "blue", "green triangle")):
        (folder / name).mkdir()
        for each in range(10):
            picture(10 * number + each).save(folder / name / f"{each}.png")
    (folder / "blue" / "3.png").write_text("no picture")
    return folder


def test_a_folder_is_dealt_out_and_broken_pictures_are_told(data_folder):
    data = load_classes(str(data_folder))
    assert data.names == ("blue", "green triangle", "red circle")
    sizes = [len(part) for part in (data.train, data.validation, data.test)]
    assert sizes in ([17, 6, 6], [18, 5, 6], [18, 6, 5])
    assert [each.id for each in data.refused] == ["blue/3.png"] and "cannot be read" in data.refused[0].reason
    ids = [each.id for part in (data.train, data.validation, data.test) for each in part]
    assert len(ids) == len(set(ids)) == 29
    few = load_classes(str(data_folder), n=3, n_train=6, seed=1)
    assert {each.label for each in few.test} == set(data.names) and len(few.train) == 6
    assert few.digest != data.digest and data.digest == load_classes(str(data_folder)).digest


def test_a_folder_may_have_parts_and_names_of_its_own(tmp_path):
    for part in ("train", "val", "test"):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            picture(len(part) + 20 * int(name[-1])).save(tmp_path / part / name / "a.png")
    table = tmp_path / "names.csv"
    table.write_text('n01,red circle\nn02,"blue star"\n')
    data = load_classes(str(tmp_path), names=table)
    assert (
        data.names == ("red circle", "blue star") and [each.label for each in data.test] and len(data.validation) == 2
    )
    table.write_text("n01,red circle\n")
    with pytest.raises(UsageError, match="no line for the class 'n02'"):
        load_classes(str(tmp_path), names=table)
    table.write_bytes(b"\xef\xbb\xbfn01,red circle\r\nn02,blue star\r\n")
    assert load_classes(str(tmp_path), names=table).names == ("red circle", "blue star"), "a byte order mark hides none"


def test_folders_that_hold_no_classes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="neither a folder, nor hf:owner/name, nor one of scenes/things"):
        load_classes(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="holds no folder of a class"):
        load_classes(str(tmp_path))
    (tmp_path / "red").mkdir()
    with pytest.raises(UsageError, match="class folder .*red' holds no image"):
        load_classes(str(tmp_path))
    for number in range(3):
        picture(number).save(tmp_path / "red" / f"{number}.png")
    with pytest.raises(UsageError, match="there is only the class red; at least two are needed"):
        load_classes(str(tmp_path))
    for other, text in (
        ("...", "holds no image|holds no word"),
        ("blue", "'blue' has 1 image"),
    ):
        (tmp_path / other).mkdir()
        for number in range(1 if other == "blue" else 3):
            picture(50 + number).save(tmp_path / other / f"{number}.png")
        if other != "...":
            with pytest.raises(UsageError, match=text):
                load_classes(str(tmp_path))
        for path in (tmp_path / other).iterdir():
            path.unlink()
        (tmp_path / other).rmdir()
    with pytest.raises(UsageError, match="number of test images is 0; at least one"):
        load_classes("scenes/beetles", n=0)


def test_generated_classes_are_balanced_and_never_of_the_training_split():
    data = load_classes("scenes/things", n=128, n_train=3, n_validation=2)
    assert len(data.names) == 128 == len({each.label for each in data.test}) and len(data.train) == 3
    again = load_classes("scenes/things", n=128, n_train=3, n_validation=2)
    assert data.digest == again.digest
    assert len({each.id.split()[-1] for part in (data.train, data.validation, data.test) for each in part}) == 133
    slots = {part: {int(each.id.split()[-1], 16) % 10 for each in getattr(data, part)} for part in ("train", "test")}
    # The last two tenths of the scenes by their key, which the embedded models were not trained on.
    assert slots == {"train": {8}, "test": {9}}
    assert class_names("scenes/beetles")[0] == "alva" and normalised("Sea-Lion_2 ") == "sea lion 2"


def test_a_dataset_of_the_hub_takes_the_same_path():
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["red_circle", "blue"])})
    made = {
        name: datasets.Dataset.from_dict(
            {"img": [picture(first + number) for number in range(8)], "fine": [0, 1] * 4}, features=features
        )
        for name, first in (("train", 20), ("test", 0))
    }
    table = made["test"].cast_column("img", datasets.Image(decode=False)).to_list()
    table[0]["img"]["bytes"] = b"no picture"
    made["test"] = datasets.Dataset.from_list(table, features=features)
    data = from_splits("hf:a/b", datasets.DatasetDict(made), {"train": None, "validation": None, "test": None}, seed=0)
    assert data.names == ("red circle", "blue")
    assert len(data.train) + len(data.validation) == 8 and len(data.test) == 7 and data.refused[0].id == "test 0"
    assert (
        np.abs(np.asarray(data.test[0].image, int) - np.asarray(picture(int(data.test[0].id.split()[1])), int)).max()
        < 3
    )
    with pytest.raises(UsageError, match="one called train is needed"):
        from_splits("x", {"test": made["test"]}, {}, seed=0)
    with pytest.raises(UsageError, match="no column of type ClassLabel"):
        from_splits("x", {"train": made["train"].remove_columns("fine")}, {}, seed=0)


# The run


def asked_of(model_folder, data_folder, out, *more):
    words = ["--questions", *QUESTIONS, "--new-tokens", "4", "--batch", "8", "--positions", "3"]
    return ["--model", model_folder, "--data", data_folder, "--out", out, *words, *more]


@pytest.fixture(scope="module")
def finished(model_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "counts.csv").write_text("red circle,5\nblue,0\ngreen triangle,100\n")
    more = ("--counts", folder / "counts.csv", "--tune", "projector", "--tune-steps", "3")
    assert command(classify, *asked_of(model_folder, data_folder, folder / "first", *more)) == 0
    return folder / "first"


def test_a_run_leaves_every_method_with_its_chance_and_draws_from_the_file_alone(finished):
    result = Result.load(finished)
    assert result.axes == AXES and [each.name for each in result.metrics] == [each.name for each in METRICS]
    methods = set(result.table["method"])
    assert {
        GENERATION,
        SUM,
        MEAN,
        "sum less no image",
        "mean less mean image",
        "probe, tower mean",
        "probe, last token",
    } <= methods
    assert set(result.table["model"]) == {"as loaded", "tuned (projector)"} and set(result.table["question"]) == {
        *QUESTIONS,
        "average",
    }
    table = result.table
    assert np.allclose(table["accuracy_baseline"].dropna(), 1 / table.loc[table["accuracy_baseline"].notna(), "k"])
    closed = table[(table["world"] == "closed") & (table["order"] == "fixed") & (table["k"] == 3)]
    assert set(closed["method"]) == {GENERATION} and closed["answer"].notna().all()
    asked = table[table["method"].isin([GENERATION, SUM]) & table["accuracy"].notna()]
    assert asked.groupby("model").size().nunique() == 1
    about = result.provenance
    assert about["refused"][0]["id"] == "blue/3.png" and about["tuned"]["n_trained"] > 0
    assert about["frequency"]["counts"] == {"blue": 0, "green triangle": 100, "red circle": 5}
    assert all(each["p_corrected"] >= each["p"] for each in about["comparisons"])
    drawn = redraw(finished)
    assert set(drawn) == {"accuracy", "candidates", "frequency", "positions", "tuning"}
    for name, figure in drawn.items():
        assert json.loads(figure.to_json()) == json.loads((finished / "figures" / f"{name}.json").read_text()), name
    assert any("could not be used: blue/3.png: " in each for each in result.findings)
    assert any(each.startswith("Fine-tuned: projector") for each in result.findings)


def test_a_killed_run_goes_on_to_the_same_bytes(model_folder, data_folder, finished, tmp_path, monkeypatch):
    options = asked_of(model_folder, data_folder, tmp_path / "out", "--config", finished / "config.json")
    with monkeypatch.context() as patch:
        killed_at(patch, steps, "score_tables", 2)
        assert command(classify, *options) == 130
    calls = killed_at(monkeypatch, steps, "generated", -1)
    assert command(classify, *options, "--resume") == 0
    assert not calls, "no answer is generated again"
    assert (tmp_path / "out" / "result.parquet").read_bytes() == (finished / "result.parquet").read_bytes()
    assert (tmp_path / "out" / "summary.csv").read_bytes() == (finished / "summary.csv").read_bytes()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--k", "7"), "--k 7 is not a number of candidates among 3 classes"),
        (("--questions", "what zebra is this?"), "'zebra', which"),
        (("--n-qa", "0"), "n_qa is 0 and must be at least 1"),
        (("--style", "paper"), "has no token for"),
        (("--counts", "none.csv"), "counts 'none.csv' cannot be read"),
        (("--qa", "none.jsonl"), "questions 'none.jsonl' cannot be read"),
        (("--n-train", "1"), "has no training image; raise --n-train"),
        (("--contrastive", "no/such/model"), "no/such/model"),
    ],
)
def test_wrong_use_is_one_line(model_folder, data_folder, tmp_path, capsys, more, text):
    options = asked_of(model_folder, data_folder, tmp_path / "out")
    if more[0] == "--style":
        options = [each for each in options if each not in ("--questions", *QUESTIONS)]
    assert command(classify, *options, *more) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and text in said[-1] and not any("Traceback" in line for line in said)


def test_help_tells_its_options():
    assert_help_tells(classify, ["--tune", "--contrastive", "--k", "--qa"])


def test_a_table_is_completed_with_what_was_asked_of_others(tmp_path):
    names = ["a", "b"]
    one = score_rows(Cell(CLASSES, "m", "q", OPEN, "-", SUM, 2), [Labelled("1", "", "a")], names, np.eye(2)[:1], seed=0)
    two = score_rows(
        Cell("two-hop", "m", "q", OPEN, "-", MEAN, 2), [Labelled("2", "", "b")], names, np.eye(2)[:1], seed=0
    )
    whole = completed(pd.concat([two, one], ignore_index=True))
    assert len(whole) == 4 and whole["accuracy"].notna().sum() == 2
    result = Result("some", whole, AXES, METRICS, elsewhere=ELSEWHERE)
    summary = result.summary("accuracy")
    assert summary["n"].tolist() == [1, 1] and summary["n_missing"].tolist() == [0, 0]
    result.save(tmp_path)
    assert Result.load(tmp_path).summary("accuracy")["n_missing"].tolist() == [0, 0]
    table = whole.copy()
    table.loc[table["task"] == CLASSES, "accuracy"] = np.nan
    lost = dataclasses.replace(result, table=table).summary("accuracy")
    assert lost["n"].tolist() == [0, 1] and lost["n_missing"].tolist() == [1, 0], "missing in its own cell"
    both = over_wordings(side_by_side({"one": result, "two": result}))
    assert both is not None and both.summary("accuracy")["n_missing"].tolist() == [0, 0]
    assert whole["task"].iloc[0] == CLASSES and set(whole[whole["accuracy"].isna()]["skipped"]) == {
        "asked of other pictures"
    }


def test_the_intro_speaks_of_what_is_run_alone():
    told = {(c, p): classify._question(contrastive=c, probes=p) for c in (True, False) for p in (True, False)}
    assert "compared with a contrastive model and linear probes on" in told[True, True]
    assert "compared with a contrastive model on" in told[True, False] and "probes" not in told[True, False]
    assert "compared with linear probes on" in told[False, True] and "contrastive" not in told[False, True]
    assert told[False, False].endswith("its probabilities of the class names are read.")
    given = {"data": "scenes/beetles", "probes": False, "contrastive": "none"}
    assert classify._options(classify.Config(**given)).question == told[False, False]
