"""Steps against examples, learning rate against batch: identities, minimisations, limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special

from theory.laws import (
    TradeOff,
    fit_tradeoff,
    progress_share,
    sgd_learning_rate,
    sign_descent_peak,
    sign_descent_rate,
    surge_learning_rate,
)
from theory.verdict import Estimate

SIZE = st.floats(1e-2, 1e6)


@given(SIZE, SIZE, SIZE)
def test_hyperbola(s_min: float, e_min: float, batch: float) -> None:
    """(S/S_min - 1)(E/E_min - 1) = 1 and E = B·S at every batch."""
    law = TradeOff(s_min, e_min)
    s, e = law.steps(batch), law.examples(batch)
    assert e == pytest.approx(batch * s, rel=1e-12)
    assert (s - s_min) * (e - e_min) == pytest.approx(s_min * e_min, rel=1e-5, abs=1e-9 * s * e)


@given(SIZE, SIZE)
def test_at_b_crit_twice_both_minima(s_min: float, e_min: float) -> None:
    """S = 2S_min, E = 2E_min; 20 % more examples at 0.2 B_crit."""
    law = TradeOff(s_min, e_min)
    assert law.steps(law.b_crit) == pytest.approx(2 * s_min)
    assert law.examples(law.b_crit) == pytest.approx(2 * e_min)
    assert law.waste(0.2 * law.b_crit) == pytest.approx(0.2)


@given(SIZE, SIZE, st.floats(1.001, 1e4))
def test_one_epoch_law(s_min: float, e_min: float, multiple: float) -> None:
    """E(B_max(N)) = N: putting E = N into the law and solving for the batch."""
    law = TradeOff(s_min, e_min)
    n = multiple * e_min
    b_max = law.one_epoch_batch_max(n)
    assert law.examples(b_max) == pytest.approx(n, rel=1e-9)
    assert b_max == pytest.approx(law.b_crit * (n / e_min - 1), rel=1e-6)


def test_one_epoch_exponent_is_the_slope_and_tends_to_one() -> None:
    """D log B_max/d log N = N/(N-E_min): infinite at E_min, 1 far above; below E_min there is no batch."""
    law = TradeOff(100.0, 5000.0)
    for n in (6e3, 2e4, 1e6):
        slope = (np.log(law.one_epoch_batch_max(n * 1.0001)) - np.log(law.one_epoch_batch_max(n))) / np.log(
            1.0001
        )
        assert law.one_epoch_exponent(n) == pytest.approx(slope, rel=1e-3)
    assert law.one_epoch_exponent(1e9) == pytest.approx(1, abs=1e-4)
    assert law.one_epoch_exponent(5e3) == np.inf and np.isnan(law.one_epoch_exponent(1e3))
    assert law.one_epoch_batch_max(1e3) < 0


def test_no_interior_optimum_on_the_hyperbola() -> None:
    """At equal examples the smallest batch always gives most progress."""
    law = TradeOff(37.0, 900.0)
    assert np.all(np.diff([law.examples(b) for b in np.geomspace(0.1, 1e4, 50)]) > 0)


@given(SIZE, SIZE)
def test_fit_recovers_the_law(s_min: float, e_min: float) -> None:
    """Noise-free data give S_min and E_min back."""
    law = TradeOff(s_min, e_min)
    batches = law.b_crit * np.geomspace(0.01, 100, 9)
    fitted = fit_tradeoff(batches, [law.steps(b) for b in batches])
    assert (fitted.s_min, fitted.e_min) == pytest.approx((s_min, e_min), rel=1e-6)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 1e4), st.floats(0.5, 1e4))
def test_sgd_rate_minimises_the_expected_loss(sq: float, ghg: float, b_noise: float, batch: float) -> None:
    """ε_max/(1+B_noise/B) against a numerical minimum of -ε|G|² + ½ε²GᵀHG(1+B_noise/B), and its progress."""
    eps = float(sgd_learning_rate(batch, sq / ghg, b_noise))

    def change(v: float) -> float:
        return -v * sq + 0.5 * v * v * ghg * (1 + b_noise / batch)

    found = optimize.minimize_scalar(lambda v: change(v * eps), bounds=(0.0, 3.0), method="bounded")
    assert found.x == pytest.approx(1.0, abs=1e-5)
    assert change(eps) == pytest.approx(-float(progress_share(batch, b_noise)) * sq**2 / (2 * ghg), rel=1e-9)


@given(st.floats(0.01, 100), st.floats(0.1, 1e4), st.floats(1.01, 1e3))
def test_surge_law_peaks_at_b_n_and_is_symmetric(eps: float, peak: float, factor: float) -> None:
    """ε(B_n) = ε_max, ε(cB_n) = ε(B_n/c) < ε_max."""
    at, above, below = (
        float(surge_learning_rate(b, eps, peak)) for b in (peak, peak * factor, peak / factor)
    )
    assert at == pytest.approx(eps) and above == pytest.approx(below, rel=1e-9) and above < eps


def test_surge_law_tends_to_the_square_root_rule() -> None:
    """For B ≪ B_n: ε ∝ √B; for SGD ε ∝ B."""
    assert surge_learning_rate(4e-6, 1.0, 1.0) / surge_learning_rate(1e-6, 1.0, 1.0) == pytest.approx(
        2, rel=1e-4
    )
    assert sgd_learning_rate(4e-6, 1.0, 1.0) / sgd_learning_rate(1e-6, 1.0, 1.0) == pytest.approx(4, rel=1e-4)


def sign_problem(ratio: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A correlated Hessian whose peak B_n lies at ratio·πσ²/2μ² of the approximation's limit."""
    d = 40
    coupling = np.pi / 2 / ratio / (d - 1) * 2 / np.pi
    hessian = np.eye(d) + coupling * (np.ones((d, d)) - np.eye(d))
    return np.full(d, 0.05), np.ones(d), hessian


def test_surge_law_holds_for_exact_sign_descent_at_small_signal() -> None:
    """B ≪ πσ²/2μ²: the erf model's best rate is the surge law within 3 %."""
    mu, sigma, h = sign_problem(0.01)
    peak, eps = sign_descent_peak(mu, sigma, h)
    assert peak < 0.02 * np.pi / 2 / 0.05**2
    for b in peak * np.array([0.1, 1.0, 4.0]):
        assert sign_descent_rate(float(b), mu, sigma, h) == pytest.approx(
            float(surge_learning_rate(b, eps, peak)), rel=0.03
        )
    rates = [sign_descent_rate(float(b), mu, sigma, h) for b in peak * np.geomspace(0.05, 20, 41)]
    assert 15 < int(np.argmax(rates)) < 25


def test_surge_law_fails_outside_its_range() -> None:
    """Control: with B_n near πσ²/2μ² the exact rate does not fall as the law says."""
    mu, sigma, h = sign_problem(2.0)
    peak, eps = sign_descent_peak(mu, sigma, h)
    exact, law = sign_descent_rate(20 * peak, mu, sigma, h), float(surge_learning_rate(20 * peak, eps, peak))
    assert exact > 1.5 * law


def test_expected_sign_is_the_error_function(agree) -> None:
    """E[sign of a batch mean] = erf(√(B/2) μ/σ), from draws."""
    draws = np.random.default_rng(51).normal(0.3, 1.0, (200_000, 4)).mean(1)
    signs = np.sign(draws)
    estimate = Estimate(float(signs.mean()), float(signs.std(ddof=1) / np.sqrt(signs.size)), signs.size)
    agree("E[sign] of a batch mean, B = 4", estimate, float(special.erf(np.sqrt(2) * 0.3)))
