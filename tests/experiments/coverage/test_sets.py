"""The vectorised sets: the real `estimate()` run by run, and the shortest honest code of every rival."""

import math

import numpy as np
import pytest

from experiments.coverage import sets as module
from experiments.coverage.noise import DIRECTIONS, LAWS, simulate
from experiments.coverage.sets import METHODS, clamped_ema, ema_of_ratios, hull, moments_of, statuses
from gns.estimate import Moments, estimate
from gns.statistics.moments import BETWEEN
from gns.sums import StepSums
from tests.reference import estimators as slow
from tests.reference.tolerances import close

LEVELS = (0.80, 0.90, 0.95)
RUNS = 12
SIZES, TRUTHS = (3, 10, 20, 50), (0.2, 5, 500, 20_000)


def sampled():
    """Every k with every B and every law, directions in turn: as many each; the other half is slow.

    Laws and directions only draw the numbers that are compared; k and B decide which branch is taken.
    """
    for i, b_simple in enumerate(TRUTHS):
        for j, k in enumerate(SIZES):
            for n, law in enumerate(LAWS):
                for m, direction in enumerate(DIRECTIONS):
                    slow = (i + j + n + m) % 2
                    marks = [pytest.mark.slow] if slow else []
                    yield pytest.param(law, b_simple, k, direction, marks=marks)


def same(mine, real, rtol, what):
    """Equal up to rounding, where both may be infinite or not there."""
    if math.isfinite(real) and math.isfinite(mine):
        close(mine, real, rtol=rtol, what=what)
    else:
        assert mine == real or (math.isnan(mine) and math.isnan(real)), (what, mine, real)


@pytest.mark.parametrize(("law", "b_simple", "k", "direction"), list(sampled()))
def test_the_toolkits_sets_are_those_of_estimate(law, b_simple, k, direction):
    noise = simulate(law, "1/j^2", 4, RUNS, k, seed=k)
    found = hull(*noise.unbiased(b_simple, direction), LEVELS)
    status = statuses(found, k)
    m, q = noise.recorded(b_simple, direction)
    for r in range(RUNS):
        steps = [StepSums(i, 4, float(a), float(b)) for i, (a, b) in enumerate(zip(m[r], q[r], strict=True))]
        for i, level in enumerate(LEVELS):
            real = estimate(steps, level=level)
            if real.variance != BETWEEN:  # taken for a drifting run, one in 500: not what is simulated
                continue
            assert status[i, r] == real.status
            same(found.low[i, r], real.low, 1e-7, f"low {r} {level}")
            same(found.high[i, r], real.high, 1e-7, f"high {r} {level}")
            held = real.low <= b_simple <= real.high
            assert held == (found.low[i, r] <= b_simple <= found.high[i, r])
        if real.b_simple > 0:
            close(found.point[r], real.b_simple, rtol=1e-9, what="point")


def test_every_status_occurs_above():
    seen = set()
    for k in (10, 20):
        for b in (5, 20_000):
            x, y = simulate("gaussian", "1/j^2", 4, 200, k, seed=k).unbiased(b, "even")
            seen |= set(np.unique(statuses(hull(x, y, LEVELS), k)))
    assert seen == {"collecting", "measured", "lower bound", "not detectable"}


def test_moments_of_many_runs_are_those_of_each():
    x, y = simulate("t5", "1/j", 4, 5, 30, seed=1).unbiased(20, "top")
    many = moments_of(x, y)
    for r in range(5):
        one = Moments.of(x[r], y[r], np.ones(30), np.ones(30))
        close([many.x[r], many.y[r], *(v[r] for v in many.second)], [one.x, one.y, *one.second], rtol=1e-9)
        close([v[r] for v in many.third], one.third, rtol=1e-7)
        assert many.k == pytest.approx(one.k)


def steps_of(b_simple, k, seed=2):
    return simulate("gaussian", "1/j", 4, 40, k, seed).unbiased(b_simple, "even")


@pytest.mark.parametrize("k", [4, 30])
@pytest.mark.parametrize("b_simple", [1, 30, 20_000])
def test_fieller_is_the_quadratics_solution(b_simple, k):
    x, y = steps_of(b_simple, k)
    found = METHODS["fieller"](x, y, LEVELS)
    for r in range(len(x)):
        for i, level in enumerate(LEVELS):
            expected = slow.positive_hull(slow.fieller(x[r], y[r], level))
            low, high = expected or (math.nan, math.nan)
            same(found.low[i, r], low, 1e-6, f"low {r}")
            same(found.high[i, r], high, 1e-6, f"high {r}")


@pytest.mark.parametrize("b_simple", [1, 30, 20_000])
def test_delta_is_the_textbooks(b_simple):
    x, y = steps_of(b_simple, 30)
    found = METHODS["delta"](x, y, LEVELS)
    for r in range(len(x)):
        for i, level in enumerate(LEVELS):
            expected = slow.delta_method(x[r], y[r], level)
            close([found.low[i, r], found.high[i, r]], expected, rtol=1e-9, what=f"delta {r}")


@pytest.mark.parametrize("b_simple", [1, 300])
def test_the_bootstrap_resamples_steps_with_replacement(b_simple):
    k = 12
    x, y = steps_of(b_simple, k)
    found = METHODS["bootstrap"](x, y, LEVELS)
    rng = np.random.default_rng(np.random.SeedSequence([k, 999]))
    counts = rng.multinomial(k, np.full(k, 1 / k), 999)
    for r in range(5):
        ratios = []
        for times in counts:
            chosen = np.repeat(np.arange(k), times)
            assert len(chosen) == k
            top, bottom = x[r, chosen].sum(), y[r, chosen].sum()
            ratios.append(top / bottom if bottom > 0 else math.inf)
        ratios.sort()
        for i, cut in enumerate((100, 50, 25)):  # of 1,000 gaps between 999 values
            same(found.low[i, r], ratios[cut - 1], 1e-4, f"low {r}")
            same(found.high[i, r], ratios[-cut], 1e-4, f"high {r}")


def test_a_bootstrap_of_noise_has_no_upper_end():
    found = METHODS["bootstrap"](*steps_of(1e9, 12), LEVELS)
    assert np.isinf(found.high[2]).mean() > 0.5


def recursive(values):
    """An exponential average as trainers write it, its bias at the start divided out."""
    average = 0.0
    for value in values:
        average = 0.99 * average + 0.01 * value
    return average / (1 - 0.99 ** len(values))


def test_exponential_averages_are_the_recursions():
    x, y = steps_of(30, 50)
    clamped, ratios = clamped_ema(x, y, LEVELS), ema_of_ratios(x, y, LEVELS)
    assert (y < 0).any()
    for r in range(5):
        expected = recursive(x[r]) / recursive([max(v, 0) for v in y[r]])
        close(clamped.point[r], expected, rtol=1e-9, what="clamped")
        close(ratios.point[r], recursive(x[r] / y[r]), rtol=1e-9, what="of ratios")


def test_an_exponential_averages_interval_is_a_t_interval_where_all_weights_are_equal(monkeypatch):
    monkeypatch.setattr(module, "DECAY", 1.0)
    x, y = steps_of(30, 50)
    found = ema_of_ratios(x, y, LEVELS)
    for r in range(5):
        ratio = x[r] / y[r]
        half = module.stats.t.ppf(0.975, 49) * ratio.std(ddof=1) / math.sqrt(50)
        close([found.low[2, r], found.high[2, r]], [ratio.mean() - half, ratio.mean() + half], rtol=1e-8)


def test_clamping_reads_low_and_averaging_ratios_is_useless():
    """Two mistakes seen in other implementations, at a true B of 300."""
    x, y = simulate("gaussian", "1/j", 16, 200, 200, seed=4).unbiased(300, "even")
    assert np.median(clamped_ema(x, y, LEVELS).point) < 150
    assert abs(np.median(ema_of_ratios(x, y, LEVELS).point)) < 30
