"""Variance by differences against its definition, the test for drift against permutations, their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gns.estimate import estimate, summarise
from gns.statistics.moments import (
    BETWEEN,
    DRIFT_ALARM,
    DRIFT_STEPS,
    SUCCESSIVE,
    Moments,
    _least,
    _ranks,
    drifting,
)
from gns.statistics.sets import honest_set
from gns.sums import StepSums
from tests.reference import estimators as slow
from tests.reference.tolerances import close

SPECTRUM = 1 / np.arange(1, 65)


def records(m, q, n=16) -> list[StepSums]:
    return [StepSums(i, n, float(a), float(b)) for i, (a, b) in enumerate(zip(m, q, strict=True))]


def rising(seed: int, times: float, k: int = 60, first: float = 5.0) -> list[StepSums]:
    """Steps whose noise scale grows so many times, from `first`."""
    b = first * times ** np.linspace(0, 1, k)
    return records(*slow.drifting_steps(np.random.default_rng(seed), SPECTRUM, b, 16))


def average_truth(times: float, k: int = 60, first: float = 5.0) -> float:
    return 1 / float(np.mean(1 / (first * times ** np.linspace(0, 1, k))))


@given(seed=st.integers(0, 9999), k=st.integers(3, 40), theta=st.floats(0.01, 100))
def test_differences_are_those_of_the_definition(seed, k, theta):
    rng = np.random.default_rng(seed)
    x, y = rng.exponential(2, k), rng.exponential(1, k) - 0.3
    moments = Moments.of(x, y, np.ones(k), np.ones(k), variance=SUCCESSIVE)
    expected = slow.by_differences(x, y, theta)
    t, h = moments.statistics(np.array(theta), np.array(1.0))
    close([float(t), moments.df], [expected[0], expected[2]], rtol=1e-8)
    assert abs(float(h) - expected[1]) <= 1e-6 * max(1, abs(expected[1]))


def test_differences_estimate_the_same_moments_where_nothing_drifts():
    """4,000 runs of 30 skewed steps: variance and third cumulant within 4 standard errors of the truth."""
    rng = np.random.default_rng(3)
    ones, squares, cubes = np.ones(30), [], []
    for _ in range(4000):
        moments = Moments.of(rng.exponential(1, 30), rng.standard_normal(30), ones, ones, variance=SUCCESSIVE)
        squares.append(moments.second[0] * 30 * 30 / 29)
        cubes.append(moments.third[0] * 30 * 30)
    for found, truth in ((squares, 1.0), (cubes, 2.0)):  # of the exponential law
        z = (np.mean(found) - truth) / (np.std(found) / math.sqrt(len(found)))
        assert abs(z) < 4, (np.mean(found), truth)
    # the degrees of freedom: 2/Var of the relative variance for normal steps
    rng = np.random.default_rng(4)
    normal = [
        Moments.of(rng.standard_normal(30), rng.standard_normal(30), ones, ones, variance=SUCCESSIVE)
        for _ in range(4000)
    ]
    scatter = np.var([m.second[0] for m in normal]) / np.mean([m.second[0] for m in normal]) ** 2
    assert 2 / scatter == pytest.approx(normal[0].df, rel=0.09)  # 4 standard errors of a variance of 4,000


def test_a_trend_enters_the_plain_variance_and_hardly_the_differences():
    rng = np.random.default_rng(0)
    noise, trend, ones = rng.standard_normal(200), np.linspace(0, 10, 200), np.ones(200)
    for variance, low, high in ((BETWEEN, 8, 11), (SUCCESSIVE, 0.99, 1.01)):
        still = Moments.of(noise, noise, ones, ones, variance=variance)
        moving = Moments.of(noise + trend, noise, ones, ones, variance=variance)
        assert low < moving.second[0] / still.second[0] < high


def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="variance is 'blocks'; known: 'between steps', 'successive diff"):
        Moments.of(np.ones(3), np.ones(3), np.ones(3), np.ones(3), variance="blocks")


@pytest.mark.parametrize("k", [1, 1.2, 4 / 3, 2, 3, 50])
def test_degrees_of_freedom_do_not_pass_those_between_steps(k):
    moments = Moments(1.0, 1.0, (1.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), k, SUCCESSIVE)
    assert 0.66 * (k - 1) <= moments.df <= k - 1


# the test for drift


def test_exchangeable_steps_of_any_law_are_not_taken_for_drifting():
    """4,000 series a law: at a rate of 0.1 % more than 13 have probability 8e-5 (Poisson of 4)."""
    rng = np.random.default_rng(1)
    assert stats.poisson.sf(13, 4_000 * DRIFT_ALARM) < 1e-4
    for draw in (rng.standard_normal, lambda size: rng.standard_t(1, size), rng.standard_exponential):
        alarms = sum(drifting(row) for row in draw((4_000, 50)))
        assert alarms <= 13


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.02, 0.03])
def test_the_verdict_is_that_of_permutations(slope):
    """Where the permutation p is clear of 0.1 % by a factor of 3 on either side."""
    seen = set()
    for seed in range(12):
        values = np.random.default_rng(seed).standard_normal(60) + slope * np.arange(60)
        p = slow.neighbours_closer(values, 20_000, seed)
        if p < DRIFT_ALARM / 3 or p > 3 * DRIFT_ALARM:
            assert drifting(values) is (p < DRIFT_ALARM), (seed, p)
            seen.add(p < DRIFT_ALARM)
    assert seen


def test_a_clear_trend_drifts_in_any_direction_and_constants_do_not():
    up = np.arange(DRIFT_STEPS) + 0.1 * np.random.default_rng(0).standard_normal(DRIFT_STEPS)
    assert drifting(up) and drifting(-up) and drifting(np.exp(up))
    assert not drifting(np.ones(50)) and not drifting(np.tile([0.0, 1.0], 25))
    assert not drifting(up[:-1]), "fewer than that many steps are not judged"


@given(seed=st.integers(0, 9999), k=st.integers(2, 300), kind=st.sampled_from(["normal", "cauchy", "ties"]))
def test_the_short_cut_is_never_above_the_statistic_itself(seed, k, kind):
    rng = np.random.default_rng(seed)
    draw = {"normal": rng.standard_normal, "cauchy": rng.standard_cauchy}.get(kind)
    values = rng.integers(0, 4, k).astype(float) if draw is None else draw(k)
    values = values * 1e-9 + np.linspace(0, 1e-9, k) * (seed % 3 if draw else 0)
    ranks = stats.rankdata(values)
    assert np.array_equal(_ranks(values), ranks)
    whole = ((ranks - ranks.mean()) ** 2).sum()
    assert whole == 0 or _least(values) <= (np.diff(ranks) ** 2).sum() / whole * (1 + 1e-12)


def test_the_short_cut_settles_long_runs():
    values = np.random.default_rng(0).standard_normal(10_000)
    exact = (np.diff(stats.rankdata(values)) ** 2).sum() / (10_000 * (1e8 - 1) / 12)
    assert 0.99 * exact < _least(values) <= exact


# what an estimate makes of it


def test_steps_that_do_not_drift_lose_nothing():
    """Bit-identical to the variance between steps, in all of 60 runs but the 0.2 % that raise an alarm."""
    plain = 0
    for seed in range(60):
        m, q = slow.gaussian_steps(np.random.default_rng(seed), SPECTRUM, 50, 16, 50)
        e = estimate(records(m, q))
        assert e.moments is not None
        x, y = np.array([16 * (m - q) / 15, (16 * q - m) / 15])
        by_hand = Moments.of(x, y, np.ones(50), np.ones(50))
        if e.variance == BETWEEN:
            plain += 1
            close([e.low, e.high], honest_set(by_hand, 0.95)[:2], rtol=1e-12)
    assert plain >= 58


@pytest.mark.parametrize("times", [3, 30])
def test_coverage_under_a_drifting_target(times):
    """300 runs of 60 steps: the plain variance covers always and too wide, that by differences as it should.

    At 94 % at least 263 of 300 are covered but for a chance of 2e-5; 300 of 300 would be a set that is too
    wide (chance 1e-8 at 94 %).
    """
    assert stats.binom.cdf(262, 300, 0.94) < 2e-5
    truth = average_truth(times)
    covered, plain, used, narrower = 0, 0, 0, []
    for seed in range(300):
        e = estimate(rising(seed, times))
        used += e.variance == SUCCESSIVE
        covered += e.low <= truth <= e.high
        steps = rising(seed, times)
        x, y = np.array([s.trace_sigma for s in steps]), np.array([s.grad_sq_norm for s in steps])
        low, high, _ = honest_set(Moments.of(x, y, np.ones(60), np.ones(60)), 0.95)
        plain += low <= truth <= high
        narrower.append((e.high - e.low) / (high - low))
    assert used > 280
    assert 263 <= covered < 300
    assert plain >= 297, "the control: drift counted as noise"
    assert np.median(narrower) < (0.8 if times == 3 else 0.65)


def test_the_estimate_says_which_variance_was_used_for_each_group():
    drifting_run, still = rising(0, 30), rising(0, 1)
    assert estimate(drifting_run).variance == SUCCESSIVE
    assert estimate(still).variance == BETWEEN
    assert summarise(drifting_run[:10], level=0.95).variance == BETWEEN


def test_moments_times_a_factor_are_those_of_values_times_it():
    draw = np.random.default_rng(0)
    x, y, w = draw.exponential(size=30), draw.exponential(size=30), draw.uniform(size=30)
    for variance in (BETWEEN, SUCCESSIVE):
        found = Moments.of(x, y, w, w, variance=variance).times(-0.3)
        wanted = Moments.of(-0.3 * x, -0.3 * y, w, w, variance=variance)
        assert (found.k, found.variance) == (wanted.k, wanted.variance)
        for name in ("x", "y", "second", "third"):
            close(np.array(getattr(found, name)), np.array(getattr(wanted, name)), rtol=1e-12)
