import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns.advising.epoch import epoch_plan, largest_batch
from theory.tradeoff import TradeOff

numbers = st.floats(1, 1e6)


@given(numbers, numbers, st.floats(0.01, 1e5), st.floats(1, 1e3))
def test_against_the_one_epoch_law_of_the_theory(n, e_min, b_crit, reference):
    law = TradeOff(s_min=e_min / b_crit, e_min=e_min)
    needed = law.examples(reference)
    found = largest_batch(n, needed, reference, b_crit)
    assert found == pytest.approx(
        law.one_epoch_batch_max(n), rel=1e-6, abs=1e-6 * (b_crit + reference) * (1 + n / e_min)
    )


def test_the_largest_batch_takes_exactly_the_epoch():
    law = TradeOff(s_min=20.0, e_min=4000.0)
    batch = largest_batch(30_000, law.examples(16), 16, law.b_crit)
    assert law.examples(batch) == pytest.approx(30_000)


def test_limits():
    assert largest_batch(5000, 5000, 16, 212) == pytest.approx(16)
    assert largest_batch(5000, 5000, 16, math.inf) == 16
    assert largest_batch(6000, 5000, 16, math.inf) == math.inf
    assert largest_batch(4000, 5000, 16, math.inf) == -math.inf
    assert largest_batch(10_000, 5000, 1e-9, 212) == pytest.approx(212)  # B_crit (N/E_min − 1)
    assert largest_batch(4000, 5000, 16, 212) < 0 < largest_batch(4000, 5000, 64, 212)


@given(st.integers(64, 10**6), st.floats(10, 1e6), st.floats(0.1, 1e4), st.floats(1, 30))
def test_bands(n, needed, low, wide):
    plan = epoch_plan(n, 16, (low, low * wide), [1, 16, 64], needed)
    inside = [largest_batch(n, needed, 16, low * wide**share) for share in (0, 0.3, 0.7, 1)]
    room = 1e-9 * max(map(abs, inside))
    assert plan.largest[0] - room <= min(inside) and max(inside) <= plan.largest[1] + room
    assert plan.largest_doubled[0] > plan.largest[0] and plan.largest_doubled[1] > plan.largest[1]
    for row in plan.rows:
        assert row.steps == math.ceil(n / row.batch_size)
        assert row.useful == pytest.approx(
            (1 / (1 + row.batch_size / low), 1 / (1 + row.batch_size / low / wide))
        )
    shares = [row.useful[0] for row in plan.rows]
    assert shares == sorted(shares, reverse=True)


def test_without_a_target_nothing_is_claimed_of_it():
    plan = epoch_plan(20_000, 16, (160.0, math.inf), [64])
    assert (plan.largest, plan.largest_doubled, plan.examples_needed) == (None, None, None)
    assert plan.rows[0].useful == (pytest.approx(160 / 224), 1)
