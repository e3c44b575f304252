"""Prediction against measurement: known correlations, calibrations and prices."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.agreement import calibration, regret, spearman
from experiments.analysis.cells import cells
from experiments.analysis.curves import Estimated, curve
from tests.experiments.analysis.synthetic import rows


def exact(*values):
    return [Estimated(float(value), value, value) for value in values]


def noisy(values, sigma, random):
    seen = [v * math.exp(random.normal(0, sigma)) for v in values]
    return [Estimated(v, 0, math.inf, draws=v * np.exp(random.normal(0, sigma, 50))) for v in seen]


def test_a_rank_correlation_is_spearmans_and_infinity_ranks_highest():
    found = spearman(exact(1, 5, 2, 9, 4), exact(3, 4, 1, math.inf, 8))
    assert found.value == pytest.approx(stats.spearmanr([1, 5, 2, 9, 4], [3, 4, 1, 99, 8]).statistic)
    assert -1 < found.low < found.value < found.high < 1
    with pytest.raises(ValueError, match="four configurations; seen 3 and 3"):
        spearman(exact(1, 2, 3), exact(1, 2, 3))


def test_intervals_of_a_rank_correlation_cover_it():
    """16 configurations from a normal pair with r = 0.6, whose rank correlation is 6/π·asin(r/2)."""
    truth, hits = 6 / math.pi * math.asin(0.3), 0
    for n in range(60):
        x, y = np.random.default_rng(n).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 16).T
        found = spearman(exact(*x), exact(*y), draws=60, seed=n)
        hits += found.low <= truth <= found.high
    assert stats.binom.cdf(hits, 60, 0.95) > 1e-3, hits
    assert hits < 60  # an interval that always covers is too wide to say anything


def test_noise_in_the_numbers_widens_the_interval():
    random = np.random.default_rng(0)
    values = np.exp(np.arange(12.0) / 4)
    sure = spearman(exact(*values), exact(*values))
    unsure = spearman(noisy(values, 1.0, random), noisy(values, 1.0, random))
    assert unsure.high - unsure.low > sure.high - sure.low


def test_a_calibration_constant_is_a_geometric_mean():
    constant, share = calibration(exact(1, 10, 100), exact(3, 30, 3000))
    assert constant.value == pytest.approx(3 * 10 ** (1 / 3))
    assert share.value == 0.0  # ratios of 3, 3 and 30, each against the mean of the others
    constant, share = calibration(exact(1, 2, 3, 4), exact(5, 10, 15, math.inf))
    assert (constant.value, share.value) == (pytest.approx(5.0), 1.0)
    assert constant.note == "1 pairs without a finite number"
    with pytest.raises(ValueError, match="of three configurations; seen 1 of 2, of 1"):
        calibration(exact(1, 2), exact(1, math.inf))


def test_a_configuration_drawn_twice_does_not_predict_itself():
    """Ratios so far apart that none is near a mean of others, however often those are drawn."""
    constant, share = calibration(exact(1, 1, 1, 1), exact(1, 10**0.4, 1e30, 1e70))
    assert share.value == 0.0
    assert (share.low, share.high) == (0.0, 0.0)
    assert constant.low < constant.value < constant.high


def test_pairs_of_one_configuration_are_left_out_and_drawn_together():
    """Three readings of each of five configurations say no more than one does."""
    values, others = (1.0, 2.0, 4.0, 8.0, 16.0), (3.0, 2.5, 60.0, 9.0, 80.0)
    names = list("abcde")
    once = calibration(exact(*values), exact(*others))
    threefold = calibration(exact(*values * 3), exact(*others * 3), groups=names * 3)
    for a, b in zip(once, threefold, strict=True):
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    alone = calibration(exact(*values * 3), exact(*others * 3))
    assert alone[0].high / alone[0].low < 0.8 * once[0].high / once[0].low  # as if there were 15
    one, three = (
        spearman(exact(*values), exact(*others)),
        spearman(exact(*values * 3), exact(*others * 3), groups=names * 3),
    )
    assert three.value == pytest.approx(one.value)
    assert three.high - three.low >= 0.95 * (one.high - one.low)
    with pytest.raises(ValueError, match="of three configurations; seen 3 of 3, of 2"):
        calibration(exact(1, 2, 3), exact(1, 2, 3), groups=["a", "a", "b"])


def test_a_calibration_covers_its_constant():
    hits = 0
    for n in range(40):
        random = np.random.default_rng(n)
        values = np.exp(random.normal(3, 1, 16))
        found, _ = calibration(noisy(values, 0.3, random), noisy(2 * values, 0.3, random), draws=100, seed=n)
        hits += found.low <= 2 <= found.high
    assert stats.binom.cdf(hits, 40, 0.95) > 1e-3, hits


def test_regret_is_the_loss_that_a_choice_costs():
    curves = [
        curve(cell, draws=50) for best in (4.0, 16.0) for cell in cells(rows(best=best, curvature=0.02))
    ]
    mean, own = regret(curves, [4.0, 4.0])
    assert own == pytest.approx([0.0, 0.08]) and mean.value == pytest.approx(0.04)
    assert mean.low == pytest.approx(0.0, abs=1e-6) and mean.high == pytest.approx(0.08, abs=1e-6)
    between, _ = regret(curves[:1], [4 * math.sqrt(2)])
    assert between.value == pytest.approx(0.01)  # half-way between 0 and 0.02
    assert regret(curves[:1], [1e6])[0].value == pytest.approx(0.02 * 25)  # the edge of the grid
    with pytest.raises(ValueError, match="a choice for each configuration; seen 1 for 2"):
        regret(curves, [4.0])


def test_regret_is_counted_from_the_batch_that_is_best_on_validation_data():
    (cell,) = cells(rows(best=4.0, rates=[1e-3], shift=0))
    cell.test[:] = cell.test[::-1]  # on test data the best one is 32
    assert regret([curve(cell, draws=5)], [32.0], draws=2)[0].value == pytest.approx(-0.02 * 9)
