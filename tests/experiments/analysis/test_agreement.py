"""Prediction against measurement: known correlations, calibrations and prices."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.agreement import calibration, heterogeneity, regret, spearman
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
    found = calibration(exact(1, 10, 100), exact(3, 30, 3000))
    assert found.constant.value == pytest.approx(3 * 10 ** (1 / 3))
    assert found.share.value == 0.0  # ratios of 3, 3 and 30, each against the mean of the others
    assert found.off.value == pytest.approx(10 ** ((0.5 + 0.5 + 1) / 3))
    found = calibration(exact(1, 2, 3, 4), exact(5, 10, 15, math.inf))
    assert (found.constant.value, found.share.value, found.exact) == (pytest.approx(5.0), 1.0, 3)
    with pytest.raises(ValueError, match="of three configurations; seen 1 of 2, of 1"):
        calibration(exact(1, 2), exact(1, math.inf))


def test_a_configuration_drawn_twice_does_not_predict_itself():
    """Ratios so far apart that none is near a mean of others, however often those are drawn."""
    found = calibration(exact(1, 1, 1, 1), exact(1, 10**0.4, 1e30, 1e70))
    assert found.share.value == 0.0 and not np.nan_to_num(found.share.draws).any()
    assert found.constant.low < found.constant.value < found.constant.high


def test_the_interval_of_a_share_is_no_narrower_than_that_of_as_many_throws():
    """All of seven resample to all of seven: Clopper and Pearson say 59 … 100 %; none: 0 … 41 %."""
    all_ = calibration(exact(*range(1, 8)), exact(*range(1, 8))).share
    assert (all_.value, all_.high) == (1.0, 1.0) and all_.low == pytest.approx(0.025 ** (1 / 7))
    none = calibration(exact(*[1] * 7), exact(*(10.0 ** (k * k) for k in range(7)))).share
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(1 - 0.025 ** (1 / 7))


def test_noise_that_numbers_hold_is_not_added_to_them_again():
    """Numbers known as badly as they differ: the share is of the numbers, the ceiling tells of the noise."""
    random = np.random.default_rng(0)
    values = np.exp(random.normal(3, 1, 10))
    sure = exact(*values)
    unsure = [replace(each, draws=each.value * np.exp(random.normal(0, 0.7, 2_000))) for each in sure]
    a, b = calibration(sure, sure), calibration(sure, unsure)
    for name in ("constant", "share", "off"):
        assert getattr(a, name) == getattr(b, name)
    assert a.ceiling == 1.0
    # |N(0, 0.7²·(1 + 1/9))| ≤ log 2
    assert b.ceiling == pytest.approx(
        2 * stats.norm.cdf(math.log(2) / (0.7 * math.sqrt(10 / 9))) - 1, abs=0.02
    )


def test_a_lower_bound_is_no_number():
    """It fits nothing; at the least it is a miss, at the most a hit unless it is too large already."""
    measured = exact(2, 4, 6, 8)
    for value, most in ((2.0, 1.0), (10.0, 1.0), (1000.0, 0.8)):
        bound = replace(exact(value)[0], at_least=True)
        found = calibration(exact(1, 2, 3, 4, 5), [*measured, bound])
        assert (found.constant.value, found.share.value) == (pytest.approx(2.0), 1.0)
        assert (found.exact, found.bounds) == (4, 1) and found.share.note == "1 pairs are lower bounds"
        assert found.share.high == pytest.approx(1.0) or most < 1
        assert found.share.low < 0.3 and float(np.nanmedian(found.share.most)) == pytest.approx(
            most, abs=0.01
        )


def test_bounds_that_are_too_large_already_are_no_hits_at_the_most():
    measured = exact(2, 4, 6, 8) + [replace(e, at_least=True) for e in exact(*[2e5] * 4)]
    share = calibration(exact(*range(1, 9)), measured).share
    assert share.value == 1.0 and share.high == pytest.approx(stats.beta.ppf(0.975, 5, 4), abs=0.05)


def test_readings_of_one_configuration_are_no_throws_of_their_own():
    values, names = range(1, 8), list("abcdefg")
    once = calibration(exact(*values), exact(*values)).share
    thrice = calibration(exact(*[*values] * 3), exact(*[*values] * 3), groups=names * 3).share
    assert (thrice.value, thrice.low, thrice.high) == (once.value, pytest.approx(once.low), once.high)


def test_the_ceiling_is_of_numbers_whose_uncertainty_is_known():
    random = np.random.default_rng(0)
    known = [replace(e, draws=e.value * np.exp(random.normal(0, 0.6, 2_000))) for e in exact(*range(1, 11))]
    opened = [Estimated(e.value, 0.0, math.inf) for e in known]
    sure, all_ = exact(*range(1, 11)), calibration(exact(*range(1, 11)), known).ceiling
    half = calibration(sure, [*known[:5], *opened[5:]]).ceiling
    assert half == pytest.approx(all_, abs=0.06) and all_ < 0.8  # as exact numbers they would raise it
    assert math.isnan(calibration(sure, [*known[:2], *opened[2:]]).ceiling)


def test_numbers_that_differ_by_more_than_their_intervals_are_told():
    same = [Estimated(v, v / 2, 2 * v) for v in (8.0, 10.0, 12.0)]
    p, n = heterogeneity(same)
    assert p > 0.5 and n == 3
    assert heterogeneity([*same, Estimated(1000.0, 900.0, 1100.0)])[0] < 1e-6
    opened = [Estimated(8.0, 4.0, math.inf), Estimated(8.0, 4.0, 16.0, at_least=True)]
    assert heterogeneity([*same, *opened]) == (p, n) and math.isnan(heterogeneity(opened)[0])
    # what counts is the side on which the others lie
    toward, away = Estimated(40.0, 8.0, 44.0), Estimated(40.0, 36.0, 200.0)
    assert heterogeneity([*same, toward])[0] > 0.1 and heterogeneity([*same, away])[0] < 1e-4
    assert (
        heterogeneity([Estimated(8.0, 8.0, 32.0), Estimated(24.0, 12.0, 48.0)])[0] > 0.1
    )  # value at its end
    # uniform under the null: ln-values with the spread that the intervals say
    random, half = np.random.default_rng(1), 1.96 * 0.3
    found = [
        heterogeneity([Estimated(v, v * math.exp(-half), v * math.exp(half)) for v in np.exp(0.3 * z)])[0]
        for z in random.standard_normal((200, 6))
    ]
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_pairs_of_one_configuration_are_left_out_and_drawn_together():
    """Three readings of each of five configurations say no more than one does."""
    values, others = (1.0, 2.0, 4.0, 8.0, 16.0), (3.0, 2.5, 60.0, 9.0, 80.0)
    names = list("abcde")
    once = calibration(exact(*values), exact(*others))
    threefold = calibration(exact(*values * 3), exact(*others * 3), groups=names * 3)
    for name in ("constant", "off"):
        a, b = getattr(once, name), getattr(threefold, name)
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    assert once.share.value == threefold.share.value
    np.testing.assert_array_equal(once.share.draws, threefold.share.draws)
    alone = calibration(exact(*values * 3), exact(*others * 3)).constant  # as if there were 15
    assert alone.high / alone.low < 0.8 * once.constant.high / once.constant.low
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
        pair = noisy(values, 0.3, random), noisy(2 * values, 0.3, random)
        found = calibration(*pair, draws=100, seed=n).constant
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


def test_replicates_that_choose_anew_do_not_lean_and_what_is_chosen_may_be_uncertain():
    """The best batch is unsure: replicates that find a better one make every rule dearer than it is."""
    (cell,) = cells(rows(best=16.0, curvature=0.005, sigma=0.05, seeds=3))
    of = [curve(cell, draws=300)]
    sure, _ = regret(of, [float(of[0].batches[of[0].validation.argmin()])])
    assert sure.value == 0 and sure.low < 0 < sure.high and sure.high < float(np.quantile(sure.draws, 0.97))
    unsure, _ = regret(of, [16.0], others=[np.array([1.0, 16.0, 128.0])])
    assert unsure.high > regret(of, [16.0])[0].high


def test_regret_is_counted_from_the_batch_that_is_best_on_validation_data():
    (cell,) = cells(rows(best=4.0, rates=[1e-3], shift=0))
    cell.test[:] = cell.test[::-1]  # on test data the best one is 32
    assert regret([curve(cell, draws=5)], [32.0], draws=2)[0].value == pytest.approx(-0.02 * 9)
