"""Is there any signal? The F-test, why it fails on real spectra, and three tests that hold their size.

If the true gradient is zero, N|ḡ|²/tr S ~ F(r, r(N-1)): exact, but only for isotropic Gaussian gradients.
On a decaying spectrum the numerator is far more variable than F(r, ·) allows, so the test finds signal
where there is none. The size of any such test is an exact one-dimensional integral (Imhof), and the
repairs are: degrees of freedom r_eff in place of r, a studentised test over steps, random sign flips.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from theory.domain import Floats, count, finite_array, matrix, positive, probability, spectrum, vector
from theory.domain import seed as check_seed

_LOG_FROM, _LOG_TO = -34.0, 14.0
_COARSE_NODES, _REFINEMENTS, _PRECISION = 3000, 13, 1e-11
_CHUNK = 1 << 19
_TIE = 1e-9


def any_signal_p_value(ratio: ArrayLike, r: float, n: int) -> Floats:
    """P-value of the F-test: P(F(r, r(N-1)) > N|ḡ|²/tr S).

    Exact for the lemma's isotropic data, invalid for any other spectrum (`f_test_size`); with r = r_eff it is
    Box's approximation, good for every spectrum.

    Args:
        ratio: any shape, N|ḡ|²/tr S, >= 0.
        r: rank, or effective rank, > 0.
        n: number of examples N, >= 2.

    Returns:
        The p-values, in ratio's shape.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, n = positive("r", r), count("n", n, 2)
    seen = finite_array("ratio", ratio)
    if np.any(seen < 0):
        raise ValueError(f"ratio: needs numbers >= 0, got {float(seen.min())!r}")
    return special.fdtrc(r, r * (n - 1), seen)


def critical_ratio(r: float, n: int, level: float = 0.05) -> float:
    """The value N|ḡ|²/tr S has to exceed for the F-test to reject at `level`.

    Args:
        r: rank, or effective rank, > 0.
        n: number of examples N, >= 2.
        level: nominal size, in (0, 1).

    Returns:
        The upper quantile of F(r, r(N-1)).

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, n = positive("r", r), count("n", n, 2)
    return float(1 / special.fdtri(r * (n - 1), r, probability("level", level)))  # 1/F swaps the tails


def f_test_size(
    eigenvalues: ArrayLike, n: int, level: float = 0.05, assumed_rank: float | None = None
) -> float:
    """True rejection rate of the F-test on Gaussian gradients of any spectrum and no signal.

    P(Σ λⱼ (χ²₁ - c/(N-1) χ²_{N-1}) > 0) with c the critical ratio for the assumed rank. On 64 directions with
    λⱼ = 1/j the size at nominal 5 % is 16.8 %, with λⱼ = j⁻² it is 23.8 % (N = 100).

    Args:
        eigenvalues: [d], spectrum of the per-example covariance.
        n: number of examples N, >= 2.
        level: nominal size, in (0, 1).
        assumed_rank: degrees of freedom used for the critical value; the number of non-zero eigenvalues
            if left out (the lemma's test), `effective_rank(eigenvalues)` for Box's.

    Returns:
        The true size.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    lam, n = spectrum("eigenvalues", eigenvalues), count("n", n, 2)
    lam = lam[lam > 0]
    rank = float(lam.size) if assumed_rank is None else positive("assumed_rank", assumed_rank)
    c = critical_ratio(rank, n, level)
    weights = np.concatenate([lam, -c / (n - 1) * lam])
    dof = np.concatenate([np.ones(lam.size), np.full(lam.size, n - 1.0)])
    return quadratic_form_positive(weights, dof)


def quadratic_form_positive(weights: ArrayLike, dof: ArrayLike) -> float:
    """P(Σ wⱼ χ²_{kⱼ} > 0) for weights of both signs, by Imhof's integral.

        ½ + (1/π) ∫₀^∞ sin θ(u) / (u ρ(u)) du,   θ = ½ Σ kⱼ arctan(wⱼu),   ρ = Π (1 + wⱼ²u²)^(kⱼ/4)

    taken by the trapezoid rule in log u, halving the step until the result moves by less than 1e-11. Good to
    1e-9 once Σk >= 6 or so; the slow decay of ρ for fewer degrees of freedom is truncated at u = e¹⁴ in units
    of the largest weight, which costs up to 1e-6. Weights of one sign need no integral.

    Args:
        weights: [m], any sign, not all zero.
        dof: [m], > 0, degrees of freedom.

    Returns:
        The probability.

    Raises:
        ValueError: if the two lengths differ, a dof is not positive, all weights are zero, or the integral
            does not settle (very large degrees of freedom on very small weights).

    Source: J. P. Imhof 1961, Biometrika 48, eq. 3.2.
    """
    w, k = vector("weights", weights), vector("dof", dof)
    if k.shape != w.shape or np.any(k <= 0):
        raise ValueError(f"dof: needs {w.size} numbers > 0, one per weight, got {k.tolist()}")
    if not np.any(w != 0):
        raise ValueError("weights: needs at least one that is not 0, got all zero")
    w, k = w[w != 0] / np.max(np.abs(w)), k[w != 0]
    if np.all(w > 0) or np.all(w < 0):
        return float(w[0] > 0)
    step = (_LOG_TO - _LOG_FROM) / _COARSE_NODES
    nodes: Floats = _LOG_FROM + step * np.arange(_COARSE_NODES, dtype=np.float64)
    value = step * _imhof_sum(nodes, w, k)
    for _ in range(_REFINEMENTS):
        between: Floats = nodes + 0.5 * step
        step, before = step / 2, value
        value = 0.5 * value + step * _imhof_sum(between, w, k)
        nodes = np.concatenate([nodes, between])
        if abs(value - before) < _PRECISION:
            return float(np.clip(0.5 + value / np.pi, 0.0, 1.0))
    raise ValueError(f"dof: needs an integral that settles within {_REFINEMENTS} halvings, got {k.max():g}")


def _imhof_sum(log_u: Floats, w: Floats, k: Floats) -> float:
    """Sum of sin θ/ρ over the nodes, in chunks of bounded memory."""
    total, rows = 0.0, max(1, _CHUNK // w.size)
    for i in range(0, log_u.size, rows):
        x = np.exp(log_u[i : i + rows])[:, None] * w
        total += float(np.sum(np.sin(0.5 * np.arctan(x) @ k) * np.exp(-0.25 * np.log1p(x * x) @ k)))
    return total


def hall_statistic(t: ArrayLike, skewness: ArrayLike, k: int) -> Floats:
    """Hall's skewness-corrected t: H = √K (W + γW²/3 + γ²W³/27 + γ/(6K)), W = T/√K.

    Monotone in T, since dH/dT = (1 + γW/3)², so it can be inverted (`theory.intervals`). It removes the
    first-order effect of a skewed mean on the t-test.

    Args:
        t: any shape, ordinary t statistics of a mean of K values.
        skewness: same shape, sample skewness γ.
        k: number of values, >= 2.

    Returns:
        The corrected statistics, to be compared with t's own quantiles.

    Raises:
        ValueError: if an argument is outside its domain.

    Source: P. Hall 1992, J. R. Statist. Soc. B 54, 221.
    """
    k = count("k", k, 2)
    t, gamma = finite_array("t", t), finite_array("skewness", skewness)
    w = t / np.sqrt(k)
    return np.sqrt(k) * (w + gamma * w**2 / 3 + gamma**2 * w**3 / 27 + gamma / (6 * k))


def studentised_statistic(per_step: ArrayLike) -> tuple[Floats, Floats]:
    """T and H of the mean of |G|² over K steps: the studentised test for any signal.

    Needs no spectrum: the steps' own scatter is the yardstick. T is conservative upwards because each step's
    |G|² is skewed to the right; H corrects that.

    Args:
        per_step: [..., K], the unbiased |G|² of each step.

    Returns:
        T and H, each [...]; reject "no signal" when H exceeds the upper t_{K-1} quantile.

    Raises:
        ValueError: if there are fewer than two steps, a value is not finite, or all steps of a run are equal.
    """
    y = finite_array("per_step", per_step)
    if y.ndim == 0 or y.shape[-1] < 2:
        raise ValueError(f"per_step: needs at least 2 steps on the last axis, got shape {y.shape}")
    if np.any(np.ptp(y, axis=-1) == 0):
        raise ValueError("per_step: needs steps that differ, got the same value in all of them")
    k = y.shape[-1]
    y = y / np.max(np.abs(y), axis=-1, keepdims=True)
    centred = y - y.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).sum(-1) / (k - 1))
    gamma = ((centred / spread[..., None]) ** 3).mean(-1)
    t = np.sqrt(k) * y.mean(-1) / spread
    return t, hall_statistic(t, gamma, k)


def squared_covariance_trace(gram: ArrayLike) -> Floats:
    """Unbiased estimate of tr(Σ²) from the Gram matrix of N examples.

        (N-1)/(N(N-2)(N-3)) · [(N-1)(N-2) tr S² + (tr S)² - N/(N-1) Σ|gᵢ-ḡ|⁴]

    Exactly unbiased for every distribution with finite fourth moments, so one sample can be negative.
    tr(S²) itself is far too large: it contains (trΣ)²/N.

    Args:
        gram: [..., N, N], inner products gᵢ·gⱼ, N >= 4.

    Returns:
        [...], the estimates.

    Raises:
        ValueError: if there are fewer than four examples, or the matrix is not square and finite.

    Source: Himeno & Yamada 2014, J. Multivariate Anal. 130, 27.
    """
    k = matrix("gram", gram, square=True)
    n = k.shape[-1]
    if n < 4:
        raise ValueError(f"gram: needs a square matrix of at least 4 examples, got shape {k.shape}")
    centred = k - k.mean(-1, keepdims=True) - k.mean(-2, keepdims=True) + k.mean((-2, -1), keepdims=True)
    lengths = np.diagonal(centred, axis1=-2, axis2=-1)
    trace = lengths.sum(-1) / (n - 1)
    trace_s2 = (centred**2).sum((-2, -1)) / (n - 1) ** 2
    fourth = n / (n - 1) * (lengths**2).sum(-1)
    return (n - 1) / (n * (n - 2) * (n - 3)) * ((n - 1) * (n - 2) * trace_s2 + trace**2 - fourth)


def estimated_effective_rank(gram: ArrayLike) -> Floats:
    """r_eff from N examples: (tr S)² / `squared_covariance_trace`, kept within its possible range [1, N²].

    The limits are needed because the denominator of a small sample can be negative or exceed (tr S)²; they
    make the estimate usable as degrees of freedom and biased there.

    Args:
        gram: [..., N, N], inner products gᵢ·gⱼ, N >= 4.

    Returns:
        [...], the estimates.

    Raises:
        ValueError: if `squared_covariance_trace` refuses the matrix, or all examples are equal.
    """
    k = matrix("gram", gram, square=True)
    square, n = squared_covariance_trace(k), k.shape[-1]
    trace = (np.trace(k, axis1=-2, axis2=-1) - k.sum((-2, -1)) / n) / (n - 1)
    if np.any(trace <= 0):
        raise ValueError(f"gram: needs examples that differ, got tr S = {float(np.min(trace))!r}")
    return trace**2 / np.clip(square, trace**2 / n**2, trace**2)


def sign_flip_p_value(gram: ArrayLike, flips: int, seed: int) -> float:
    """P-value of |Σ gᵢ|² among |Σ εᵢgᵢ|² with random signs: exact for symmetric noise, any spectrum.

    Ties count against the signal, up to rounding: all signs equal give the same square, and with few examples
    they are drawn often.

    Args:
        gram: [N, N], inner products of the per-example gradients.
        flips: number of random sign vectors; the p-value is a multiple of 1/(flips+1).
        seed: seed of the signs.

    Returns:
        (1 + number of flips at least as large) / (flips + 1).

    Raises:
        ValueError: if `gram` is not one square finite matrix, or flips or seed is outside its domain.
    """
    k, flips = matrix("gram", gram, square=True), count("flips", flips)
    if k.ndim != 2 or k.size == 0:
        raise ValueError(f"gram: needs one square matrix, got shape {k.shape}")
    signs = np.random.default_rng(check_seed("seed", seed)).choice([-1.0, 1.0], size=(flips, k.shape[0]))
    flipped = np.einsum("fi,ij,fj->f", signs, k, signs, optimize=True)
    bar = k.sum() - _TIE * np.trace(k)
    return float((1 + np.sum(flipped >= bar)) / (flips + 1))
