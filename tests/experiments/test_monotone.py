"""Monotone curves against scipy, and where they reach a level."""

import math

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from experiments.monotone import first_reach, isotonic, start


def test_isotonic_rows_are_scipys():
    y = np.random.default_rng(0).standard_normal((40, 7)) + 0.3 * np.arange(7)
    assert (np.diff(y, axis=1) < 0).any()
    expected = np.stack([isotonic_regression(row).x for row in y])
    assert isotonic(y) == pytest.approx(expected, abs=1e-12)


def test_a_curve_is_followed_between_its_points():
    x = np.log(2.0 ** np.arange(9))
    rates = np.array([3.0, 20.0, 90.0])
    y = np.log1p(np.exp(x) / rates[:, None])
    places = np.exp(first_reach(x, y, np.log(np.full(3, 2.0))))
    assert places == pytest.approx(rates, rel=0.01)


def test_rows_of_other_lengths_do_not_mix():
    y = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, np.inf], [np.inf, 0.0, 0.0], [0.0, np.inf, 5.0]])
    assert start(y).tolist() == [0.0, 0.0, np.inf, 0.0]
    assert first_reach(np.arange(3.0), y, np.full(4, 1.5)) == pytest.approx([1.5, 1.0, 0.0, 0.0], abs=1e-2)


@pytest.mark.parametrize(
    "y, level, place",
    [
        ([0.0, 1.0, 2.0, 3.0], 1.5, 1.5),
        ([0.0, 1.0, 2.0, 3.0], 2.0, 2.0),
        ([0.0, 1.0, 2.0, 3.0], 3.1, math.inf),
        ([2.0, 3.0, 4.0, 5.0], 1.0, 0.0),
        ([0.0, 1.0, math.inf, 0.0], 2.0, 1.0),
        ([math.inf, 1.0, 2.0, 3.0], 2.0, 0.0),
        ([0.0, 2.0, 0.0, 3.0], 1.0, 1.0),  # made monotone: 0, 1, 1, 3
    ],
)
def test_where_a_monotone_curve_reaches_a_level(y, level, place):
    found = first_reach(np.arange(4.0), np.array([y, y]), np.array([level, level]))
    assert found == pytest.approx([place, place], abs=1e-6)
