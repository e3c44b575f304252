"""How sure: the confidence set of a ratio of means (Fieller), Hall's correction, the detection limit.

B_simple = E[x]/E[y] with x_k, y_k the trΣ and |G|² estimates of step k. When E[y] is not distinguishable from
zero no interval is honest, and Fieller's set says so by being unbounded: it has three shapes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from theory.any_signal import hall_statistic
from theory.domain import Floats, count, finite_array, like, positive, probability, spectrum, vector

INTERVAL, TWO_RAYS, WHOLE_LINE = "interval", "two rays", "whole line"
_SCAN = 721


@dataclass(frozen=True)
class RatioSet:
    """A confidence set for a ratio.

    Attributes:
        shape: "interval" [low, high]; "two rays" (-inf, low] and [high, inf); "whole line".
        low: lower end, or end of the left ray; -inf for the whole line.
        high: upper end, or start of the right ray; inf for the whole line.
    """

    shape: str
    low: float
    high: float

    def contains(self, theta: float) -> bool:
        """Whether a ratio lies in the set."""
        if self.shape == INTERVAL:
            return self.low <= theta <= self.high
        return self.shape == WHOLE_LINE or theta <= self.low or theta >= self.high


def fieller(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> RatioSet:
    """Fieller's set for E[x]/E[y] from paired values.

        Aθ² - 2Bθ + C <= 0,   A = ȳ² - t²v_yy,   B = x̄ȳ - t²v_xy,   C = x̄² - t²v_xx

    with v the covariances of the means and t the two-sided t_{K-1} quantile. A > 0: an interval. A <= 0: the
    denominator is not significant, and the set is two rays or the whole line.

    Args:
        x: [K], numerators (trΣ per step).
        y: [K], denominators (|G|² per step).
        level: confidence, in (0, 1).

    Returns:
        The set.

    Raises:
        ValueError: if an argument is outside its domain.

    Source: E. C. Fieller 1954, J. R. Statist. Soc. B 16, 175.
    """
    x, y, t = _paired(x, y, level)
    x, y, unit = _unit_scale(x, y)
    v = np.cov(x, y) / x.size
    a = float(y.mean() ** 2 - t**2 * v[1, 1])
    b = float(x.mean() * y.mean() - t**2 * v[0, 1])
    c = float(x.mean() ** 2 - t**2 * v[0, 0])
    return _solve_quadratic(a, b, c, unit)


def _solve_quadratic(a: float, b: float, c: float, unit: float) -> RatioSet:
    """{θ: aθ² - 2bθ + c <= 0} · unit as one of the three shapes; the roots without cancellation."""
    discriminant = b * b - a * c
    if a > 0:  # the estimate itself is inside, so a negative discriminant is rounding: the set is a point
        discriminant = max(discriminant, 0.0)
    if discriminant < 0 or (a == 0 and b == 0):
        return RatioSet(WHOLE_LINE, -np.inf, np.inf)
    far = b + np.copysign(np.sqrt(discriminant), b)
    if a == 0:
        end = c / (2 * b) * unit
        return RatioSet(INTERVAL, end, np.inf) if b > 0 else RatioSet(INTERVAL, -np.inf, end)
    low, high = sorted((far / a * unit, c / far * unit if far != 0 else 0.0))
    return RatioSet(INTERVAL if a > 0 else TWO_RAYS, float(low), float(high))


def ratio_statistics(x: ArrayLike, y: ArrayLike, theta: ArrayLike) -> tuple[Floats, Floats]:
    """T and Hall's H of D_k = x_k - θ y_k, for testing E[x]/E[y] = θ.

    Args:
        x: [..., K], numerators.
        y: [..., K], denominators.
        theta: ratio(s) to test, a scalar or [...] without the last axis.

    Returns:
        T = √K D̄/s and its skewness-corrected H, each [...]; ±inf where all D_k are one number but zero.

    Raises:
        ValueError: if the shapes do not match, K < 2, or a value is not finite.
    """
    x, y, theta = finite_array("x", x), finite_array("y", y), finite_array("theta", theta)
    if x.ndim == 0 or x.shape[-1] < 2:
        raise ValueError(f"x: needs at least 2 values on the last axis, got shape {x.shape}")
    if x.shape != y.shape:
        raise ValueError(f"y: needs the shape {x.shape} of x, got {y.shape}")
    if theta.ndim and theta.shape != x.shape[:-1]:
        raise ValueError(f"theta: needs a scalar or the shape {x.shape[:-1]}, got {theta.shape}")
    return _skew_statistics(x - theta[..., None] * y)


def _skew_statistics(d: Floats) -> tuple[Floats, Floats]:
    """T and H of the mean along the last axis; a constant run is infinitely significant, or zero."""
    k = d.shape[-1]
    size = np.max(np.abs(d), axis=-1, keepdims=True)
    d = d / np.where(size > 0, size, 1.0)
    mean = d.mean(-1, keepdims=True)
    constant = np.ptp(d, axis=-1) == 0
    spread = np.where(constant, 1.0, np.sqrt(((d - mean) ** 2).sum(-1) / (k - 1)))
    skewness = np.where(constant, 0.0, (((d - mean) / spread[..., None]) ** 3).mean(-1))
    t = np.sqrt(k) * mean[..., 0] / spread
    h = hall_statistic(t, skewness, k)
    certain = np.where(d[..., 0] == 0, 0.0, np.copysign(np.inf, d[..., 0]))
    return np.where(constant, certain, t), np.where(constant, certain, h)


def hull_accepts(x: ArrayLike, y: ArrayLike, theta: ArrayLike, level: float = 0.95) -> NDArray[np.bool_]:
    """Whether θ is in the recommended set: rejected only where T *and* H agree on the side.

    θ is too small only if T > t and H > t, too large only if both < -t: the hull of Fieller's and Hall's
    sets.

    Args:
        x: [..., K], numerators.
        y: [..., K], denominators.
        theta: ratio(s), a scalar or [...].
        level: confidence, in (0, 1).

    Returns:
        Booleans, [...].

    Raises:
        ValueError: if an argument is outside its domain.
    """
    t_stat, h_stat = ratio_statistics(x, y, theta)
    t = t_quantile(np.shape(x)[-1], level)
    return ~((np.minimum(t_stat, h_stat) > t) | (np.maximum(t_stat, h_stat) < -t))


def hall_hull(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> RatioSet:
    """The recommended set: Fieller's with Hall's skewness correction, hull of both on each side.

    With θ = tan φ the values x - θy become x cos φ - y sin φ and infinity is an ordinary point of a circle.
    There the rejected angles are found on a grid, their longest run is refined by root finding, and the set
    is what that run leaves: one arc around the estimate, hence one of Fieller's three shapes. With five
    values or fewer H may reject in several runs; what lies between them then counts as accepted.

    Args:
        x: [K], numerators (trΣ per step).
        y: [K], denominators (|G|² per step).
        level: confidence, in (0, 1).

    Returns:
        The set.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    x, y, t = _paired(x, y, level)
    xs, ys, unit = _unit_scale(x, y)
    if np.ptp(xs) == 0 and np.ptp(ys) == 0:
        return RatioSet(INTERVAL, float(xs[0] / ys[0] * unit), float(xs[0] / ys[0] * unit))
    centre = float(np.arctan2(xs.mean(), ys.mean()))
    angles = centre + np.linspace(-np.pi / 2, np.pi / 2, _SCAN)[:-1]
    run = _longest_run(_margin(angles, xs, ys, t) > 0)
    if run is None:
        return RatioSet(WHOLE_LINE, -np.inf, np.inf)
    step = np.pi / (_SCAN - 1)

    def end(inside: float, outside: float) -> float:
        def objective(phi: float) -> float:
            return float(_margin(np.array([phi]), xs, ys, t)[0])

        return float(optimize.brentq(objective, inside, outside, xtol=1e-14))  # pyright: ignore

    first, last = angles[0] + run[0] * step, angles[0] + run[1] * step
    a, b = end(first, first - step), end(last, last + step)
    low, high = float(np.tan(b)) * unit, float(np.tan(a)) * unit
    through_infinity = np.floor((b - np.pi / 2) / np.pi) != np.floor((a + np.pi / 2) / np.pi)
    return RatioSet(TWO_RAYS, high, low) if through_infinity else RatioSet(INTERVAL, low, high)


def _margin(angles: Floats, x: Floats, y: Floats, t: float) -> Floats:
    """By how much T and H agree on rejecting each angle; negative where it is accepted."""
    d = x * np.cos(angles)[:, None] - y * np.sin(angles)[:, None]
    t_stat, h_stat = _skew_statistics(d)
    return np.maximum(np.minimum(t_stat, h_stat), -np.maximum(t_stat, h_stat)) - t


def _longest_run(rejected: NDArray[np.bool_]) -> tuple[int, int] | None:
    """First and last index of the longest run of True on a circle (last may exceed the length)."""
    if not rejected.any():
        return None
    start = int(np.flatnonzero(~rejected)[0])  # the estimate's own angle is always accepted
    padded = np.concatenate([[False], np.roll(rejected, -start), [False]]).astype(int)
    begins, ends = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1)
    best = int(np.argmax(ends - begins))
    return int(begins[best]) + start, int(ends[best]) - 1 + start


def delta_interval(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> RatioSet:
    """The textbook delta-method interval, kept as the control that fails: always bounded, often wrong.

    Args:
        x: [K], numerators.
        y: [K], denominators.
        level: confidence, in (0, 1).

    Returns:
        An interval around x̄/ȳ.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    x, y, t = _paired(x, y, level)
    if y.mean() == 0:
        raise ValueError("y: needs a mean other than 0 for the delta method, got 0.0")
    theta = x.mean() / y.mean()
    half = t * np.std(x - theta * y, ddof=1) / np.sqrt(x.size) / abs(y.mean())
    return RatioSet(INTERVAL, float(theta - half), float(theta + half))


def t_quantile(k: int, level: float = 0.95) -> float:
    """Two-sided t quantile with K-1 degrees of freedom.

    Args:
        k: number of steps, >= 2.
        level: confidence, in (0, 1).

    Returns:
        The quantile.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    return float(stats.t.ppf((1 + probability("level", level)) / 2, count("K", k, 2) - 1))


def detection_limit(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> float:
    """Largest B that this run could have resolved: x̄/(t · se(ȳ)).

    Args:
        x: [K], trΣ per step.
        y: [K], |G|² per step.
        level: confidence, in (0, 1).

    Returns:
        The limit, in examples.

    Raises:
        ValueError: if the lengths differ, an argument is outside its domain, the mean of x is not positive,
            or all y are equal.
    """
    x, y, t = _paired(x, y, level)
    if x.mean() <= 0:
        raise ValueError(f"x: needs a mean > 0, got {float(x.mean())!r}")
    if np.ptp(y) == 0:
        raise ValueError(f"y: needs values that differ, got {float(y[0])!r} in every step")
    return float(x.mean() / (t * np.std(y, ddof=1) / np.sqrt(y.size)))


def planned_detection_limit(batch: int, steps: int, r_eff: float, t: float = 1.645) -> float:
    """Largest B that K steps of b examples can tell from "no signal": √(b(b-1)K·r_eff/2)/t.

    From Var|G|² = 2tr(Σ²)/(b(b-1)) per step at G = 0. b = 16, K = 50, r_eff = 13.8: 175; the same 800
    examples pooled at one point (b = 800, K = 1): 1,277.

    Args:
        batch: examples per step b, >= 2.
        steps: number of steps K, >= 1.
        r_eff: (trΣ)²/tr(Σ²), > 0.
        t: quantile, > 0; 1.645 is the one-sided 5 % normal one.

    Returns:
        The limit, in examples.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    b, k = count("batch", batch, 2), count("steps", steps)
    return float(np.sqrt(b * (b - 1) * k * positive("r_eff", r_eff) / 2) / positive("t", t))


def step_variances(eigenvalues: ArrayLike, mean: ArrayLike, batch: int) -> tuple[float, float, float]:
    """Exact Var of a step's trΣ and |G|² estimates and their covariance, Gaussian gradients.

    Var[x] = 2tr(Σ²)/(b-1);  Var[y] = 2tr(Σ²)/(b(b-1)) + 4GᵀΣG/b;  Cov = -2tr(Σ²)/(b(b-1)),
    because y = |ḡ|² - x/b with ḡ and x independent.

    Args:
        eigenvalues: [d], spectrum of Σ.
        mean: [d], true gradient in the eigenbasis.
        batch: examples per step b, >= 2.

    Returns:
        (Var[x], Var[y], Cov[x, y]).

    Raises:
        ValueError: if the lengths differ or an argument is outside its domain.
    """
    lam, b = spectrum("eigenvalues", eigenvalues), count("batch", batch, 2)
    g = like("mean", mean, "eigenvalues", lam)
    with np.errstate(over="ignore"):
        square = 2 * float(np.sum(lam * lam))
        drift = 4 * float(np.sum(lam * g * g)) / b
    if not np.isfinite(square + drift):
        raise ValueError(f"eigenvalues: needs squares within the range of a float, got {float(lam.max())!r}")
    return square / (b - 1), square / (b * (b - 1)) + drift, -square / (b * (b - 1))


def _paired(x: ArrayLike, y: ArrayLike, level: float) -> tuple[Floats, Floats, float]:
    """Two checked arrays of one length and the t quantile.

    Raises:
        ValueError: if the lengths differ, a value is not finite, or all y are zero.
    """
    x = vector("x", x, 2)
    y = like("y", y, "x", x)
    if not np.any(y):
        raise ValueError("y: needs a value other than 0, got all zero")
    return x, y, t_quantile(x.size, level)


def _unit_scale(x: Floats, y: Floats) -> tuple[Floats, Floats, float]:
    """Both divided by their largest magnitude, and the unit that takes their ratio back."""
    top = float(np.abs(x).max()) or 1.0
    bottom = float(np.abs(y).max())
    return x / top, y / bottom, top / bottom
