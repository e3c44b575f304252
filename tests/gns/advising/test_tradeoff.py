import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns.advising.tradeoff import EQUAL, Price, examples_ratio, extra_cost, positive, steps_ratio
from theory.tradeoff import TradeOff

PRICES = [
    Price(time=0.05),
    Price(time=1.0),
    Price(time=3.0),
    Price(time=400.0),
    Price(step=0.3),
    Price(step=40.0),
]
scales = st.floats(0.05, 1e6)
prices = st.floats(1e-3, 1e3)


def cost(batch, b_crit, price: Price):
    """c_S·S + c_E·E from its definition, S_min = c_E = 1, so E_min = B_crit."""
    per_step = price.step if price.step is not None else price.time * b_crit
    law = TradeOff(s_min=1.0, e_min=b_crit)
    return per_step * law.steps(batch) + law.examples(batch)


@pytest.mark.parametrize("batch", [1, 7, 212, 5000])
@pytest.mark.parametrize("b_crit", [0.05, 3.0, 212.0])
def test_the_laws_are_those_of_the_theory(batch, b_crit):
    law = TradeOff(s_min=10.0, e_min=10 * b_crit)
    assert steps_ratio(batch, b_crit) == pytest.approx(law.steps(batch) / law.s_min)
    assert examples_ratio(batch, b_crit) == pytest.approx(law.examples(batch) / law.e_min)


@pytest.mark.parametrize("price", PRICES, ids=str)
@pytest.mark.parametrize("b_crit", [0.7, 20.0, 300.0])
@pytest.mark.parametrize("waste", [0.01, 0.05, 0.3])
def test_best_batch_and_near_range_against_numeric_minimisation(price, b_crit, waste):
    grid = price.best(b_crit) * np.logspace(-3, 3, 20_001)
    costs = np.array([cost(b, b_crit, price) for b in grid])
    assert grid[costs.argmin()] == pytest.approx(price.best(b_crit), rel=1e-3)
    good = grid[costs <= (1 + waste) * costs.min()]
    assert price.near(b_crit, waste) == pytest.approx((good[0], good[-1]), rel=1e-3)
    for i in (0, 5_000, 12_345, -1):
        assert price.extra_cost(grid[i], b_crit) == pytest.approx(
            costs[i] / costs.min() - 1, rel=1e-6, abs=1e-12
        )


@given(scales, prices, st.floats(0.001, 1), st.floats(0.01, 100))
def test_a_range_scales_with_the_noise_scale_and_the_step_price(b_crit, p, waste, factor):
    for price, scaled in ((Price(time=p), Price(time=p)), (Price(step=p), Price(step=p * factor))):
        low, high = price.near(b_crit, waste)
        assert scaled.near(b_crit * factor, waste) == pytest.approx((low * factor, high * factor), rel=1e-9)
        assert low <= price.best(b_crit) * (1 + 1e-12) and price.best(b_crit) <= high * (1 + 1e-12)
        assert price.extra_cost(low, b_crit) == pytest.approx(waste, rel=1e-6)
        assert price.extra_cost(high, b_crit) == pytest.approx(waste, rel=1e-6)


@given(scales, prices)
def test_the_two_units_are_one_price(b_crit, p):
    by_time, by_step = Price(time=p), Price(step=p * b_crit)
    assert by_time.best(b_crit) == pytest.approx(by_step.best(b_crit))
    assert by_time.near(b_crit, 0.05) == pytest.approx(by_step.near(b_crit, 0.05))
    assert by_time.extra_cost(33.0, b_crit) == pytest.approx(
        by_step.extra_cost(33.0, b_crit), rel=1e-6, abs=1e-9
    )


@given(prices, scales, st.floats(1.0, 50), st.floats(0.01, 1))
def test_ranges_rise_with_the_noise_scale_and_with_the_price_of_time(p, b_crit, more, waste):
    for price in (Price(time=p), Price(step=p)):
        below, above = price.near(b_crit, waste), price.near(b_crit * more, waste)
        assert below[0] <= above[0] * (1 + 1e-9) and below[1] <= above[1] * (1 + 1e-9)
    cheap, dear = Price(time=p).near(b_crit, waste), Price(time=p * more).near(b_crit, waste)
    assert cheap[0] <= dear[0] * (1 + 1e-9) and cheap[1] <= dear[1] * (1 + 1e-9)


def test_equal_prices_are_the_ones_of_before():
    assert EQUAL.near(100, 0.05) == pytest.approx((64.17, 155.83), abs=0.01)
    assert extra_cost(37, 100) == pytest.approx((1 + 100 / 37 + 1 + 37 / 100) / 4 - 1)


def test_ends_of_the_scale():
    assert Price(time=2.0).near(math.inf, 0.05) == (math.inf, math.inf)
    assert Price(step=4.0).near(math.inf, 0.05) == (pytest.approx(80.0), math.inf)
    assert Price(step=4.0).near(1e13, 0.05)[0] == pytest.approx(80.0, rel=1e-4)
    assert Price(time=2.0).near(0.0, 0.05) == (0.0, 0.0)
    assert Price(step=4.0).near(0.0, 0.05) == (0.0, pytest.approx(0.2))
    assert Price(step=4.0).extra_cost(16, math.inf) == 0.25
    assert Price(step=4.0).extra_cost(16, 1e13) == pytest.approx(0.25, rel=1e-4)
    assert Price(time=2.0).extra_cost(16, 0.0) == Price(time=2.0).extra_cost(16, math.inf) == math.inf


@pytest.mark.parametrize(
    ("given_price", "message"),
    [
        ({}, "time_price is None and step_price is None; exactly one of the two is needed"),
        ({"time": 1.0, "step": 2.0}, "time_price is 1.0 and step_price is 2.0; exactly one"),
        ({"time": 0.0}, "time_price is 0.0; a finite number > 0 is needed"),
        ({"step": -3}, "step_price is -3; a finite number > 0 is needed"),
        ({"time": math.inf}, "time_price is inf"),
        ({"step": "4"}, "step_price is '4'"),
        ({"time": True}, "time_price is True"),
    ],
)
def test_bad_prices(given_price, message):
    with pytest.raises(ValueError, match=message):
        Price(**given_price)


@pytest.mark.parametrize("value", [10**400, math.inf, math.nan, -1, 0, True, "2", None])
def test_what_is_no_finite_positive_number_is_named(value):
    with pytest.raises(ValueError, match="x is .* a finite number > 0 is needed"):
        positive("x", value)
    positive("x", 10**300, whole=True)


@pytest.mark.parametrize("value", [1.5, 0, math.inf])
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(ValueError, match="x is .* a whole number, 1 or more, is needed"):
        positive("x", value, whole=True)
