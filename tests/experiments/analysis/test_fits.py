"""Lines, laws and surfaces: known answers, known intervals, and what cannot be told is not told."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.cells import cells
from experiments.analysis.curves import Estimated, curve
from experiments.analysis.fits import exponent, fit_law, slope, surface
from tests.experiments.analysis.synthetic import RATES, best_rate, rows


def only(made, **more):
    (cell,) = cells(made)
    return curve(cell, **more)


def test_a_slope_and_its_interval_are_students():
    x, y = [0.0, 1.0, 2.0, 3.0], [0.1, 0.9, 2.2, 2.8]
    found = slope(x, y)
    b = np.polyfit(x, y, 1)
    error = math.sqrt(((y - np.polyval(b, x)) ** 2).sum() / 2 / 5.0)  # Σ(x − x̄)² = 5
    assert (found.value, found.high - found.value) == pytest.approx((b[0], 4.302653 * error))
    with pytest.raises(ValueError, match="three points at two places"):
        slope([1.0, 1.0, 1.0], y[:3])


def drawn(value, sigma, random, draws=400):
    return Estimated(value, 0.0, math.inf, draws=value * np.exp(random.normal(0, sigma, draws)))


def test_an_exponent_comes_back_and_its_intervals_cover():
    sizes, truth = [256, 512, 1024, 2048], 0.6
    exact = [Estimated(n**truth, 0, 0, draws=np.full(9, n**truth)) for n in sizes]
    assert exponent(sizes, exact).value == pytest.approx(truth)
    hits = 0
    for n in range(100):
        random = np.random.default_rng(n)
        seen = [n**truth * math.exp(random.normal(0, 0.3)) for n in sizes]
        found = exponent(sizes, [drawn(value, 0.3, random) for value in seen])
        hits += found.low <= truth <= found.high
    assert 1e-3 < stats.binom.cdf(hits, 100, 0.95) < 1 - 1e-3 or hits == 100


def test_a_batch_beyond_the_grid_gives_no_exponent_but_a_bound():
    """N grows fourfold; B is 8, then 8 or beyond 32: the exponent is 0 or at least 1."""
    inside, beyond = np.full(4, 8.0), np.array([8.0, math.inf, math.inf, 8.0])
    bounds = {"least": np.where(np.isinf(beyond), 32.0, 8.0), "most": beyond}
    more = Estimated(math.inf, 0, 0, draws=beyond, **bounds)
    found = exponent([100, 400], [Estimated(8, 0, 0, draws=inside), more])
    assert math.isnan(found.value) and found.note == "beyond the grid in 50% of the draws"
    assert (found.low, found.high) == (pytest.approx(0.0, abs=1e-9), math.inf)
    always = Estimated(
        math.inf, 0, 0, draws=np.full(4, math.inf), least=np.full(4, 32.0), most=np.full(4, math.inf)
    )
    found = exponent([100, 400], [Estimated(8, 0, 0, draws=inside), always])
    assert (found.low, found.high) == (pytest.approx(1.0), math.inf)
    found = exponent([100, 400], [always, Estimated(8, 0, 0, draws=inside)])
    assert (found.low, found.high) == (-math.inf, pytest.approx(-1.0))
    # a size in the middle has no weight; without bounds an infinite draw says nothing
    found = exponent(
        [100, 200, 400], [Estimated(8, 0, 0, draws=inside), always, Estimated(8, 0, 0, draws=inside)]
    )
    assert (found.low, found.high) == pytest.approx((0.0, 0.0), abs=1e-9)
    bare = Estimated(math.inf, 0, 0, draws=np.full(4, math.inf))
    assert exponent([100, 400], [Estimated(8, 0, 0, draws=inside), bare]).low == -math.inf


def test_a_number_without_draws_leaves_the_exponent_without_an_interval():
    sure = Estimated(8, 0, 0, draws=np.full(4, 8.0))
    found = exponent([100, 400], [sure, Estimated(16.0, 0, math.inf)])
    assert (found.value, found.low, found.high) == (pytest.approx(0.5), -math.inf, math.inf)


def test_a_batch_that_is_a_lower_bound_gives_no_exponent():
    sure = Estimated(8, 0, 0, draws=np.full(4, 8.0))
    bound = Estimated(16, 0, 0, draws=np.full(4, 16.0), most=np.full(4, 64.0), at_least=True)
    found = exponent([100, 400], [sure, bound])
    assert math.isnan(found.value) and (found.low, found.high) == (pytest.approx(0.5), pytest.approx(1.5))


def test_draws_beyond_the_grid_do_not_bias_the_interval_of_an_exponent():
    """B = N^0.9/25 with noise, read off a grid that ends at 64: dropping draws pulls the exponent down."""
    sizes, truth, hits = [256, 1024, 4096], 0.9, 0
    for n in range(60):
        random = np.random.default_rng(n)
        found = []
        for size in sizes:
            made = size**truth / 25 * math.exp(random.normal(0, 0.3))
            draws = made * np.exp(random.normal(0, 0.3, 300))
            seen = np.where(draws > 64, math.inf, draws)
            found.append(Estimated(made, 0, 0, draws=seen, least=np.minimum(draws, 64.0), most=seen))
        each = exponent(sizes, found)
        hits += each.low <= truth <= each.high
    assert stats.binom.cdf(hits, 60, 0.95) > 1e-3, hits


def test_the_surge_law_finds_its_peak_and_its_noise_scale():
    found = fit_law("surge", only(rows(rate_of=best_rate), draws=20))
    assert found.noise.value == pytest.approx(16, rel=0.05) and found.peak == pytest.approx(2e-3, rel=0.02)
    assert found.noise.low <= 16 * 1.05 and found.noise.high >= 16 * 0.95
    assert found.misfit < 0.05
    others = [
        fit_law(law, only(rows(rate_of=best_rate), draws=5)).misfit for law in ("sgd", "sqrt", "constant")
    ]
    assert min(others) > 3 * found.misfit


def test_rates_at_the_edge_of_their_grid_are_in_no_fit():
    """At batches 1 and 2 the grid begins above the law's rate: the best of the grid is not the best one."""
    made = [
        r for r in rows(rate_of=best_rate) if r["config"]["lr"] >= 1.4e-3 or r["config"]["batch_size"] > 2
    ]
    found = only(made, draws=20)
    assert found.rate_edges == ("low",) * 2 + ("",) * 6
    fit = fit_law("surge", found)
    assert fit.left_out == 2 and fit.noise.value == pytest.approx(16, rel=0.05)
    assert fit.peak == pytest.approx(2e-3, rel=0.02) and fit.misfit < 0.05
    beyond = only(rows(rate_of=lambda batch: 1.0), draws=5)
    with pytest.raises(
        ValueError, match="3 batch sizes whose best learning rate is inside its grid; seen 0 of 8"
    ):
        fit_law("sgd", beyond)


def test_the_sgd_law_finds_its_noise_scale():
    made = rows(rate_of=lambda batch: 3e-3 / (1 + 10 / batch), rates=[1e-4 * 2 ** (i / 2) for i in range(14)])
    found = fit_law("sgd", only(made, draws=20))
    assert found.noise.value == pytest.approx(10, rel=0.05) and found.peak == pytest.approx(3e-3, rel=0.02)
    assert list(found.rate(np.array([10.0]))) == pytest.approx([1.5e-3], rel=0.03)


def test_rates_that_do_not_bend_give_no_noise_scale():
    found = fit_law("sgd", only(rows(), draws=20))
    assert found.noise.low == 0.0 and found.noise.note == "the rates do not bend within the grid"


def test_intervals_of_the_noise_scale_cover_it():
    hits = 0
    for n in range(40):
        made = rows(rate_of=best_rate, sigma=0.004, rate_curvature=0.05, seeds=3, n=n)
        found = fit_law("surge", only(made, draws=150, seed=n)).noise
        hits += found.low <= 16 <= found.high
    assert stats.binom.cdf(hits, 40, 0.93) > 1e-3, hits


def test_a_quadratic_surface_gives_its_own_coefficients_back():
    (cell,) = cells(rows(best=6.0, curvature=0.01, rate_curvature=0.04, shift=0.0))
    found = surface(cell, window=0.2)
    assert found.coefficients[3:] == pytest.approx([0.01, 0.0, 0.04], abs=1e-9)
    assert (found.batch.value, found.rate.value) == (pytest.approx(6.0), pytest.approx(1e-3))
    assert found.misfit < 1e-9
    (tilted,) = cells(rows(best=16.0, rate_of=lambda b: 1e-3 * (b / 16) ** 0.25, curvature=0.02))
    found = surface(tilted, window=0.2)
    assert (found.batch.value, found.rate.value) == (pytest.approx(16.0), pytest.approx(1e-3))


def test_a_surface_without_a_minimum_says_so():
    (cell,) = cells(rows(curvature=-0.001))
    assert surface(cell, window=0.5).batch.note == "no minimum"
    (small,) = cells(rows(rates=RATES[3:5]))
    with pytest.raises(
        ValueError, match="seven runs at three batch sizes and three learning rates within 0.1"
    ):
        surface(small)
