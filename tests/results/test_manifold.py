"""Distances and residuals beside natural states: against scikit-learn, and on a plane that states leave."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from vlm_mech.results.manifold import Natural, Strangeness


def plane(n, seed, *, width=12):
    """States on a plane of two dimensions, with a little noise."""
    rng = np.random.default_rng(seed)
    states = np.zeros((n, width))
    states[:, :2] = rng.normal(size=(n, 2))
    return states + 0.01 * rng.normal(size=(n, width))


def test_numbers_are_those_of_scikit_learn():
    natural, states = plane(40, 0), plane(6, 1) + 0.3
    owners, own = np.repeat(np.arange(20), 2), np.arange(6)
    known = Natural(natural, owners, neighbours=8, directions=3)
    found, put = known.strangeness(states, own), known.projected(states, own)

    def by_hand(state, owner):
        others = natural[owners != owner]
        nearest = NearestNeighbors(n_neighbors=8).fit(others)
        distances, at = nearest.kneighbors(state[None])
        components = PCA(3).fit(others[at[0]])
        residual = np.linalg.norm(state - components.inverse_transform(components.transform(state[None]))[0])
        near, start = others[at[0]], np.full(8, 1 / 8)
        sums = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
        how = {"bounds": [(0, 1)] * 8, "constraints": [sums], "options": {"ftol": 1e-12, "maxiter": 500}}
        fit = minimize(lambda weights: ((weights @ near - state) ** 2).sum(), start, method="SLSQP", **how)
        return distances[0, 0], residual, fit.x @ near

    usual = np.array([by_hand(*each)[:2] for each in zip(natural, owners, strict=True)])
    for number in range(6):
        distance, residual, projected = by_hand(states[number], number)
        assert found.distance[number] == pytest.approx(100 * (usual[:, 0] < distance).mean())
        assert found.residual[number] == pytest.approx(100 * (usual[:, 1] < residual).mean())
        assert put[number] == pytest.approx(projected, abs=1e-3)


def test_what_leaves_the_plane_is_strange_and_what_stays_is_not():
    natural, owners = plane(80, 0), np.repeat(np.arange(40), 2)
    known = Natural(natural, owners)
    inside = known.strangeness(plane(30, 1), np.arange(30))
    assert np.median(inside.residual) < 80 and np.median(inside.distance) < 80
    out = plane(30, 1)
    out[:, 5] += 1.0
    outside = known.strangeness(out, np.arange(30))
    assert outside.residual.min() == 100 and outside.distance.min() > 90 and outside.beyond(95).all()
    assert 0 <= inside.beyond(95).mean() < 0.4
    assert np.abs(known.projected(out, np.arange(30))[:, 5]).max() < 0.2, "brought back to the plane"


def test_a_mean_difference_that_wakes_a_silent_unit_is_flagged_and_what_needs_the_unit_is_gone():
    """States of one answer lie on one axis, those of the other on another; a unit is silent on both.

    Moved by the difference of the means, states of the first come to lie beside the second axis, as far from it as they
    lay from their own mean: half of them wake the unit. Put among natural states, what they say of the second axis is
    left, and the unit sleeps.
    """
    rng = np.random.default_rng(0)
    sizes, noise = rng.uniform(1, 2, (2, 40)), 0.02 * rng.normal(size=(80, 8))
    states = np.zeros((80, 8))
    states[:40, 0], states[40:, 1] = sizes
    states += noise
    one, other = states[:40], states[40:]
    unit = lambda given: np.maximum(0, -given[:, 0] - 0.15)  # noqa: E731
    assert unit(states).max() == 0, "silent on all natural states"
    moved = one + (other.mean(0) - one.mean(0))
    assert (unit(moved) > 0).mean() > 0.3
    known = Natural(states, np.tile(np.arange(40), 2), directions=2)
    found, put = known.strangeness(moved, np.arange(40)), known.projected(moved, np.arange(40))
    awake = unit(moved) > 0
    assert np.median(found.distance) > 95 and found.beyond(95)[awake].all()
    assert unit(put).max() == 0 and put[:, 1].mean() == pytest.approx(moved[:, 1].mean(), abs=0.1)
    exchanged = known.strangeness(other[rng.permutation(40)], np.arange(40))
    assert np.median(exchanged.distance) < 80 and np.median(exchanged.residual) < 80, "an exchange stays natural"


def test_own_states_are_no_neighbours():
    """Each state's own natural state is the same; the nearest other one is far."""
    natural = 10 * np.eye(20)
    known = Natural(natural, np.arange(20))
    found = known.strangeness(natural[:5], np.arange(5))
    assert found.distance.tolist() == [0] * 5, "as far from others as natural states are, not at distance 0"
    moved = natural[:5] * 1.5
    assert known.strangeness(moved, np.arange(5)).distance.tolist() == [100] * 5


def test_too_few_natural_states_are_refused():
    with pytest.raises(ValueError, match="9 natural states of other examples; 10 are needed"):
        Natural(np.eye(10), np.arange(10)).strangeness(np.eye(10)[:1], np.arange(1))


def test_a_state_is_beyond_a_percentile_by_its_distance_or_by_its_residual():
    found = Strangeness(np.array([96.0, 10.0, 95.0]), np.array([0.0, 99.0, 95.0]))
    assert found.beyond(95).tolist() == [True, True, False]
