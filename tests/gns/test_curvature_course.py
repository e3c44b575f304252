"""Readings of B_noise over a training: averaged first, then divided."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gns.curvature.course import in_words, joined, over_readings, so_far
from gns.curvature.result import Cost, CurvatureEstimate, CurvatureReading
from gns.moments import Moments
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
