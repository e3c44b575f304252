"""With signal: what the plug-in and the unbiased number measure, and why the lemma's conclusion reverses.

Two questions share one formula. The plug-in over all N examples, tr(S)/|ḡ|², is the exact noise scale of the
*empirical* objective, the one that several epochs over the same data descend. The unbiased estimator
targets the *population*, which is what one pass over fresh data sees. They are linked by

    1/B_plugin = 1/B_simple + 1/n

so without signal (1/B_simple = 0) the plug-in reads n: that is Lemma 4.1, the zero-signal end of this law.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.domain import count, finite, like, non_negative, positive, spectrum
from theory.spectra import isotropic_reciprocal_moment


def plugin_from_population(b_simple: float, n: int) -> float:
    """The plug-in's target, trΣ/E|ḡ|² = 1/(1/B_simple + 1/n); saturates at n.

    Exact: E[q] = |G|² + trΣ/n for q = |ḡ|², whatever the distribution. It is *not* the mean of the ratio;
    see `plugin_ratio_mean`.

    Args:
        b_simple: population noise scale, > 0; `inf` for no signal.
        n: examples averaged in ḡ, >= 2.

    Returns:
        The plug-in number, in examples.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    b, n = _noise_scale(b_simple), count("n", n, 2)
    return float(n) if b == np.inf else b * (n / (b + n))


def population_from_plugin(b_plugin: float, n: int) -> float:
    """The link backwards: 1/(1/B_plugin - 1/n). Negative when B_plugin > n, infinite at n: legal results.

    Args:
        b_plugin: plug-in number of one step or data set, > 0.
        n: examples averaged in ḡ, >= 2.

    Returns:
        The implied population noise scale, in examples.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    b_plugin, n = positive("b_plugin", b_plugin), count("n", n, 2)
    return float("inf") if b_plugin == n else b_plugin * (n / (n - b_plugin))


def plugin_ratio_mean(r: float, n: int, b_simple: float) -> float:
    """Mean of the ratio trΣ/|ḡ|² itself, for isotropic Gaussian noise of rank r around a true gradient.

    |ḡ|² = (trΣ/(rn)) χ'²_r(λ) with λ = rn/B_simple, so the mean is rn·E[1/χ'²_r(rn/B_simple)]. Zero signal
    gives rN/(r-2) back. Here the covariance does not depend on the gradient, as for fixed noise; the
    regression of `signal_b_simple` differs at finite n.

    Args:
        r: rank, > 0.
        n: examples averaged in ḡ, >= 2.
        b_simple: population noise scale, > 0; `inf` for no signal.

    Returns:
        The mean, in examples; `inf` for r <= 2.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, b, n = positive("r", r), _noise_scale(b_simple), count("n", n, 2)
    noncentrality = r * n / b
    if noncentrality > 1e300:
        raise ValueError(f"b_simple: needs at least rn/1e300, got {b_simple!r}")
    return r * n * isotropic_reciprocal_moment(r, noncentrality)


def mean_of_ratios_factor(r: float, n: int, b_simple: float) -> float:
    """How far the mean of ratios lies above the link: between 1 (strong signal) and r/(r-2) (none).

    Args:
        r: rank, > 0.
        n: examples averaged in ḡ, >= 2.
        b_simple: population noise scale, > 0; `inf` for no signal.

    Returns:
        `plugin_ratio_mean / plugin_from_population`, dimensionless.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    return plugin_ratio_mean(r, n, b_simple) / plugin_from_population(b_simple, n)


def _noise_scale(b_simple: float) -> float:
    """A population noise scale, > 0 or infinite.

    Raises:
        ValueError: if it is neither.
    """
    infinite = isinstance(b_simple, float | np.floating) and b_simple == np.inf
    return float("inf") if infinite else positive("b_simple", b_simple)


@dataclass(frozen=True)
class GradientMoments:
    """Population moments of a per-example gradient.

    Attributes:
        trace_sigma: trΣ.
        grad_sq_norm: |G|².
        trace_h_sigma: tr(HΣ).
        g_h_g: GᵀHG.

    Raises:
        ValueError: if one is not a finite number, or a trace or square is negative.
    """

    trace_sigma: float
    grad_sq_norm: float
    trace_h_sigma: float
    g_h_g: float

    def __post_init__(self) -> None:
        for name in ("trace_sigma", "grad_sq_norm"):
            non_negative(name, getattr(self, name))
        for name in ("trace_h_sigma", "g_h_g"):
            finite(name, getattr(self, name))

    @property
    def b_simple(self) -> float:
        """trΣ/|G|², in examples; `inf` at zero gradient."""
        return float("inf") if self.grad_sq_norm == 0 else self.trace_sigma / self.grad_sq_norm

    @property
    def b_noise(self) -> float:
        """tr(HΣ)/GᵀHG, in examples; `inf` at zero gradient."""
        return float("inf") if self.g_h_g == 0 else self.trace_h_sigma / self.g_h_g


def regression_moments(input_spectrum: ArrayLike, error: ArrayLike, noise_variance: float) -> GradientMoments:
    """Moments of the gradient of ½(wᵀx - y)², x ~ N(0, diag h), y = w*ᵀx + noise, at w = w* - e.

    g = -(eᵀx + ε)x. By Isserlis' theorem, with G = -He and ρ = eᵀHe + s²:

        E[g gᵀ] = ρH + 2 He eᵀH,     Σ = ρH + GGᵀ,     trΣ = ρ trH + |G|²,     tr(HΣ) = ρ trH² + GᵀHG

    Args:
        input_spectrum: [d], h, eigenvalues of the input covariance (the Hessian).
        error: [d], e, distance from the optimum, in the eigenbasis.
        noise_variance: s² of the label noise, >= 0.

    Returns:
        The four moments.

    Raises:
        ValueError: if the lengths differ or an argument is outside its domain.
    """
    h = spectrum("input_spectrum", input_spectrum)
    e = like("error", error, "input_spectrum", h)
    noise = non_negative("noise_variance", noise_variance)
    with np.errstate(over="ignore"):
        rho, g = float(np.sum(h * e * e)) + noise, h * e
        sq, ghg = float(np.sum(g * g)), float(np.sum(h * g * g))
        return GradientMoments(rho * float(h.sum()) + sq, sq, rho * float(np.sum(h * h)) + ghg, ghg)


def signal_b_simple(r: float, snr: float) -> float:
    """B_simple = r(1 + 1/SNR) + 1 for y = w·x + noise, x ~ N(0, I_r), at w₀ = 0, SNR = |w|²/s².

    Linear in the rank and independent of N: with signal the lemma's conclusion reverses.

    Args:
        r: rank, > 0.
        snr: signal to noise ratio |w|²/s², >= 0; zero is the lemma's case and gives `inf`.

    Returns:
        The population noise scale, in examples.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, snr = positive("r", r), non_negative("snr", snr)
    return float("inf") if snr == 0 else r * (1 + 1 / snr) + 1
