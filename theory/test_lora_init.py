"""LoRA at initialisation: only factor B has a gradient, its null factor, and why rank may not matter."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from theory import montecarlo as mc
from theory.laws import (
    a_effective_rank,
    a_factor_mean,
    b_factor_null_mean,
    b_factor_null_mean_given,
    effective_rank,
    gaussian_a_mean,
    init_factor_a,
    lemma_mean,
    lora_null_factor,
    signal_b_simple,
    subspace_b_mean,
    subspace_b_quantile,
    subspace_b_ratio_of_means,
    subspace_snr,
)

KINDS = ("orthonormal", "gaussian", "kaiming_uniform")


def test_only_factor_b_has_a_gradient() -> None:
    """At B = 0: dL/dA = s·Bᵀ·dW = 0, and dL/dB = s·dW·Aᵀ, by finite differences of a layer."""
    rng = np.random.default_rng(31)
    a, b, x, target = rng.normal(size=(3, 5)), np.zeros((4, 3)), rng.normal(size=5), rng.normal(size=4)
    w, s, h = rng.normal(size=(4, 5)), 0.7, 1e-6

    def loss(a_: np.ndarray, b_: np.ndarray) -> float:
        return 0.5 * float(np.sum((w @ x + s * b_ @ (a_ @ x) - target) ** 2))

    def slope(which: str, i: int, j: int) -> float:
        step = np.zeros_like(a if which == "A" else b)
        step[i, j] = h
        up, down = ((a + step, b), (a - step, b)) if which == "A" else ((a, b + step), (a, b - step))
        return (loss(*up) - loss(*down)) / (2 * h)

    d_w = np.outer(w @ x - target, x)
    assert max(abs(slope("A", i, j)) for i in range(3) for j in range(5)) == 0
    numeric = np.array([[slope("B", i, j) for j in range(3)] for i in range(4)])
    np.testing.assert_allclose(numeric, s * d_w @ a.T, rtol=1e-5, atol=1e-8)


@given(st.integers(3, 500), st.integers(2, 10**6))
def test_one_output_is_the_lemma_exactly(r: int, n: int) -> None:
    """r·d_out/(r·d_out-2) at d_out = 1, for every N, through the label-conditional formula."""
    assert n * lora_null_factor(r, 1) == pytest.approx(lemma_mean(r, n), rel=1e-13)
    assert b_factor_null_mean(r, 1, n) == pytest.approx(lemma_mean(r, n), rel=1e-8)


@pytest.mark.parametrize("r", [4, 8, 32])
def test_more_outputs_hold_only_asymptotically(r: int) -> None:
    """Two outputs: the enumerated mean tends to 2r/(2r-2) like 1/N, and is not equal to it at N = 5."""
    gaps = [abs(b_factor_null_mean(r, 2, n) / n - lora_null_factor(r, 2)) for n in (5, 100, 1000)]
    assert gaps[0] > 1e-5 * lora_null_factor(r, 2)  # measured: 1e-2, 1e-3, 4e-5 for r = 4, 8, 32
    assert gaps[2] < gaps[1] and 5 < gaps[1] / gaps[2] < 20


def test_at_rank_two_the_finite_n_mean_is_infinite_whatever_d_out() -> None:
    """With probability 2^(1-N) the labels agree and only r directions are left: asymptotics hide it."""
    assert lora_null_factor(2, 2) == 2 and b_factor_null_mean(2, 2, 10) == np.inf


def mean_over_three_outputs(r: int, n: int) -> float:
    """Labels enumerated: the other two outputs agree with the first or not in four ways, k times each."""
    total = 0.0
    for k in itertools.product(range(n + 1), repeat=3):
        if sum(k) <= n:
            both, second, third = k
            ways = stats.multinomial.pmf([*k, n - sum(k)], n, [0.25] * 4)
            a, b = 2 * (both + second) - n, 2 * (both + third) - n
            c = 2 * (both + n - sum(k)) - n
            total += float(ways) * b_factor_null_mean_given(r, [[n, a, b], [a, n, c], [b, c, n]], n)
    return total


@pytest.mark.parametrize(("r", "d_out", "n"), [(6, 2, 6), (8, 3, 8)])
def test_null_mean_by_simulation_of_the_layer(r: int, d_out: int, n: int, agree, caught) -> None:
    """Real matrices, orthonormal A, against the exact finite-N mean: all labels enumerated."""
    estimate = mc.simulate(mc.lora_null("orthonormal", r, r + 4, d_out, n, scale=0.25), 20_000, 32, 400)
    if d_out == 2:
        exact = b_factor_null_mean(r, d_out, n)
    else:
        exact = mean_over_three_outputs(r, n)
    agree(f"factor B on noise, r = {r}, d_out = {d_out}, N = {n}", estimate, exact)
    caught(f"counting r instead of r·d_out, d_out = {d_out}", estimate, lemma_mean(r, n))


@pytest.mark.parametrize(("r", "d_in", "n"), [(8, 64, 20), (12, 16, 10), (3, 200, 7)])
def test_gaussian_a_closed_form_equals_the_wishart_average(r: int, d_in: int, n: int, agree) -> None:
    """N(rd-2)/((r-2)(d-2)) against exact spectrum integrals over drawn AAᵀ."""
    means = integrals_over_a("gaussian", r, d_in, n, 600)
    agree(f"Gaussian A by spectrum integrals, r = {r}, d_in = {d_in}", means, gaussian_a_mean(r, d_in, n))


def integrals_over_a(kind: str, r: int, d_in: int, n: int, draws: int) -> mc.Estimate:
    """Spectrum integral of drawn AAᵀ, averaged."""
    means = [a_factor_mean(init_factor_a(kind, r, d_in, seed), n) for seed in range(draws)]
    return mc.Estimate(float(np.mean(means)), float(np.std(means, ddof=1)) / np.sqrt(draws), draws)


def test_gaussian_a_by_simulation_of_the_layer(agree, caught) -> None:
    """The whole layer with Gaussian A; the orthonormal value is caught as wrong at d_in = 16."""
    estimate = mc.simulate(mc.lora_null("gaussian", 12, 16, 1, 10), 20_000, 34, 400)
    agree("factor B, Gaussian A, r = 12, d_in = 16", estimate, gaussian_a_mean(12, 16, 10))
    caught("orthonormal A's value in its place", estimate, lemma_mean(12, 10))


def test_kaiming_uniform_a_by_simulation_of_the_layer(agree) -> None:
    """Peft's default: the layer against the average of spectrum integrals over its own AAᵀ."""
    estimate = mc.simulate(mc.lora_null("kaiming_uniform", 12, 24, 1, 10), 15_000, 35, 400)
    route = integrals_over_a("kaiming_uniform", 12, 24, 10, 600)
    both = mc.Estimate(estimate.value, float(np.hypot(estimate.se, route.se)), estimate.n)
    agree("factor B, Kaiming-uniform A, r = 12, d_in = 24", both, route.value)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_layers_forget_the_initialisation(kind: str) -> None:
    """AAᵀ → I as d_in/r grows: all three kinds tend to rN/(r-2)."""
    factors = [a_factor_mean(init_factor_a(kind, 8, d, 36), 20) / lemma_mean(8, 20) for d in (16, 256, 4096)]
    assert abs(factors[2] - 1) < 0.003 and factors[0] >= factors[2] - 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_effective_rank_of_a_by_moments_and_by_draws(kind: str) -> None:
    """(E tr W)²/E tr W² with the entries' kurtosis, against drawn AAᵀ."""
    r, d = 8, 40
    spectra = [np.linalg.svd(init_factor_a(kind, r, d, s), compute_uv=False) ** 2 for s in range(2000)]
    drawn = np.mean([v.sum() for v in spectra]) ** 2 / np.mean([(v**2).sum() for v in spectra])
    assert a_effective_rank(kind, r, d) == pytest.approx(drawn, rel=0.01)
    if kind == "orthonormal":
        assert effective_rank(spectra[0]) == pytest.approx(r)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_of_a_does_not_matter(kind: str) -> None:
    """Gauge: c·A has the same noise scale."""
    a = init_factor_a(kind, 6, 20, 37)
    assert a_factor_mean(100 * a, 9) == pytest.approx(a_factor_mean(a, 9), rel=1e-12)


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0.05, 50))
def test_random_subspace_catches_signal_and_noise_alike(r: int, extra: int, snr: float) -> None:
    """B at the mean captured share equals d(1+1/SNR)+1 for every r: the rank cancels."""
    d = r + extra
    captured = r / d
    b = signal_b_simple(r, subspace_snr(captured, 1.0, 1 / snr)) if captured < 1 or snr < np.inf else np.inf
    assert b == pytest.approx(subspace_b_ratio_of_means(d, snr), rel=1e-9)


@pytest.mark.parametrize(("r", "d"), [(8, 64), (32, 64), (64, 64)])
def test_subspace_mean_by_simulation(r: int, d: int, agree) -> None:
    """E[B] = r(d-2)/(r-2)·(1+1/SNR)+1 over drawn subspaces."""
    snr = 0.5
    share = mc.captured_share(r, d)
    if r == d:
        assert subspace_b_mean(r, d, snr) == subspace_b_ratio_of_means(d, snr)
        return
    estimate = mc.simulate(lambda rng, m: r / share(rng, m) * (1 + 1 / snr) + 1, 100_000, 38, d)
    agree(f"B over random subspaces, r = {r}, d = {d}", estimate, subspace_b_mean(r, d, snr))


def test_captured_share_by_drawing_the_subspace_itself(same_law) -> None:
    """|Aw|²/|w|² with A from a QR decomposition follows the Beta law used for the quantiles."""
    rng, r, d, snr = np.random.default_rng(39), 5, 20, 1.0
    w = np.ones(d) / np.sqrt(d)
    b = np.array(
        [r / np.sum((init_factor_a("orthonormal", r, d, rng) @ w) ** 2) * 2 + 1 for _ in range(4000)]
    )
    grid = np.linspace(0.001, 0.999, 999)
    quantiles = [subspace_b_quantile(p, r, d, snr) for p in grid]
    same_law("B over QR subspaces, r = 5, d = 20", b, lambda v: np.interp(v, quantiles, grid, 0.0, 1.0))


def test_scatter_over_subspaces_shrinks_with_rank() -> None:
    """90 % ranges at d = 512 narrow from r = 4 to 256; the median stays within 21 % of the full model."""
    widths, full = [], subspace_b_ratio_of_means(512, 1.0)
    for r in (4, 16, 64, 256):
        low, mid, high = (subspace_b_quantile(p, r, 512, 1.0) for p in (0.05, 0.5, 0.95))
        widths.append(high / low)
        assert abs(mid / full - 1) < 0.21
    assert widths == sorted(widths, reverse=True) and widths[-1] < 1.3
    assert subspace_b_quantile(0.5, 512, 512, 1.0) == full


def test_whole_multi_output_layer_reads_the_full_models_noise_scale(agree) -> None:
    """Regression with d_out outputs at B = 0: factor B's unbiased sums, and the full weights' B_simple."""
    d, r, d_out, b, noise = 24, 8, 3, 6, 1.5
    rng = np.random.default_rng(40)
    w = rng.normal(size=(d_out, d)) / np.sqrt(d)
    sq = float(np.sum(w**2))

    def sample(gen: np.random.Generator, size: int) -> np.ndarray:
        rows = []
        for _ in range(size):
            a = init_factor_a("orthonormal", r, d, gen)
            x = gen.standard_normal((b, d))
            delta = -(x @ w.T + noise * gen.standard_normal((b, d_out)))
            g = np.einsum("no,nr->nor", delta, x @ a.T).reshape(1, b, -1)
            rows.append(np.concatenate(mc.step_estimates(g)))
        return np.array(rows)

    trace, grad = mc.simulate_columns(sample, 20_000, 41, 400)
    # E|δ|²|Ax|² = r(|W|² + d_out s²) + 2|AWᵀ|²; E|G|² = |AWᵀ|² = (r/d)|W|²
    exact_grad = r / d * sq
    agree("|G|² of factor B, 3 outputs", grad, exact_grad)
    agree("trΣ of factor B, 3 outputs", trace, r * (sq + d_out * noise**2) + 2 * exact_grad - exact_grad)
    full = (d * (sq + d_out * noise**2) + sq) / sq
    assert trace.value / grad.value == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize(("r", "n"), [(3, 2), (4, 5), (8, 20), (3, 41)])
def test_hypergeometric_mean_equals_the_sum_of_spectrum_integrals(r: int, n: int) -> None:
    """Two outputs: ₂F₁(½, 1; (r+1)/2; c²)/(2N(r-1)) against the integral for every c, binomially weighted."""
    weights = stats.binom.pmf(np.arange(n + 1), n, 0.5)
    integrals = [b_factor_null_mean_given(r, [[n, 2 * k - n], [2 * k - n, n]], n) for k in range(n + 1)]
    assert b_factor_null_mean(r, 2, n) == pytest.approx(float(weights @ integrals), rel=1e-12)


def test_null_mean_at_the_extremes() -> None:
    """Rank one and two examples are infinite, not nan; a billion examples are at the asymptote."""
    assert b_factor_null_mean(1, 1, 2) == b_factor_null_mean(1, 2, 2) == np.inf
    assert b_factor_null_mean_given(1, [[2.0]], 2) == np.inf
    assert b_factor_null_mean(3, 2, 10**9) / 1e9 == pytest.approx(lora_null_factor(3, 2), rel=1e-9)
    assert b_factor_null_mean(10**6, 2, 10**6) / 1e6 == pytest.approx(1, rel=1e-5)
