"""The run contract: options, replaying, resuming, what may be overwritten, and how errors end."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.runs import fake_run
from vlm_mech.errors import CLOSED_PIPE, UsageError, WorkError
from vlm_mech.results.result import Result
from vlm_mech.runs import contract, provenance, workspace
from vlm_mech.runs.command_line import parse
from vlm_mech.runs.configuration import ClaimConfig, default_folder
from vlm_mech.runs.outcome import Outcome

ROOT = Path(__file__).parents[2]
CONTRACT = {
    "result.parquet", "result.json", "claims.json", "summary.csv", "config.json", "provenance.json", "figures",
    "report.html",
}  # fmt: skip


def command(*arguments, experiment=fake_run.run):
    """The exit status of the fake experiment, run in this process."""
    try:
        contract.main(fake_run.Config, experiment, name="fake", argv=[str(each) for each in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_after(n_batches, error=KeyboardInterrupt):
    """The fake experiment, killed while that batch is under way."""

    def experiment(config, work):
        real, n_kept = workspace.Workspace.keep, 0

        def keep(self, key, table, notes):
            nonlocal n_kept
            if n_kept == n_batches:
                raise error
            n_kept += 1
            real(self, key, table, notes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workspace.Workspace, "keep", keep)
            return fake_run.run(config, work)

    return experiment


def test_a_run_leaves_the_contract_and_says_where(tmp_path, capsys):
    assert command("--out", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == CONTRACT
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {"heat.json", "curves.json", "index.html"}
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) < 6_000_000
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "recovered (fraction), mean by layer, n = 12"
    assert "- the image is read before layer 3" in printed
    assert printed[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert printed[-2].startswith("432 rows in ") and printed[-2].endswith("logit_diff in summary.csv")
    row = next(line for line in printed if line.startswith("denoising") and "image" in line)
    means = Result.load(tmp_path / "out").summary("recovered").query("direction == 'denoising' and span == 'image'")
    assert row.split()[2:] == [f"{mean:.2f}" for mean in means["mean"]]


def test_commands_with_other_options_do_not_meet_in_one_folder():
    usual, other = ClaimConfig(), ClaimConfig(data="scenes/left-right", n=5)
    assert (
        default_folder(usual, "swap")
        == Path("runs/swap")
        == default_folder(dataclasses.replace(usual, resume=True), "swap")
    )
    assert default_folder(other, "swap") == Path("runs/swap-data-scenes-left-right-n-5")
    long = [dataclasses.replace(usual, wording=(f"{'very ' * 20}{end} {{question}}",)) for end in "ab"]
    names = [default_folder(each, "swap").name for each in long]
    assert names[0] != names[1] and all(len(name) < 80 and "/" not in name for name in names)


def test_provenance_says_what_ran(tmp_path):
    assert command("--out", tmp_path / "out", "--seed", "7", "--attn", "eager") == 0
    found = json.loads((tmp_path / "out" / "provenance.json").read_text(), parse_constant=pytest.fail)
    assert (found["seed"], found["device"], found["dtype"], found["attention"]) == (7, "cpu", "float32", "eager")
    assert {"python", "torch", "transformers", "nnsight", "numpy", "pandas"} <= set(found["versions"])
    assert found["receipts"] == {"batches": 3} and found["seconds"] >= 0 and found["resumed"] is False


def test_the_commit_is_that_of_the_checkout_and_marked_when_changed(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert provenance._commit(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert provenance._commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert provenance._commit(tmp_path) == f"{head}-dirty"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_a_run_from_a_checkout_names_its_commit(tmp_path):
    assert command("--out", tmp_path / "out") == 0
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "out" / "provenance.json").read_text())["commit"]
    assert found.removesuffix("-dirty") == head.stdout.strip()


def test_config_repeats_and_options_beside_it_win(tmp_path):
    first = ("--n", "8", "--kind", "curly", "--spans", "a", "b c", "--keep", "--seed", "3")
    assert command("--out", tmp_path / "first", *first) == 0
    saved = tmp_path / "first" / "config.json"
    config = parse(fake_run.Config, ["--config", str(saved)], name="fake")
    assert (config.n, config.kind, config.spans, config.keep, config.seed) == (8, "curly", ("a", "b c"), True, 3)
    assert config.out is None and config.overwrite is False
    for arguments in (["--config", str(saved), "--n", "5"], ["--n=5", f"--config={saved}"]):
        config = parse(fake_run.Config, arguments, name="fake")
        assert (config.n, config.kind, config.spans) == (5, "curly", ("a", "b c"))
    assert parse(fake_run.Config, ["--config", str(saved), "--spans", "z"], name="fake").spans == ("z",)
    assert command("--config", saved, "--out", tmp_path / "again") == 0
    one, other = contents(tmp_path / "first"), contents(tmp_path / "again")
    assert all(one[name] == other[name] for name in ("result.parquet", "summary.csv", "config.json", "result.json"))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ('{"banana": 1}', "has unknown option(s) banana"),
        ('{"out": "somewhere"}', "has unknown option(s) out"),
        ('{"n": "many"}', "--n"),
        ('{"attn": "flash"}', "--attn"),
        ('{"keep": "yes"}', "keep is 'yes'; true or false is needed"),
        ("[1]", "has unknown option(s) (no object)"),
        ("{not json", "cannot be read"),
    ],
)
def test_configs_are_checked_like_the_command_line(tmp_path, capsys, saved, message):
    (tmp_path / "mine.json").write_text(saved)
    assert command("--config", tmp_path / "mine.json", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_killed_anywhere_resumes_to_the_same_bytes(tmp_path, capsys):
    assert command("--out", tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole")
    for n_batches in (0, 1, 2):
        out = tmp_path / f"killed {n_batches}"
        assert command("--out", out, experiment=killed_after(n_batches)) == 130
        assert "--resume goes on from here" in capsys.readouterr().err
        assert {path.name for path in out.iterdir()} == {"partial"}
        assert command("--out", out, "--resume", "--n", "8") == 2
        assert "had other options: n" in capsys.readouterr().err
        assert command("--out", out, "--resume") == 0
        assert {path.name for path in out.iterdir()} == CONTRACT
        now = contents(out)
        assert all(now[name] == whole[name] for name in ("result.parquet", "summary.csv", "config.json"))


def test_pages_too_are_the_same_bytes_but_for_the_times_in_provenance(tmp_path):
    out = tmp_path / "out"
    assert command("--out", out) == 0
    whole = every_file(out)
    assert any(name.startswith("figures/") and name.endswith(".html") for name in whole)
    shutil.rmtree(out)
    assert command("--out", out, experiment=killed_after(1)) == 130
    assert command("--out", out, "--resume") == 0
    now = every_file(out)
    assert [name for name in {*whole, *now} if whole.get(name) != now.get(name)] == ["provenance.json"]
    one, other = (json.loads(each["provenance.json"]) for each in (whole, now))
    assert {name for name in one if one[name] != other[name]} <= {"seconds", "finished", "resumed"}


def every_file(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_batches_done_are_not_done_again(tmp_path):
    assert command("--out", tmp_path / "out", experiment=killed_after(2)) == 130
    assert command("--out", tmp_path / "out", "--resume", experiment=killed_after(1)) == 0


def test_a_kill_while_files_are_written_leaves_no_half_result(tmp_path, monkeypatch):
    """Three figure files are moved into place, then seven others, the table last."""
    real = workspace.os.replace
    assert command("--out", tmp_path / "whole") == 0
    for n_moves in (0, 2, 3, 9, 10):
        out, left = tmp_path / f"{n_moves}", n_moves

        def replace(source, target):
            nonlocal left
            if "finished" in str(source):
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            return real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(workspace.os, "replace", replace)
            status = command("--out", out)
        assert status == (130 if n_moves < 10 else 0)
        if status:
            assert (out / "partial" / "config.json").is_file()
            assert not (out / "result.parquet").exists(), "the result comes last"
            assert command("--out", out, "--resume") == 0
        assert {path.name for path in out.iterdir()} == CONTRACT
        assert (out / "result.parquet").read_bytes() == (tmp_path / "whole" / "result.parquet").read_bytes()


def test_a_kill_while_an_old_result_is_replaced_leaves_no_mixture(tmp_path, monkeypatch):
    out, real = tmp_path / "out", workspace.os.replace
    assert command("--out", out) == 0

    def replace(source, target):
        if Path(source).name == "summary.csv":
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(workspace.os, "replace", replace)
        assert command("--out", out, "--overwrite", "--n", "8") == 130
    assert not (out / "result.parquet").exists() and not (out / "provenance.json").exists()
    assert command("--out", out, "--resume", "--n", "8") == 0
    assert Result.load(out).table["example"].nunique() == 8


def test_batches_survive_an_error_in_a_later_one(tmp_path):
    assert command("--out", tmp_path / "out", experiment=killed_after(2, MemoryError("full"))) == 1
    assert len(list((tmp_path / "out" / "partial").glob("*.parquet"))) == 2
    assert command("--out", tmp_path / "out", "--resume", experiment=killed_after(1)) == 0


def test_resuming_a_complete_run_changes_nothing(tmp_path, capsys):
    assert command("--out", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert command("--out", tmp_path / "out", "--resume") == 0
    assert "already complete" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_the_old_result_stays_until_the_new_one_is_complete(tmp_path):
    out = tmp_path / "out"
    assert command("--out", out) == 0
    before = contents(out)
    assert command("--out", out, "--overwrite", "--wrong", "use") == 2
    assert contents(out) == before
    assert command("--out", out, "--overwrite", "--n", "8", experiment=killed_after(1)) == 130
    assert before.items() <= contents(out).items()
    assert command("--out", out, "--resume", "--n", "8") == 0
    assert Result.load(out).table["example"].nunique() == 8 and not (out / "partial").exists()


def test_figures_of_an_earlier_run_do_not_linger(tmp_path):
    out = tmp_path / "out"
    assert command("--out", out) == 0

    def fewer(config, work):
        outcome = fake_run.run(config, work)
        return Outcome(outcome.result, {"heat": outcome.figures["heat"]})

    for name in ("mine.html", "curves.html"):  # the second as 0.1.0 left it
        (out / "figures" / name).write_text(name)
    assert command("--out", out, "--overwrite", experiment=fewer) == 0
    assert {path.name for path in (out / "figures").iterdir()} == {"heat.json", "index.html", "mine.html"}


def with_tables(*names, **changes):
    """The fake experiment with tables of these names, each of one row."""

    def experiment(config, work):
        outcome = fake_run.run(config, work)
        return dataclasses.replace(outcome, tables={name: pd.DataFrame({"n": [config.n]}) for name in names}, **changes)

    return experiment


def test_every_table_is_among_the_files_of_a_run(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out, experiment=with_tables("counts", "by group")) == 0
    assert {path.name for path in out.iterdir()} == CONTRACT | {"counts.csv", "by group.csv"}
    assert (out / "counts.csv").read_text() == "n\n12\n" and "<caption>counts.csv</caption>" in (
        out / "report.html"
    ).read_text()
    assert json.loads((out / "provenance.json").read_text())["tables"] == ["counts", "by group"]
    assert "logit_diff in summary.csv; counts.csv; by group.csv" in capsys.readouterr().out
    before = contents(out)
    assert command("--out", out, "--resume", experiment=with_tables("counts", "by group")) == 0
    assert contents(out) == before and "counts.csv" in capsys.readouterr().out
    # Those of an earlier run go, what is the user's stays.
    (out / "mine.csv").write_text("mine")
    assert command("--out", out, "--overwrite", "--n", "8", experiment=with_tables("counts")) == 0
    assert {path.name for path in out.iterdir()} == CONTRACT | {"counts.csv", "mine.csv"}
    assert (out / "counts.csv").read_text() == "n\n8\n"
    assert command("--out", out, "--overwrite", "--n", "8", experiment=killed_after(1)) == 130
    assert (out / "counts.csv").is_file()
    assert command("--out", out, "--resume", "--n", "8") == 0
    assert {path.name for path in out.iterdir()} == CONTRACT | {"mine.csv"}


def test_what_a_kill_put_in_place_is_replaced_with_the_run(tmp_path, monkeypatch):
    """Tables and figures are there, the record that names them is not."""
    out, real = tmp_path / "out", workspace.os.replace

    def replace(source, target):
        if Path(source).name == "provenance.json" and "finished" in str(source):
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(workspace.os, "replace", replace)
        assert command("--out", out, experiment=with_tables("counts")) == 130
    assert (out / "counts.csv").is_file()
    shutil.copytree(out, tmp_path / "other")
    assert command("--out", out, "--resume", experiment=with_tables("counts")) == 0
    assert {path.name for path in out.iterdir()} == CONTRACT | {"counts.csv"}
    assert command("--out", tmp_path / "other", "--overwrite", experiment=with_tables("sums", figures={})) == 0
    assert {path.name for path in (tmp_path / "other").iterdir()} == CONTRACT | {"sums.csv"}
    assert not list((tmp_path / "other" / "figures").iterdir())


@pytest.mark.parametrize("name", ["summary", "../mine", "a/b"])
def test_a_table_that_would_replace_another_file_is_refused(tmp_path, capsys, name):
    assert command("--out", tmp_path / "out", experiment=with_tables(name)) == 1
    assert f"a table called {name!r} has no place" in capsys.readouterr().err


def unanswered(config, work):
    """Keeps batches without any value, as of pairs that are all answered wrongly."""
    (work.partial / "states").mkdir(exist_ok=True)
    values = ["recovered", "recovered_baseline", "logit_diff", "logit_diff_baseline"]
    for key in ("00", "01"):
        work.keep(key, fake_run.swapped(range(2)).assign(skipped="wrong", **dict.fromkeys(values, float("nan"))), {})
    raise WorkError("0 of 4 pairs are answered right")


def test_a_run_that_measured_nothing_leaves_what_was_there(tmp_path):
    out = tmp_path / "new" / "out"
    assert command("--out", out, experiment=unanswered) == 1 and not list(tmp_path.iterdir())
    out.mkdir(parents=True)
    assert command("--out", out, experiment=unanswered) == 1 and out.exists() and not list(out.iterdir())
    assert command("--out", out) == 0, "the corrected command needs no --overwrite"
    before = contents(out)
    assert command("--out", out, "--overwrite", experiment=unanswered) == 1 and contents(out) == before


def test_what_a_run_kept_or_found_is_never_taken_back(tmp_path):
    def half(config, work):
        work.keep("0", fake_run.swapped(range(2)), {})
        unanswered(config, work)

    def states(config, work):
        (work.partial / "states").mkdir()
        (work.partial / "states" / "000.safetensors").write_bytes(b"hours")
        raise UsageError("no such layer")

    for name, experiment, kept in (("a", half, "0.parquet"), ("b", states, "states/000.safetensors")):
        assert command("--out", tmp_path / name, experiment=experiment) in (1, 2)
        assert (tmp_path / name / "partial" / kept).is_file()
    assert command("--out", tmp_path / "c", experiment=killed_after(0)) == 130
    before = contents(tmp_path / "c")
    assert command("--out", tmp_path / "c", "--resume", experiment=unanswered) == 1
    assert before.items() <= contents(tmp_path / "c").items()


def test_overwriting_never_touches_a_folder_that_is_not_ours(tmp_path, capsys):
    """A model's folder has a config.json as well."""
    for name in ("config.json", "provenance.json"):
        model = tmp_path / name.removesuffix(".json")
        model.mkdir()
        (model / name).write_text('{"model_type": "llava"}')
        before = contents(model)
        assert command("--out", model, "--overwrite") == 2
        assert "holds files but no run of ours" in capsys.readouterr().err
        assert command("--out", model) == 2
        assert "is not empty" in capsys.readouterr().err
        assert command("--out", model, "--resume") == 2
        assert "there is no run to resume" in capsys.readouterr().err
        assert contents(model) == before


def test_figure_names_of_a_forged_record_stay_in_the_folder(tmp_path):
    out = tmp_path / "out"
    assert command("--out", out) == 0
    (tmp_path / "mine.json").write_text("mine")
    record = json.loads((out / "provenance.json").read_text())
    (out / "provenance.json").write_text(json.dumps(record | {"figures": ["../../mine"]}))
    assert command("--out", out, "--overwrite") == 0
    assert (tmp_path / "mine.json").read_text() == "mine"


def test_wrong_use_leaves_no_trace(tmp_path, capsys):
    assert command("--out", tmp_path / "deep" / "out", "--wrong", "use") == 2
    assert capsys.readouterr().err == "error: kind 'curly' is no good; 'plain' would be\n"
    assert not (tmp_path / "deep" / "out").exists()
    assert command("--out", tmp_path / "deep" / "out") == 0


def test_errors_are_one_line_with_their_status(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, status, message in (
        (["--wrong", "work"], 1, "error: the second batch failed\n"),
        (["--wrong", "bug"], 1, "error: KeyError: 'banana'\n"),
        (["--resume", "--overwrite"], 2, "error: --resume and --overwrite exclude each other\n"),
        (["--out", tmp_path / "file"], 2, f"error: '{tmp_path / 'file'}' is a file; --out needs a folder\n"),
        (["--seed", "-1"], 2, "error: --seed is -1; it must be 0 or more\n"),
    ):
        assert command("--out", tmp_path / message[7:12], *arguments) == status
        assert capsys.readouterr().err == message
    for arguments in (["--n", "many"], ["--kind", "round"], ["--banana"], ["banana"], ["--n"]):
        assert command("--out", tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "--help lists the options" in error
        assert arguments[0] in error
    for arguments, said in (
        (["--kind", "round"], "invalid choice 'round' for"),
        (["--n"], "missing value for"),
        (["--n", "3", "4"], "'4' is more than --n takes"),
        (["--seed=1", "a", "b"], "'a' and 'b' are more than --seed takes"),
    ):
        assert command("--out", tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err.lower()
        assert error.startswith(f"error: {said}"), "the title of tyro's frame says the same again"
        assert "---" not in error and ".; " not in error
    assert command("--out", tmp_path / "file" / "out") == 2
    assert "cannot be written in: " in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert command("--out", tmp_path / "debug", "--wrong", "bug", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_workspace_keeps_order_and_notes(tmp_path):
    work = workspace.prepare(tmp_path / "out", {}, resume=False, overwrite=False)
    with pytest.raises(UsageError, match="no batch is stored"):
        work.collect()
    for start in (8, 0, 4):
        work.keep(f"{start:08d}", fake_run.swapped(range(start, start + 1)), {"from": start})
    table, notes = work.collect()
    assert list(table["example"].unique()) == ["e0", "e4", "e8"] and notes == [{"from": 0}, {"from": 4}, {"from": 8}]
    assert "00000004" in work and "00000005" not in work


def test_help_is_quick():
    light = (
        "from vlm_mech.runs import configuration, contract\n"
        "contract.parse(configuration.RunConfig, ['--help'], name='x')"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--overwrite" in done.stdout, done.stderr
    # Two seconds on an idle machine; several times that on one that is busy.
    assert time.monotonic() - start < 10


def test_where_nobody_reads_any_more_a_command_ends_silently():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    asked = subprocess.Popen([sys.executable, "-m", "experiments.layer_swap", "--help"], cwd=ROOT, **pipes)
    asked.stdout.close()
    assert asked.stderr.read() == b"" and asked.wait() == CLOSED_PIPE


def test_the_help_of_every_experiment_imports_nothing_heavy():
    names = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if not path.stem.startswith("_"))
    code = (
        "import runpy, sys\nsys.argv = ['it', '--help']\n"
        f"for name in {names}:\n"
        "    try: runpy.run_module(f'experiments.{name}', run_name='__main__')\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'pyarrow', 'datasets', 'pycocotools', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count("--overwrite") == len(names) > 10, done.stderr


def test_fewer_examples_than_something_can_be_said_of_are_refused_before_the_run(tmp_path, capsys):
    given = ["--n", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        contract.main(fake_run.Config, lambda *_: pytest.fail("it ran"), name="fake", fewest=2, argv=given)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: --n is 1; at least 2 examples are needed\n"
    assert not (tmp_path / "out").exists()


@dataclasses.dataclass(frozen=True)
class Claiming(fake_run.Config, ClaimConfig):
    """The fake experiment as one that speaks in claims."""


def test_a_sentence_that_names_a_layer_without_a_claim_is_left_out(tmp_path):
    with pytest.warns(UserWarning, match="left out, because it names a layer .*: 'the image is read before layer 3'"):
        contract.execute(Claiming(out=tmp_path / "run"), fake_run.run, name="fake")
    assert Result.load(tmp_path / "run").findings == ()
    assert "before layer 3" not in (tmp_path / "run/report.html").read_text()
    contract.execute(fake_run.Config(out=tmp_path / "other"), fake_run.run, name="fake")
    assert "the image is read before layer 3" in Result.load(tmp_path / "other").findings
