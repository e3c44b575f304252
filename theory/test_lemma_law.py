"""The exact law N·F(r(N-1), r): moments, density, quantiles, extremes."""

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from theory.laws import LemmaLaw, lemma_mean, lemma_mean_biased, lemma_variance

RANKS, COUNTS = st.floats(0.5, 1e3), st.integers(2, 10**5)


@pytest.mark.parametrize(("r", "n", "mean"), [(8, 20, 26.667), (128, 100, 101.587), (16, 100, 114.286)])
def test_golden_means(r: int, n: int, mean: float) -> None:
    """The numbers of FACTS §2 to the digits given."""
    assert round(lemma_mean(r, n), 3) == mean


@pytest.mark.parametrize(("r", "n"), [(3, 2), (3.5, 10), (8, 20), (128, 100), (1000, 7)])
def test_mean_is_the_integral_of_the_survival_function(r: float, n: int) -> None:
    """E[X] = ∫ P(X > x) dx, by quadrature of the incomplete beta function."""
    law = LemmaLaw(r, n)
    value = integrate.quad(
        lambda v: law.sf(np.exp(v)) * np.exp(v), -30, 120, limit=2000, points=[np.log(law.median)]
    )[0]
    assert value == pytest.approx(law.mean, rel=1e-6)


@pytest.mark.parametrize(("r", "n"), [(5, 2), (8, 20), (128, 100)])
def test_variance_is_the_second_moment_integral(r: float, n: int) -> None:
    """Var = ∫ 2x P(X > x) dx - mean²."""
    law = LemmaLaw(r, n)
    second = integrate.quad(lambda v: 2 * law.sf(np.exp(v)) * np.exp(2 * v), -30, 80, limit=2000)[0]
    assert second - law.mean**2 == pytest.approx(law.variance, rel=1e-5)


@given(st.floats(4.5, 500), st.integers(2, 5000))
def test_moments_equal_scipy(r: float, n: int) -> None:
    """Another implementation of the F moments agrees."""
    f = stats.f(r * (n - 1), r)
    assert n * f.mean() == pytest.approx(lemma_mean(r, n), rel=1e-12)
    assert n**2 * f.var() == pytest.approx(lemma_variance(r, n), rel=1e-9)


@given(RANKS, COUNTS, st.floats(0.001, 0.999))
def test_quantile_inverts_the_cdf(r: float, n: int, p: float) -> None:
    """F(F⁻¹(p)) = p, and sf = 1 - cdf."""
    law = LemmaLaw(r, n)
    x = law.quantile(p)
    assert law.cdf(x) == pytest.approx(p, rel=1e-8)
    assert law.sf(x) + law.cdf(x) == pytest.approx(1.0, rel=1e-12)


@given(st.floats(0.5, 300), st.integers(2, 1000), st.floats(0.02, 0.98))
def test_density_is_the_slope_of_the_cdf(r: float, n: int, p: float) -> None:
    """Pdf = d cdf/dx, by central differences."""
    law = LemmaLaw(r, n)
    x = law.quantile(p)
    h = 1e-4 * x
    assert law.pdf(x) == pytest.approx((law.cdf(x + h) - law.cdf(x - h)) / (2 * h), rel=1e-4)


@given(st.floats(2.1, 1e6), COUNTS)
def test_mean_is_linear_in_n_and_falls_with_r(r: float, n: int) -> None:
    """E grows in proportion to N, decreases in r and stays above N."""
    assert lemma_mean(r, 2 * n) == pytest.approx(2 * lemma_mean(r, n), rel=1e-14)
    assert lemma_mean(r, n) > lemma_mean(r * 1.1, n) > n
    assert lemma_mean_biased(r, n) == pytest.approx(lemma_mean(r, n) * (n - 1) / n, rel=1e-13)


@given(st.floats(0.5, 1e6), COUNTS, st.floats(0.01, 0.98))
def test_quantiles_increase(r: float, n: int, p: float) -> None:
    """A larger probability has a larger quantile."""
    assert LemmaLaw(r, n).quantile(p) < LemmaLaw(r, n).quantile(p + 0.01)


@pytest.mark.parametrize("r", [0.5, 1, 2])
def test_mean_is_infinite_at_or_below_rank_two_but_the_median_is_right(r: float) -> None:
    """Divergence is reported as such; half the mass still lies below the median."""
    law = LemmaLaw(r, 10)
    assert law.mean == np.inf and law.variance == np.inf and lemma_mean_biased(r, 10) == np.inf
    assert np.isfinite(law.median) and law.cdf(law.median) == pytest.approx(0.5)
    upto = [integrate.quad(law.sf, 0, top, limit=500)[0] for top in (1e3, 1e5, 1e7)]
    assert upto[1] - upto[0] > 1 and upto[2] - upto[1] > 0.9 * (upto[1] - upto[0])


@pytest.mark.parametrize("r", [2.5, 3, 4])
def test_variance_is_infinite_up_to_rank_four(r: float) -> None:
    """The mean exists but has no standard error."""
    assert np.isfinite(lemma_mean(r, 10)) and lemma_variance(r, 10) == np.inf


EXTREMES = [(3, 2), (3, 10**9), (10**6, 2), (10**6, 10**9), (16, 10**9), (1, 2), (2, 10**6), (33, 2), (40, 3)]


@pytest.mark.parametrize(("r", "n"), EXTREMES)
def test_density_is_stable_from_rank_one_to_a_million(r: int, n: int) -> None:
    """Log density against 50-digit arithmetic, in the bulk and in both tails."""
    law = LemmaLaw(r, n)
    with mpmath.workdps(50):
        a, b = mpmath.mpf(r) * (n - 1) / 2, mpmath.mpf(r) / 2
        beta = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(a + b)
        for p in (1e-6, 0.1, 0.5, 0.9, 1 - 1e-6):
            x = law.quantile(p)
            ratio = mpmath.mpf(x) / n
            exact = a * mpmath.log(a / b) + (a - 1) * mpmath.log(ratio) - beta - mpmath.log(n)
            exact -= (a + b) * mpmath.log1p(a * ratio / b)
            assert law.logpdf(x) == pytest.approx(float(exact), abs=1e-10, rel=1e-12)


@pytest.mark.parametrize(("r", "n"), [(1, 2), (3, 2), (3, 50), (40, 9), (4000, 11)])
def test_cdf_is_the_integral_of_the_density(r: int, n: int) -> None:
    """Two independent implementations (incomplete beta, Loader density) agree."""
    law = LemmaLaw(r, n)
    for p in (0.05, 0.5, 0.95):
        x, start = law.quantile(p), law.quantile(1e-9)
        area = integrate.quad(lambda v: law.pdf(np.exp(v)) * np.exp(v), np.log(start), np.log(x), limit=500)[
            0
        ]
        assert area + 1e-9 == pytest.approx(p, rel=1e-7)


def test_textbook_density_would_have_lost_every_digit() -> None:
    """Control: the textbook form, written out in floats, is off by more than 0.1 where Loader's is exact."""
    law = LemmaLaw(10**6, 10**9)
    x = law.quantile(0.1)
    a, b, z = law.dof[0] / 2, law.dof[1] / 2, x / law.n
    textbook = a * np.log(a / b) + (a - 1) * np.log(z) - (a + b) * np.log1p(a * z / b) - np.log(law.n)
    textbook -= special.gammaln(a) + special.gammaln(b) - special.gammaln(a + b)
    assert abs(textbook - law.logpdf(x)) > 0.1


def test_large_n_law_is_n_r_over_chi_square() -> None:
    """For N → ∞ the numerator is constant: the law tends to N·r/χ²_r."""
    law = LemmaLaw(5, 10**9)
    for p in (0.01, 0.5, 0.99):
        assert law.quantile(p) / law.n == pytest.approx(5 / stats.chi2.isf(p, 5), rel=1e-6)


def test_density_vanishes_outside_the_support() -> None:
    """No mass below zero."""
    law = LemmaLaw(5, 9)
    assert law.pdf(-1.0) == 0 and law.cdf(-1.0) == 0 and law.sf(-1.0) == 1


@pytest.mark.parametrize("x", [5e-324, 1e-310, 1e308, np.inf, -np.inf])
def test_density_neither_overflows_nor_warns_at_the_ends_of_the_line(x: float) -> None:
    """0 where the density is below any float; warnings are errors here."""
    assert LemmaLaw(8, 20).pdf(x) == 0 and LemmaLaw(10**6, 10**9).pdf(x) == 0


@pytest.mark.parametrize(("r", "n"), EXTREMES)
def test_quantiles_invert_the_cdf_at_the_extremes(r: int, n: int) -> None:
    """From r = 1 to 10⁶ and N = 2 to 10⁹, in the bulk and in both tails."""
    law = LemmaLaw(r, n)
    for p in (1e-12, 1e-3, 0.5):
        assert law.cdf(law.quantile(p)) == pytest.approx(p, rel=1e-10)
        assert law.sf(law.quantile(1 - p)) == pytest.approx(p, rel=1e-3 if p < 1e-9 else 1e-10)
