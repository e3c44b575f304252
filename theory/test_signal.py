"""Empirical objective and population: the link between the two, and the reversal with signal."""

from fractions import Fraction

import numpy as np
import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import montecarlo as mc
from theory.laws import (
    average_over_batches,
    lemma_mean,
    mean_of_ratios_factor,
    plugin_from_population,
    plugin_mean,
    plugin_ratio_mean,
    population,
    population_from_plugin,
    regression_moments,
    signal_b_simple,
)

SMALL = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=4)


def test_golden_coin() -> None:
    """{1, 3} with a fair coin: trΣ = 1, |G|² = 4, both exactly unbiased over all batches, the ratio not."""
    assert population([[1], [3]]) == (4, 1)
    for b in (2, 3, 4, 5):
        mean = average_over_batches([[1], [3]], b)
        assert (mean.grad_sq_norm, mean.trace_sigma) == (4, 1)
        assert mean.ratio is not None and mean.ratio != Fraction(1, 4)


@given(SMALL, st.integers(2, 4))
def test_both_estimators_are_exactly_unbiased(examples: list[tuple[int, int]], b: int) -> None:
    """Over all Nᵇ ordered batches of any tiny data set, in rational arithmetic."""
    mean = average_over_batches(examples, b)
    assert (mean.grad_sq_norm, mean.trace_sigma) == population(examples)


@given(SMALL, st.integers(2, 4))
def test_without_replacement_grad_sq_norm_is_low_by_s2_over_n(
    examples: list[tuple[int, int]], b: int
) -> None:
    """|G|² falls short by S²/N and trΣ reads S², S² = N trΣ/(N-1)."""
    n = len(examples)
    b = min(b, n)
    sq, trace = population(examples)
    s2 = trace * n / (n - 1)
    mean = average_over_batches(examples, b, "without")
    assert mean.trace_sigma == s2 and mean.grad_sq_norm == sq - s2 / n


def test_dropping_bessel_is_biased_by_enumeration() -> None:
    """Control: q itself, or n-1 replaced by n, is not unbiased."""
    mean = average_over_batches([[1], [3]], 2)
    assert mean.grad_sq_norm + mean.trace_sigma / 2 == 4 + Fraction(1, 2)  # E[q]
    assert mean.trace_sigma / 2 != 1  # m - q


@given(st.floats(1e-3, 1e9), st.integers(2, 10**9))
def test_link_and_its_inverse(b_simple: float, n: int) -> None:
    """1/B_plugin = 1/B_simple + 1/n; the plug-in lies below both."""
    plugin = plugin_from_population(b_simple, n)
    assert plugin <= min(b_simple, n) * (1 + 1e-12)
    assert 1 / plugin == pytest.approx(1 / b_simple + 1 / n, rel=1e-12)
    if b_simple < 1e3 * n:
        assert population_from_plugin(plugin, n) == pytest.approx(b_simple, rel=1e-8)


def test_the_plugin_saturates_at_n() -> None:
    """No signal: the plug-in reads n, the lemma's conclusion; above n the inverse is negative, and legal."""
    assert plugin_from_population(np.inf, 64) == 64
    assert plugin_from_population(1e12, 64) == pytest.approx(64)
    assert population_from_plugin(64, 64) == np.inf
    assert population_from_plugin(80, 64) < 0


@given(SMALL, st.integers(2, 3))
def test_link_is_exact_for_the_mean_of_q(examples: list[tuple[int, int]], b: int) -> None:
    """E[q]/trΣ = 1/B_simple + 1/n, by enumeration with replacement."""
    sq, trace = population(examples)
    mean = average_over_batches(examples, b)
    assert mean.grad_sq_norm + mean.trace_sigma / b == sq + trace / b


@given(st.floats(2.5, 1e4), st.integers(2, 10**6), st.floats(0.01, 1e8))
def test_mean_of_ratios_is_off_by_at_most_r_over_r_minus_two(r: float, n: int, b_simple: float) -> None:
    """1 <= E[trΣ/q] · E[q]/trΣ <= r/(r-2), falling towards 1 with the signal."""
    factor = mean_of_ratios_factor(r, n, b_simple)
    assert 1 - 1e-9 <= factor <= r / (r - 2) * (1 + 1e-9)
    assert mean_of_ratios_factor(r, n, b_simple / 3) <= factor * (1 + 1e-9)


def test_the_lemma_is_the_zero_signal_end() -> None:
    """B_simple = ∞ gives rN/(r-2)."""
    assert plugin_ratio_mean(8, 20, np.inf) == pytest.approx(lemma_mean(8, 20), rel=1e-13)
    assert mean_of_ratios_factor(8, 20, np.inf) == pytest.approx(8 / 6, rel=1e-13)


@pytest.mark.parametrize("b_simple", [5.0, 50.0, 5000.0])
def test_mean_of_ratios_by_three_routes(b_simple: float, agree, caught) -> None:
    """Noncentral χ² law = spectrum integral = simulation; the link is caught as wrong for the ratio."""
    r, n = 12, 40
    lam, mean = np.ones(r), np.zeros(r)
    mean[2] = np.sqrt(r / b_simple)
    exact = plugin_ratio_mean(r, n, b_simple)
    assert plugin_mean(lam, n, mean) == pytest.approx(exact, rel=1e-12)
    estimate = mc.simulate(mc.spectrum_plugin(lam, n, mean), 300_000, 21, 24)
    agree(f"E[trS/|ḡ|²] with signal, B_simple = {b_simple:g}", estimate, exact)
    if b_simple >= 50:
        caught(
            f"link in place of the mean of ratios, B = {b_simple:g}",
            estimate,
            plugin_from_population(b_simple, n),
        )


def test_noncentral_moment_by_simulation(agree, caught) -> None:
    """E[1/χ'²₈(5)] = 0.0987466; forgetting the signal is caught."""
    estimate = mc.simulate(mc.noncentral_reciprocal(8, 5), 400_000, 22)
    agree("E[1/χ'²₈(5)]", estimate, 0.0987466)
    caught("E[1/χ²₈] in its place", estimate, 1 / 6)


def test_signal_case_is_derived_symbolically() -> None:
    """trΣ = |w|²(r+1) + s²r and |G|² = |w|² from Gaussian moments, for r = 1..4."""
    s2, w2 = sp.symbols("s2 w2", positive=True)
    for r in (1, 2, 3, 4):
        # w along the first axis: E[(w·x+ε)²|x|²] = w2 E[x1²(x1² + r - 1)] + s2 r = w2 (3 + r - 1) + s2 r
        x = sp.Symbol("x", real=True)
        density = sp.exp(-(x**2) / 2) / sp.sqrt(2 * sp.pi)
        fourth, second = (sp.integrate(x**k * density, (x, -sp.oo, sp.oo)) for k in (4, 2))
        second_moment = w2 * (fourth + (r - 1) * second**2) + s2 * r
        b_simple = sp.simplify((second_moment - w2) / w2)
        assert sp.simplify(b_simple - (r * (1 + s2 / w2) + 1)) == 0
        assert float(b_simple.subs({s2: 2, w2: 1})) == pytest.approx(signal_b_simple(r, 0.5))


@given(st.integers(1, 30), st.floats(0.01, 100))
def test_signal_case_is_the_isotropic_regression(r: int, snr: float) -> None:
    """The general Isserlis moments reduce to r(1+1/SNR)+1, and B_noise = B_simple when H = I."""
    error = np.zeros(r)
    error[r // 2] = 1.7
    moments = regression_moments(np.ones(r), error, 1.7**2 / snr)
    assert moments.b_simple == pytest.approx(signal_b_simple(r, snr), rel=1e-12)
    assert moments.b_noise == pytest.approx(moments.b_simple, rel=1e-12)


@pytest.mark.parametrize(("r", "snr"), [(4, 0.5), (16, 2.0)])
def test_signal_case_by_simulation(r: int, snr: float, agree, caught) -> None:
    """Unbiased sums over regression steps of 8: trΣ = r(1+1/SNR)+1 and |G|² = 1; their ratio is B."""
    trace, grad = mc.simulate_columns(mc.regression_step(r, snr, 8), 200_000, 23, 8 * (r + 1))
    agree(f"trΣ with signal, r = {r}, SNR = {snr}", trace, signal_b_simple(r, snr))
    agree(f"|G|² with signal, r = {r}, SNR = {snr}", grad, 1.0)
    caught(f"trΣ without the +1, r = {r}", trace, signal_b_simple(r, snr) - 1)


def test_anisotropic_regression_by_simulation(agree) -> None:
    """trΣ, |G|², tr(HΣ), GᵀHG of a regression with spectrum, from pairs of examples."""
    h, e, s2 = np.array([3.0, 1.0, 0.5]), np.array([0.5, -1.0, 2.0]), 0.8
    exact = regression_moments(h, e, s2)

    def sample(rng: np.random.Generator, size: int) -> np.ndarray:
        x = rng.standard_normal((2, size, 3)) * np.sqrt(h)
        g = -(x @ e + rng.standard_normal((2, size)) * np.sqrt(s2))[..., None] * x
        cross, half = g[0] * g[1], 0.5 * (g[0] - g[1]) ** 2
        return np.stack([half.sum(1), cross.sum(1), half @ h, cross @ h], 1)

    truths = (exact.trace_sigma, exact.grad_sq_norm, exact.trace_h_sigma, exact.g_h_g)
    for name, estimate, truth in zip(
        ("trΣ", "|G|²", "tr(HΣ)", "GᵀHG"), mc.simulate_columns(sample, 300_000, 24, 8), truths, strict=True
    ):
        agree(f"regression {name}", estimate, truth)


@given(st.floats(1, 1e5), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_with_signal_the_noise_scale_grows_with_rank_and_falls_with_snr(
    r: float, snr: float, more: float
) -> None:
    """The reversal: linear in r at fixed SNR, independent of N; infinite without signal."""
    assert signal_b_simple(2 * r, snr) - 1 == pytest.approx(2 * (signal_b_simple(r, snr) - 1), rel=1e-12)
    assert signal_b_simple(r, snr + more) < signal_b_simple(r, snr)
    assert signal_b_simple(r, 0.0) == np.inf


def test_link_at_the_ends_of_the_float_range() -> None:
    """A tiny B_simple is read as itself, and next to n the inverse keeps its digits."""
    assert plugin_from_population(1e-320, 10) == 1e-320
    b = 64 * (1 - 2.0**-50)
    assert population_from_plugin(b, 64) == pytest.approx(64 * (2.0**50 - 1), rel=1e-12)
    assert plugin_ratio_mean(8, 10**9, 1e-9) == pytest.approx(1e-9, rel=1e-12)
