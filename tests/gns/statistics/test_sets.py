"""The p-value against the set it belongs to, and its size; how many more steps a width takes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gns.estimate import Estimate, estimate
from gns.statistics.moments import Moments
from gns.statistics.sets import confidence_set, half_width, honest_set, p_value, times_more
from gns.sums import StepSums
from tests.reference import estimators as slow
from tests.reference.tolerances import close

SPECTRA = {"1/j": 1 / np.arange(1, 65), "j^-2": 1 / np.arange(1, 65) ** 2.0}


def simulated(seed: int, b: float, k: int = 50, spectrum: str = "1/j") -> list[StepSums]:
    m, q = slow.gaussian_steps(np.random.default_rng(seed), SPECTRA[spectrum], b, 16, k)
    return [StepSums(i, 16, float(a), float(c)) for i, (a, c) in enumerate(zip(m, q, strict=True))]


# the p-value


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("b", [20, 300, 1000, 1e9])
def test_p_is_below_half_the_error_exactly_where_the_set_has_an_upper_end(b, level):
    for seed in range(25):
        e = estimate(simulated(seed, b), level=level)
        assert (e.p_value < (1 - level) / 2) is math.isfinite(e.high)


def one_loud_step(y: float) -> list[StepSums]:
    """40 steps of 8 examples with tr Σ about 1 and this |G|², one of them with tr Σ = 2,000."""
    noise = [2000.0 if k == 20 else 1 + 0.2 * (7 * k % 40) / 40 for k in range(40)]
    signal = [y * (1 + 0.2 * (11 * k % 40) / 40) for k in range(40)]
    return [
        StepSums(k, 8, x * 7 / 8 + g + x / 8, g + x / 8)
        for k, (x, g) in enumerate(zip(noise, signal, strict=True))
    ]


def test_a_squared_gradient_below_zero_leaves_no_upper_end():
    """Infinity may be rejected as too small where numbers below it are not: it is no upper end."""
    e = estimate(one_loud_step(-0.02))
    assert e.grad_sq_norm < 0 and e.moments is not None
    assert math.isfinite(confidence_set(e.moments, 0.95)[1]), "the case is no longer one"
    assert (e.high, e.status) == (math.inf, "lower bound")
    assert e.p_value > 0.5 and e.low <= confidence_set(replace(e.moments, y=0.0), 0.95)[0]
    assert estimate(one_loud_step(0.02)).status == "measured"


@given(
    seed=st.integers(0, 9999),
    k=st.integers(3, 60),
    y=st.floats(-2, 2),
    loud=st.floats(0, 8),
    level=st.sampled_from([0.5, 0.8, 0.95, 0.99]),
)
def test_p_and_the_upper_end_agree_on_skewed_steps_too(seed, k, y, loud, level):
    rng = np.random.default_rng(seed)
    a, b = rng.exponential(1, k), y + rng.standard_normal(k)
    a[rng.integers(k)] += 10**loud
    moments = Moments.of(a, b, np.ones(k), np.ones(k))
    high, p = honest_set(moments, level)[1], p_value(moments)
    assert p < (1 - level) / 2 or math.isinf(high)
    assert moments.y > 0 or math.isinf(high)


@given(seed=st.integers(0, 9999), k=st.integers(3, 60), mean=st.floats(-1, 2))
def test_p_is_that_of_the_definition(seed, k, mean):
    rng = np.random.default_rng(seed)
    y = mean + rng.exponential(1, k) - 1
    t, h = slow.hall(-y, np.zeros(k), 0.0)
    close(
        p_value(Moments.of(np.ones(k), y, np.ones(k), np.ones(k))), stats.t.cdf(max(t, h), k - 1), rtol=1e-6
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [20, 50])
def test_without_signal_p_is_small_no_more_often_than_it_says(spectrum, k):
    """2,000 runs a cell. The control is the F test of isotropic data, which FACTS has at 17 and 25 %."""
    rng, runs, n = np.random.default_rng(k), 2000, 16
    m, q = slow.gaussian_steps(rng, SPECTRA[spectrum], 1e18, n, runs * k)
    x, y = ((n * (m - q) / (n - 1)).reshape(runs, k), ((n * q - m) / (n - 1)).reshape(runs, k))
    ones = np.ones(k)
    p = np.array([p_value(Moments.of(a, b, ones, ones)) for a, b in zip(x, y, strict=True)])
    for level in (0.025, 0.05):
        bound = stats.binom.isf(1e-4, runs, level)
        assert (p < level).sum() <= bound, (level, (p < level).mean())
    d = len(SPECTRA[spectrum])
    isotropic = stats.f.sf(q / (m - q) * (n - 1), d, d * (n - 1))
    assert (isotropic < 0.05).mean() > 0.1, "the control got through"


def test_p_finds_a_signal_and_is_unknown_without_steps():
    assert estimate(simulated(0, 5)).p_value < 1e-9
    assert math.isnan(estimate(simulated(0, 5, k=1)).p_value)
    assert estimate([StepSums(i, 16, 16.0, 1.0) for i in range(30)]).p_value == 0.5  # |G|² = 0 without noise
    assert estimate([StepSums(i, 16, 15.0, 1.0) for i in range(30)]).p_value == 0.0  # noiseless signal


# how many more


@pytest.mark.parametrize("width", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("b", [5, 50])
def test_the_predicted_number_of_steps_gives_the_width(b, width):
    moments = estimate(simulated(1, b)).moments
    assert moments is not None
    times = times_more(moments, 0.95, width)
    close(half_width(moments.scaled(times), 0.95), width, rtol=1e-3)


def test_moments_of_a_run_repeated_are_the_scaled_ones():
    x, y = np.random.default_rng(0).exponential(1, (2, 30))
    once, four = (Moments.of(np.tile(x, r), np.tile(y, r), np.ones(30 * r), np.ones(30 * r)) for r in (1, 4))
    expected = once.scaled(4)
    close(four.second, expected.second, rtol=1e-12)
    close(four.third, expected.third, rtol=1e-12)
    assert (four.k, four.x) == (pytest.approx(expected.k), pytest.approx(expected.x))


@pytest.mark.parametrize(("spectrum", "b", "k"), [("j^-2", 20, 100), ("1/j", 20, 20)])
def test_the_prediction_is_right_within_a_factor_of_one_and_a_half(spectrum, b, k):
    """What each of 80 runs predicts for ±20 %, against the steps after which the median set is that narrow.

    Simulated with 200 runs: within the factor in 95 % (100 steps, j⁻²) and 76 % (20 steps, 1/j).
    """
    width, lengths = 0.2, []
    for seed in range(80):
        e = estimate(simulated(seed, b, k, spectrum))
        if e.status == "measured":
            lengths.append((e.n_examples + e.more_examples(width)) / 16)
    needed = _needed(spectrum, b, width)
    within = np.mean([needed / 1.5 < length < needed * 1.5 for length in lengths])
    assert len(lengths) > 70
    assert within > (0.85 if k == 100 else 0.6), (within, needed)
    assert 0.8 < np.median(lengths) / needed < 1.25


def _needed(spectrum: str, b: float, width: float) -> float:
    """Steps after which the median set of 30 runs has this half-width, approached three times."""
    steps = 100
    for _ in range(3):
        found = [estimate(simulated(1000 + s, b, steps, spectrum)) for s in range(30)]
        steps = round(steps * (np.median([(e.high - e.low) / 2 / e.b_simple for e in found]) / width) ** 2)
    return steps


def test_a_narrow_set_needs_no_more_and_no_signal_no_number():
    assert estimate(simulated(0, 5, k=400)).more_examples(0.2) == 0
    nothing = next(e for s in range(9) if (e := estimate(simulated(s, 1e9))).grad_sq_norm < 0)
    assert nothing.more_examples() == math.inf
    assert math.isnan(estimate([]).more_examples())
    with pytest.raises(ValueError, match="width is 0; a relative half-width above 0"):
        nothing.more_examples(0)


def test_an_estimate_written_by_hand_goes_by_the_root():
    e = Estimate(200.0, 120.0, 280.0, 0.95, "measured", 1.0, 0.005, 900.0, 50, 800)
    assert e.more_examples(0.2) == pytest.approx(800 * 3)
    assert replace(e, high=math.inf).more_examples(0.2) == math.inf


def test_the_outlook_in_words():
    wide = estimate(simulated(0, 20, k=20))
    more = wide.more_examples()
    assert more > 0
    assert (
        wide.outlook().startswith("About ")
        and "more examples for ±20 %, at this batch size (" in wide.outlook()
    )
    assert estimate(simulated(0, 5, k=400)).outlook() == "The interval is no wider than ±20 %."
    bound = estimate(simulated(6, 1e7))
    assert bound.outlook(0.1).startswith("At least ") and "|G|² cannot be told from 0" in bound.outlook(0.1)
    assert "before 2 steps" in estimate([]).outlook()
    early = estimate(simulated(0, 5, k=6))  # a set of few steps can be narrow by chance
    assert early.status == "collecting" and early.outlook().endswith("before 20 steps are measured.")


def test_without_spread_no_number_of_examples_is_named():
    same = estimate([StepSums(i, 8, 3.0, 3.0) for i in range(30)])
    assert (same.status, same.b_simple, same.more_examples()) == ("measured", 0.0, math.inf)
    assert "averages to no more than 0" in same.outlook()
    uneven = [StepSums(i, 8, 1 + 0.01 * (i % 3), 1.2, sum_sq_weights=0.3) for i in range(30)]
    assert estimate(uneven).b_simple < 0 and "|G|²" not in estimate(uneven).outlook()


# metrics


def test_metrics_do_not_mix():
    steps = simulated(0, 20)
    adam = [replace(s, metric="adam") for s in steps]
    assert estimate(adam).metric == "adam" and estimate(steps).metric == "euclidean"
    with pytest.raises(ValueError, match="2 metrics, adam, euclidean: their sums do not add"):
        estimate([*steps, *adam])
    unusable = replace(adam[0], reason="of another kind")
    assert estimate([*steps, unusable]).n_skipped == 1
