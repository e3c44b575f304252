import math

import pytest

from gns.advising.rates import PER_OCTAVE, rate_curves, spread
from gns.advising.tradeoff import LAWS


def test_curves_are_the_laws_on_a_fine_grid():
    curves = rate_curves(1e-4, 24, (160.0, 310.0), 2, 4096)
    assert [c.law for c in curves] == list(LAWS)
    for curve in curves:
        assert curve.batches == tuple(sorted(curve.batches))
        assert (curve.batches[0], curve.batches[-1]) == (2, pytest.approx(4096))
        assert len(curve.batches) == 11 * PER_OCTAVE + 2  # 24 is no power of two: it joins the grid
        steps = [b / a for a, b in zip(curve.batches, curve.batches[1:], strict=False)]
        assert max(steps) <= 2 ** (1 / PER_OCTAVE) + 1e-9
        for batch, low, high in zip(curve.batches, curve.low, curve.high, strict=True):
            ends = [1e-4 * LAWS[curve.law](batch, 24, b) for b in (160.0, 310.0)]
            assert (low, high) == pytest.approx((min(ends), max(ends)))
        at = curve.batches.index(24.0)
        assert curve.low[at] == pytest.approx(1e-4) and curve.high[at] == pytest.approx(1e-4)


def test_a_bound_alone_gives_finite_curves():
    for curve in rate_curves(1e-4, 16, (175.0, math.inf), 2, 1024):
        assert all(map(math.isfinite, curve.high))
    sgd = rate_curves(1e-4, 16, (175.0, math.inf), 2, 1024)[0]
    assert sgd.high[-1] == pytest.approx(1e-4 * 1024 / 16)


def test_a_grid_of_one_batch():
    (curve, *_) = rate_curves(1e-4, 1, (3.0, 4.0), 1, 1)
    assert curve.batches == (1.0,)


def test_spread_is_the_worst_ratio_of_two_laws():
    ratios = [[law(256, 16, b) for law in LAWS.values()] for b in (160, 310)]
    assert spread(256, 16, (160, 310)) == pytest.approx(max(max(r) / min(r) for r in ratios))
    assert spread(16, 16, (160, 310)) == pytest.approx(1)
    # below √(256·16) the ends differ: there the square-root law is the highest, by (φ + 256)/(φ + 16)
    assert spread(256, 16, (310, 10)) == spread(256, 16, (10, 310)) == pytest.approx(266 / 26)
