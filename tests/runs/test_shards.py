"""Runs made in parts: the same bytes in any order, and what is said when parts do not belong together."""

import itertools
import json
import shutil

import pytest

from tests.runs import fake_run
from tests.runs.test_contract import command, contents
from vlm_mech.errors import UsageError
from vlm_mech.runs import merge as merging
from vlm_mech.runs.shards import PartDone, Shard, shard_of
from vlm_mech.runs.workspace import Workspace, in_batches

NUMBERS = ("result.parquet", "summary.csv", "config.json", "figures/heat.json", "figures/curves.json")


def merge(*arguments, monkeypatch):
    """The exit status of the command, run in this process."""
    monkeypatch.setattr("sys.argv", ["merge", *(str(each) for each in arguments)])
    try:
        merging.main()
    except SystemExit as stop:
        return stop.code
    return 0


def same_numbers(folder, other):
    one, two = contents(folder), contents(other)
    return set(one) == set(two) and all(one[name] == two[name] for name in NUMBERS)


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 3, 2, 1), (3, 1, 4, 2)])
def test_shards_in_any_order_make_the_run_of_one_process(tmp_path, monkeypatch, order):
    assert command("--out", tmp_path / "whole", "--n", 30) == 0
    for number in order:
        assert command("--out", tmp_path / "parts", "--n", 30, "--shard", f"{number}/4") == 0
    assert merge(tmp_path / "parts", monkeypatch=monkeypatch) == 0
    assert same_numbers(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("of_all", [1, 3, 12])
def test_the_number_of_shards_makes_no_difference(tmp_path, monkeypatch, of_all):
    assert command("--out", tmp_path / "whole", "--n", 30) == 0
    for number in range(of_all):
        assert command("--out", tmp_path / "parts", "--n", 30, "--shard", f"{number + 1}/{of_all}") == 0
    assert merge(tmp_path / "parts", "--keep", monkeypatch=monkeypatch) == 0
    assert len(list((tmp_path / "parts/shards").iterdir())) == of_all
    shutil.rmtree(tmp_path / "parts/shards")
    assert same_numbers(tmp_path / "whole", tmp_path / "parts")


def test_every_batch_is_in_one_shard(tmp_path):
    steps = in_batches(30, 4)
    found = []
    for number in range(3):
        part = Workspace(tmp_path / str(number), share=Shard(number + 1, 3))
        found.append([key for key, _ in part.batches(steps, "batches")])
        with pytest.raises(PartDone):
            part.collect()
    assert sorted(itertools.chain(*found)) == sorted(steps)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_shard_that_was_begun_goes_on_and_one_that_is_whole_does_nothing(tmp_path, monkeypatch):
    kept = []
    real = Workspace.keep
    monkeypatch.setattr(Workspace, "keep", lambda self, key, *rest: (kept.append(key), real(self, key, *rest))[1])
    arguments = ("--out", tmp_path, "--n", 30, "--shard", "1/2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_run, "swapped", _third_fails(fake_run.swapped))
        assert command(*arguments) == 1
    begun = list(kept)
    assert len(begun) == 2
    assert command(*arguments) == 0
    assert sorted(set(kept)) == sorted(kept) == ["00000000", "00000008", "00000016", "00000024"]
    assert command(*arguments) == 0
    assert len(kept) == 4


def _third_fails(swapped):
    calls = itertools.count()

    def fails(examples):
        if next(calls) == 2:
            raise OSError("the disk is full")
        return swapped(examples)

    return fails


def test_several_wordings_are_shared_out_each(tmp_path, monkeypatch):
    asked = ("--n", 12, "--wording", "{question} One word.", "--wording", "Look: {question}")
    assert command("--out", tmp_path / "whole", *asked) == 0
    for number in (2, 1):
        assert command("--out", tmp_path / "parts", *asked, "--shard", f"{number}/2") == 0
    assert merge(tmp_path / "parts", monkeypatch=monkeypatch) == 0
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    names = [name for name in one if name.endswith(("result.parquet", "summary.csv"))]
    assert len(names) == 6
    assert all(one[name] == two[name] for name in names)


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch, capsys):
    assert merge(tmp_path, monkeypatch=monkeypatch) == 2
    assert "there are no shards" in capsys.readouterr().err
    command("--out", tmp_path, "--shard", "2/3")
    assert merge(tmp_path, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert "of the 3 shards" in told and "not whole: 1/3, 3/3;" in told
    assert "python -m tests.runs.fake_run" in told and "--shard 1/3" in told
    assert not (tmp_path / "partial").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("--shard", "2/2", "--seed", 5), r"shards 1/2 and 2/2 of .* have different options: seed \(0 and 5\)"),
        (("--shard", "2/3"), "has shards of 2 and of 3"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(tmp_path, others, message):
    command("--out", tmp_path, "--shard", "1/2")
    command("--out", tmp_path, *others)
    with pytest.raises(UsageError, match=message):
        merging.merge(tmp_path)


def test_a_shard_made_by_another_version_is_refused(tmp_path):
    command("--out", tmp_path, "--shard", "1/2")
    command("--out", tmp_path, "--shard", "2/2")
    path = tmp_path / "shards/2-of-2/shard.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"versions": told["versions"] | {"torch": "1.0"}}))
    with pytest.raises(UsageError, match=r"different versions: torch \('.*' and '1.0'\); make one again"):
        merging.merge(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard", "0/3"), "--shard is '0/3'; K/N is needed"),
        (("--shard", "4/3"), "--shard is '4/3'"),
        (("--shard", "3"), "--shard is '3'"),
        (("--shard", "1/2", "--workers", "2"), "--shard and --workers exclude each other"),
        (("--workers", "0"), "--workers is 0"),
    ],
)
def test_wrong_shares_are_refused_in_one_line(tmp_path, capsys, arguments, message):
    assert command("--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_comes_late_finds_the_run_complete(tmp_path, capsys, monkeypatch):
    command("--out", tmp_path)
    before = contents(tmp_path)
    assert command("--out", tmp_path, "--shard", "1/2") == 0
    assert merge(tmp_path, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("is already complete") == 2
    assert command("--out", tmp_path, "--shard", "1/2", "--seed", 3) == 2
    assert "had other options: seed" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_run_of_one_process_does_not_begin_where_shards_are(tmp_path, capsys):
    command("--out", tmp_path, "--shard", "1/2")
    for more in ((), ("--overwrite",)):
        assert command("--out", tmp_path, *more) == 2
        assert "holds shards of a run; python -m vlm_mech.runs.merge" in capsys.readouterr().err


def test_merging_waits_for_no_shard_and_no_shard_begins_meanwhile(tmp_path, capsys, monkeypatch):
    for number in (1, 2):
        command("--out", tmp_path, "--shard", f"{number}/2")
    with Workspace(tmp_path / "shards/2-of-2").held():
        assert merge(tmp_path, monkeypatch=monkeypatch) == 2
        assert "another run is going on in" in capsys.readouterr().err
        assert command("--out", tmp_path, "--shard", "2/2", "--overwrite") == 2
        assert "wait for it" in capsys.readouterr().err


def test_other_folders_beside_shards_do_not_count(tmp_path, monkeypatch):
    for number in (1, 2):
        command("--out", tmp_path, "--shard", f"{number}/2")
    shutil.copytree(tmp_path / "shards/2-of-2", tmp_path / "shards/2-of-2.bak")
    assert merge(tmp_path, monkeypatch=monkeypatch) == 0


def test_files_of_a_whole_shard_that_changed_are_noticed(tmp_path, capsys, monkeypatch):
    found = {"data": "a"}
    monkeypatch.setattr("vlm_mech.runs.contract.ingredients", lambda *_, **__: found)
    monkeypatch.setattr("vlm_mech.runs.sharing.ingredients", lambda *_, **__: found)
    assert command("--out", tmp_path, "--shard", "1/2") == 0
    assert command("--out", tmp_path, "--shard", "1/2") == 0
    assert "whole already" in capsys.readouterr().out
    found = {"data": "b"}
    assert command("--out", tmp_path, "--shard", "1/2") == 2
    assert "was made of another data" in capsys.readouterr().err
    assert command("--out", tmp_path, "--shard", "2/2") == 0
    with pytest.raises(UsageError, match="have different files: data; make one again"):
        merging.merge(tmp_path)


@pytest.mark.parametrize("harm", ["cut", "changed", "notes", "receipts", "exchanged"])
def test_a_broken_batch_is_never_taken_for_a_whole_one(tmp_path, capsys, harm):
    work = Workspace(tmp_path)
    work.keep("00", fake_run.swapped(range(2)), {"n": 2})
    table, notes = tmp_path / "partial/00.parquet", tmp_path / "partial/00.json"
    content = table.read_bytes()
    if harm == "cut":
        table.write_bytes(content[: len(content) // 2])
    elif harm == "changed":
        table.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif harm == "notes":
        notes.write_bytes(notes.read_bytes()[:20])
    elif harm == "receipts":
        notes.write_text(notes.read_text().replace('"n": 2', '"n": 3'))
    else:
        work.keep("01", fake_run.swapped(range(2, 4)), {"n": 2})
        for path in (table, notes):
            path.with_stem("01").rename(path)
    assert "00" not in Workspace(tmp_path)
    assert "00" in capsys.readouterr().err
    again = Workspace(tmp_path)
    assert [key for key, _ in again.batches({"00": None}, "batches")] == ["00"]


def test_shards_are_read_from_their_text():
    assert shard_of(None) is None
    assert (shard_of("3/16").number, shard_of("3/16").of_all) == (3, 16)
