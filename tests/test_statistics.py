"""Intervals and tests against scipy, against hand computation, and by simulation."""

import numpy as np
import pytest
from scipy import stats

from vlm_mech.errors import UsageError
from vlm_mech.statistics import bootstrap_means, corrected, percentile_interval, sign_flip_p


def each(n):
    return np.arange(n)


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(1).exponential(size=(60, 1))
    low, high = percentile_interval(values, each(60), level=0.9, n_resamples=20_000, seed=0)
    theirs = stats.bootstrap(
        (values[:, 0],), np.mean, confidence_level=0.9, n_resamples=20_000, method="percentile", random_state=0
    ).confidence_interval
    assert low[0] == pytest.approx(theirs.low, abs=0.01)
    assert high[0] == pytest.approx(theirs.high, abs=0.01)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(2), 0
    for seed in range(500):
        values = rng.normal(0.3, 1, (50, 1))
        low, high = percentile_interval(values, each(50), level=0.95, n_resamples=400, seed=seed)
        hits += low[0] <= 0.3 <= high[0]
    # 95 % of 500, three standard errors and the known slight optimism of percentile intervals allowed.
    assert 0.91 <= hits / 500 <= 0.98


def test_cells_share_their_resamples():
    values = np.random.default_rng(3).normal(size=(30, 1)) + np.array([[0.0, 5.0]])
    means = bootstrap_means(values, each(30), n_resamples=300, seed=0)
    assert np.allclose(means[:, 1] - means[:, 0], 5.0)


def test_groups_are_drawn_together():
    """Each scene counted four times: by groups the interval is that of the scenes, by examples it is half as wide."""
    scenes = np.random.default_rng(4).normal(size=25)
    values, groups = np.repeat(scenes, 4)[:, None], np.repeat(np.arange(25), 4)
    options = {"level": 0.95, "n_resamples": 4000, "seed": 0}
    once = np.subtract(*percentile_interval(scenes[:, None], each(25), **options))
    grouped = np.subtract(*percentile_interval(values, groups, **options))
    naive = np.subtract(*percentile_interval(values, each(100), **options))
    assert grouped == pytest.approx(once, rel=0.02)
    assert naive == pytest.approx(once / 2, rel=0.1)


def test_missing_values_are_left_out_and_too_few_give_no_interval():
    values = np.array([[1.0, np.nan, 2.0], [3.0, np.nan, np.nan], [5.0, np.nan, np.nan]])
    low, high = percentile_interval(values, each(3), level=0.95, n_resamples=500, seed=0)
    assert low[0] < 3 < high[0] and np.isnan(low[1:]).all() and np.isnan(high[1:]).all()
    assert np.isnan(sign_flip_p(values, each(3), n_resamples=100, seed=0)).tolist() == [False, True, True]


def test_exact_sign_flip_test_by_hand_and_by_scipy():
    effects = np.array([[1.0], [2.0], [3.0]])
    # Of the eight sign patterns only +++ and --- reach a sum of six.
    assert sign_flip_p(effects, each(3), n_resamples=100, seed=0)[0] == 2 / 8
    more = np.random.default_rng(5).normal(0.5, 1, (9, 1))
    theirs = stats.permutation_test(
        (more[:, 0], np.zeros(9)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(more, each(9), n_resamples=1000, seed=0)[0] == pytest.approx(theirs.pvalue)


def test_random_sign_flip_test_is_close_to_the_exact_one_and_never_zero():
    effects = np.random.default_rng(6).normal(0.4, 1, (14, 1))
    exact = sign_flip_p(effects, each(14), n_resamples=2**14, seed=0)[0]
    drawn = sign_flip_p(effects, each(14), n_resamples=2**14 - 1, seed=0)[0]
    assert drawn == pytest.approx(exact, abs=0.01)
    sure = sign_flip_p(np.ones((60, 1)), each(60), n_resamples=999, seed=0)[0]
    assert sure == 1 / 1000
    assert sign_flip_p(np.zeros((5, 1)), each(5), n_resamples=999, seed=0)[0] == 1.0


def test_corrections_by_hand():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    assert np.allclose(corrected(p, "holm"), [0.03, 0.06, np.nan, 0.06, 0.02], equal_nan=True)
    assert np.allclose(corrected(p, "benjamini-hochberg"), [0.02, 0.04, np.nan, 0.04, 0.02], equal_nan=True)
    assert np.array_equal(corrected(p, "none"), p, equal_nan=True)
    with pytest.raises(UsageError, match="correction 'bonferoni' is not known"):
        corrected(p, "bonferoni")


def test_false_positives_are_as_rare_as_promised():
    """20 cells without any effect: Holm finds something in at most about 5 % of 200 experiments."""
    rng, found = np.random.default_rng(7), 0
    for seed in range(200):
        p = sign_flip_p(rng.normal(size=(24, 20)), each(24), n_resamples=2000, seed=seed)
        found += (corrected(p, "holm") < 0.05).any()
    assert found <= 20
