"""Readings of B_noise over a training: averaged first, then divided."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gns.curvature.course import in_words, joined, over_readings, progress_weighted, so_far
from gns.curvature.result import Cost, CurvatureEstimate, CurvatureReading
from gns.statistics.moments import Moments
from tests.reference.tolerances import close

NAN = math.nan


def reading(step, x, y, cost=10.0, calls=1, step_seconds=1.0):
    estimate = CurvatureEstimate(
        b_noise=NAN,
        low=0.0,
        high=math.inf,
        level=0.95,
        status="lower bound",
        trace_h_sigma=x,
        g_h_g=y,
        detection_limit=NAN,
        method="exact",
        operator="hessian",
        b_simple=NAN,
        b_simple_low=0.0,
        b_simple_high=math.inf,
        b_simple_status="lower bound",
        trace_sigma=1.0,
        grad_sq_norm=1.0,
        n_examples=16,
        n_hessian=4,
        probes=8,
        cost=Cost(cost, 1.0, calls, 9, step_seconds),
    )
    return CurvatureReading(step, 1e-3, estimate)


def readings(n, b=20.0, sign=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        reading(50 * k, sign * (b + rng.normal()), sign * (1 + 0.5 * rng.normal()), 9 + k % 3)
        for k in range(n)
    ]


def test_the_ratio_is_that_of_the_averages():
    found = over_readings(readings(40))
    x, y = np.array([(r.estimate.trace_h_sigma, r.estimate.g_h_g) for r in readings(40)]).mean(0).T
    close(found.b_noise, x / y, rtol=1e-12)
    assert found.low < 20 < found.high and found.status == "measured"
    assert found.steps_each == 10 and "40 readings, each about 10 training steps" in str(found)


def test_the_spread_of_readings_that_know_it_is_added_not_seen_in_their_scatter():
    known = Moments(0.0, 0.0, (6.0, 1.0, 0.5), (0.0,) * 4, 8.0)
    far_apart = [reading(50 * k, 20.0 + 1000 * k, 2.0) for k in range(3)]
    told = [replace(r, estimate=replace(r.estimate, moments=known)) for r in far_apart]
    m = joined([r.estimate for r in told])
    unit = m.y / 2.0
    close(np.array(m.second) * m.k / m.df / unit**2, np.array(known.second) * 8 / 7 / 3, rtol=1e-12)
    close(m.df, 21.0, rtol=1e-12)  # three times seven, as they are equally sure
    assert over_readings(told).status == "measured" and over_readings(far_apart).status == "collecting"


def test_the_cost_is_in_steps_of_the_training_not_in_calls():
    for calls, seconds in ((1, 1.0), (4, 4.0)):
        every = [reading(50 * k, 20.0, 1.0, 12.0 * seconds, calls, seconds) for k in range(3)]
        assert over_readings(every).steps_each == 12


def test_no_cost_in_steps_is_told_where_no_step_was_timed():
    found = over_readings([reading(50 * k, 20.0, 1.0, step_seconds=None) for k in range(3)])
    assert math.isnan(found.steps_each) and "training steps" not in str(found)


@pytest.mark.parametrize(
    ("largest", "text"),
    [(4.0, "λ_max ≥ 4 (a lower bound). Above a learning rate of 2/λ_max = 0.5 plain"), (-1.0, "no ceiling")],
)
def test_what_readings_say_in_words(largest, text):
    found = readings(4)
    last = replace(found[-1], estimate=replace(found[-1].estimate, largest_eigenvalue=largest))
    said = in_words([*found[:-1], last])
    assert said[0].startswith("B_noise = ") and said[0].endswith("; collecting.")
    assert said[1] == "4 readings of about 10 steps each: 19 % more time."
    assert text in said[2] and len(said) == 3
    assert in_words([]) == [] and in_words(found[:1])[0].startswith("B_noise ≥ 0 examples")


def test_few_readings_are_collected_and_negative_curvature_is_said():
    assert over_readings(readings(1)) is None
    assert over_readings(readings(5)).status == "collecting"
    assert over_readings(readings(40, sign=-1.0)).status == "indefinite"


def test_a_trace_significantly_below_zero_is_said_too():
    found = over_readings([reading(50 * k, -20.0 - k % 3, 1.0 + 0.1 * (k % 2)) for k in range(40)])
    assert found.status == "indefinite" and found.b_noise < 0


def test_no_detection_limit_is_named_where_the_trace_comes_out_below_zero():
    scattered = [reading(50 * k, -1.0 + 30 * (-1) ** k, 0.1 + (-1) ** (k // 2)) for k in range(40)]
    found = over_readings(scattered)
    assert found.status == "lower bound" and math.isnan(found.detection_limit)
    assert over_readings([reading(r.step, 1.0, r.estimate.g_h_g) for r in scattered]).detection_limit > 0
    one = replace(scattered[0].estimate, detection_limit=NAN)
    assert "detection limit" not in str(one) and "16 examples, 8 probes, exact" in str(one)
    assert "(detection limit 3.4, 16 examples" in str(replace(one, detection_limit=3.4))


def test_a_value_outside_of_its_interval_is_not_said():
    below = replace(over_readings(readings(4)), b_noise=-3.0, low=0.0, high=2.0)
    assert str(below).startswith("B_noise not resolved (0 … 2), ")
    below = replace(readings(1)[0].estimate, b_noise=-3.0, low=0.0, high=2.0, status="measured")
    assert str(below).startswith("B_noise not resolved (95 %: 0 … 2), ")


def test_the_course_ends_with_all_readings():
    course = so_far(readings(10))
    assert [c.readings for c in course] == list(range(3, 11))
    assert course[-1] == over_readings(readings(10))


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_the_scale_of_the_loss_does_not_matter(scale):
    every = readings(30)
    scaled = [reading(r.step, scale * r.estimate.trace_h_sigma, scale * r.estimate.g_h_g) for r in every]
    a, b = over_readings(every), over_readings(scaled)
    close([a.b_noise, a.low, a.high], [b.b_noise, b.low, b.high], rtol=1e-9)


def test_readings_without_any_spread_are_joined_without_a_division_by_zero():
    none = Moments(0.0, 0.0, (0.0,) * 3, (0.0,) * 4, 8.0)
    found = joined([SimpleNamespace(trace_h_sigma=0.0, g_h_g=0.0, moments=none)] * 3)
    assert found.second == (0.0, 0.0, 0.0) and found.df == 3 * none.df


def test_progress_weights_are_those_of_the_steps_between_readings():
    every = [
        reading(k, x, y) for k, (x, y) in enumerate([(20.0, 1.0), (30.0, 1.0), (40.0, 0.5), (50.0, 0.5)])
    ]
    found = progress_weighted(every, 4.0)
    q = [1 + 30 / 4, (1 + 20 / 4 + 0.5 + 40 / 4) / 2, (1 + 30 / 4 + 0.5 + 50 / 4) / 2, 0.5 + 40 / 4]
    x, y = ([getattr(r.estimate, name) for r in every] for name in ("trace_h_sigma", "g_h_g"))
    wanted = sum(a / b for a, b in zip(x, q, strict=True)) / sum(a / b for a, b in zip(y, q, strict=True))
    assert found.b_noise == pytest.approx(wanted, rel=1e-12)


def test_where_nothing_moves_weights_do_not_matter_and_where_noise_rules_steps_count_by_signal():
    level = [reading(k, 20.0, 1.0) for k in range(6)]
    assert progress_weighted(level, 4.0).b_noise == pytest.approx(over_readings(level).b_noise)
    # far below B_noise a step's progress is B/B_k: the harmonic mean, but for what neighbours do not tell
    moving = [reading(k, 100.0 * 2 ** (k / 40), 1.0) for k in range(40)]
    b = np.array([r.estimate.trace_h_sigma for r in moving])
    assert progress_weighted(moving, 1e-3).b_noise == pytest.approx(1 / np.mean(1 / b), rel=0.01)


@pytest.mark.parametrize(
    ("b", "fall", "off"),
    [((20, 20), 1, 1.0), ((10, 40), 1, 1.025), ((5, 100), 1, 1.11), ((5, 100), 30, 0.945)],
)
def test_how_far_off_neighbours_weights_are_where_b_noise_drifts(b, fall, off):
    """What the docstring says of it, without errors; the weights of each reading's own Q_k are the truth."""
    each, g_h_g = np.geomspace(*b, 8), np.geomspace(1, 1 / fall, 8)
    found = progress_weighted(
        [reading(k, x * y, y) for k, (x, y) in enumerate(zip(each, g_h_g, strict=True))], 4
    )
    progress = 1 / (1 + each / 4)
    assert found.b_noise / (progress @ each / progress.sum()) == pytest.approx(off, abs=0.005)


def test_weights_are_those_of_the_spread_too():
    """Where all is known but a reading of ten times the weight, its spread counts a hundredfold."""
    every = []
    for k, (x, y) in enumerate([(20.0, 1.0), (200.0, 10.0), (20.0, 1.0), (200.0, 10.0)]):
        each = reading(k, x, y)
        moments = Moments(x, y, (4.0 * y, 0.1 * y, 0.01 * y), (0.3, 0.1, 0.02, 0.01), 8.0)
        every.append(replace(each, estimate=replace(each.estimate, moments=moments)))
    q = np.array([60.0, 6.0, 60.0, 6.0])  # of the neighbours
    weighed = [
        replace(
            r,
            estimate=replace(
                r.estimate,
                trace_h_sigma=r.estimate.trace_h_sigma * w,
                g_h_g=r.estimate.g_h_g * w,
                moments=r.estimate.moments.times(w),
            ),
        )
        for r, w in zip(every, 60 / q, strict=True)
    ]
    found, wanted = progress_weighted(every, 4.0), over_readings(weighed)
    assert found.high < math.inf and (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_the_scale_of_the_loss_does_not_matter_to_weights():
    every = [reading(k, 20.0 + k, 1.0) for k in range(5)]
    tiny = [reading(k, (20.0 + k) * 2.0**-300, 2.0**-300) for k in range(5)]
    assert progress_weighted(tiny, 4.0).b_noise == pytest.approx(progress_weighted(every, 4.0).b_noise)


@pytest.mark.parametrize(
    ("made", "batch", "said"),
    [
        ([(20.0, 1.0)] * 2, 4.0, "2 reading.s. at batch 4; at least 3"),
        ([(20.0, 1.0)] * 3, 0.0, "3 reading.s. at batch 0; at least 3 and a batch above 0"),
        (
            [(1.0, 1.0), (1.0, -40.0), (1.0, 1.0)],
            4.0,
            "reading at step 0, GᵀHG .* estimated as -39.8",
        ),
    ],
)
def test_what_cannot_be_weighed_is_said(made, batch, said):
    with pytest.raises(ValueError, match=said):
        progress_weighted([reading(k, *pair) for k, pair in enumerate(made)], batch)
