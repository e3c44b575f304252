import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns.advising.goodput import goodputs, soonest

SPEEDS = {16: 100.0, 64: 300.0, 256: 400.0, 1024: 410.0}
curves = st.dictionaries(
    st.sampled_from([2**i for i in range(12)]), st.floats(1, 1e4), min_size=1, max_size=8
)


def seconds(batch, speed, b_crit, reference, needed):
    """E(B)/throughput with E(B) = E_min (1 + B/B_crit), from the examples taken at the reference batch."""
    e_min = needed / (1 + reference / b_crit)
    return e_min * (1 + batch / b_crit) / speed


@given(curves, st.floats(1, 1e4), st.floats(1, 40))
def test_the_most_goodput_is_soonest_in_wall_clock(speeds, low, wide):
    ends = (low, low * wide)
    timed = goodputs(speeds, 16, ends, 8000.0)
    times = {b: [seconds(b, v, end, 16, 8000.0) for end in ends] for b, v in speeds.items()}
    for g in timed:
        assert g.seconds == pytest.approx((min(times[g.batch_size]), max(times[g.batch_size])))
    best = soonest(timed, 16)
    for end, useful in ((0, lambda g: g.useful[0]), (1, lambda g: g.useful[1])):
        first = max(timed, key=useful).batch_size
        assert times[first][end] == pytest.approx(min(t[end] for t in times.values()))
        assert first in best.ends
    # the delay holds within the interval too, and no other batch has a smaller one
    inside = np.geomspace(*ends, 40)
    worst = {
        b: max(
            seconds(b, v, x, 16, 1.0) / min(seconds(c, w, x, 16, 1.0) for c, w in speeds.items())
            for x in inside
        )
        for b, v in speeds.items()
    }
    assert worst[best.batch_size] - 1 <= best.delay * (1 + 1e-6) + 1e-9
    assert min(worst.values()) == pytest.approx(worst[best.batch_size])


def test_what_is_said_of_the_batch_in_use_and_of_the_edges():
    best = soonest(goodputs(SPEEDS, 16, (160.0, 310.0)), 16)
    assert (best.batch_size, best.ends, best.at_edge) == (64, (64, 64), None)
    assert best.delay == 0 and best.in_use == pytest.approx((1.3571, 1.6150), abs=1e-3)
    assert soonest(goodputs(SPEEDS, 17, (160.0, 310.0)), 17).in_use is None
    assert soonest(goodputs(SPEEDS, 16, (1e7, 1e8)), 16).at_edge == "largest"
    assert soonest(goodputs({4: 1.0, 8: 1.0}, 16, (3.0, 4.0)), 16).at_edge == "smallest"
    assert soonest(goodputs({4: 1.0}, 16, (3.0, 4.0)), 16).at_edge is None
    assert soonest((), 16) is None


def test_without_an_upper_end_the_fastest_batch_counts_at_infinity():
    timed = goodputs(SPEEDS, 16, (175.0, math.inf), 8000.0)
    assert timed[-1].useful[1] == 410.0
    best = soonest(timed, 16)
    assert best.ends == (64, 1024) and best.batch_size == 256
    at_end = [max(g.useful[end] for g in timed) / timed[2].useful[end] - 1 for end in (0, 1)]
    assert best.delay == pytest.approx(max(at_end))
