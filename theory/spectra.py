"""E[trΣ/|ḡ|²] for any spectrum and any mean: one integral that contains every special case.

For Q >= 0, 1/Q = ∫₀^∞ e^(-tQ) dt. With Q = |ḡ|² = Σⱼ (μⱼ + √(λⱼ/N) zⱼ)² the expectation under the integral
is known in closed form, and the integral is one-dimensional whatever the dimension. Eigenvalues, means and t
enter through their logarithms, so that a spectrum may span the whole range of a float, subnormals included.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from theory.domain import Floats, count, finite, like, non_negative, positive, spectrum

_LOG_STEP = 0.05
_LOG_FROM = -42.0
_LOG_NEGLIGIBLE = -41.5
_CHUNK = 1 << 20


def power_law_spectrum(d: int, exponent: float = 1.0) -> Floats:
    """λⱼ = j^(-exponent) for j = 1..d.

    Args:
        d: dimension, >= 1.
        exponent: finite; 0 is the isotropic case.

    Returns:
        [d], largest first for a positive exponent.

    Raises:
        ValueError: if an argument is outside its domain, or d^(-exponent) is beyond the range of a float.
    """
    j, power = np.arange(1, count("d", d) + 1, dtype=float), finite("exponent", exponent)
    if abs(power) * np.log(j[-1]) > 700:
        raise ValueError(f"exponent: needs |exponent| log d <= 700, got {exponent!r} with d = {d}")
    return j**-power


def effective_rank(eigenvalues: ArrayLike) -> float:
    """r_eff = (trΣ)²/tr(Σ²), between 1 and the number of non-zero eigenvalues.

    Args:
        eigenvalues: [d], >= 0, not all zero.

    Returns:
        The effective rank (dimensionless).

    Raises:
        ValueError: if an argument is outside its domain.
    """
    lam = spectrum("eigenvalues", eigenvalues)
    p = np.exp(_log(lam) - np.log(lam.max()))
    return float(p.sum() ** 2 / np.sum(p * p))


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
        ValueError: if an argument is outside its domain, the mean's length is not the spectrum's, or the
            moment exists and is beyond the range of a float.
    """
    lam = spectrum("eigenvalues", eigenvalues)
    return _exp("eigenvalues", _log_reciprocal_moment(_log(lam), np.ones_like(lam), _log_square(lam, mean)))


def isotropic_reciprocal_moment(r: float, noncentrality: float = 0.0) -> float:
    """E[1/χ'²_r(λ)] = ₁F₁(1; r/2; -λ/2)/(r-2), by the integral of `reciprocal_moment`.

    r = 8, λ = 5 gives 0.0987466. `inf` for r <= 2: the density of χ'²_r at zero is then bounded away from 0.

    Args:
        r: degrees of freedom, > 0.
        noncentrality: λ = |μ|² in units of the variance, >= 0.

    Returns:
        The moment (dimensionless).

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, lam = positive("r", r), non_negative("noncentrality", noncentrality)
    log_moment = _log_reciprocal_moment(np.zeros(1), np.full(1, r), _log(np.full(1, lam)))
    return _exp("r", log_moment)


def isotropic_reciprocal_moment_hyp(r: float, noncentrality: float = 0.0) -> float:
    """The same moment by the hypergeometric function; a second route for `isotropic_reciprocal_moment`.

    Args:
        r: degrees of freedom, > 0.
        noncentrality: λ >= 0.

    Returns:
        ₁F₁(1; r/2; -λ/2)/(r-2), `inf` for r <= 2.

    Raises:
        ValueError: if an argument is outside its domain, or scipy's series gives out (λ beyond 1e300 or so).
    """
    r, lam = positive("r", r), non_negative("noncentrality", noncentrality)
    value = float("inf") if r <= 2 else float(special.hyp1f1(1.0, r / 2, -lam / 2) / (r - 2))
    if np.isnan(value):
        raise ValueError(f"noncentrality: needs a value that scipy's 1F1 can take, got {noncentrality!r}")
    return value


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

    Raises:
        ValueError: if an argument is outside its domain.
    """
    lam, n = spectrum("eigenvalues", eigenvalues), count("n", n, 2)
    log_moment = _log_reciprocal_moment(_log(lam) - np.log(n), np.ones_like(lam), _log_square(lam, mean))
    log_trace = float(special.logsumexp(_log(lam)))
    return _exp("mean", log_trace + log_moment)


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

    Raises:
        ValueError: if an argument is outside its domain.
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

    Raises:
        ValueError: if an argument is outside its domain.
    """
    lam = spectrum("eigenvalues", eigenvalues)
    m = positive("multiplicity", multiplicity)
    return _exp(
        "eigenvalues", _log_reciprocal_moment(_log(lam), np.full_like(lam, m), _log_square(lam, None))
    )


def _log(values: Floats) -> Floats:
    """Logarithm with log 0 = -inf, silently."""
    with np.errstate(divide="ignore"):
        return np.log(values)


def _log_square(lam: Floats, mean: ArrayLike | None) -> Floats:
    """Log μ² for each eigenvalue; -inf without a mean."""
    mu = np.zeros_like(lam) if mean is None else like("mean", mean, "eigenvalues", lam)
    return 2 * _log(np.abs(mu))


def _exp(name: str, log_value: float) -> float:
    """Back from the logarithm; +inf stays what it is, a finite value beyond a float's range does not.

    Raises:
        ValueError: if the value is finite and too large, or too small to be told from zero.
    """
    if np.isfinite(log_value) and abs(log_value) > 709.7:
        raise ValueError(f"{name}: needs a result within the range of a float, got exp({log_value:.6g})")
    return float(np.exp(log_value))


def _log_reciprocal_moment(log_lam: Floats, dof: Floats, log_sq_mean: Floats) -> float:
    """Log E[1/Q] for Q = Σⱼ λⱼ χ'²(dofⱼ), log_sq_mean the squared mean inside each eigenvalue's space."""
    noisy = np.isfinite(log_lam)
    half_dof = 0.5 * float(dof[noisy].sum())
    fixed = bool(np.any(np.isfinite(log_sq_mean[~noisy])))
    if half_dof <= 1 and not fixed:
        return float("inf")
    log_scale = float(special.logsumexp(np.concatenate([np.log(dof) + log_lam, log_sq_mean])))
    log_lam, dof, log_sq_mean = _merge_equal(log_lam - log_scale, dof, log_sq_mean - log_scale)
    power_from = 40.0 - float(log_lam[np.isfinite(log_lam)].min())
    logs, v, block = np.empty(0), _LOG_FROM, 64
    while True:
        nodes: Floats = v + _LOG_STEP * np.arange(block, dtype=np.float64)
        logs = np.concatenate([logs, nodes + _log_laplace(nodes, log_lam, dof, log_sq_mean)])
        v = float(nodes[-1]) + _LOG_STEP
        if v > 2 and logs[-1] < logs.max() + _LOG_NEGLIGIBLE:
            return float(special.logsumexp(logs)) + np.log(_LOG_STEP) - log_scale
        if not fixed and v > power_from:  # from here on a pure power of t: sum the geometric series
            tail = logs[-1] - np.log(np.expm1((half_dof - 1) * _LOG_STEP))
            return float(np.logaddexp(special.logsumexp(logs), tail)) + np.log(_LOG_STEP) - log_scale


def _merge_equal(log_lam: Floats, dof: Floats, log_sq_mean: Floats) -> tuple[Floats, Floats, Floats]:
    """Equal eigenvalues become one with summed degrees of freedom."""
    unique, inverse = np.unique(log_lam, return_inverse=True)
    merged, means = np.zeros(unique.size), np.full(unique.size, -np.inf)
    np.add.at(merged, inverse, dof)
    np.logaddexp.at(means, inverse, log_sq_mean)
    return unique, merged, means


def _log_laplace(log_t: Floats, log_lam: Floats, dof: Floats, log_sq_mean: Floats) -> Floats:
    """Log E[e^(-tQ)], chunked over eigenvalues so that memory stays bounded."""
    out = np.zeros_like(log_t)
    width = max(1, _CHUNK // log_t.size)
    for i in range(0, log_lam.size, width):
        part = slice(i, i + width)
        log_one_plus = np.logaddexp(0.0, np.log(2) + log_t[:, None] + log_lam[part])
        out -= 0.5 * log_one_plus @ dof[part]
        if np.any(np.isfinite(log_sq_mean[part])):
            out -= np.exp(np.minimum(log_t[:, None] + log_sq_mean[part] - log_one_plus, 700.0)).sum(1)
    return out
