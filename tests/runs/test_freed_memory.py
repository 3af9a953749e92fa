"""Commands keep what they free, where glibc is what allocates and nobody said otherwise."""

import os
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.runs.test_contract import command
from vlm_mech.runs import contract, freed_memory
from vlm_mech.runs.freed_memory import APART, KEPT, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory

AGAIN = """
import resource, sys, torch
from pathlib import Path
from vlm_mech.runs.freed_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
def some():
    made = [torch.ones(2**20) for _ in range(60)]
torch.ones(2**20)
empty = held()
some()
held_after, faults = held() - empty, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    some()
print(held_after, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
"""Six times 60 tensors of 4 MiB, all freed in between: the bytes that the process holds after the first time, and how
many pages it is given anew for the other five."""


@pytest.fixture
def asked(monkeypatch):
    """What `mallopt` is asked; it takes no more than 32 MiB for what is mapped apart, as older ones do."""
    found = []

    def mallopt(name, value):
        found.append((name, value))
        return int(name != M_MMAP_THRESHOLD or value <= 2**25)

    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(freed_memory.sys, "platform", "linux")
    for name in [each for each in freed_memory.os.environ if each.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return found


def test_both_limits_are_asked_for_in_turn(asked):
    keep_freed_memory()
    assert asked == [(M_MMAP_THRESHOLD, APART), (M_TRIM_THRESHOLD, KEPT)]


def test_where_one_is_refused_the_other_is_left_alone(asked, monkeypatch):
    monkeypatch.setattr(freed_memory, "APART", 2**26)
    keep_freed_memory()
    assert asked == [(M_MMAP_THRESHOLD, 2**26)]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072")]
)
def test_what_the_environment_says_stays(asked, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    keep_freed_memory()
    assert asked == []


def test_elsewhere_nothing_is_done(asked, monkeypatch):
    monkeypatch.setattr(freed_memory.sys, "platform", "darwin")
    keep_freed_memory()
    monkeypatch.setattr(freed_memory.sys, "platform", "linux")
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed_memory()
    assert asked == []


def test_commands_keep_it(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(contract, "keep_freed_memory", lambda: kept.append(True))
    assert command("--out", tmp_path / "run", "--n", 4) == 0
    assert kept == [True]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_held_and_pages_are_not_asked_for_again():
    """How many pages are given anew where memory goes back depends on the kernel; that it goes back does not."""
    whole = 60 * 2**22

    # glibc lets its threshold grow with what is freed, and then keeps what lies under anything small: a threshold that
    # is given stays, and all of these tensors are mapped apart.
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def told(how, **more):
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, how], capture_output=True, text=True, check=True, env=plain | more
        )
        return [int(each) for each in done.stdout.split()]

    (kept, kept_faults), (given_back, faults) = told("kept"), told("given back", MALLOC_MMAP_THRESHOLD_=str(2**20))
    assert given_back < 0.1 * whole < 0.9 * whole < kept
    assert kept_faults < 0.1 * 5 * whole // resource.getpagesize() and 2 * kept_faults < faults
