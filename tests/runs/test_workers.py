"""Batches shared out among Ray actors on a cluster of two machines (two raylets here): the same bytes as one process,
whoever dies."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from tests.runs.test_contract import ROOT, command, contents
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.runs import workers
from vlm_mech.runs.configuration import ClaimConfig
from vlm_mech.runs.starting_ray import check_address, single_threaded
from vlm_mech.runs.workers import Crew, Deal, Dealt, Worker

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """A head without a CPU, and two machines of one CPU each."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    from ray.cluster_utils import Cluster

    made = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20})
    # Each at an address of its own: a command joins the machine at its own address, the head, which stays.
    own = ("127.0.0.2", "127.0.0.3")
    nodes = [made.add_node(num_cpus=1, object_store_memory=100 * 2**20, node_ip_address=each) for each in own]
    try:
        yield made, nodes
    finally:
        ray.shutdown()
        made.shutdown()


def shared(folder, cluster, *arguments):
    """The fake experiment in a process of its own, as commands are: in this one the types of its calls are checked."""
    given = ["--out", folder, "--ray", cluster[0].address, *arguments]
    how = [sys.executable, "-m", "tests.runs.fake_run", *(str(each) for each in given)]
    return subprocess.run(how, cwd=ROOT, capture_output=True, text=True)


def alone(folder, *arguments):
    """The fake experiment with two workers of one machine, begun in a process of its own."""
    how = [sys.executable, "-m", "tests.runs.fake_run", "--out", str(folder), "--n", "40", "--workers", "2", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(how, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": ""}, **pipes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert command("--out", folder, "--n", 40) == 0
    return (folder / "result.parquet").read_bytes()


@pytest.mark.long
def test_two_workers_make_the_bytes_of_one_process(tmp_path, cluster, whole):
    done = shared(tmp_path / "run", cluster, "--n", 40)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/result.parquet").read_bytes() == whole
    assert not (tmp_path / "run/partial").exists()


def test_a_worker_that_is_killed_is_started_again(tmp_path, cluster, whole):
    done = shared(tmp_path / "run", cluster, "--n", 40, "--die", tmp_path / "died")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    assert (tmp_path / "run/result.parquet").read_bytes() == whole
    assert not (tmp_path / "run/partial").exists()


def test_what_one_raises_ends_the_run_as_ever_and_the_rest_is_kept(tmp_path, cluster):
    done = shared(tmp_path / "run", cluster, "--n", 40, "--wrong", "work")
    assert done.returncode == 1 and "error: the second batch failed" in done.stderr.splitlines()
    assert list((tmp_path / "run/partial").glob("*.parquet"))


@pytest.mark.long
def test_what_one_is_asked_wrongly_ends_the_run_and_leaves_nothing(tmp_path, cluster):
    done = shared(tmp_path / "other", cluster, "--wrong", "use")
    assert done.returncode == 2 and "kind 'curly' is no good" in done.stderr
    assert not (tmp_path / "other").exists()


def test_several_wordings_and_a_run_taken_up(tmp_path, cluster):
    asked = ("--n", 12, "--wording", "{question} One word.", "--wording", "Look: {question}")
    assert command("--out", tmp_path / "one", *asked) == 0
    done = shared(tmp_path / "two", cluster, *asked)
    assert done.returncode == 0, done.stderr
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name: each for name, each in one.items() if name.endswith("parquet")} == {
        name: each for name, each in two.items() if name.endswith("parquet")
    }
    done = shared(tmp_path / "two", cluster, *asked, "--resume")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "--ray '127.0.0.1:9' cannot be reached"),
        ("ray://127.0.0.1:10001", "run the command on a machine of the cluster"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_at_once(address, message):
    with pytest.raises(UsageError, match=message):
        check_address(address)


def test_more_workers_than_cpus_are_refused(tmp_path, cluster):
    done = shared(tmp_path / "run", cluster, "--workers", 3)
    assert done.returncode == 2 and "--workers is 3, of one CPU each; Ray has 2" in done.stderr


# Last, since a machine is gone afterwards.
def test_a_machine_that_is_lost_stops_nobody(tmp_path, cluster, whole):
    made, nodes = cluster

    def lose():
        while not 2 <= len(list((tmp_path / "run/partial").glob("0*.parquet"))) < 8:
            time.sleep(0.02)
        made.remove_node(nodes[1], allow_graceful=False)
        lost.append(nodes[1])

    lost = []
    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    done = shared(tmp_path / "run", cluster, "--n", 40, "--slow", "0.5")
    assert done.returncode == 0, done.stderr
    assert lost, "it was lost before the run was done"
    assert (tmp_path / "run/result.parquet").read_bytes() == whole


def test_without_an_address_ray_is_started_for_the_run_and_this_process_works_too(tmp_path, whole):
    done = alone(tmp_path / "run", "--slow", "0.2")
    told, errors = done.communicate()
    assert done.returncode == 0, errors
    assert "workers: 2, of one CPU each, of Ray on this machine, this process one of them" in told
    assert (tmp_path / "run/result.parquet").read_bytes() == whole


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSTOP])
def test_the_process_that_began_ends_the_run_when_others_die_or_stop(tmp_path, whole, how):
    run = alone(tmp_path / "run", "--slow", "0.5", "--hold")
    lost, started = set(), time.monotonic()
    while run.poll() is None:
        if time.monotonic() - started > 200:
            run.kill()
        for each in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = each.cmdline()[:1]
                if title and title[0].startswith("ray::Worker") and any("held-" in at.path for at in each.open_files()):
                    lost.add(each.pid)
                    each.send_signal(how)
        time.sleep(0.05)
    assert run.returncode == 0, run.communicate()[1]
    assert lost, "none was lost before the run was done"
    assert (tmp_path / "run/result.parquet").read_bytes() == whole


def test_what_this_process_raises_ends_the_run_and_takes_the_folder_back(tmp_path):
    run = alone(tmp_path / "run", "--wrong", "use")
    assert "kind 'curly' is no good" in run.communicate()[1] and run.returncode == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_what_this_process_fails_at_ends_the_run_and_frees_the_other(tmp_path):
    run = alone(tmp_path / "run", "--wrong", "work")
    assert "error: the second batch failed" in run.communicate()[1] and run.returncode == 1
    assert not list((tmp_path / "run/partial").glob("?" * 32 + ".json"))


@pytest.mark.parametrize("given", ["two", "0", "-1"])
def test_a_number_of_threads_that_is_none_is_told(monkeypatch, given):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    with pytest.raises(UsageError, match="OMP_NUM_THREADS is .*; it must be 1 or more"):
        single_threaded()


@pytest.mark.parametrize(("given", "kept"), [("", "1"), ("2,1", "2,1"), ("3", "3")])
def test_threads_are_those_of_workers(monkeypatch, given, kept):
    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    try:
        single_threaded()
        assert os.environ["OMP_NUM_THREADS"] == kept and torch.get_num_threads() == int(kept[0])
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finished_is_given_again_and_each_batch_first_once():
    deal = Deal()
    deal.offer(["a", "b", "c"], ["a"])
    assert [deal.take("x", None), deal.take("y", None)] == ["b", "c"]
    assert deal.take("x", "b") == "c"
    assert deal.state() == (2, 3)
    assert deal.take("x", None, again=False) is None
    assert deal.take("x", "c") is None
    assert deal.take("y", "c") is None
    with pytest.raises(WorkError, match="different batches"):
        deal.offer(["a", "b"], [])


class Called:
    """A method of an actor that is called here."""

    def __init__(self, method):
        self.remote = method


@pytest.mark.parametrize(("looks", "mine", "killed"), [(2, ["b"], 0), (10**6, ["b", "a"], 1)])
def test_who_is_still_at_a_batch_is_waited_for_and_not_for_ever(monkeypatch, tmp_path, looks, mine, killed):
    """Another worker has batch `a`, and is done with it after so many looks."""
    monkeypatch.setattr(ray, "get", lambda told: told)
    monkeypatch.setattr(workers, "SHORTEST", 0.1)
    deal, seen, ends = Deal(), [], []
    deal.offer(["a", "b"], [])
    assert deal.take("another", None) == "a"

    class Other(Dealt):
        def look(self, timeout=0):
            seen.append(timeout)
            time.sleep(0.01)
            if len(seen) == looks:
                deal.take("another", "a")

        def kill(self):
            ends.append("killed")

        def end(self):
            ends.append("ended")

    called = SimpleNamespace(offer=Called(deal.offer), take=Called(deal.take), state=Called(deal.state))
    crew = Crew(ClaimConfig(), "", tmp_path, 2, 0, works=True, begun=Other(called, [], ["a call"], tmp_path / "token"))
    assert list(crew.of(["a", "b"], "batches", {"a": False, "b": False})) == mine
    assert ends == ["killed"] * killed + ["ended"] and deal.state() == (2, 2)


def test_a_machine_without_the_folder_is_told_so(tmp_path):
    with pytest.raises(UsageError, match="is not seen from .*; workers need a folder that all machines see"):
        Worker().work(None, "tests.runs.fake_run", {}, tmp_path, "token.json", 0)
