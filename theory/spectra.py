"""E[trΣ/|ḡ|²] for any spectrum and any mean: one integral that contains every special case.

For Q >= 0, 1/Q = ∫₀^∞ e^(-tQ) dt. With Q = |ḡ|² = Σⱼ (μⱼ + √(λⱼ/N) zⱼ)² the expectation under the integral
is known in closed form, and the integral is one-dimensional whatever the dimension.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from theory.domain import Floats, count, finite, non_negative, positive, spectrum, vector

_LOG_STEP = 0.05
_LOG_FROM = -42.0
_NEGLIGIBLE = 1e-18
_CHUNK = 1 << 20


def power_law_spectrum(d: int, exponent: float = 1.0) -> Floats:
    """λⱼ = j^(-exponent) for j = 1..d.

    Args:
        d: dimension, >= 1.
        exponent: finite; 0 is the isotropic case.

    Returns:
        [d], largest first for a positive exponent.
    """
    return np.arange(1, count("d", d) + 1, dtype=float) ** -finite("exponent", exponent)


def effective_rank(eigenvalues: ArrayLike) -> float:
    """r_eff = (trΣ)²/tr(Σ²), between 1 and the number of non-zero eigenvalues.

    Args:
        eigenvalues: [d], >= 0, not all zero.

    Returns:
        The effective rank (dimensionless).
    """
    lam = spectrum("eigenvalues", eigenvalues)
    p = lam / lam.sum()
    return float(1.0 / np.sum(p * p))


def reciprocal_moment(eigenvalues: ArrayLike, mean: ArrayLike | None = None) -> float:
    """E[1/Q] of Q = Σⱼ (μⱼ + √λⱼ zⱼ)², z ~ N(0, I).

        E[1/Q] = ∫₀^∞ Πⱼ (1+2tλⱼ)^(-1/2) · exp(-Σⱼ t μⱼ²/(1+2tλⱼ)) dt

    Existence: near Q = 0 the density behaves like Q^(k/2-1), k the number of non-zero λ, unless some μⱼ is
    non-zero where λⱼ = 0 (then Q cannot reach 0). So the moment is finite iff k >= 3 or such a μⱼ exists;
    otherwise `inf` is returned.

    Method: with t = e^v/E[Q] the integrand decays exponentially at both ends and is analytic in a strip
    of half-width π/2, so the trapezoid rule converges geometrically; a step of 0.05 is at rounding level.

    Args:
        eigenvalues: [d], λⱼ >= 0, not all zero.
        mean: [d], μⱼ, the mean in the eigenbasis; zero if left out.

    Returns:
        E[1/Q], in 1/(units of λ).

    Raises:
        ValueError: if the mean's length is not the spectrum's.
    """
    lam = spectrum("eigenvalues", eigenvalues)
    mu = np.zeros_like(lam) if mean is None else vector("mean", mean)
    if mu.shape != lam.shape:
        raise ValueError(f"mean: needs {lam.size} components, one per eigenvalue, got {mu.size}")
    return _reciprocal_moment(lam, np.ones_like(lam), mu * mu)


def isotropic_reciprocal_moment(r: float, noncentrality: float = 0.0) -> float:
    """E[1/χ'²_r(λ)] = ₁F₁(1; r/2; -λ/2)/(r-2), by the integral of `reciprocal_moment`.

    r = 8, λ = 5 gives 0.0987466. `inf` for r <= 2: the density of χ'²_r at zero is then bounded away from 0.

    Args:
        r: degrees of freedom, > 0.
        noncentrality: λ = |μ|² in units of the variance, >= 0.

    Returns:
        The moment (dimensionless).
    """
    r, lam = positive("r", r), non_negative("noncentrality", noncentrality)
    return _reciprocal_moment(np.ones(1), np.full(1, r), np.full(1, lam))


def isotropic_reciprocal_moment_hyp(r: float, noncentrality: float = 0.0) -> float:
    """The same moment by the hypergeometric function; a second route for `isotropic_reciprocal_moment`.

    Args:
        r: degrees of freedom, > 0.
        noncentrality: λ >= 0.

    Returns:
        ₁F₁(1; r/2; -λ/2)/(r-2), `inf` for r <= 2.
    """
    r, lam = positive("r", r), non_negative("noncentrality", noncentrality)
    return float("inf") if r <= 2 else float(special.hyp1f1(1.0, r / 2, -lam / 2) / (r - 2))


def plugin_mean(eigenvalues: ArrayLike, n: int, mean: ArrayLike | None = None) -> float:
    """E[trΣ/|ḡ|²] over data sets of N Gaussian gradients with covariance Σ and mean G.

        zero mean:  N trΣ ∫₀^∞ Πⱼ (1+2tλⱼ)^(-1/2) dt

    1/j spectrum, d = 64, N = 100: 112.784. Because S and ḡ of a Gaussian sample are independent and
    E[tr S] = trΣ, this is also E[tr(S)/|ḡ|²]. Any isotropic spectrum of length r gives rN/(r-2) back.

    Args:
        eigenvalues: [d], eigenvalues of the per-example covariance Σ, units gradient².
        n: number of examples N, >= 2.
        mean: [d], true gradient in the eigenbasis; zero if left out.

    Returns:
        The mean, in examples; `inf` under the existence condition of `reciprocal_moment`.
    """
    lam, n = spectrum("eigenvalues", eigenvalues), count("n", n, 2)
    return float(lam.sum()) * reciprocal_moment(lam / n, mean)


def plugin_mean_shortcut(eigenvalues: ArrayLike, n: int) -> float:
    """N·r_eff/(r_eff-2), the tempting shortcut: never below `plugin_mean`.

    Proof: with weights pⱼ = λⱼ/trΣ and h(p) = log(1+2tp)/p = ∫₀^{2t} ds/(1+sp), convex in p, Jensen gives
    Σ log(1+2tpⱼ) = Σ pⱼ h(pⱼ) >= h(Σ pⱼ²) = h(1/r_eff) = r_eff log(1+2t/r_eff), so the true integrand is the
    smaller at every t. Equality iff all non-zero λ are equal. `inf` for r_eff <= 2, even where the true
    mean is finite.

    Args:
        eigenvalues: [d], >= 0, not all zero.
        n: number of examples N, >= 2.

    Returns:
        The shortcut's value, in examples.
    """
    r_eff, n = effective_rank(eigenvalues), count("n", n, 2)
    return float("inf") if r_eff <= 2 else n * r_eff / (r_eff - 2)


def repeated_reciprocal_moment(eigenvalues: ArrayLike, multiplicity: float) -> float:
    """E[1/Q] of Q = Σⱼ λⱼ χ²_m with every eigenvalue repeated m times, without storing the repeats.

    Args:
        eigenvalues: [d], >= 0, not all zero.
        multiplicity: m > 0, degrees of freedom of each term.

    Returns:
        E[1/Q]; `inf` if m times the number of non-zero λ is <= 2.
    """
    lam = spectrum("eigenvalues", eigenvalues)
    m = positive("multiplicity", multiplicity)
    return _reciprocal_moment(lam, np.full_like(lam, m), np.zeros_like(lam))


def _reciprocal_moment(lam: Floats, dof: Floats, sq_mean: Floats) -> float:
    """E[1/Q] for Q = Σⱼ λⱼ χ'²(dofⱼ), sq_mean the squared mean inside each eigenvalue's space."""
    fixed = float(sq_mean[lam == 0].sum())
    if float(dof[lam > 0].sum()) <= 2 and fixed == 0:
        return float("inf")
    scale = float((dof * lam).sum() + sq_mean.sum())
    lam, dof, sq_mean = _merge_equal(lam / scale, dof, sq_mean / scale)
    power_from = 40.0 - float(np.log(lam[lam > 0].min()))
    total, v, block = 0.0, _LOG_FROM, 64
    while True:
        nodes = v + _LOG_STEP * np.arange(block)
        values = np.exp(nodes + _log_laplace(np.exp(nodes), lam, dof, sq_mean))
        total += float(values.sum())
        v = float(nodes[-1]) + _LOG_STEP
        if v > 2 and values[-1] < _NEGLIGIBLE * total:
            return total * _LOG_STEP / scale
        if fixed == 0 and v > power_from:  # from here on a pure power of t: sum the geometric series
            ratio = np.exp(-(0.5 * float(dof[lam > 0].sum()) - 1) * _LOG_STEP)
            return (total + float(values[-1]) * ratio / (1 - ratio)) * _LOG_STEP / scale


def _merge_equal(lam: Floats, dof: Floats, sq_mean: Floats) -> tuple[Floats, Floats, Floats]:
    """Equal eigenvalues become one with summed degrees of freedom."""
    unique, inverse = np.unique(lam, return_inverse=True)
    size = unique.size
    merged = np.zeros((2, size))
    np.add.at(merged[0], inverse, dof)
    np.add.at(merged[1], inverse, sq_mean)
    return unique, merged[0], merged[1]


def _log_laplace(t: Floats, lam: Floats, dof: Floats, sq_mean: Floats) -> Floats:
    """Log E[e^(-tQ)], chunked over eigenvalues so that memory stays bounded."""
    out = np.zeros_like(t)
    width = max(1, _CHUNK // t.size)
    for i in range(0, lam.size, width):
        part = slice(i, i + width)
        x = 2 * t[:, None] * lam[part]
        out -= 0.5 * np.log1p(x) @ dof[part] + (t[:, None] / (1 + x)) @ sq_mean[part]
    return out
