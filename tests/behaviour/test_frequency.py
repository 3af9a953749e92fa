"""Counts of class names in training text: by hand, in turn, taken up again, and read by `classify --counts`."""

import pandas as pd
import pytest

from experiments import frequency as experiment
from tests.data.readers.made import save, write_json, write_lines
from tests.data.readers.test_llava import turns
from tests.helpers import assert_help_tells, command, killed_at
from vlm_mech.behaviour.classify.frequency import read_counts
from vlm_mech.behaviour.frequency import study
from vlm_mech.behaviour.frequency.data import cuts_within, sentences, texts
from vlm_mech.data.readers.llava import Entry
from vlm_mech.data.text_sources import exchanges
from vlm_mech.data.words import words_of
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw

TALKS = [
    {"id": "a", "conversations": turns("What colour is the star?", "Red. A red star is near a dog. No red star here!")},
    {"id": "b", "conversations": turns("Is the star red?", "Yes.", "And a DOG?", "dogs, two.\nred\nstar")},
    {"id": "c", "conversations": 7},
]


@pytest.fixture
def made(tmp_path):
    write_json(tmp_path / "llava.json", TALKS)
    (tmp_path / "names.txt").write_text("red star\n\ndog\nzebra\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "one.txt").write_text("a dog. A dog runs\n\nred dog star\n")
    (tmp_path / "more" / "two.md").write_text("zebra red star?")
    (tmp_path / "more" / "none.csv").write_text("dog")
    return tmp_path


def test_texts_by_hand(made):
    source = f"llava:{made / 'llava.json'}"
    assert list(texts(source, "contiguous")) == [
        "What colour is the star?", "Red.", "A red star is near a dog.", "No red star here!", "Is the star red?",
        "Yes.", "And a DOG?", "dogs, two.", "red\nstar",
    ]  # fmt: skip
    assert list(texts(source, "together")) == [
        "What colour is the star? Red. A red star is near a dog. No red star here!", "Is the star red? Yes.",
        "And a DOG? dogs, two.\nred\nstar",
    ]  # fmt: skip
    lone = Entry("x", "", None, (("gpt", "one"), ("human", "two"), ("human", "three")))
    assert list(exchanges(lone)) == ["one", "two three"]
    found = list(texts(str(made / "more"), "contiguous"))
    assert found == ["a dog.", "A dog runs", "red dog star", "zebra red star?"]


@pytest.mark.parametrize(("rule", "counts"), [("contiguous", (4, 5, 1)), ("together", (5, 4, 1))])
def test_counts_by_hand_are_read_by_classify(made, tmp_path, rule, counts):
    """contiguous: "red star" in two sentences of a, one of b (over a line break), one of two.md.

    together: in all three exchanges, in "red dog star" and in two.md. dog: in one sentence of a, one of b, and three of
    one.txt, two of them in one line.
    """
    given = ["--classes", made / "names.txt", "--text", f"llava:{made / 'llava.json'}", made / "more", "--rule", rule]
    assert command(experiment, *given, "--out", tmp_path / "out") == 0
    named = ("red star", "dog", "zebra")
    assert read_counts(tmp_path / "out" / "counts.csv", named).tolist() == list(counts)
    result = Result.load(tmp_path / "out")
    assert result.table.groupby("example")["count"].sum()[list(named)].tolist() == list(counts)
    n_texts = (9, 4) if rule == "contiguous" else (3, 3)
    assert tuple(result.provenance["text"]["n_texts"].values()) == n_texts
    assert set(redraw(tmp_path / "out")) == {"counts"}


def test_a_killed_count_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "kept", lambda *given, **named: REAL(*given, **named, batch=2))
    given = ["--classes", made / "names.txt", "--text", f"llava:{made / 'llava.json'}", made / "more"]
    assert command(experiment, *given, "--out", tmp_path / "one") == 0
    with monkeypatch.context() as patch:
        killed_at(patch, study, "counted", 3)
        assert command(experiment, *given, "--out", tmp_path / "two") == 130
    calls = killed_at(monkeypatch, study, "counted", -1)
    assert command(experiment, *given, "--out", tmp_path / "two", "--resume") == 0
    assert len(calls) == 7 - 2, "nine and four texts by twos, two pairs of them counted before"
    for name in ("result.parquet", "counts.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    whole = pd.read_csv(tmp_path / "one" / "counts.csv")
    assert whole["count"].tolist() == [4, 5, 1]


REAL = study.kept


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A cat.\nA dog!", ["A cat.", "A dog!"]),
        ("a golden\nretriever runs", ["a golden\nretriever runs"]),
        ("a golden\n \nretriever", ["a golden", "retriever"]),
        ("one\r\n\r\ntwo", ["one", "two"]),
        ("A dog (big!) ran 2.5 miles.", ["A dog (big!) ran 2.5 miles."]),
        ("The ST. Bernard, barks. A (St.\nBernard's) dog.", ["The ST. Bernard, barks.", "A (St.\nBernard's) dog."]),
        ("He is a saint. Bernard is not. At the St.\n\nBernard",
         ["He is a saint.", "Bernard is not.", "At the St.", "Bernard"]),
        ("A rev. St. Bernard. St. Dog.", ["A rev.", "St. Bernard.", "St.", "Dog."]),
        ("Mr. Rev. St. Paul says", ["Mr.", "Rev. St. Paul says"]),
    ],
)  # fmt: skip
def test_sentences_by_hand(text, parts):
    assert list(sentences(text, cuts_within(["St. Bernard", "Rev. St. Paul", "dog"]))) == parts


def test_a_name_with_a_full_stop_is_found_across_it(tmp_path):
    write_json(tmp_path / "llava.json", [{"id": "a", "conversations": turns("Which?", "The St. Bernard barks. A dog")}])
    source = f"llava:{tmp_path / 'llava.json'}"
    found = study.counted(texts(source, "contiguous", ["St. Bernard", "dog"]), ["St. Bernard", "dog"])
    assert found.tolist() == [1, 1]


def test_classes_of_one_name_have_its_counts(made, tmp_path, capsys):
    for number in range(9):
        save(tmp_path / "dup" / "images" / f"{number}.jpg", number)
    rows = [{"image": f"{at}.jpg", "label": at % 3, "split": ("train", "valid", "test")[at // 3]} for at in range(9)]
    write_lines(tmp_path / "dup" / "a.jsonl", rows)
    write_json(tmp_path / "dup" / "a_classes.json", ["dog", "red star", "dog"])
    given = ["--data", f"vlmclassifier:{tmp_path / 'dup'}", "--text", made / "more"]
    assert command(experiment, *given, "--out", tmp_path / "out") == 0
    counts = pd.read_csv(tmp_path / "out" / "counts.csv").set_index("class")["count"].to_dict()
    assert counts == {"dog (0)": 3, "red star": 1, "dog (2)": 3}
    assert "Classes that share a name share its count: dog (0), dog (2)." in capsys.readouterr().out


def test_a_count_is_tested_against_nothing(made, tmp_path):
    given = ["--classes", made / "names.txt", "--text", made / "more"]
    assert command(experiment, *given, "--out", tmp_path / "out") == 0
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["mean"].notna().all() and summary[["baseline", "effect", "p"]].isna().all(axis=None)
    assert "counts.csv" in (tmp_path / "out" / "report.html").read_text(), "a table of the run, as its files are"


def test_long_text_is_not_kept_in_memory(made):
    words_of.cache_clear()
    study.counted((f"a red star {number}" for number in range(50)), ["red star"], rule="contiguous")
    assert words_of.cache_info().currsize <= 1, "the names alone"


def test_wrong_use_is_one_line(made, tmp_path, capsys):
    (tmp_path / "twice.txt").write_text("dog\nDog\n")
    (tmp_path / "empty.txt").write_text("\n")
    for given, message in (
        ([], "--text is needed"),
        (["--device", "cuda"], "--device is not for this experiment: it counts names in text and uses no model"),
        (["--n", "3"], "--n is not for this experiment"),
        (["--text", "nowhere"], "text 'nowhere' is neither a file, nor a folder of texts, nor llava:FILE"),
        (["--text", tmp_path / "more" / "one.txt", tmp_path / "more" / "one.txt"], "is given twice"),
        (["--text", tmp_path / "empty.txt"], "holds no text"),
        (["--text", made / "more", "--classes", tmp_path / "twice.txt"], "'dog' and 'Dog' are the same words"),
        (["--text", f"llava:{made / 'more'}"], "holds no file of the format llava"),
    ):
        assert command(experiment, *given, "--out", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_help_tells_its_options():
    assert_help_tells(experiment, ("--text", "--rule", "--classes"))
