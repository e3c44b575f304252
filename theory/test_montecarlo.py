"""The lemma by simulation: of its data, of its law, with controls to be caught, at one false-alarm rate."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from theory import lemma
from theory import montecarlo as mc
from theory.laws import (
    LemmaLaw,
    lemma_mean,
    lemma_mean_biased,
    lemma_variance,
    plugin_mean,
    power_law_spectrum,
)
from theory.verdict import COMPARISONS, FAMILY_FALSE_ALARM, Estimate, alarm_level, z_bound


@pytest.mark.parametrize(("r", "n", "d"), [(8, 20, 12), (16, 10, None), (128, 100, None), (10, 2, 10)])
def test_lemma_from_its_own_data(r: int, n: int, d: int | None, agree, caught) -> None:
    """x, y, U → gradients → tr(S)/|ḡ|²: mean rN/(r-2); r for r-2 and the expected |ḡ|² are caught."""
    draws = {128: 6_000}.get(r, 100_000)
    estimate = mc.simulate(mc.lemma_data(r, n, d), draws, 81, r * n)
    agree(
        f"lemma from data, r = {r}, N = {n}, U {'left out' if d is None else f'in R^{d}'}",
        estimate,
        lemma_mean(r, n),
    )
    if r < 100:
        caught(f"r instead of r-2 (mean N), r = {r}, N = {n}", estimate, float(n))


@pytest.mark.parametrize(("r", "n"), [(8, 20), (16, 10), (10, 2)])
def test_bessels_factor_is_visible(r: int, n: int, agree, caught) -> None:
    """S dividing by N follows rN/(r-2)·(N-1)/N, and is caught as the lemma's quantity."""
    estimate = mc.simulate(mc.lemma_data(r, n, None, "N"), 100_000, 82, r * n)
    agree(f"biased S from data, r = {r}, N = {n}", estimate, lemma_mean_biased(r, n))
    caught(f"Bessel's factor dropped, r = {r}, N = {n}", estimate, lemma_mean(r, n))


def test_population_norm_is_caught(agree, caught) -> None:
    """tr(S) over the expected |ḡ|² has mean N: the lemma lives on the fluctuation of |ḡ|²."""
    estimate = mc.simulate(mc.population_norm_control(16, 100), 100_000, 83)
    agree("tr(S)/E|ḡ|², r = 16, N = 100", estimate, 100.0)
    caught("population value of |ḡ|², r = 16, N = 100", estimate, lemma_mean(16, 100))


@pytest.mark.parametrize(("r", "n"), [(8, 20), (128, 100)])
def test_golden_simulations(r: int, n: int, agree) -> None:
    """FACTS §2: (8,20) 26.63 ± 0.09 and (128,100) 101.635 ± 0.17 are draws of the same law."""
    golden = {8: Estimate(26.63, 0.09, 0), 128: Estimate(101.635, 0.17, 0)}[r]
    assert golden.agrees(lemma_mean(r, n))
    agree(f"lemma law, r = {r}, N = {n}", mc.simulate(mc.lemma_law(r, n), 400_000, 84, 2), lemma_mean(r, n))


@pytest.mark.parametrize(("r", "n"), [(1, 5), (2, 3), (3, 10), (8, 20), (32, 4)])
def test_data_follow_the_whole_law(r: int, n: int, same_law) -> None:
    """Kolmogorov-Smirnov of tr(S)/|ḡ|² from data against N·F(r(N-1), r), also where the mean is infinite."""
    same_law(
        f"data against N·F, r = {r}, N = {n}",
        mc.collect(mc.lemma_data(r, n), 40_000, 85, r * n),
        LemmaLaw(r, n).cdf,
    )


WRONG_LAWS = {
    "N-1 for N": (20, LemmaLaw(8, 19).cdf),
    "r+1 for r": (20, LemmaLaw(9, 20).cdf),
    "constant numerator": (5, lambda x: stats.chi2.sf(8 * 5 / x, 8)),
}


@pytest.mark.parametrize("wrong", WRONG_LAWS)
def test_ks_test_catches_a_wrong_law(wrong: str) -> None:
    """Controls: at 40,000 draws the KS bound rejects neighbours of the law."""
    n, cdf = WRONG_LAWS[wrong]
    sample = mc.collect(mc.lemma_data(8, n), 40_000, 86, 8 * n)
    assert stats.kstest(sample, cdf).statistic > stats.kstwo.isf(alarm_level(), sample.size)


@pytest.mark.parametrize("r", [1, 2])
def test_divergence_is_visible_and_the_median_is_right(r: int) -> None:
    """R <= 2: the running mean keeps growing with the sample, the median sits where the law says."""
    law = LemmaLaw(r, 10)
    sample = mc.collect(mc.lemma_data(r, 10), 200_000, 87, 10 * r)
    means = [float(sample[:k].mean()) for k in (200, 200_000)]
    assert means[1] > 1.5 * means[0] and law.mean == np.inf
    se = 0.5 / np.sqrt(sample.size) / float(law.pdf(law.median))
    assert abs(float(np.median(sample)) - law.median) < z_bound() * se


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(9, 60), st.integers(2, 50), st.integers(0, 2**31))
def test_symbolic_law_and_simulation_agree_anywhere(agree, r: int, n: int, seed: int) -> None:
    """Random (r, N): symbolic rN/(r-2) = law = simulation within the bound; 25 comparisons."""
    formula = lemma.steps()[9].formula
    exact = float(formula.subs({lemma.r: r, lemma.N: n}))
    assert exact == pytest.approx(lemma_mean(r, n), rel=1e-14)
    agree(f"hypothesis: law at r = {r}, N = {n}", mc.simulate(mc.lemma_law(r, n), 30_000, seed, 2), exact)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.floats(0.2, 5), min_size=10, max_size=14),
    st.floats(0, 2),
    st.integers(2, 40),
    st.integers(0, 2**31),
)
def test_integral_and_simulation_agree_for_any_spectrum_and_mean(
    agree, eigenvalues: list[float], signal: float, n: int, seed: int
) -> None:
    """Random spectra and means: the integral = simulation within the bound; 25 comparisons."""
    lam = np.array(eigenvalues)
    mean = np.full(lam.size, signal / np.sqrt(lam.size))
    estimate = mc.simulate(mc.spectrum_plugin(lam, n, mean), 20_000, seed, 2 * lam.size)
    agree(f"hypothesis: spectrum and mean, d = {lam.size}, N = {n}", estimate, plugin_mean(lam, n, mean))


def test_variance_of_the_law_by_simulation(agree) -> None:
    """N²·2r²(rN-2)/(r(N-1)(r-2)²(r-4)) at r = 20, where its own standard error exists."""
    mean = lemma_mean(20, 12)
    law = mc.lemma_law(20, 12)
    estimate = mc.simulate(lambda rng, size: (law(rng, size) - mean) ** 2, 400_000, 88, 2)
    agree("variance of the law, r = 20, N = 12", estimate, lemma_variance(20, 12))


def test_power_law_golden_by_simulation(agree, caught) -> None:
    """1/j, d = 64, N = 100: 112.784 from draws; the r_eff shortcut (116.9) is caught."""
    lam = power_law_spectrum(64)
    estimate = mc.simulate(mc.spectrum_plugin(lam, 100), 200_000, 89, 128)
    agree("1/j spectrum, d = 64, N = 100", estimate, 112.784)
    caught("r_eff/(r_eff-2) shortcut on 1/j", estimate, 116.933)


def test_rotation_of_the_data_changes_nothing() -> None:
    """The estimate does not see U: same x, same numbers, any orthonormal embedding."""
    rng = np.random.default_rng(90)
    g = rng.standard_normal((50, 9, 4))
    u = np.linalg.qr(rng.standard_normal((11, 4)))[0]
    for plain, turned in zip(mc.step_estimates(g), mc.step_estimates(g @ u.T), strict=True):
        np.testing.assert_allclose(plain, turned, rtol=1e-10, atol=1e-12)


@given(st.floats(1e-6, 1e6))
def test_scale_of_the_loss_cancels(c: float) -> None:
    """Loss × c multiplies |G|² and trΣ by c² and leaves the ratio alone."""
    g = np.random.default_rng(91).standard_normal((20, 6, 5)) + 0.5
    (t1, q1), (tc, qc) = mc.step_estimates(g), mc.step_estimates(c * g)
    np.testing.assert_allclose(tc, c * c * t1, rtol=1e-9)
    np.testing.assert_allclose(tc / qc, t1 / q1, rtol=1e-7)


def test_identical_examples_have_no_noise() -> None:
    """trΣ = 0 and |G|² is the common square."""
    trace, grad = mc.step_estimates(np.ones((1, 7, 3)))
    assert trace == pytest.approx(0, abs=1e-14) and grad == pytest.approx(3)


def test_chunks_are_bounded_merged_and_reproducible() -> None:
    """Streaming mean and standard error equal the whole array's; the same seed gives the same draws."""
    law = mc.lemma_law(12, 9)
    sizes = [len(c) for c in mc.chunks(law, 5_000_000, 92, 2)]
    assert max(sizes) * 2 <= mc.CHUNK_NUMBERS and sum(sizes) == 5_000_000
    whole = mc.collect(law, 3_000_000, 92, 2)
    merged = mc.simulate(law, 3_000_000, 92, 2)
    assert merged.value == pytest.approx(whole.mean(), rel=1e-12)
    assert merged.se == pytest.approx(whole.std(ddof=1) / np.sqrt(whole.size), rel=1e-10)
    assert mc.simulate(law, 3_000_000, 92, 2) == merged and mc.simulate(law, 3_000_000, 93, 2) != merged


def test_ten_million_draws_of_the_rank_16_law(agree, caught) -> None:
    """10⁷ draws in seconds on one core (no clock here): the smallest bias caught is below 0.1 %."""
    estimate = mc.simulate(mc.lemma_law(16, 100), 10_000_000, 94, 2)
    agree("lemma law, r = 16, N = 100, 10⁷ draws", estimate, lemma_mean(16, 100))
    caught("0.1 % too large, 10⁷ draws", estimate, 1.001 * lemma_mean(16, 100))
    assert estimate.smallest_bias() < 1e-3 * lemma_mean(16, 100)


@pytest.mark.slow
def test_ten_million_data_sets_of_rank_16(agree) -> None:
    """The data model itself, x, y and all: 10⁷ data sets of 10 examples."""
    agree(
        "lemma from data, r = 16, N = 10, 10⁷",
        mc.simulate(mc.lemma_data(16, 10), 10_000_000, 95, 160),
        160 / 14,
    )


def test_family_wise_false_alarm_rate() -> None:
    """Bonferroni: all comparisons together cost at most the stated rate; under the null z is N(0, 1)."""
    assert alarm_level() * COMPARISONS == pytest.approx(FAMILY_FALSE_ALARM)
    assert 2 * stats.norm.sf(z_bound()) == pytest.approx(alarm_level())
    z = [mc.simulate(mc.lemma_law(40, 10), 2000, 1000 + s, 2).z(lemma_mean(40, 10)) for s in range(1500)]
    assert stats.kstest(z, "norm").statistic < stats.kstwo.isf(alarm_level(), 1500)


def test_smallest_bias_is_caught_as_often_as_stated() -> None:
    """A bias of exactly `smallest_bias` is rejected in 95 % of repeats."""
    hits = []
    for seed in range(400):
        e = mc.simulate(mc.lemma_law(40, 10), 2000, 5000 + seed, 2)
        hits.append(not e.agrees(lemma_mean(40, 10) - e.smallest_bias()))
    assert 0.90 < np.mean(hits) < 0.99
