"""The ratio of a row: its median, how well it is known, how far steps scatter."""

import numpy as np
import pytest

from experiments.overhead.ratios import bootstrap, ratio


def test_the_ratio_is_of_pairs():
    found = ratio({"untouched_s": [1.0, 10.0, 2.0, 4.0], "arm_s": [1.1, 12.0, 2.2, 4.4]})
    assert (found.middle, found.low, found.high) == pytest.approx((1.1, 1.1, 1.175))
    assert found.pairs == 4 and found.off == pytest.approx(found.most - 1)


def test_blocks_of_pairs_are_added_before_they_are_divided():
    row = {"untouched_s": [1.0] * 6, "arm_s": [1.0, 1.0, 4.0] * 2, "block": 3}
    found = ratio(row)
    assert (found.middle, found.low, found.high, found.pairs) == (2, 2, 2, 2)


def test_the_bootstrap_interval_holds_the_median_as_often_as_it_says():
    """200 samples of 40 from a skewed law whose median is 1: the standard error of 95 % is 1.5 %."""
    drawn = np.random.default_rng(5).lognormal(0, 0.1, (200, 40))
    held = np.mean([low <= 1 <= high for low, high in map(bootstrap, drawn.tolist())])
    assert 0.9 <= held <= 0.99


def test_more_pairs_narrow_the_interval_but_not_the_quartiles():
    drawn = np.random.default_rng(1).normal(1.05, 0.05, 400).tolist()
    few, many = (ratio({"untouched_s": [1.0] * n, "arm_s": drawn[:n]}) for n in (20, 400))
    assert many.most - many.least < 0.4 * (few.most - few.least)
    assert many.high - many.low > 0.6 * (few.high - few.low)
