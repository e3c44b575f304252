"""Any spectrum, any mean: one integral, checked against closed forms, hypergeometric series and draws."""

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from theory.laws import (
    effective_rank,
    isotropic_reciprocal_moment,
    lemma_mean,
    plugin_mean,
    plugin_mean_shortcut,
    power_law_spectrum,
    reciprocal_moment,
)
from theory.spectra import isotropic_reciprocal_moment_hyp, repeated_reciprocal_moment

SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=12)


def test_golden_power_law() -> None:
    """λⱼ = 1/j, d = 64, N = 100: 112.784."""
    assert round(plugin_mean(power_law_spectrum(64), 100), 3) == 112.784


def test_golden_noncentral() -> None:
    """R = 8, λ = 5: 0.0987466 by integral, by ₁F₁ and by the Poisson mixture."""
    k = np.arange(200)
    mixture = float(np.sum(stats.poisson.pmf(k, 2.5) / (8 + 2 * k - 2)))
    routes = (isotropic_reciprocal_moment(8, 5), isotropic_reciprocal_moment_hyp(8, 5), mixture)
    assert [round(v, 7) for v in routes] == [0.0987466] * 3
    assert np.ptp(routes) < 1e-14


@given(st.integers(3, 2000), st.integers(2, 10**9))
def test_isotropic_spectrum_gives_the_lemma_back(r: int, n: int) -> None:
    """The integral with r equal eigenvalues is rN/(r-2)."""
    assert plugin_mean(np.full(r, 0.37), n) == pytest.approx(lemma_mean(r, n), rel=1e-12)


@pytest.mark.parametrize("r", [2.01, 2.5, 3, 8, 1e3, 1e6])
@pytest.mark.parametrize("noncentrality", [0.0, 1e-6, 1.0, 50.0, 1e4, 1e9])
def test_noncentral_moment_is_hypergeometric(r: float, noncentrality: float) -> None:
    """E[1/χ'²_r(λ)] = ₁F₁(1; r/2; -λ/2)/(r-2), from r = 2.01 to a million (scipy itself is good to 1e-9)."""
    ours = isotropic_reciprocal_moment(r, noncentrality)
    assert ours == pytest.approx(isotropic_reciprocal_moment_hyp(r, noncentrality), rel=2e-9)


@pytest.mark.parametrize(("r", "noncentrality"), [(3, 2.0), (8, 5.0), (1000, 1e4), (10**6, 10**6)])
def test_noncentral_moment_against_thirty_digits(r: int, noncentrality: float) -> None:
    """½ ∫₀¹ (1-v)^(r/2-2) e^(-λv/2) dv in multiple precision: a third route."""
    with mpmath.workdps(30):
        rate = mpmath.mpf(r) / 2 - 2 + mpmath.mpf(noncentrality) / 2
        cuts = [0] + [c for c in (1 / rate, 10 / rate, 60 / rate) if 0 < c < 1] + [1]
        value = mpmath.quad(
            lambda v: (1 - v) ** (mpmath.mpf(r) / 2 - 2) * mpmath.exp(-noncentrality * v / 2) / 2, cuts
        )
    assert isotropic_reciprocal_moment(r, noncentrality) == pytest.approx(
        float(value), rel=1e-9 if r > 3 else 1e-7
    )


@given(SPECTRA, st.lists(st.floats(-30, 30), min_size=12, max_size=12))
def test_integral_against_adaptive_quadrature(eigenvalues: list[float], means: list[float]) -> None:
    """Trapezoid in log t against scipy's adaptive rule on the same integrand written out again."""
    lam, mu = np.array(eigenvalues), np.array(means[: len(eigenvalues)])
    unit = lam.sum() + (mu**2).sum()

    def integrand(v: float) -> float:
        t = np.exp(v) / unit
        return np.exp(v - 0.5 * np.log1p(2 * t * lam).sum() - (t * mu**2 / (1 + 2 * t * lam)).sum())

    pieces = [integrate.quad(integrand, *ends, limit=400, epsabs=1e-12)[0] for ends in ((-45, 0), (0, 120))]
    assert unit * reciprocal_moment(lam, mu) == pytest.approx(sum(pieces), rel=1e-9)


@given(SPECTRA, st.floats(1e-8, 1e8), st.integers(2, 10**6))
def test_scale_of_the_gradient_does_not_matter(eigenvalues: list[float], factor: float, n: int) -> None:
    """Multiplying every gradient by √factor leaves the noise scale alone."""
    lam = np.array(eigenvalues)
    assert plugin_mean(factor * lam, n) == pytest.approx(plugin_mean(lam, n), rel=1e-10)


@given(SPECTRA, st.integers(0, 10))
def test_order_and_zero_padding_do_not_matter(eigenvalues: list[float], zeros: int) -> None:
    """The spectrum is a multiset, and directions without noise or mean add nothing."""
    lam = np.array(eigenvalues)
    padded = np.concatenate([np.zeros(zeros), lam[::-1]])
    assert plugin_mean(padded, 10) == pytest.approx(plugin_mean(lam, 10), rel=1e-12)


def test_rotation_inside_an_eigenspace_does_not_matter() -> None:
    """Only the squared mean per eigenspace counts."""
    lam = np.array([2.0, 2.0, 1.0, 0.5])
    a, b = reciprocal_moment(lam, [3.0, 4.0, 1.0, 0.0]), reciprocal_moment(lam, [5.0, 0.0, 1.0, 0.0])
    assert a == pytest.approx(b, rel=1e-13)


@given(SPECTRA, st.integers(2, 1000))
def test_shortcut_never_falls_below_and_rank_never_above(eigenvalues: list[float], n: int) -> None:
    """rN/(r-2) <= exact <= r_eff·N/(r_eff-2): the theorem in `plugin_mean_shortcut`."""
    lam = np.array(eigenvalues)
    exact = plugin_mean(lam, n)
    assert lemma_mean(lam.size, n) <= exact * (1 + 1e-9)
    assert exact <= plugin_mean_shortcut(lam, n) * (1 + 1e-9)


def test_shortcut_overstates_the_power_law() -> None:
    """1/j, d = 64: 116.9 instead of 112.8; and infinity on j⁻⁴ where the truth is finite."""
    assert plugin_mean_shortcut(power_law_spectrum(64), 100) == pytest.approx(116.933, abs=1e-3)
    steep = power_law_spectrum(64, 4.0)
    assert plugin_mean_shortcut(steep, 100) == np.inf and plugin_mean(steep, 100) < np.inf


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=2))
def test_fewer_than_three_directions_have_no_mean(eigenvalues: list[float]) -> None:
    """Existence: finite iff three λ are non-zero..."""
    assert plugin_mean(eigenvalues + [0.0, 0.0], 10) == np.inf
    assert plugin_mean(eigenvalues + [0.1, 0.1], 10) < np.inf


def test_a_mean_outside_the_noise_rescues_existence() -> None:
    """...or the true gradient leaves the noise's span: then |ḡ|² cannot reach zero."""
    assert reciprocal_moment([1.0, 0.0], [0.0, 2.0]) < 0.25
    assert reciprocal_moment([1.0, 0.0], [5.0, 0.0]) == np.inf


@given(SPECTRA, st.floats(0, 20), st.floats(0.1, 10))
def test_a_stronger_signal_lowers_the_plugin(eigenvalues: list[float], size: float, more: float) -> None:
    """Monotone in the mean."""
    lam = np.array(eigenvalues)
    direction = np.zeros_like(lam)
    direction[0] = 1.0
    weak, strong = (plugin_mean(lam, 20, m * direction) for m in (size, size + more))
    assert strong <= weak * (1 + 1e-12)


@given(SPECTRA)
def test_effective_rank_lies_between_one_and_the_rank(eigenvalues: list[float]) -> None:
    """1 <= (trΣ)²/trΣ² <= number of directions."""
    assert 1 - 1e-12 <= effective_rank(eigenvalues) <= len(eigenvalues) * (1 + 1e-12)


def test_effective_rank_of_the_power_law() -> None:
    """r_eff = 13.8 for 1/j, d = 64, the number behind FACTS §3's detection limits."""
    assert round(effective_rank(power_law_spectrum(64)), 1) == 13.8


@pytest.mark.parametrize("m", [1, 3, 7])
def test_repeats_need_not_be_stored(m: int) -> None:
    """Every eigenvalue m times equals m degrees of freedom each."""
    lam = power_law_spectrum(5)
    assert repeated_reciprocal_moment(lam, m) == pytest.approx(
        reciprocal_moment(np.repeat(lam, m)), rel=1e-12
    )


def test_a_million_eigenvalues() -> None:
    """Stable at d = 10⁶ and N = 10⁹: the factor is 1 + O(1/r_eff)."""
    lam = np.repeat(power_law_spectrum(10), 10**5)
    factor = plugin_mean(lam, 10**9) / 1e9
    assert factor == pytest.approx(1 + 2 / effective_rank(lam), rel=1e-9)


TINY = 1e-320
FLOAT_RANGE = [
    ([5e-324] * 5, 1 / 3 * 5, "subnormal"),
    ([1e308] * 5, 1 / 3 * 5, "near overflow"),
    ([1.0, TINY, TINY], np.pi / 2 * 1e160, "π/2√ε"),
    ([1e300, 1e-300, 1e-300], np.pi / 2 * 1e300, "π/2√ε over 600 decades"),
    ([1.0, 1.0, 1e-300], np.log(4e300), "log(4/ε)"),
    ([1.0, 1e-300, 1e-300, 1e-300], 1e150, "1/√ε"),
]


@pytest.mark.parametrize(("eigenvalues", "factor", "why"), FLOAT_RANGE, ids=[c[2] for c in FLOAT_RANGE])
def test_any_spectrum_that_floats_can_hold(eigenvalues: list[float], factor: float, why: str) -> None:
    """E[plug-in]/N in closed form for two scales 1 ≫ ε, from subnormals to 1e308; nothing overflows."""
    assert plugin_mean(eigenvalues, 100) == pytest.approx(
        100 * factor, rel=1e-3 if TINY in eigenvalues else 1e-9
    )


def test_a_mean_of_any_size_is_felt() -> None:
    """One noisy direction and a mean m outside it: E[1/Q] → √(π/2)/m, down to m = 1e-200."""
    for m in (1e-8, 1e-100, 1e-200):
        assert reciprocal_moment([1.0, 0.0], [0.0, m]) * m == pytest.approx(np.sqrt(np.pi / 2), rel=1e-7)


@pytest.mark.parametrize("excess", [1e-3, 1e-7, 1e-10, 1e-14])
def test_just_above_two_degrees_of_freedom(excess: float) -> None:
    """1/(r-2) keeps its digits as r → 2⁺."""
    r = 2 + excess
    assert isotropic_reciprocal_moment(r) == pytest.approx(1 / (r - 2), rel=1e-12)


@pytest.mark.parametrize("r", [3, 8, 10**6])
def test_strong_signal_limit(r: int) -> None:
    """E[1/χ'²_r(λ)] = 1/λ · (1 - (r-4)/λ + O(1/λ²)): the sign of λ is right and large λ loses nothing."""
    for noncentrality in (1e12, 1e15, 1e300):
        expected = (1 - (r - 4) / noncentrality) / noncentrality
        assert isotropic_reciprocal_moment(r, noncentrality) == pytest.approx(expected, rel=1e-11)
