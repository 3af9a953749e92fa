"""What comes before a sweep is really done, in the order told, and told in plain forward passes."""

import itertools

import pytest

from tests.benchmark.test_benchmark import small
from vlm_mech.benchmark import fixed_costs
from vlm_mech.benchmark.fixed_costs import Costs, measured


@pytest.fixture
def asked(monkeypatch):
    """A small shape, and the options of the sweeps that are run."""
    options = []
    real = fixed_costs.sweep

    def recorded(*given, **named):
        options.append((len(given[2]), named["check"]))
        return real(*given, **named)

    monkeypatch.setattr(fixed_costs, "geometry", lambda name, full: small(name))
    monkeypatch.setattr(fixed_costs, "sweep", recorded)
    return options


def test_each_is_done_and_the_unit_is_the_fastest_plain_pass(asked, monkeypatch):
    took = itertools.chain([5.0, 2.0, 3.0], itertools.count(10.0, 10.0))
    done = []

    def clocked(work):
        done.append(work())
        return next(took)

    monkeypatch.setattr(fixed_costs, "_seconds", clocked)
    found = dict(measured(Costs(threads=1)))
    assert found == {
        "plain forward (seconds)": 2.0,
        "load check": 5.0,
        "hash of weights": 10.0,
        "read-out": 15.0,
        "4 knockouts, check=0": 20.0,
        "4 knockouts, check=1": 25.0,
    }
    assert asked == [(4, 0), (4, 1)]
    findings, weights, readout, without, _ = done[3:]
    assert len(findings) >= 45 and all(each.holds for each in findings)
    assert len(weights) == 16 and readout.scale == 1.0 and set(without.table["layer"]) == set(range(4))


def test_time_is_taken_around_the_work(monkeypatch):
    now = iter([1.0, 4.5])
    monkeypatch.setattr(fixed_costs.time, "perf_counter", lambda: next(now))
    assert fixed_costs._seconds(lambda: None) == 3.5
