import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns.advising.ranges import WASTE, batch_ranges, worst_cost
from gns.advising.tradeoff import Price

PRICES = [Price(time=1.0), Price(time=7.0), Price(time=0.1), Price(step=30.0)]
ends = st.tuples(st.floats(2, 1e5), st.floats(1, 20)).map(lambda pair: (pair[0], pair[0] * pair[1]))


@pytest.mark.parametrize("price", PRICES, ids=str)
def test_sure_batches_hold_wherever_the_truth_is_and_no_others_do(price):
    near = batch_ranges(150, 300, price=price)[-1]
    truths = np.linspace(150, 300, 301)
    for batch in np.geomspace(near.low / 2, near.high * 2, 200):
        always = max(price.extra_cost(batch, b) for b in truths) <= WASTE
        ever = min(price.extra_cost(batch, b) for b in truths) <= WASTE * (1 + 1e-9)
        assert always == bool(near.sure and near.sure[0] <= batch <= near.sure[1])
        assert ever or not near.low * 1.001 <= batch <= near.high * 0.999
        assert not ever or near.low * 0.999 <= batch <= near.high * 1.001


@given(ends, st.sampled_from(PRICES), st.floats(0.5, 1e5))
def test_the_worst_cost_is_at_an_end(interval, price, batch):
    inside = [price.extra_cost(batch, b) for b in np.geomspace(*interval, 50)]
    assert max(inside) <= worst_cost(batch, interval, price) * (1 + 1e-9) + 1e-12


@given(ends, st.sampled_from(PRICES))
def test_the_pick_is_the_power_of_two_of_least_worst_cost(interval, price):
    near = batch_ranges(*interval, price=price)[-1]
    worst = {2**i: worst_cost(2**i, interval, price) for i in range(30)}
    assert near.pick_extra_cost == worst[near.pick] == min(worst.values())
    assert near.price is price and near.low <= near.high


@given(ends, st.floats(0.01, 100))
def test_the_pick_at_a_time_price_moves_with_its_root(interval, p):
    """Multiplying the price by 4 doubles every batch: the roots, the sure part, and the power of two."""
    once, four = (batch_ranges(*interval, price=Price(time=x))[-1] for x in (p, 4 * p))
    best = Price(time=p).best(1.0)
    assert Price(time=4 * p).best(1.0) == pytest.approx(2 * best)
    assert (
        four.low > once.low
        and four.high > once.high
        and four.pick in (once.pick, 2 * once.pick, 4 * once.pick)
    )


def test_without_an_upper_end():
    time, step = (batch_ranges(175, math.inf, price=p)[-1] for p in (Price(time=4.0), Price(step=30.0)))
    assert (time.high, time.pick, time.sure) == (math.inf, None, None)
    assert time.low == pytest.approx(Price(time=4.0).near(175, WASTE)[0])
    assert step.high == math.inf and step.pick is None
    assert step.low == pytest.approx(Price(step=30.0).near(175, WASTE)[0]) and step.sure is None


def test_the_data_bound_the_pick():
    assert batch_ranges(160, 310, dataset_size=200)[-1].pick == 128
    assert batch_ranges(160, 310, dataset_size=1)[-1].pick == 1
