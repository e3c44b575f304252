"""Steps against examples, and the learning rate against the batch: four short laws.

The hyperbola is exact for a quadratic whose noise scale stays constant and whose learning rate is the best
one at each step; in real training it is a good description (McCandlish et al. 2018, appendix D).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from theory.domain import Floats, finite_array, like, matrix, positive, sorted_sizes, vector


@dataclass(frozen=True)
class TradeOff:
    """(S/S_min - 1)(E/E_min - 1) = 1.

    Attributes:
        s_min: steps needed at infinite batch, > 0.
        e_min: examples needed at vanishing batch, > 0.

    Raises:
        ValueError: if one of them is not a finite number > 0.

    Source: arXiv:1812.06162, eq. 2.11.
    """

    s_min: float
    e_min: float

    def __post_init__(self) -> None:
        positive("s_min", self.s_min)
        positive("e_min", self.e_min)

    @property
    def b_crit(self) -> float:
        """E_min/S_min, in examples: there both steps and examples are twice their minimum."""
        return self.e_min / self.s_min

    def steps(self, batch: float) -> float:
        """S(B) = S_min (1 + B_crit/B), steps to the target at batch B > 0."""
        return self.s_min * (1 + self.b_crit / positive("batch", batch))

    def examples(self, batch: float) -> float:
        """E(B) = E_min (1 + B/B_crit), examples to the target at batch B > 0."""
        return self.e_min * (1 + positive("batch", batch) / self.b_crit)

    def waste(self, batch: float) -> float:
        """E(B)/E_min - 1 = B/B_crit, the share of extra examples: 1 at B_crit, 0.2 at 0.2 B_crit."""
        return positive("batch", batch) / self.b_crit

    def one_epoch_batch_max(self, n: float) -> float:
        """Largest batch that reaches the target in one epoch: (N - E_min)/S_min = B_crit (N/E_min - 1).

        Put E = N into the law. Zero or negative means that N examples do not suffice at any batch.

        Args:
            n: data-set size N, > 0.

        Returns:
            B_max(N), in examples.

        Raises:
            ValueError: if an argument is outside its domain.
        """
        return (positive("n", n) - self.e_min) / self.s_min

    def one_epoch_exponent(self, n: float) -> float:
        """D log B_max / d log N = N/(N - E_min): above 1 everywhere, 1 for N ≫ E_min, infinite at E_min.

        Args:
            n: data-set size N, > 0.

        Returns:
            The local exponent; nan for N < E_min, where there is no batch.

        Raises:
            ValueError: if an argument is outside its domain.
        """
        n = positive("n", n)
        return float("inf") if n == self.e_min else (n / (n - self.e_min) if n > self.e_min else float("nan"))


def fit_tradeoff(batches: ArrayLike, steps: ArrayLike) -> TradeOff:
    """Least-squares fit of S(B) = S_min + E_min/B with relative errors.

    Minimises Σ (S_min/Sₖ + E_min/(BₖSₖ) - 1)², linear in the two unknowns.

    Args:
        batches: [k], increasing, k >= 2.
        steps: [k], > 0, steps to the target.

    Returns:
        The fitted law.

    Raises:
        ValueError: if the lengths differ, a step count is not positive, or the fit has no positive solution.
    """
    b = sorted_sizes("batches", batches)
    s = like("steps", steps, "batches", b)
    if b.size < 2:
        raise ValueError(f"batches: needs at least 2, got {b.size}")
    if np.any(s <= 0):
        raise ValueError(f"steps: needs {b.size} numbers > 0, one per batch, got {s.tolist()}")
    design = np.stack([1 / s, 1 / (b * s)], axis=1)
    s_min, e_min = np.linalg.lstsq(design, np.ones(b.size), rcond=None)[0]
    if not (s_min > 0 and e_min > 0):
        raise ValueError(f"steps: needs data with positive S_min and E_min, got S_min={s_min}, E_min={e_min}")
    return TradeOff(float(s_min), float(e_min))


def sgd_learning_rate(batch: ArrayLike, eps_max: float, b_noise: float) -> Floats:
    """Best SGD step size ε(B) = ε_max/(1 + B_noise/B).

    It minimises the expected second-order loss change -ε|G|² + ½ε²(GᵀHG + tr(HΣ)/B), with
    ε_max = |G|²/GᵀHG.

    Args:
        batch: any shape, > 0.
        eps_max: step size at infinite batch, > 0.
        b_noise: tr(HΣ)/GᵀHG, > 0.

    Returns:
        Step sizes in batch's shape.

    Raises:
        ValueError: if an argument is outside its domain.

    Source: arXiv:1812.06162, eq. 2.6 and 2.7.
    """
    return positive("eps_max", eps_max) / (1 + positive("b_noise", b_noise) / _batch(batch))


def progress_share(batch: ArrayLike, b_noise: float) -> Floats:
    """ΔL(B)/ΔL_max = 1/(1 + B_noise/B), the share of the best progress per step.

    Args:
        batch: any shape, > 0.
        b_noise: tr(HΣ)/GᵀHG, > 0.

    Returns:
        Shares in (0, 1), in batch's shape.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    return 1.0 / (1 + positive("b_noise", b_noise) / _batch(batch))


def surge_learning_rate(batch: ArrayLike, eps_max: float, b_peak: float) -> Floats:
    """Best learning rate of Adam: ε(B) = 2ε_max/(√(B_n/B) + √(B/B_n)); rises, peaks at B_n, falls.

    Derived for sign descent with small per-example signal, B ≪ πσ²/2μ² (`sign_descent_rate` is the exact
    model). B_n is fitted from (S, E) pairs and is *not* B_noise = tr(HΣ)/GᵀHG: it compares diagonal and
    off-diagonal curvature. Symmetric in log B around the peak.

    Args:
        batch: any shape, > 0.
        eps_max: the rate at the peak, > 0.
        b_peak: B_n, > 0.

    Returns:
        Learning rates in batch's shape.

    Raises:
        ValueError: if an argument is outside its domain.

    Source: Li et al. 2024, arXiv:2405.14578, eq. 17 to 20.
    """
    root = np.sqrt(_batch(batch) / positive("b_peak", b_peak))
    return 2 * positive("eps_max", eps_max) / (root + 1 / root)


def sign_descent_rate(batch: float, mean: ArrayLike, deviation: ArrayLike, hessian: ArrayLike) -> float:
    """Best step of sign descent on Gaussian gradients, without the small-signal approximation.

        E[sᵢ] = erf(√(B/2) μᵢ/σᵢ),   ε = Σ μᵢE[sᵢ] / (Σᵢ Hᵢᵢ + Σ_{i≠j} Hᵢⱼ E[sᵢ]E[sⱼ])

    Coordinates are taken as independent, as in the source.

    Args:
        batch: B, > 0.
        mean: [d], μ, true gradient.
        deviation: [d], σ > 0, per-example standard deviation.
        hessian: [d, d], symmetric H.

    Returns:
        The step that minimises the expected second-order loss.

    Raises:
        ValueError: if shapes do not match, a deviation is not positive, or the curvature is not positive.
    """
    mu, sigma, h = _sign_problem(mean, deviation, hessian)
    signs = special.erf(np.sqrt(positive("batch", batch) / 2) * mu / sigma)
    off = h - np.diag(np.diag(h))
    curvature = float(np.trace(h) + signs @ off @ signs)
    if curvature <= 0:
        raise ValueError(f"hessian: needs positive expected curvature, got {curvature}")
    return float(mu @ signs) / curvature


def sign_descent_peak(mean: ArrayLike, deviation: ArrayLike, hessian: ArrayLike) -> tuple[float, float]:
    """(B_n, ε_max) of the surge law that `sign_descent_rate` follows while B ≪ πσ²/2μ².

    With E[sᵢ] ≈ √(2B/π) μᵢ/σᵢ the rate is a√B/(c + bB): peak at B_n = c/b, height a/(2√(bc)).

    Args:
        mean: [d], μ, true gradient.
        deviation: [d], σ > 0.
        hessian: [d, d], symmetric H with positive off-diagonal curvature along the signal.

    Returns:
        B_n and ε_max.

    Raises:
        ValueError: if the off-diagonal curvature is not positive (then the rate never turns down), the trace
            is not positive, or an argument is outside its domain.
    """
    mu, sigma, h = _sign_problem(mean, deviation, hessian)
    slope = np.sqrt(2 / np.pi) * mu / sigma
    off = float(slope @ (h - np.diag(np.diag(h))) @ slope)
    diagonal = float(np.trace(h))
    if diagonal <= 0:
        raise ValueError(f"hessian: needs a trace > 0, got {diagonal}")
    if off <= 0:
        raise ValueError(f"hessian: needs positive off-diagonal curvature along the signal, got {off}")
    return diagonal / off, float(mu @ slope) / (2 * np.sqrt(diagonal * off))


def _sign_problem(mean: ArrayLike, deviation: ArrayLike, hessian: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """μ, σ and H, checked against one another.

    Raises:
        ValueError: if shapes do not match, a deviation is not positive, or H is not symmetric.
    """
    mu, h = vector("mean", mean), matrix("hessian", hessian)
    sigma = like("deviation", deviation, "mean", mu)
    if np.any(sigma <= 0):
        raise ValueError(f"deviation: needs {mu.size} numbers > 0, got {sigma.tolist()}")
    if h.shape != (mu.size, mu.size) or not np.allclose(h, h.T):
        raise ValueError(f"hessian: needs a symmetric matrix of shape {(mu.size, mu.size)}, got {h.tolist()}")
    return mu, sigma, h


def _batch(batch: ArrayLike) -> Floats:
    """Batch sizes of any shape.

    Raises:
        ValueError: if there is none, or one is not a finite number > 0.
    """
    values = finite_array("batch", batch)
    if values.size == 0 or np.any(values <= 0):
        raise ValueError(f"batch: needs finite numbers > 0, got {values.tolist()}")
    return values
