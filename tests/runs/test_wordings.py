"""Runs of several wordings: a complete run of each, what is said over them, and taking them up again."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from tests.runs import fake_run
from tests.runs.test_contract import CONTRACT, command, contents
from vlm_mech.errors import TooFewError, UsageError, WorkError
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw
from vlm_mech.results.wordings import LEFT_OUT
from vlm_mech.runs import contract, workspace
from vlm_mech.runs.configuration import ASKING, ClaimConfig, as_json, worded
from vlm_mech.runs.outcome import Outcome

TWO = ("--wording", "{question}", "--wording", "{question} One word.")
SAID = ["{question}", "{question} One word."]


def asked(config, work):
    """The fake experiment, whose numbers move with the number of letters of the wording; the last example may lack."""
    outcome = fake_run.run(config, work)
    template = config.asking.template
    table = outcome.result.table.copy()
    table["recovered"] += len(template) / 100
    if len(template) > 12:
        table = table[table["example"] != "e11"]
    provenance = outcome.result.provenance | {"data": {"n": 12, "wording": config.asking.told}}
    return Outcome(fake_run.swap_result(table=table, provenance=provenance), outcome.figures)


def numbers(folder):
    """What does not tell time or place."""
    files = contents(folder)
    return {
        name: held
        for name, held in files.items()
        if name.endswith((".parquet", ".csv", ".json")) and "prov" not in name
    }


def test_several_wordings_leave_a_run_of_each_and_one_over_them(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out, *TWO, experiment=asked) == 0
    assert {path.name for path in out.iterdir()} == CONTRACT | {"wordings.csv", "wording-1", "wording-2"}
    for number in (1, 2):
        part = out / f"wording-{number}"
        assert {path.name for path in part.iterdir()} == CONTRACT
        assert json.loads((part / "config.json").read_text())["wording"] == [SAID[number - 1]]
    result = Result.load(out)
    assert result.axes == ("wording", "direction", "span", "layer") and set(result.table["wording"]) == set(SAID)
    assert json.loads((out / "config.json").read_text())["wording"] == SAID
    assert "wordings" not in json.loads((out / "config.json").read_text())
    told = [(each["wording"], each["folder"], each["n"]) for each in result.provenance["wordings"]]
    assert told == [(SAID[0], "wording-1", 12), (SAID[1], "wording-2", 11)]
    assert result.provenance["data"] == {"n": 12}
    assert result.findings[0].startswith("2 wordings; numbers over them are of the 11 examples")
    over = pd.read_csv(out / "wordings.csv")
    assert len(over) == 2 * 36 and set(over["n"]) == {11} and set(over["n_wordings"]) == {2}
    page = (out / "report.html").read_text()
    assert 'href="wording-1/report.html"' in page and "{question} One word." in page and "wordings.csv" in page
    assert page.index("2 wordings; numbers") < page.index("wording-1/report.html")
    assert set(redraw(out)) == {"wordings"}
    printed = capsys.readouterr().out
    assert "wording 2 of 2: '{question} One word.'" in printed and "over 2 wordings:" in printed


def test_one_wording_is_simply_applied(tmp_path):
    seen = []

    def experiment(config, work):
        seen.append(config.asking)
        return fake_run.run(config, work)

    options = ("--suffix", "One word.", "--system", "Look.", "--prefix", "It is")
    assert command("--out", tmp_path / "a", "--wording", "Say: {question} ", *options, experiment=experiment) == 0
    assert seen[0].template == "Say: {question} One word."
    assert (seen[0].system, seen[0].prefix) == ("Look.", "It is")
    assert {path.name for path in (tmp_path / "a").iterdir()} == CONTRACT
    again = ("--config", tmp_path / "a" / "config.json", "--out", tmp_path / "b")
    assert command(*again, experiment=experiment) == 0 and seen[1] == seen[0]
    assert command(*again[:2], "--wording", "{question}!", "--out", tmp_path / "c", experiment=experiment) == 0
    assert seen[2].template == "{question}! One word."
    # A run without such options says what it said before there were any.
    assert command("--out", tmp_path / "d") == 0
    assert set(ASKING).isdisjoint(json.loads((tmp_path / "d" / "config.json").read_text()))


def test_wordings_may_stand_in_a_file_and_be_given_in_several_ways(tmp_path):
    path = tmp_path / "wordings.txt"
    path.write_bytes(b"\xef\xbb\xbf# of mine\r\n\r\n{question}\r\n  Say: {question}\n")
    for number, given in enumerate(
        (
            ("--wordings", path),
            ("--wording", "{question}", "Say: {question}"),
            ("--wording={question}", "--seed", 0, "--wording=Say: {question}"),
            ("--wording", "{question}", "--seed=0", "--wording", "Say: {question}"),
        )
    ):
        assert command("--out", tmp_path / str(number), *given, experiment=asked) == 0
        assert numbers(tmp_path / str(number)) == numbers(tmp_path / "0")
    path.unlink()  # the wordings themselves are what is kept
    again = ("--config", tmp_path / "0" / "config.json", "--out", tmp_path / "again")
    assert command(*again, experiment=asked) == 0 and numbers(tmp_path / "again") == numbers(tmp_path / "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--wording", "Answer."), "wording 'Answer.' has {question} 0 times; once is needed, as in '{question} One"),
        (("--wording", "{question} {question}"), "has {question} 2 times; once is needed"),
        (("--wording", ""), "wording '' has {question} 0 times"),
        (("--wording", "{question}", "{question}"), "wording '{question}' is given twice; once is needed"),
        (("--wordings", "nowhere.txt"), "wordings 'nowhere.txt' cannot be read"),
        (("--wordings", "."), "wordings '.' cannot be read"),
        (("--suffix", " "), "the suffix is ' '; a text that follows every question is needed, or none"),
        (("--system", ""), "the system message is ''; a text is needed, or none"),
        (("--prefix", ""), "the prefix is ''; a text that begins the answer is needed, or none"),
        (("--prefix", "It is "), "the prefix 'It is ' has space around it"),
        ((*TWO, "--prefix", "It is "), "the prefix 'It is ' has space around it"),
    ],
)
def test_wordings_that_cannot_be_are_refused_in_one_line_before_anything_is_done(tmp_path, capsys, options, message):
    assert command("--out", tmp_path / "out", *options) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--system", "Be helpful."), "the system message 'Be helpful.' holds 'Be', which organism has no token for"),
        (("--prefix", "it seems"), "the prefix 'it seems' holds 'seems', which organism has no token for"),
        (("--suffix", "say a word."), "the wording 'say a word.' holds 'say', which organism has no token for"),
        (("--wording", "hello {question}"), "the wording 'hello' holds 'hello', which organism has no token for"),
    ],
)
def test_words_that_the_model_does_not_know_are_refused_in_one_line(tmp_path, capsys, option, message):
    def loading(config, work):
        config.load()
        return fake_run.run(config, work)

    assert command("--out", tmp_path / "out", *option, experiment=loading) == 2
    assert capsys.readouterr().err.strip() == f"error: {message}" and not (tmp_path / "out").exists()
    known = ("--suffix", "answer with one word.", "--prefix", "it is")
    assert command("--out", tmp_path / "out", *known, experiment=loading) == 0


def test_an_empty_file_and_an_experiment_that_asks_nothing_are_refused(tmp_path, capsys):
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    assert command("--wordings", tmp_path / "none.txt") == 2
    assert "has no line with a wording, such as '{question} One word.'" in capsys.readouterr().err
    for option in ("--wording={question}", "--suffix=x", "--system=x", "--prefix=x"):
        with pytest.raises(SystemExit):
            contract.main(fake_run.Config, fake_run.run, name="fake", argv=[option], unasked="it times fixed prompts")
        name = option.partition("=")[0]
        assert capsys.readouterr().err.strip() == f"error: {name} is not for this experiment: it times fixed prompts"


def test_runs_of_wordings_killed_anywhere_resume_to_the_same_bytes(tmp_path, capsys):
    whole = tmp_path / "whole"
    assert command("--out", whole, *TWO, experiment=asked) == 0
    for n_batches in (0, 1, 3, 4, 5):
        out, n_kept = tmp_path / f"killed {n_batches}", []

        def killed(config, work, n_kept=n_kept, n_batches=n_batches):
            real = workspace.Workspace.keep

            def keep(self, key, table, notes):
                if len(n_kept) == n_batches:
                    raise KeyboardInterrupt
                n_kept.append(key)
                real(self, key, table, notes)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(workspace.Workspace, "keep", keep)
                return asked(config, work)

        assert command("--out", out, *TWO, experiment=killed) == 130
        assert not (out / "result.parquet").exists()
        assert command("--out", out, *TWO, experiment=asked) == 2, "neither --resume nor --overwrite"
        assert command("--out", out, *TWO, "--resume", experiment=asked) == 0
        assert numbers(out) == numbers(whole), n_batches
    before = contents(whole)
    assert command("--out", whole, *TWO, "--resume", experiment=asked) == 0
    assert contents(whole) == before and "this run is already complete" in capsys.readouterr().out
    assert command("--out", whole, "--wording", "{question}", "--resume", experiment=asked) == 2
    assert "had other options: wording" in capsys.readouterr().err


def test_a_kill_between_runs_or_before_the_end_is_taken_up(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    assert command("--out", whole, *TWO, experiment=asked) == 0
    real, published = workspace.Workspace.publish, []

    def publish(self):
        published.append(self.folder.name)
        real(self)
        if self.folder.name == "wording-1":
            raise KeyboardInterrupt

    out = tmp_path / "between"
    monkeypatch.setattr(workspace.Workspace, "publish", publish)
    assert command("--out", out, *TWO, experiment=asked) == 130
    monkeypatch.setattr(workspace.Workspace, "publish", lambda self: published.append(self.folder.name) or real(self))
    assert command("--out", out, *TWO, "--resume", experiment=asked) == 0
    assert published == ["wording-1", "wording-2", "between"], "the first run is not done again"
    assert numbers(out) == numbers(whole)


def test_overwriting_does_all_runs_again_and_an_old_one_is_never_taken_for_new(tmp_path):
    out, offset = tmp_path / "out", [0.0]

    def moved(config, work):
        if offset[0] and config.asking.template == SAID[1]:
            raise KeyboardInterrupt
        outcome = asked(config, work)
        table = outcome.result.table.assign(recovered=outcome.result.table["recovered"] + offset[0])
        return Outcome(fake_run.swap_result(table=table), outcome.figures)

    assert command("--out", out, *TWO, "--wording", "Third: {question}", experiment=moved) == 0
    old = Result.load(out / "wording-2").table
    offset[0] = 5.0
    assert command("--out", out, *TWO, "--overwrite", experiment=moved) == 130
    assert Result.load(out).axes[0] == "wording", "what was there stays until the new one is complete"
    offset[0] = 0.0
    real = moved

    def further(config, work):
        outcome = real(config, work)
        table = outcome.result.table.assign(recovered=outcome.result.table["recovered"] + 7)
        return Outcome(fake_run.swap_result(table=table), outcome.figures)

    assert command("--out", out, *TWO, "--resume", experiment=further) == 0
    assert (Result.load(out / "wording-2").table["recovered"] - old["recovered"]).min() > 6.9
    assert set(Result.load(out).table["wording"]) == set(SAID)
    assert not (out / "wording-3").exists(), "the run of a wording that is no longer asked for"
    assert command("--out", out, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == CONTRACT


def test_errors_name_the_wording_and_leave_what_was_done(tmp_path, capsys):
    def failing(config, work):
        if config.asking.template == SAID[1]:
            raise WorkError("nothing is answered right")
        return asked(config, work)

    out = tmp_path / "out"
    assert command("--out", out, *TWO, experiment=failing) == 1
    told = capsys.readouterr().err.strip()
    assert told == "error: wording 2, '{question} One word.': nothing is answered right"
    assert (out / "wording-1" / "result.parquet").exists()
    assert command("--out", out, *TWO, "--resume", experiment=asked) == 0

    def nothing(config, work):
        raise WorkError("no")

    assert command("--out", tmp_path / "none", *TWO, experiment=nothing) == 1
    assert not (tmp_path / "none").exists()


def answered_in(wordings):
    """The fake experiment, of whose examples too few count in other wordings."""

    def experiment(config, work):
        if config.asking.template in wordings:
            return asked(config, work)
        work.keep("00000000", fake_run.swapped(range(4)), {"from": 0})
        raise TooFewError("1 of 12 are answered right")

    return experiment


def test_a_wording_in_which_too_few_are_answered_rightly_is_left_out(tmp_path, capsys):
    out, third = tmp_path / "out", "{question} !"
    three = (*TWO, "--wording", third)
    assert command("--out", out, *three, experiment=answered_in((SAID[0], third))) == 0
    assert "left out: 1 of 12 are answered right" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == CONTRACT | {"wordings.csv", "wording-1", "wording-3"}
    result = Result.load(out)
    rows = result.table[result.table["wording"] == SAID[1]]
    why = f"{LEFT_OUT}1 of 12 are answered right"
    assert rows["recovered"].isna().all() and set(rows["skipped"]) == {why} and rows["example"].nunique() == 12
    assert result.provenance["left_out"] == [{"wording": SAID[1], "reason": "1 of 12 are answered right"}]
    assert [each["wording"] for each in result.provenance["wordings"]] == [SAID[0], third]
    assert result.findings[0].startswith("2 wordings; numbers over them are of the 12 examples")
    assert f"Wording {SAID[1]!r}: {why}." in result.findings
    over = pd.read_csv(out / "wordings.csv")
    assert set(over["n_wordings"]) == {2} and not over["wording_sd"].isna().any()
    plain = tmp_path / "plain"
    assert command("--out", plain, "--wording", SAID[0], "--wording", third, experiment=asked) == 0
    assert (out / "wordings.csv").read_bytes() == (plain / "wordings.csv").read_bytes()
    names = {trace.name for trace in redraw(out)["wordings"].data}
    assert not any(SAID[1] in name for name in names) and len(names) == 3
    assert command("--out", out, *three, "--resume", experiment=asked) == 0


def test_one_wording_that_is_left_stands_alone_and_none_is_an_error(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out, *TWO, experiment=answered_in(SAID[1:])) == 0
    result = Result.load(out)
    assert result.findings[0].startswith(f"One wording has a result, {SAID[1]!r}; nothing is said over wordings")
    assert {path.name for path in out.iterdir()} == CONTRACT | {"wordings.csv", "wording-2"}
    none = tmp_path / "none"
    assert command("--out", none, *TWO, experiment=answered_in(())) == 1
    assert capsys.readouterr().err.strip() == "error: wording 1, '{question}': 1 of 12 are answered right"
    # What was done is kept, and the run taken up again.
    assert command("--out", none, *TWO, "--resume", experiment=asked) == 0


def test_a_dry_run_says_what_each_wording_needs(tmp_path, capsys):
    class Config(fake_run.Config):
        dry_run = True

    contract.main(Config, fake_run.run, name="fake", argv=list(TWO), plan=lambda config: config.asking.template)
    assert capsys.readouterr().out.splitlines() == ["scenes/colour: pairs of scenes", *SAID]


ROOT = Path(__file__).parents[2]
OWN = {
    "behaviour/blur_decay/blur.py",
    "behaviour/erroneous_agreement/similarity.py",
    "behaviour/contrastive_tuning/captions.py",
    "behaviour/contrastive_tuning/training.py",
    "data/text_sources.py",
    "methods/lens/build_bank.py",
    "methods/lens/named_patches.py",
}
"""They ask what no user words: whether a family can do without a picture, states of a tower, captions and other texts
read as text, image tokens, which no question before them words."""


def test_every_experiment_puts_its_questions_in_the_wording():
    paths = [path for path in (ROOT / "experiments").glob("[a-z]*.py") if "main(Config" in path.read_text()]
    assert len(paths) == 19
    for path in paths:
        code = path.read_text() + ((path.parent / "_weight_swap.py").read_text() if path.stem == "layer_swap" else "")
        if path.stem in ("benchmark", "frequency", "validate"):
            assert "unasked=" in code
        else:
            # Which refuses words around the questions that the model does not know.
            assert "config.load(" in code and "VLM.load(" not in code
            assert "**config.drawn" in code and "seed=config.seed, split" not in code.replace(
                "object_masks(pairs, seed", ""
            )
    for room in ("data", "methods", "behaviour"):
        for path in (ROOT / "vlm_mech" / room).rglob("*.py"):
            if str(path.relative_to(ROOT / "vlm_mech")) not in OWN:
                assert not re.search(r"\bPrompt\((?!\))", path.read_text()), f"{path} makes a prompt past its wording"


# Wordings in which claims are made again


def test_claims_of_each_wording_are_made_again_in_the_others():
    given = ("{question}", "{question} One word.", "See: {question}")
    each = worded(ClaimConfig(wording=given, suffix="Please."))
    asked = [one.asking.template for one in each]
    assert asked[0] == "{question} Please."
    assert [one.other_wordings for one in each] == [tuple(a for a in asked if a != own) for own in asked]
    (alone,) = worded(ClaimConfig(wording=given[:1]))
    assert alone.other_wordings == () and "other_wordings" not in as_json(alone)
    own = ("Look: {question}",)
    assert {one.other_wordings for one in worded(ClaimConfig(wording=given, other_wordings=own))} == {own}
    assert as_json(ClaimConfig(other_wordings=own))["other_wordings"] == [*own]


@pytest.mark.parametrize(
    ("others", "line"), [(("One word.",), "0 times"), (("See: {question}", "See: {question}"), "is given twice")]
)
def test_other_wordings_that_cannot_be_are_refused(others, line):
    with pytest.raises(UsageError, match=line):
        worded(ClaimConfig(other_wordings=others))
