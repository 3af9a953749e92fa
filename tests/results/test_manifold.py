"""Distances and residuals beside natural states: against scikit-learn, and on a plane that states leave."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from vlm_mech.results.manifold import strangeness


def plane(n, seed, *, width=12):
    """States on a plane of two dimensions, with a little noise."""
    rng = np.random.default_rng(seed)
    states = np.zeros((n, width))
    states[:, :2] = rng.normal(size=(n, 2))
    return states + 0.01 * rng.normal(size=(n, width))


def test_numbers_are_those_of_scikit_learn():
    natural, states = plane(40, 0), plane(6, 1) + 0.3
    owners, own = np.repeat(np.arange(20), 2), np.arange(6)
    found = strangeness(states, natural, own, owners, neighbours=8, directions=3)

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
        assert found.projected[number] == pytest.approx(projected, abs=1e-3)


def test_what_leaves_the_plane_is_strange_and_what_stays_is_not():
    natural, owners = plane(80, 0), np.repeat(np.arange(40), 2)
    inside = strangeness(plane(30, 1), natural, np.arange(30), owners)
    assert np.median(inside.residual) < 80 and np.median(inside.distance) < 80
    out = plane(30, 1)
    out[:, 5] += 1.0
    outside = strangeness(out, natural, np.arange(30), owners)
    assert outside.residual.min() == 100 and outside.distance.min() > 90
    assert np.abs(outside.projected[:, 5]).max() < 0.2, "brought back to the plane"


def test_own_states_are_no_neighbours():
    """Each state's own natural state is the same; the nearest other one is far."""
    natural = 10 * np.eye(20)
    found = strangeness(natural[:5], natural, np.arange(5), np.arange(20))
    assert found.distance.tolist() == [0] * 5, "as far from others as natural states are, not at distance 0"
    moved = natural[:5] * 1.5
    assert strangeness(moved, natural, np.arange(5), np.arange(20)).distance.tolist() == [100] * 5


def test_too_few_natural_states_are_refused():
    with pytest.raises(ValueError, match="9 natural states of other examples; 10 are needed"):
        strangeness(np.eye(10)[:1], np.eye(10), np.arange(1), np.arange(10))
